"""Progress is shown where somebody watches, and as asked."""

import io
import sys

import pytest
from rich.console import Console

from qgraft.progress import shown


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
