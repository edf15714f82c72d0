"""loss.png, whatever a run has logged."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from qgraft.plots import plot_losses


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Draws entries of a log and gives the figure that was written."""
    figures: list[Figure] = []
    written = Figure.savefig

    def savefig(self: Figure, *args: Any, **options: Any) -> None:
        figures.append(self)
        written(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def draw(*entries: dict[str, Any]) -> Figure:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


def test_a_single_point_is_seen(drawn: Any) -> None:
    axes = drawn({"step": 3, "loss": 2.5}).axes[0]
    (line,) = axes.lines
    assert line.get_marker() == "o" and list(line.get_xdata()) == [3]
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 2.5 and axes.get_xlim()[0] == 0


def test_the_best_held_out_loss_is_marked_and_no_point_lies_under_the_legend(drawn: Any) -> None:
    losses = [2.6, 1.9, 2.2, 3.5]
    figure = drawn(*({"step": 10 * n, "loss": 3.0 - n / 2, "eval_loss": loss} for n, loss in enumerate(losses, 1)))
    axes = figure.axes[0]
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([20], [1.9])
    assert axes.get_ylim()[1] > 3.5
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "training: 1.000 at the end", "held-out: 3.500 at the end", "best: 1.900 at step 20"]  # fmt: skip
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_losses_that_are_no_numbers_are_left_out(drawn: Any, loss: float | None) -> None:
    axes = drawn({"step": 1, "loss": 1.5}, {"step": 2, "loss": loss}).axes[0]
    assert list(axes.lines[0].get_xdata()) == [1]


def test_nothing_logged(drawn: Any) -> None:
    assert not drawn().axes[0].lines
