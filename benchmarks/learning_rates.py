"""Which learning rate a LoRA takes, by its rank and by the size of the model: held-out losses after one pass over a task.

    python benchmarks/learning_rates.py                                   # an hour on two cores
    python benchmarks/learning_rates.py --models smollm2-135m --ranks 8   # part of it
    python benchmarks/learning_rates.py --plot                            # only draw and print, from the CSV

Every run starts from the base with a new LoRA on all linear layers, lora_alpha twice its rank, and learns the rows of the
task once in groups of 8, with a cosine schedule and 5 steps of warm-up. SmolLM2-135M is in Q4_1, Gemma 3 270M in llama.cpp's
Q4_K_M mix. Results are appended to benchmarks/results/learning_rates.csv; a line that is there already is not run again.
The chart is learning_rates.png beside it.
"""

import argparse
import csv
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import machine

RESULTS = Path(__file__).with_name("results") / "learning_rates.csv"
MODELS = ("smollm2-135m", "gemma3-270m")
RANKS = (4, 32)
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
KEY = ("model", "task", "r", "learning_rate")


def main() -> None:
    """Run what is asked for and not yet in the CSV, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="comma list")
    parser.add_argument("--tasks", default="identity", help="comma list, of tasks.py")
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)), help="comma list")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="comma list")
    parser.add_argument("--plot", action="store_true", help="only draw and print")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(learn(json.loads(options.only))))
        return
    if not options.plot:
        lists = (getattr(options, name).split(",") for name in ("models", "tasks", "ranks", "rates"))
        for case in itertools.product(*lists):
            run_new(dict(zip(KEY, case, strict=True)))
    plot()
    print_table()


def run_new(case: dict[str, str]) -> None:
    """One run in a process of its own, appended to the CSV unless it is there."""
    if any(all(row[key] == case[key] for key in KEY) for row in read()):
        return
    result = machine.in_own_process(__file__, ["--only", json.dumps(case)])
    line = {**case, **result, **machine.describe("qgraft", "torch", "transformers")}
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, line)
        if new:
            writer.writeheader()
        writer.writerow(line)
    print(case | result, flush=True)


def learn(case: dict[str, str]) -> dict[str, float]:
    """The losses of held-out rows before and after."""
    from tasks import TASKS

    import qgraft

    rows, held_out = TASKS[case["task"]]()
    model, tokenizer = qgraft.load(case["model"])
    rank = int(case["r"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = qgraft.TrainArguments(
            output_dir=folder, r=rank, lora_alpha=2.0 * rank, learning_rate=float(case["learning_rate"]),
            num_train_epochs=1.0, lr_scheduler_type="cosine", warmup_steps=5, save_strategy="no", plot_loss=False,
        )  # fmt: skip
        metrics = qgraft.train(model, tokenizer, rows, arguments, eval_dataset=held_out).metrics
    return {name: metrics[name] for name in ("eval_loss_before", "eval_loss")}


def read() -> list[dict[str, str]]:
    """The lines of the CSV."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def curves() -> dict[tuple[str, str, str], list[tuple[float, float]]]:
    """(model, task, r) -> its (learning rate, held-out loss), by rising rate."""
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in read():
        point = float(row["learning_rate"]), float(row["eval_loss"])
        found.setdefault((row["model"], row["task"], row["r"]), []).append(point)
    return {key: sorted(points) for key, points in found.items()}


def print_table() -> None:
    """A line for every model, task and rank, the least loss in bold."""
    rates = sorted({rate for points in curves().values() for rate, _ in points})
    print(f"| model | task | r | {' | '.join(f'{rate:g}' for rate in rates)} |\n|{'---|' * (3 + len(rates))}")
    for (model, task, rank), points in curves().items():
        losses, best = dict(points), min(loss for _, loss in points)
        cells = (f"{losses[rate]:.3f}" if rate in losses else "" for rate in rates)
        print(f"| {model} | {task} | {rank} | {' | '.join(f'**{c}**' if c == f'{best:.3f}' else c for c in cells)} |")


def plot() -> None:
    """Held-out loss over learning rate, a line for every model, task and rank."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    colors: dict[tuple[str, str], Any] = {}
    for (model, task, rank), points in curves().items():
        color = colors.setdefault((model, task), f"C{len(colors)}")
        style = "-" if rank == str(min(RANKS)) else "--"
        axes.plot(*zip(*points, strict=True), style, color=color, marker="o", label=f"{model}, {task}, r={rank}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss after one pass")
    axes.legend(frameon=False)
    figure.savefig(RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
