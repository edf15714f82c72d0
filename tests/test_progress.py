"""Progress is shown where somebody watches, as asked, and in a way that the place can show."""

import io
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, TextColumn

import qgraft.progress
from qgraft.progress import Display, shown

COLUMNS = (TextColumn("{task.description} {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=8))


def test_as_asked() -> None:
    console = Console(file=io.StringIO())
    assert shown(False) is None and shown(console) is console
    assert isinstance(shown(True), Console)


@pytest.mark.parametrize("watched", [True, False])
def test_where_somebody_watches(monkeypatch: pytest.MonkeyPatch, watched: bool) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: watched  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    assert (shown(None) is not None) is watched


def test_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert shown(None) is not None


def ten_steps(console: Console | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step every ten seconds of a clock of ours."""
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(qgraft.progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with Display(*COLUMNS, console=console) as display:
        task = display.add_task("step", total=10)
        for _ in range(10):
            display.advance(task)


def test_a_file_gets_a_line_now_and_then_and_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    ten_steps(Console(file=file, width=80), monkeypatch)
    lines = [line.strip() for line in file.getvalue().splitlines()]
    assert lines[-1] == "step 10/10" and 1 < len(lines) < 10
    assert all(line.startswith("step ") and "━" not in line and "\x1b" not in line for line in lines)
    assert len(set(lines)) == len(lines)


def test_a_terminal_gets_richs_own_bar() -> None:
    file = io.StringIO()
    with Display(*COLUMNS, console=Console(file=file, force_terminal=True, width=80)) as display:
        display.add_task("step", total=10, completed=10)
    assert "step 10/10" in file.getvalue() and "━" in file.getvalue() and "\x1b" in file.getvalue()


def test_nobody_gets_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ten_steps(None, monkeypatch)
    assert capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings("error")
def test_a_notebook_gets_one_output_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[list[str]] = []

    def html(table: Any) -> str:
        return str(table._repr_mimebundle_([], [])["text/html"])

    def display(table: Any, display_id: bool) -> Any:
        assert display_id
        outputs.append([html(table)])
        return SimpleNamespace(update=lambda table: outputs[-1].append(html(table)))

    module = ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    ten_steps(Console(file=io.StringIO(), force_jupyter=True), monkeypatch)
    assert len(outputs) == 1 and "step 1/10" in outputs[0][0] and "step 10/10" in outputs[0][-1]
