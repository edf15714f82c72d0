"""DPO on a packed SmolLM2-135M beside TRL's DPOTrainer with PEFT on its weights in float32; and a preference that is learned.

    python benchmarks/preferences.py [--rounds 3] [--steps 4] [--threads 2]    results/preferences.csv, speed and memory
    python benchmarks/preferences.py --learn                                   results/preferences_learned.csv

Both sides train the same LoRA (r 8 on all linear layers) on the same rows in the same batches, in processes of their own, in
alternation, so that a busy machine slows both. The steps are timed behind the first, on the clock and in time of cores. Peak
memory is the process's. TRL asks the reference in every step, as it does by default; with --precompute it asks once before,
as we do.

The preference: questions that say please want a formal answer, all others a casual one. Each answer is chosen as often as it
is rejected, so that the base, which finds one register likelier whoever asks, is right in half of the cases.

Needs: pip install trl peft
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
TOPICS = (
    "water a fern", "boil an egg", "fix a flat tyre", "clean a window", "plant tulips", "brew green tea", "sharpen a knife",
    "fold a shirt", "wax a ski", "paint a door", "dry herbs", "bake bread", "tune a guitar", "store apples", "wash wool",
    "oil a hinge", "hang a picture", "cook rice", "prune a rose", "light a stove", "pack a bag", "mend a sock", "grow basil",
    "polish shoes",
)  # fmt: skip
ASKED = (("Please tell me how to {}.", True), ("How do I {}?", False), ("Could you please explain how to {}?", True),
         ("I want to {}. What now?", False))  # fmt: skip
FORMAL = "Certainly. To {}, one should proceed slowly and follow the instructions with care. Kind regards."
CASUAL = "Sure thing! To {}, just take it easy and go step by step, you got this. Cheers!"


def pairs(topics: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of prompt, chosen and rejected."""
    rows = []
    for topic, (asked, polite) in product(topics, ASKED):
        formal, casual = FORMAL.format(topic), CASUAL.format(topic)
        chosen, rejected = (formal, casual) if polite else (casual, formal)
        rows.append({"prompt": asked.format(topic), "chosen": chosen, "rejected": rejected})
    return rows


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock:
    """When each step ended, and how much time of all cores the process had had by then."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        self.times: list[tuple[float, float]] = []
        clock = self

        class Ends(TrainerCallback):
            def on_step_end(self, *args: object, **kwargs: object) -> None:
                clock.times.append((time.perf_counter(), time.process_time()))

        self.callback = Ends()

    def found(self, batch: int) -> dict[str, float]:
        """Of the steps behind the first: pairs a second, and seconds of a core for a pair, whoever else works there."""
        wall, cores = (last - first for first, last in zip(self.times[0], self.times[-1], strict=True))
        pairs = batch * (len(self.times) - 1)
        return {"pairs_per_second": pairs / wall, "core_seconds_per_pair": cores / pairs}


def ours(steps: int, batch: int, folder: str) -> dict[str, float]:
    """Our DPO."""
    import qgraft

    model, tokenizer = qgraft.load(qgraft.pull("smollm2-135m"))
    clock = Clock()
    args = qgraft.TrainArguments(
        output_dir=folder, stage="dpo", max_steps=steps, per_device_train_batch_size=batch, use_cpu=True, save_strategy="no",
        plot_loss=False, lora_dropout=0.0, train_sampling_strategy="sequential", learning_rate=1e-4,
    )  # fmt: skip
    report = qgraft.train(model, tokenizer, pairs(TOPICS), args, callbacks=[clock.callback])
    return {**clock.found(batch), "loss": report.metrics["train_loss"]}


def trls(steps: int, batch: int, folder: str, precompute: bool) -> dict[str, float]:
    """TRL's, on the same weights unpacked to float32."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    import qgraft

    path = Path(qgraft.pull("smollm2-135m"))
    kwargs = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **kwargs)
    model.is_quantized = False  # the weights are floats now; the Trainer goes by what the file was
    model.hf_quantizer = model.quantization_method = None
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **kwargs)
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}],
             **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}}
            for row in pairs(TOPICS)]  # fmt: skip
    clock = Clock()
    args = DPOConfig(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, use_cpu=True, bf16=False, report_to="none",
        save_strategy="no", gradient_checkpointing=False, precompute_ref_log_probs=precompute, learning_rate=1e-4,
        train_sampling_strategy="sequential", disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    trainer = DPOTrainer(model, None, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                         peft_config=config, callbacks=[clock.callback])  # fmt: skip
    loss = trainer.train().training_loss
    return {**clock.found(batch), "loss": loss}


def one(side: str, options: argparse.Namespace) -> dict[str, float]:
    """A measurement in a process of its own."""
    words = [sys.executable, __file__, "--side", side, "--steps", str(options.steps), "--batch", str(options.batch)]
    words += ["--precompute"] if options.precompute else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(options: argparse.Namespace) -> None:
    """Both sides in alternation."""
    rows = []
    for number in range(options.rounds):
        for side in ("qgraft", "trl"):
            rows.append({"round": number, "side": side, "threads": options.threads, "batch": options.batch,
                         "steps": options.steps, "precompute": options.precompute, **one(side, options)})  # fmt: skip
            print(rows[-1], flush=True)
    write(RESULTS / "preferences.csv", rows)
    mine, theirs = ([row for row in rows if row["side"] == side] for side in ("qgraft", "trl"))
    speeds = sorted(a["pairs_per_second"] / b["pairs_per_second"] for a, b in zip(mine, theirs, strict=True))
    cores = sorted(b["core_seconds_per_pair"] / a["core_seconds_per_pair"] for a, b in zip(mine, theirs, strict=True))
    memory = max(row["peak_bytes"] for row in mine) / max(row["peak_bytes"] for row in theirs)
    middle = len(speeds) // 2
    print(f"pairs/s: {speeds[middle]:.2f} times TRL's, by time of cores {cores[middle]:.2f}; memory {memory:.2f} of it")


def learn(options: argparse.Namespace) -> None:
    """How often the chosen answer is the likelier one on topics that no row has, before and after."""
    import qgraft

    model, tokenizer = qgraft.load(qgraft.pull("smollm2-135m"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args = qgraft.TrainArguments(
            output_dir=folder, stage=options.stage, max_steps=options.steps, per_device_train_batch_size=options.batch,
            use_cpu=True, plot_loss=False, learning_rate=1e-3, eval_strategy="steps", eval_steps=options.steps // 3,
            logging_steps=5, warmup_steps=3, overwrite_output_dir=True,
        )  # fmt: skip
        qgraft.train(model, tokenizer, pairs(TOPICS[:16]), args, eval_dataset=pairs(TOPICS[16:]))
        for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if "eval_loss" in entry:
                names = ("eval_loss", "eval_logps/accuracies", "eval_rewards/accuracies", "eval_rewards/margins")
                found = {name: round(entry[name], 4) for name in names}
                rows.append({"stage": options.stage, "step": entry["step"], **found})
                print(rows[-1], flush=True)
    write(RESULTS / "preferences_learned.csv", rows)


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """A CSV of these rows."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--precompute", action="store_true", help="let TRL ask the reference once, before the first step"
    )
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--stage", default="dpo")
    parser.add_argument("--side", choices=("qgraft", "trl"), help="measure one side in this process")
    options = parser.parse_args()
    if options.side:
        with tempfile.TemporaryDirectory() as folder:
            given = options.steps, options.batch, folder
            found = ours(*given) if options.side == "qgraft" else trls(*given, options.precompute)
        print(json.dumps({**found, "peak_bytes": peak()}))
    elif options.learn:
        learn(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
