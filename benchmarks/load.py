"""Loading SmolLM2-135M Q4_1: qgraft against transformers' own GGUF loader, each in a process of its own, alternating.

    python benchmarks/load.py

Seconds from the call to a usable model and tokenizer (imports not counted), resident memory afterwards and its peak,
torch and all libraries included. Written to benchmarks/results/load.csv.
"""

import argparse
import csv
import datetime
import json
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).with_name("results") / "load.csv"
CONTESTANTS = ("qgraft", "transformers")


def main() -> None:
    """Run the contestants in turn, print medians, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(load_qgraft() if options.only == "qgraft" else load_transformers()))
        return
    runs = []
    for number in range(options.rounds):
        for name in CONTESTANTS:
            command = [sys.executable, __file__, "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append({"round": number, "contestant": name, **json.loads(done.stdout.strip().splitlines()[-1])})
    about = {"date": datetime.date.today().isoformat()}
    about |= {package: version(package) for package in ("qgraft", "torch", "transformers")}
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*about, *runs[0]])
        writer.writeheader()
        writer.writerows({**about, **run} for run in runs)
    for name in CONTESTANTS:
        mine = [run for run in runs if run["contestant"] == name]
        figures = {key: statistics.median(run[key] for run in mine) for key in ("seconds", "resident_mb", "peak_mb")}
        print(
            f"{name:<14}{figures['seconds']:6.2f} s   resident {figures['resident_mb']:5.0f} MB"
            f"   peak {figures['peak_mb']:5.0f} MB"
        )


def load_qgraft() -> dict[str, float]:
    """Ours."""
    import qgraft

    load = qgraft.load  # the imports behind it happen here
    path = qgraft.pull("smollm2-135m")
    return measure(lambda: load(path))


def load_transformers() -> dict[str, float]:
    """The dequantizing loader, with the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qgraft

    path = qgraft.pull("smollm2-135m")
    where = {"gguf_file": path.name}
    return measure(
        lambda: (
            AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **where),
            AutoTokenizer.from_pretrained(str(path.parent), **where),
        )
    )


def measure(load: object) -> dict[str, float]:
    """Seconds of load(), and the process's memory in MB."""
    import resource

    import psutil

    began = time.perf_counter()
    kept = load()
    seconds = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    resident = psutil.Process().memory_info().rss
    assert kept[0] is not None
    return {"seconds": seconds, "resident_mb": resident / 1e6, "peak_mb": peak / 1e6}


if __name__ == "__main__":
    main()
