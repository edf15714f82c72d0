"""How far the estimate of a run's memory is from what the run then holds: SmolLM2-135M, LoRA on all linear layers.

    python benchmarks/memory.py             # 8 runs of two steps, each in a process of its own; about 4 minutes

Settings: passes of at most 128, 384 and 1024 tokens, with and without gradient checkpointing, r=8 and 32. Rows are the
identity set, in batches that fill a pass. Memory is the peak resident memory of the process as `qgraft train` starts it.
Written to benchmarks/results/memory.csv; a run whose estimate is off by more than 15 % fails the benchmark.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import machine

RESULTS = Path(__file__).with_name("results") / "memory.csv"
SETTINGS = [(tokens, ckpt, 8) for tokens in (128, 384, 1024) for ckpt in (0, 1)]
SETTINGS += [(384, ckpt, 32) for ckpt in (0, 1)]
TOLERANCE = 0.15


def main() -> None:
    """Run every setting, print and write estimate and measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", nargs=3, type=int, metavar=("TOKENS", "CHECKPOINTING", "R"))
    parser.add_argument("--in_process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        print(json.dumps(run(options.steps, *options.only)))
        return
    results = []
    for setting in [tuple(options.only)] if options.only else SETTINGS:
        results.append(in_own_process(setting, options.steps))
        write(results[-1:])
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in results[-1].items()}, flush=True)
    worst = max(results, key=lambda result: abs(result["off"]))
    print(f"furthest off: {worst['off']:+.1%} at {worst['tokens']} tokens a pass")
    if abs(worst["off"]) > TOLERANCE:
        sys.exit(f"an estimate is off by more than {TOLERANCE:.0%}")


def in_own_process(setting: tuple[int, ...], steps: int) -> dict[str, Any]:
    """One run."""
    return machine.in_own_process(__file__, ["--in_process", "--steps", str(steps), "--only", *map(str, setting)])


def run(steps: int, tokens: int, checkpointing: int, r: int) -> dict[str, Any]:
    """Estimate, then train, in this process."""
    import qgraft
    from qgraft.memory.settings import Setting, apply_setting, estimate
    from qgraft.training.adapter import prepare_adapter
    from qgraft.training.run import train

    model, tokenizer = qgraft.load("smollm2-135m")
    setting = Setting(tokens, bool(checkpointing))
    with tempfile.TemporaryDirectory() as folder:
        args = qgraft.TrainArguments(
            output_dir=folder, r=r, max_steps=steps, max_tokens_per_pass=tokens, save_strategy="no", use_cpu=True,
            max_length=tokens,
            name="Aria", author="the Qgraft team", per_device_train_batch_size=2 + tokens // 32, plot_loss=False,
        )  # fmt: skip
        apply_setting(args, setting)
        prepare_adapter(model, args)
        found = next(each for each in estimate(model, args) if each.setting == setting)
        report = train(model, tokenizer, "identity", args)
    peak = report.metrics["peak_memory_bytes"]
    return {
        "tokens": tokens, "checkpointing": checkpointing, "r": r,
        **{f"{name}_mb": round(size / 1e6) for name, size in found.parts().items()},
        "estimate_mb": found.total / 1e6, "peak_mb": peak / 1e6, "off": found.total / peak - 1,
        "tokens_per_second": report.metrics["tokens_per_second"],
    }  # fmt: skip


def write(results: list[dict[str, Any]]) -> None:
    """Append to the CSV with date, device and versions."""
    about = {
        "date": datetime.date.today().isoformat(), "cpu": platform.processor() or platform.machine(),
        "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()), "libc": "-".join(platform.libc_ver()),
        **{package: version(package) for package in ("qgraft", "torch", "transformers")},
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*about, *results[0]])
        if new:
            writer.writeheader()
        writer.writerows({**about, **result} for result in results)


if __name__ == "__main__":
    main()
