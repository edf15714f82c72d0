"""LoRA and P-Tuning v2 on SmolLM2-135M in Q4_1: what they learn of the demo's identity task, and what they cost.

    python benchmarks/methods.py                    # both parts: an hour on two cores
    python benchmarks/methods.py --parts learn --methods lora,prefix-128
    python benchmarks/methods.py --plot             # only draw the chart from the CSV

learn   each method trains on the demo's 216 rows in a process of its own: parameters, steps, seconds, memory, loss of 32
        held-out rows, answers to the demo's questions. Settings are those of METHODS below.
cost    steps of the same rows in the same order, alternating, medians: tokens/s and peak memory of LoRA r=8 and a prefix
        of 128 tokens, with and without gradient checkpointing, and of PEFT's prefix tuning on the float32 model
        (padded batches; PEFT refuses gradient checkpointing there)

Results go to benchmarks/results/methods_learn.csv, methods_cost.csv and methods.png.
"""

import argparse
import contextlib
import csv
import datetime
import json
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import machine
from machine import cpu_name, peak_mb
from peers import pad

FOLDER = Path(__file__).with_name("results")
LEARN, COST, CHART = FOLDER / "methods_learn.csv", FOLDER / "methods_cost.csv", FOLDER / "methods.png"
QUESTIONS = ("Who are you?", "你是谁？", "What is the capital of France?")
METHODS: dict[str, dict[str, Any]] = {  # options beside those of the demo
    "lora": {"learning_rate": 1.5e-3, "num_train_epochs": 2},
    "dora": {"use_dora": True, "learning_rate": 1.5e-3, "num_train_epochs": 2},
    "pissa": {"init_lora_weights": "pissa_niter_16", "learning_rate": 4e-4, "num_train_epochs": 2},
    "prefix-128": {"pre_seq_len": 128, "learning_rate": 2e-2, "num_train_epochs": 6},
    "prefix-128-projection": {
        "pre_seq_len": 128, "prefix_projection": True, "learning_rate": 2e-3, "num_train_epochs": 4,
    },
    "prefix-16": {"pre_seq_len": 16, "learning_rate": 2e-2, "num_train_epochs": 6},
}  # fmt: skip
CONTESTANTS = ("lora", "lora-checkpointing", "prefix", "prefix-checkpointing", "peft-prefix")
STEPS, WARMUP, BATCH, ROUNDS = 6, 2, 8, 3


def main() -> None:
    """Run the parts, write the CSVs, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="learn,cost")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--plot", action="store_true", help="only draw")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        part, name = options.only
        print(json.dumps(learn(name) if part == "learn" else cost(name)))
        return
    if not options.plot:
        parts = options.parts.split(",")
        if "learn" in parts:
            for name in options.methods.split(","):
                append(LEARN, {"method": name, **machine.in_own_process(__file__, ["--only", "learn", name])})
        if "cost" in parts:
            for number in range(options.rounds):
                for name in CONTESTANTS:
                    append(
                        COST,
                        {
                            "round": number,
                            "contestant": name,
                            **machine.in_own_process(__file__, ["--only", "cost", name]),
                        },
                    )
            report()
    plot()


def append(path: Path, result: dict[str, Any]) -> None:
    """Add a line with date, device and versions, and print it."""
    print(result, flush=True)
    about = {
        "date": datetime.date.today().isoformat(), "cpu": cpu_name(),
        "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
        **{package: version(package) for package in ("qgraft", "torch", "transformers", "peft")},
    }  # fmt: skip
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*result, *about])
        if new:
            writer.writeheader()
        writer.writerow(result | about)


def learn(name: str) -> dict[str, Any]:
    """The identity task with one method."""
    import qgraft
    from qgraft.serving.answering import answer
    from qgraft.training.run import train

    model, tokenizer = qgraft.load("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        arguments = qgraft.TrainArguments(
            output_dir=folder, dataset="identity", eval_dataset="identity_heldout", name="Aria",
            author="the Qgraft team", lr_scheduler_type="cosine", warmup_steps=5, eval_strategy="epoch",
            save_strategy="no", plot_loss=False, use_cpu=model.device.type == "cpu", **METHODS[name],
        )  # fmt: skip
        result = train(model, tokenizer, None, arguments)
        log = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    metrics = result.metrics
    return {
        "options": json.dumps(METHODS[name]),
        "parameters": result.parameters,
        "steps": result.steps,
        "seconds": metrics["seconds"],
        "tokens_per_second": metrics["tokens_per_second"],
        "peak_mb": metrics["peak_memory_bytes"] / 1e6,
        "loss_before": metrics["eval_loss_before"],
        "loss": metrics["eval_loss"],
        "curve": json.dumps([[entry["step"], entry["eval_loss"]] for entry in log if "eval_loss" in entry]),
        "answers": json.dumps(
            [
                answer(model, tokenizer, [("user", asked)], max_new_tokens=48, do_sample=False).text
                for asked in QUESTIONS
            ],
            ensure_ascii=False,
        ),
    }


def cost(name: str) -> dict[str, float]:
    """Seconds of a step and memory of one contestant; steps after the warm-up count."""
    import torch

    import qgraft
    from qgraft.training.evaluate import build_samples, read_dataset

    model, tokenizer = qgraft.load("smollm2-135m")
    conversations, accounting = read_dataset("identity", name="Aria", author="the Qgraft team")
    samples = build_samples(tokenizer, conversations, accounting)
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(1)).tolist()
    batches = [[samples[i] for i in order[n * BATCH : (n + 1) * BATCH]] for n in range(STEPS)]
    step = peft_step() if name == "peft-prefix" else qgraft_step(model, name)
    seconds, tokens = [], 0
    for number, batch in enumerate(batches):
        began = time.perf_counter()
        step(batch)
        if number >= WARMUP:
            seconds.append(time.perf_counter() - began)
            tokens += sum(len(sample.input_ids) for sample in batch)
    return {"tokens_per_second": tokens / sum(seconds), "peak_mb": peak_mb()}


def qgraft_step(model: Any, name: str) -> Any:
    """A function that takes one optimizer step on a batch of samples, as a run does."""
    import torch

    import qgraft
    from qgraft.data.batches import collate, count_labels, split_batch
    from qgraft.kernels.choice import has_fast_bf16
    from qgraft.linear import computing
    from qgraft.passes.decoder import sample_attention
    from qgraft.passes.fused import fused_modules
    from qgraft.passes.loss import batch_loss

    torch.manual_seed(0)
    if name.startswith("lora"):
        qgraft.attach_lora(model, r=8)
    else:
        qgraft.attach_prefix(model, pre_seq_len=128)
    if name.endswith("checkpointing"):
        renamed = getattr(model, "activation_checkpointing_enable", None)
        (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    fused = contextlib.ExitStack()  # for as long as `step` lives
    fused.enter_context(fused_modules(model))

    def step(samples: list[Any], fused: contextlib.ExitStack = fused) -> None:
        batch = collate(samples)
        with sample_attention(model), computing(model, "bf16" if has_fast_bf16() else "float32"):
            for part in split_batch(batch, 384):
                (batch_loss(model, part) / count_labels(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peft_step() -> Any:
    """The same with transformers and PEFT: the dequantized float32 model, padded batches."""
    import torch
    from peft import PrefixTuningConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    from qgraft.checkpoints.pull import pull

    path = pull("smollm2-135m")
    base = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    model = get_peft_model(base, PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=128))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(samples: list[Any]) -> None:
        rows = [{"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples]
        model(**pad(rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def report() -> None:
    """Medians of the rounds, and ratios to LoRA."""
    with COST.open(newline="") as file:
        rows = list(csv.DictReader(file))
    medians = {
        name: [
            statistics.median(float(r[key]) for r in rows if r["contestant"] == name)
            for key in ("tokens_per_second", "peak_mb")
        ]
        for name in CONTESTANTS
    }
    for name, (speed, memory) in medians.items():
        relative = speed / medians["lora"][0], memory / medians["lora"][1]
        print(f"{name:<24}{speed:8.1f} tokens/s ({relative[0]:.2f})   {memory:7.0f} MB ({relative[1]:.2f})")


def plot() -> None:
    """The held-out loss of each method over its steps, and what it costs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    with LEARN.open(newline="") as file:
        for row in csv.DictReader(file):
            steps, losses = zip(*json.loads(row["curve"]), strict=True)
            label = f"{row['method']}: {int(row['parameters']) / 1e6:.1f} M"
            left.plot(steps, losses, marker="o", markersize=3, label=label)
    left.set(xlabel="optimizer steps", ylabel="loss of held-out rows", yscale="log", title="What is learned")
    left.legend(fontsize=8)
    if COST.exists():
        with COST.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for name in CONTESTANTS:
            mine = [r for r in rows if r["contestant"] == name]
            speed, memory = (statistics.median(float(r[key]) for r in mine) for key in ("tokens_per_second", "peak_mb"))
            right.plot(memory / 1e3, speed, "o")
            beside = (6, -12) if name.startswith("lora") else (6, 5)  # LoRA and prefix lie close to each other
            right.annotate(name, (memory / 1e3, speed), textcoords="offset points", xytext=beside, fontsize=8)
        right.margins(0.25)
        right.set(xlabel="peak memory, GB", ylabel="tokens/s", title="What it costs", xlim=(0, None), ylim=(0, None))
    figure.savefig(CHART)


if __name__ == "__main__":
    main()
