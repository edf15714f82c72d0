"""Adapters in the upper half, with and without --cache_frozen_layers: seconds of each epoch, and whether the losses agree.

    python benchmarks/frozen_cache.py                    # two rounds of each contestant, alternating; about 4 minutes
    python benchmarks/frozen_cache.py --rounds 3 --rows 64 --epochs 4

Every contestant is a whole training run in a process of its own: SmolLM2-135M Q4_1, LoRA r=8 on all linear layers, the same
rows, seed and shuffling, batch 8.

    all       adapters in all 30 layers
    upper     adapters in layers 15 to 29: the backward pass ends at layer 15
    cached    the same with the states that enter layer 15 kept on disk: from the second epoch on nothing below runs

The losses of every step of `upper` and `cached` must be the same to rounding, or the benchmark fails.
Written to benchmarks/results/frozen_cache.csv: seconds of the steps of each epoch (evaluation and loading left out), those
that the process computed (of all cores together), and its peak resident memory. The machine is noisy: quote the ratios.
"""

import argparse
import csv
import datetime
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import machine
from machine import cpu_name, peak_mb

RESULTS = Path(__file__).with_name("results") / "frozen_cache.csv"
CONTESTANTS = {
    "all": {},
    "upper": {"layers_to_transform": "15-29"},
    "cached": {"layers_to_transform": "15-29", "cache_frozen_layers": True},
}
BATCH = 8
ROUNDING = 1e-3  # of a loss, after some steps of which each goes on from the one before


def main() -> None:
    """Run all contestants in turn, compare, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--compute", default="auto", help="how products are computed: auto, float32, bf16")
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(run_contestant(options)))
        return
    runs = []
    for number in range(options.rounds):
        for name in CONTESTANTS:
            runs.append({"round": number, **in_own_process(name, options)})
            print({key: value for key, value in runs[-1].items() if key != "losses"}, flush=True)
    write(runs, options)
    report(runs)


def in_own_process(name: str, options: argparse.Namespace) -> dict:
    """Run one contestant in a fresh interpreter."""
    words = ["--only", name, *(f"--{key}={getattr(options, key)}" for key in ("rows", "epochs", "compute"))]
    return {"contestant": name, **machine.in_own_process(__file__, words)}


def run_contestant(options: argparse.Namespace) -> dict:
    """One training run in this process; returns the measurements."""
    from transformers import TrainerCallback

    import qgraft
    from qgraft.training import run

    class Clock(TrainerCallback):
        """Times the steps of each epoch, and keeps the losses unrounded."""

        def __init__(self):
            self.epochs, self.cpu, self.losses = [], [], []

        def on_epoch_begin(self, args, state, control, **kwargs):
            self.epochs.append(0.0)
            self.cpu.append(0.0)

        def on_step_begin(self, args, state, control, **kwargs):
            self.began, self.cpu_began = time.perf_counter(), time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            self.epochs[-1] += time.perf_counter() - self.began
            self.cpu[-1] += time.process_time() - self.cpu_began

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.losses += [logs["loss"]] if "loss" in logs else []

    clock = Clock()
    model, tokenizer = qgraft.load("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        args = qgraft.TrainArguments(
            output_dir=folder, num_train_epochs=options.epochs, per_device_train_batch_size=BATCH, use_cpu=True,
            max_samples=options.rows, logging_steps=1, save_strategy="no", name="Aria", author="the Qgraft team",
            plot_loss=False, compute=options.compute, **CONTESTANTS[options.only],
        )  # fmt: skip
        made = run.train(model, tokenizer, "identity", args, callbacks=[clock])
        adapter = (Path(folder) / "adapter_model.safetensors").read_bytes()
    return {
        "compute": args.compute,
        **{f"epoch_{number}": round(seconds, 2) for number, seconds in enumerate(clock.epochs, 1)},
        **{f"cpu_{number}": round(seconds, 2) for number, seconds in enumerate(clock.cpu, 1)},
        "tokens_an_epoch": int(made.metrics["tokens"]) // options.epochs,
        "peak_mb": round(peak_mb()),
        "final_loss": clock.losses[-1],
        "losses": clock.losses,
        "adapter_sha256": hashlib.sha256(adapter).hexdigest()[:16],
    }


def write(runs: list[dict], options: argparse.Namespace) -> None:
    """Append the runs to the CSV with date, device and versions."""
    about = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        **{package: version(package) for package in ("qgraft", "torch", "transformers")},
        "rows": options.rows,
        "batch": BATCH,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    names = [*about, *(key for key in runs[0] if key != "losses")]
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names, extrasaction="ignore")
        if new:
            writer.writeheader()
        writer.writerows({**about, **run} for run in runs)


def report(runs: list[dict]) -> None:
    """Medians of the first and of later epochs; fails where `upper` and `cached` are not the same run."""

    def seconds(name: str, later: bool) -> float:
        return statistics.median(
            value for run in runs if run["contestant"] == name
            for key, value in run.items() if key.startswith("epoch_") and (key > "epoch_1") == later
        )  # fmt: skip

    for name in CONTESTANTS:
        first, later = seconds(name, False), seconds(name, True)
        peak = max(run["peak_mb"] for run in runs if run["contestant"] == name)
        print(f"{name:<8} first epoch {first:6.1f} s   later epochs {later:6.1f} s   peak {peak} MB")
    cached = seconds("cached", True)
    print(f"later epochs with the cache: {cached / seconds('upper', True):.0%} of the time of adapters in the upper half, "
          f"{cached / seconds('all', True):.0%} of that of adapters in all layers")  # fmt: skip
    steps = zip(*(run["losses"] for run in runs if run["contestant"] != "all"), strict=True)
    apart = max((max(losses) - min(losses)) / max(losses) for losses in steps)
    print(f"losses with and without the cache: at most {apart:.1e} apart")
    if apart > ROUNDING:
        sys.exit(f"expected at most {ROUNDING:.0e}, the rounding of sums")


if __name__ == "__main__":
    main()
