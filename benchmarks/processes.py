"""Training in two processes of one thread each, against one process of two threads: the same samples a step.

    python benchmarks/processes.py                  # three rounds of each, alternating; about five minutes

LoRA r=8 on all linear layers of SmolLM2-135M (Q4_1), 8 samples of the identity rows a step, float32. Written to
benchmarks/results/processes.csv: tokens a second over the steps, seconds of the whole command, and the training loss, which
must agree to 1e-5. The machine is noisy: quote the ratio.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine

RESULTS = Path(__file__).with_name("results") / "processes.csv"
CONTESTANTS = {"one process, two threads": (1, 2), "two processes, one thread each": (2, 1)}


def main() -> None:
    """Run both in turn, compare, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    runs = []
    for number in range(options.rounds):
        for name, (processes, threads) in CONTESTANTS.items():
            runs.append({"round": number, "contestant": name, **run(processes, threads, options.steps)})
            print(runs[-1], flush=True)
    losses = [each["train_loss"] for each in runs]
    assert max(losses) - min(losses) < 1e-5 * max(losses), f"the losses differ: {losses}"
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, [*runs[0], "cpu"])
        writer.writeheader()
        writer.writerows({**each, "cpu": machine.cpu_name()} for each in runs)
    for name in CONTESTANTS:
        rates = [each["tokens_per_second"] for each in runs if each["contestant"] == name]
        print(f"{name:<32}{statistics.median(rates):8.1f} tokens/s")


def run(processes: int, threads: int, steps: int) -> dict:
    """One command in a fresh interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        options = {"model_name_or_path": "smollm2-135m", "dataset": "identity", "name": "Aria", "author": "the Qgraft team",
                   "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 8 // processes,
                   "save_strategy": "no", "plot_loss": "false", "compute": "float32", "use_cpu": "true"}  # fmt: skip
        words = [f"--{name}={value}" for name, value in options.items()]
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, *launcher, "-m", "qgraft", "train", *words], check=True, capture_output=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
        seconds = time.perf_counter() - began
        metrics = json.loads((Path(folder) / "run.json").read_text())["metrics"]
    return {"tokens_per_second": round(metrics["tokens_per_second"], 1), "seconds": round(seconds, 1),
            "train_loss": metrics["train_loss"]}  # fmt: skip


if __name__ == "__main__":
    main()
