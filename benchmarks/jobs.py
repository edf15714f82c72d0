"""Several LoRAs trained on one base at once, against the same jobs one after another.

    python benchmarks/jobs.py                       # 8 jobs, two rounds of each, alternating; about five minutes
    python benchmarks/jobs.py --jobs 4 --batch 2

The jobs are LoRAs r=8 on all linear layers of SmolLM2-135M (Q4_1), with seeds and learning rates of their own, on the
identity rows in batches of one: what somebody does who tries learning rates, or tunes one adapter for each customer.

    at once    train_jobs() of all
    in turn    train() of each in one process, which loads the model once
    apart      train() of each in a process of its own, as by eight commands

The benchmark fails where the training loss of any job differs by more than 1 % between the first two (in float32 they
agree to six digits; where products are computed in bfloat16, sums of another order round otherwise).

Written to benchmarks/results/jobs.csv: useful tokens a second of all jobs together, over the steps, over the whole calls
(the adapters' making and saving included, loading not) and over the processes (the interpreter's start and loading
included); the processor time of the calls; the peak resident memory of a process. The steps of jobs at once last from the
first job's first step to the end of the last job's last, so the saving of those that end before it is counted. The machine
is noisy: quote the ratios, and not from a machine with other work, where two threads that wait for each other take many
times as long. By default a pass takes 1024 tokens, so that one is enough for the batches of all jobs; the others pass
one batch at a time whatever the budget is.
"""

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import machine

RESULTS = Path(__file__).with_name("results") / "jobs.csv"
CONTESTANTS = ("at once", "in turn", "apart")


def main() -> None:
    """Run both in turn, compare, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens_per_pass", type=int, default=1024)
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
    """Run one contestant in a fresh interpreter; "apart" in one for each job."""
    words = ["--steps", str(options.steps), "--batch", str(options.batch)]
    words += ["--tokens_per_pass", str(options.tokens_per_pass)]
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the command does
    began = time.perf_counter()
    if name == "apart":
        runs = [
            machine.in_own_process(__file__, [*words, "--only", "in turn", "--jobs", "1", "--first", str(index)])
            for index in range(options.jobs)
        ]
    else:
        runs = [machine.in_own_process(__file__, [*words, "--only", name, "--jobs", str(options.jobs)])]
    processes = time.perf_counter() - began
    tokens, seconds, calls, cpu = (sum(run[key] for run in runs) for key in ("tokens", "seconds", "calls", "cpu"))
    return {
        "contestant": name,
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "tokens_per_second_of_calls": round(tokens / calls, 1),
        "cpu_seconds_of_calls": round(cpu, 1),
        "seconds_per_step": round(seconds / options.steps, 3),
        "peak_mb": max(run["peak_mb"] for run in runs),
        "tokens_per_second_of_processes": round(tokens / processes, 1),
        "losses": [loss for run in runs for loss in run["losses"]],
    }


def run_contestant(options: argparse.Namespace) -> dict:
    """Train the jobs in this process; returns the measurements."""
    import qgraft
    from qgraft.jobs.train import train_jobs

    model, tokenizer = qgraft.load("smollm2-135m")
    chosen = range(options.first, options.first + options.jobs)
    with tempfile.TemporaryDirectory() as folder:
        jobs = [job_arguments(options, Path(folder) / str(index), index) for index in chosen]
        began, cpu_began = time.perf_counter(), time.process_time()
        if options.only == "at once":
            reports = train_jobs(model, tokenizer, jobs)
            seconds = max(report.metrics["seconds"] for report in reports)
        else:
            reports = []
            for args in jobs:
                reports.append(qgraft.train(model, tokenizer, None, args))
                qgraft.detach_lora(model)
            seconds = sum(report.metrics["seconds"] for report in reports)
        total, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return {
        "tokens": sum(report.metrics["tokens"] for report in reports),
        "seconds": seconds,
        "calls": total,
        "cpu": cpu,
        "peak_mb": round(machine.peak_mb()),
        "losses": [report.metrics["train_loss"] for report in reports],
    }


def job_arguments(options: argparse.Namespace, folder: Path, index: int) -> object:
    """What one job is told."""
    import qgraft

    return qgraft.TrainArguments(
        output_dir=str(folder), dataset="identity", name="Aria", author="the Qgraft team", max_steps=options.steps,
        per_device_train_batch_size=options.batch, learning_rate=1e-4 * (1 + index), seed=index, save_strategy="no",
        logging_steps=1000, plot_loss=False, use_cpu=True,
        max_tokens_per_pass=options.tokens_per_pass,
    )  # fmt: skip


def write(runs: list[dict], options: argparse.Namespace) -> None:
    """Append the runs to the CSV with date, device and versions."""
    about = {
        **machine.describe("qgraft", "torch", "transformers"),
        "jobs": options.jobs,
        "steps": options.steps,
        "batch": options.batch,
        "tokens_per_pass": options.tokens_per_pass,
    }
    rows = [{**about, **{key: value for key, value in run.items() if key != "losses"}} for run in runs]
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def report(runs: list[dict]) -> None:
    """Medians and their ratio; fails when a job's losses differ by more than 1 %."""
    rates = {
        "tokens_per_second": "steps",
        "tokens_per_second_of_calls": "calls",
        "tokens_per_second_of_processes": "processes",
    }
    medians = {
        name: {
            key: statistics.median(run[key] for run in runs if run["contestant"] == name)
            for key in (*rates, "cpu_seconds_of_calls", "peak_mb")
        }
        for name in CONTESTANTS
    }
    together = medians["at once"]
    for name, figures in medians.items():
        print(f"{name}: peak {figures['peak_mb']:.0f} MB; tokens/s of "
              + ", ".join(f"{said} {figures[key]:.1f}" for key, said in rates.items()))  # fmt: skip
        ratios = ", ".join(f"{together[key] / figures[key]:.2f} by {said}" for key, said in rates.items())
        work = figures["cpu_seconds_of_calls"] / together["cpu_seconds_of_calls"]
        if name != "at once":
            print(f"  at once is x {ratios}, {work:.2f} by the processor time of calls")
    worst = max(abs(ours / theirs - 1) for ours, theirs in zip(runs[0]["losses"], runs[1]["losses"], strict=True))
    print(f"largest difference of a job's training loss: {worst:.4%}")
    if worst > 1e-2:
        sys.exit("the losses differ by more than 1 %: the contestants did not do the same work")


if __name__ == "__main__":
    main()
