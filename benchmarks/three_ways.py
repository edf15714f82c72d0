"""Three ways to a quantized model that has learned something, the comparison that llama.cpp#13485 asks for.

    float      LoRA on the float weights, merged in float, quantized afterwards
    merged     LoRA on the quantized weights, merged into them: by qgraft, and by quantizing W + delta again
    beside     LoRA on the quantized weights, not merged: it is computed beside them

    python benchmarks/three_ways.py                 # about ten minutes a task on one core
    python benchmarks/three_ways.py --plot          # only draw

All start from the same float weights and end in Q4_1. Only the Q4_1 file of SmolLM2-135M lies in the package index, so the
float weights are its weights moved by up to half a step, at random: weights that a quantizer could have made the file's from.
That matters: weights on the grid are where requantizing swallows a delta whole, and float weights are not on it.

Losses, in nats a token, on held-out rows of the task and on unrelated text, which shows what quantizing and the task
cost elsewhere. A task and way is a line of results/three_ways.csv, added when it is found; one that is there is not run
again. The chart is beside it, of the tasks that are complete.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import machine
import torch
from tasks import TASKS, train_adapter
from torch import Tensor

import qgraft
from qgraft.adapters.targets import find_targets, lora_layers
from qgraft.formats import quantize, unpack
from qgraft.merging.calibration import DRIFT_TOKENS, _up_to, neutral_samples
from qgraft.merging.measure import compare, states_of
from qgraft.passes.decoder import output_head

RESULTS = Path(__file__).with_name("results") / "three_ways.csv"
R, FORMAT = 8, "q4_1"
WAYS = {  # line of the CSV -> how the chart calls it
    "base": "base, quantized",
    "float, unquantized": "LoRA on float, merged",
    "float": "the same, then quantized",
    "beside": "LoRA on quantized, not merged",
    "merged": "merged by qgraft",
    "requantized": "merged by quantizing again",
}


def main() -> None:
    """Run the tasks that are asked for, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="identity,faq,style")
    parser.add_argument("--adapters", type=Path, default=Path("three_ways_adapters"), help="trained ones are kept here")
    parser.add_argument("--plot", action="store_true", help="only draw")
    options = parser.parse_args()
    if not options.plot:
        for task in options.tasks.split(","):
            run(task, options.adapters)
    plot()


def read() -> list[dict[str, str]]:
    """The lines that are there."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def run(task: str, adapters: Path) -> None:
    """The ways of one task that the CSV does not have yet."""
    missing = WAYS.keys() - {row["way"] for row in read() if row["task"] == task}
    if not missing:
        return
    about = machine.describe("qgraft", "torch")
    model, tokenizer = qgraft.load("smollm2-135m")
    weights = float_weights(model)

    def found(way: str) -> None:
        if way not in missing:
            return
        held, unrelated = losses(model, tokenizer, task)
        line = {**about, "task": task, "r": R, "way": way, "held_out_loss": held, "unrelated_loss": unrelated}
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(line))
            if new:
                writer.writeheader()
            writer.writerow(line)
        print(task, way, f"{held:.4f} {unrelated:.4f}", flush=True)

    def learned(name: str) -> None:
        """The adapter of this name, trained unless it lies there."""
        folder = adapters / f"{task}-{name}"
        if (folder / "qgraft.json").is_file():
            qgraft.load_adapter(model, folder, force=True)  # the weights are not those of the file
        else:
            train_adapter(model, tokenizer, task, R)
            qgraft.save_adapter(model, folder)

    if missing & {"float, unquantized", "float"}:
        put(model, weights, "f32")
        learned("float")
        with torch.no_grad():
            (name,) = qgraft.adapter_names(model)
            merged = {path: weights[path] + layer.loras[name].delta() for path, layer in lora_layers(model)}
        found("float, unquantized")
        qgraft.detach_lora(model)
        put(model, merged, FORMAT)
        found("float")
    put(model, weights, FORMAT)
    found("base")
    if not missing & {"beside", "merged", "requantized"}:
        return
    learned("quantized")
    found("beside")
    rows, held_out = TASKS[task]()
    for way, method in {"merged": "auto", "requantized": "nearest"}.items():
        if way not in missing:
            continue
        qgraft.merge(
            model, tokenizer, calibration=rows, eval_dataset=held_out, method=method, min_retained=-1e9, progress=False
        )
        found(way)
        qgraft.unmerge(model)


def float_weights(model: Any) -> dict[str, Tensor]:
    """Each linear layer's weight, moved by up to half a step of its own."""
    torch.manual_seed(0)
    weights = {}
    for path in find_targets(model, "all-linear"):
        grid = unpack(model.get_submodule(path).packed)
        weights[path] = grid.weight() + (torch.rand(grid.codes.shape) - 0.5) * grid.spread(grid.steps())
    return weights


def put(model: Any, weights: dict[str, Tensor], format_: str) -> None:
    """The layers with these weights in this format."""
    for path, weight in weights.items():
        model.get_submodule(path).replace(quantize(weight, format_))


def losses(model: Any, tokenizer: Any, task: str) -> tuple[float, float]:
    """(on held-out rows of the task, on unrelated text), nats a token."""
    held = qgraft.evaluate(model, tokenizer, TASKS[task]()[1]).loss
    text = _up_to(neutral_samples(tokenizer)[1::2], DRIFT_TOKENS)
    states, labels = states_of(model, text)
    return held, compare(states, states, output_head(model), labels).losses[0]


def plot() -> None:
    """Held-out losses by task and way; the paler bars are the losses on unrelated text."""
    from matplotlib.figure import Figure

    rows = read()
    ways = {task: {row["way"] for row in rows if row["task"] == task} for task in (row["task"] for row in rows)}
    tasks = [task for task, found in ways.items() if found == WAYS.keys()]
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    colors = ("#8f8f8f", "#9db7d9", "#4f81bd", "#e0a33a", "#3a9a5b", "#c8796a")
    for axes, (column, title) in zip(
        figure.subplots(1, 2),
        {"held_out_loss": "held-out rows of the task", "unrelated_loss": "unrelated text"}.items(),
        strict=True,
    ):
        for n, (way, label) in enumerate(WAYS.items()):
            heights = [
                next(float(row[column]) for row in rows if (row["task"], row["way"]) == (task, way)) for task in tasks
            ]
            places = [place + 0.13 * (n - 2.5) for place in range(len(tasks))]
            bars = axes.bar(places, heights, 0.12, color=colors[n], label=label)
            axes.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=6, padding=2)
        axes.set_xticks(range(len(tasks)), tasks)
        axes.set_title(f"loss on {title}, nats a token", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
