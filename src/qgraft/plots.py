"""Figures, drawn from the json and jsonl files that runs leave; the only place that imports matplotlib."""

import io
import json
import math
from pathlib import Path
from typing import Any

from qgraft import storage
from qgraft.json_files import parse_json


def plot_losses(metrics: Path, target: Path) -> None:
    """Draw training and held-out loss over steps from a metrics.jsonl into a PNG file."""
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state
    from matplotlib.ticker import MaxNLocator

    entries, highest, last = read_metrics(metrics), 0.0, 1
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "."), ("eval_loss", "held-out", "o")):
        points = [(entry["step"], entry[key]) for entry in entries if _finite(entry.get(key))]
        if points:
            steps, values = zip(*points, strict=True)
            highest, last = max(highest, *values), max(last, *steps)
            line = "--" if key == "eval_loss" else "-"
            marker = "o" if len(points) == 1 else style
            axes.plot(steps, values, marker + line, label=f"{label}: {values[-1]:.3f} at the end", linewidth=1.8)
        if key == "eval_loss" and len(points) > 1:
            step, best = min(points, key=lambda point: point[1])
            axes.plot([step], [best], "*", markersize=14, color="tab:red", label=f"best: {best:.3f} at step {step}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per answer token)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=3)  # where it covers no point
    axes.set_xlim(0, 1.03 * last)
    axes.set_ylim(0, 1.06 * highest or 1.0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    storage.write_file(target, buffer.getvalue())


def plot_rates(search: Path, target: Path) -> None:
    """Draw a find_lr.json: the loss of each step over its learning rate, smoothed too, and the rate that is suggested."""
    from matplotlib.figure import Figure

    found = json.loads(search.read_text(encoding="utf-8"))
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    losses, smoothed = ([math.nan if each is None else each for each in found[key]] for key in ("losses", "smoothed"))
    axes.plot(found["rates"], losses, ".", color="#9aa5b1", label="loss of the step")
    axes.plot(found["rates"], smoothed, "-", color="#2f6fb0", linewidth=1.8, label="smoothed")
    finite = [loss for loss in (*smoothed, *losses) if _finite(loss)]
    if finite:
        room = 0.7 * abs(finite[0])  # a loss that diverged would leave none for the others
        axes.set_ylim(min(finite) - 0.1 * room, max(finite[0], min(finite)) + room)
    if found["suggested"] is not None:
        axes.axvline(found["suggested"], color="#3a9a5b", linestyle="--", label=f"suggested: {found['suggested']:g}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    storage.write_file(target, buffer.getvalue())


def plot_merge(report: Path, target: Path) -> None:
    """Draw a merge.json: the losses side by side, and what each layer kept of the delta's effect, in the model's order.

    effect kept = 1 - error^2, see LayerReport.effect_kept.
    """
    from matplotlib.figure import Figure

    merge = json.loads(report.read_text(encoding="utf-8"))
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    kept, layers = merge["kept"], merge["layers"]
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    if kept is None:
        left.set_axis_off()
        left.text(0.5, 0.5, "not measured", ha="center")
    else:
        losses = [kept[key] for key in ("base", "adapter", "merged")]
        bars = left.bar(["base", "base + adapter", "merged"], losses, color=("#9aa5b1", "#2f6fb0", "#3a9a5b"))
        left.bar_label(bars, fmt="%.3f")
        left.set_ylabel("loss (nats per answer token)")
        gain = merge["retained_gain"]
        left.set_title("not measured" if gain is None else f"retained gain {gain:.1%}")
    kinds = dict.fromkeys(layer["path"].rpartition(".")[2] for layer in layers)
    for kind in kinds:
        points = [(n, each["error"]) for n, each in enumerate(layers) if each["path"].rpartition(".")[2] == kind]
        shown = [(n, 100 * (1 - error**2)) for n, error in points if error is not None]
        if shown:
            right.plot(*zip(*shown, strict=True), ".", label=kind, markersize=6)
    right.axhline(100.0, color="black", linewidth=0.8)
    lowest = right.get_ylim()[0]
    right.set_ylim(min(0.0, lowest), 105)
    right.set_xlabel("layer, in the order of the model")
    right.set_ylabel("effect kept in %; 100: all of it, 0: none")
    right.set_title("Adapter's effect on each layer's outputs: what is kept")
    right.grid(alpha=0.3)
    if right.get_legend_handles_labels()[0]:
        right.legend(ncols=4, fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    storage.write_file(target, buffer.getvalue())


def _finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; lines that are none, as a kill leaves one, are passed over."""
    entries = []
    for line in path.read_bytes().splitlines():
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step", 0), int):
            entries.append(entry)
    return entries
