"""LoRA training side by side: qgraft on the packed file, transformers + PEFT on its float32 copy.

    python benchmarks/train_cpu.py                  # three rounds of each contestant, alternating; about 6 minutes
    python benchmarks/train_cpu.py --rounds 5 --steps 24

Every contestant runs in a process of its own and gets the same rows in the same order, the same first adapter weights, the
same optimizer, learning rate and batch size (r=8 on all linear layers of SmolLM2-135M). A run whose final held-out loss
differs from ours by more than 1 % fails the benchmark.

    qgraft         Q4_1 bytes, padding-free batches, logits at answers only
    peft           transformers' Trainer and PEFT, float32, batches padded to the longest row: what everybody runs
    peft-packed    the same with transformers' padding-free collator: the gain of kernels and memory without that of padding

Written to benchmarks/results/train_cpu.csv: useful (non-padding) tokens a second while stepping, and the peak resident memory
of the whole process. The machine is noisy: quote the ratios.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).with_name("results") / "train_cpu.csv"
CONTESTANTS = ("qgraft", "peft", "peft-packed")
WARMUP_STEPS = 2


def main() -> None:
    """Run all contestants in turn, compare, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run_contestant(options)))
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for number in range(options.rounds):
            for name in CONTESTANTS:
                runs.append({"round": number, **in_own_process(name, folder, options)})
                print({key: round(v, 4) if isinstance(v, float) else v for key, v in runs[-1].items()}, flush=True)
    write(runs, options)
    report(runs)


def prepare(folder: Path) -> None:
    """The tokenized rows and the first adapter weights, shared by all contestants."""
    import torch

    import qgraft
    from qgraft.training.evaluate import build_samples, read_dataset

    model, tokenizer = qgraft.load("smollm2-135m")
    torch.manual_seed(0)
    qgraft.attach_lora(model, r=8, lora_alpha=16)
    qgraft.save_adapter(model, folder / "adapter")
    rows = {}
    for part in ("identity", "identity_heldout"):
        conversations, accounting = read_dataset(part, name="Aria", author="the Qgraft team")
        samples = build_samples(tokenizer, conversations, accounting)
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1)).tolist()
        rows[part] = [{"input_ids": samples[i].input_ids, "labels": samples[i].labels} for i in order]
    (folder / "rows.json").write_text(json.dumps(rows))


def in_own_process(name: str, folder: str, options: argparse.Namespace) -> dict:
    """Run one contestant in a fresh interpreter; its last line of output is its result."""
    command = [sys.executable, __file__, "--only", name, "--folder", folder]
    command += ["--steps", str(options.steps), "--batch", str(options.batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return {"contestant": name, **json.loads(done.stdout.strip().splitlines()[-1])}


def run_contestant(options: argparse.Namespace) -> dict:
    """Train for so many steps in this process; returns the measurements."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Times steps after the warm-up."""

        seconds, counted = 0.0, 0

        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step > WARMUP_STEPS:
                self.seconds += time.perf_counter() - self.began
                self.counted += 1

    folder = Path(options.folder)
    rows = json.loads((folder / "rows.json").read_text())
    clock = Clock()
    began = time.perf_counter()
    train = train_qgraft if options.only == "qgraft" else train_peft
    load_seconds, loss = train(options, rows, folder, clock)
    used = rows["identity"][: options.steps * options.batch][WARMUP_STEPS * options.batch :]
    tokens = sum(len(row["input_ids"]) for row in used)
    return {
        "tokens_per_second": tokens / clock.seconds,
        "seconds_per_step": clock.seconds / clock.counted,
        "load_seconds": load_seconds,
        "peak_mb": peak_mb(),
        "held_out_loss": loss,
        "total_seconds": time.perf_counter() - began,
    }


def train_qgraft(options: argparse.Namespace, rows: dict, folder: Path, clock: object) -> tuple[float, float]:
    """Ours."""
    from torch.utils.data import SequentialSampler

    import qgraft
    from qgraft.training.evaluate import evaluate_samples
    from qgraft.training.loss import padding_free
    from qgraft.training.tokenizing import Sample
    from qgraft.training.trainer import LoraTrainer

    class InOrder(LoraTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    began = time.perf_counter()
    model, _ = qgraft.load("smollm2-135m")
    load_seconds = time.perf_counter() - began
    qgraft.load_adapter(model, folder / "adapter")
    samples = {part: [Sample(row["input_ids"], row["labels"], "") for row in rows[part]] for part in rows}
    args = qgraft.TrainArguments(**training_options(options, folder))
    with padding_free(model, samples["identity"]):
        InOrder(model, args, samples["identity"], [], args.max_tokens_per_pass, [clock]).train()
    return load_seconds, evaluate_samples(model, samples["identity_heldout"]).loss


def train_peft(options: argparse.Namespace, rows: dict, folder: Path, clock: object) -> tuple[float, float]:
    """The usual stack, and its variant with a padding-free collator."""
    import torch
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

    from qgraft.checkpoints.pull import pull

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    path = pull("smollm2-135m")
    began = time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    load_seconds = time.perf_counter() - began
    # transformers marks the floats it made as a quantized model that cannot be trained
    base.is_quantized, base.hf_quantizer, base.quantization_method = False, None, None
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    args = TrainingArguments(**training_options(options, folder), report_to="none", disable_tqdm=True)
    collate = DataCollatorWithFlattening() if options.only == "peft-packed" else pad
    InOrder(model, args, data_collator=collate, train_dataset=rows["identity"], callbacks=[clock]).train()
    return load_seconds, held_out_loss(model, rows["identity_heldout"])


def training_options(options: argparse.Namespace, folder: Path) -> dict:
    """What all contestants are told."""
    return {
        "output_dir": str(folder / options.only),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1000,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def pad(rows: list[dict]) -> dict:
    """The usual collator: rows padded to the longest one, an attention mask, labels -100 on padding."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        missing = longest - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [0] * missing)
        batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * missing)
        batch["labels"].append(row["labels"] + [-100] * missing)
    return {key: torch.tensor(value) for key, value in batch.items()}


def held_out_loss(model: object, rows: list[dict]) -> float:
    """Mean over all label tokens, each row alone, by transformers' own loss."""
    import torch

    total, count = 0.0, 0
    model.eval()
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        learned = int((labels[:, 1:] != -100).sum())
        total, count = total + float(loss) * learned, count + learned
    return total / count


def peak_mb() -> float:
    """The most memory the process has held resident, in MB."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def write(runs: list[dict], options: argparse.Namespace) -> None:
    """Append the runs to the CSV with date, device and versions."""
    about = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        **{package: version(package) for package in ("qgraft", "torch", "transformers", "peft")},
        "steps": options.steps,
        "batch": options.batch,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*about, *runs[0]])
        if new:
            writer.writeheader()
        writer.writerows({**about, **run} for run in runs)


def cpu_name() -> str:
    """The CPU's model and widest vector unit that torch uses."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def report(runs: list[dict]) -> None:
    """Medians, and ours against each peer; fails when the losses differ by more than 1 %."""
    medians = {
        name: {
            key: statistics.median(run[key] for run in runs if run["contestant"] == name)
            for key in ("tokens_per_second", "peak_mb", "load_seconds", "held_out_loss")
        }
        for name in CONTESTANTS
    }
    ours = medians["qgraft"]
    for name, figures in medians.items():
        faster, smaller = ours["tokens_per_second"] / figures["tokens_per_second"], ours["peak_mb"] / figures["peak_mb"]
        print(
            f"{name:<12} {figures['tokens_per_second']:7.1f} tokens/s (ours x {faster:.2f})"
            f"  peak {figures['peak_mb']:6.0f} MB (ours {smaller:.0%})"
            f"  load {figures['load_seconds']:5.1f} s  held-out loss {figures['held_out_loss']:.4f}"
        )
    worst = max(abs(figures["held_out_loss"] / ours["held_out_loss"] - 1) for figures in medians.values())
    print(f"largest difference of held-out losses: {worst:.2%}")
    if worst > 0.01:
        sys.exit("the losses differ by more than 1 %: the contestants did not do the same work")


if __name__ == "__main__":
    main()
