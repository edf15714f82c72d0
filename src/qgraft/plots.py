"""Figures, drawn from the json and jsonl files that runs leave; the only place that imports matplotlib."""

import io
import json
from pathlib import Path
from typing import Any

from qgraft import storage


def plot_losses(metrics: Path, target: Path) -> None:
    """Draw training and held-out loss over steps from a metrics.jsonl into a PNG file."""
    from matplotlib.figure import Figure  # no pyplot: no window system, no global state

    entries = read_metrics(metrics)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held-out", "o--")):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, style, label=f"{label} ({values[-1]:.3f})", linewidth=1.8, markersize=5)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per answer token)")
    axes.set_title("Loss")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    axes.set_ylim(bottom=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    storage.write_file(target, buffer.getvalue())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; a torn last line, left by a kill, is passed over."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries
