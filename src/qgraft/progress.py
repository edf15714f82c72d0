"""Where progress is shown, and how: a bar in a terminal, one output that is replaced in a notebook, lines elsewhere.

In Python nothing is shown where nobody watches (into a file, a pipe, a test), unless `progress=True` asks for lines there;
`logging.getLogger("qgraft")` has a line for each log of a run in any case, at the level INFO. Commands ask for them: the log
of a job that runs for hours must say how far it is.

rich's own display needs ipywidgets in a notebook, and warns and shows nothing where they are missing. IPython itself can
replace an output (`display_id`), which is all that a table of a few numbers needs.
"""

import logging
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOGGER = logging.getLogger("qgraft")
SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_OUTPUTS = 0.25  # in a notebook
SECONDS_OF_PACE = 600.0  # that the time left is reckoned from; rich's half a minute may hold no step of a large model


def shown(progress: bool | Console | None) -> Console | None:
    """The console that progress goes to; None for none.

    Args:
        progress: True and False are obeyed, a console is taken as it is; None: where somebody is watching.
    """
    if isinstance(progress, Console):
        return progress
    if progress is None:
        progress = (sys.stderr is not None and sys.stderr.isatty()) or Console().is_jupyter
    return Console(stderr=True) if progress else None


class Display(Progress):
    """rich's Progress, in a terminal as it is; see the module's docstring for notebooks and files."""

    def __init__(self, *columns: ProgressColumn, console: Console | None) -> None:
        self.moving = console is not None and console.is_terminal and not console.is_jupyter
        if console is not None and not self.moving and not console.is_jupyter:
            columns = tuple(column for column in columns if not isinstance(column, BarColumn))
        super().__init__(
            *columns, console=console, disable=console is None, auto_refresh=self.moving,
            speed_estimate_period=SECONDS_OF_PACE,
        )  # fmt: skip
        self._between = SECONDS_BETWEEN_OUTPUTS if self.console.is_jupyter else SECONDS_BETWEEN_LINES
        self._next = time.monotonic() + self._between
        self._stale = False
        self._output: Any = None  # of a notebook

    def start(self) -> None:
        """Begin; called again, it changes nothing."""
        if self.moving:
            super().start()

    def stop(self) -> None:
        """Show how it ended."""
        if self.moving:
            super().stop()
        elif self._stale:
            self._show()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As in rich."""
        super().update(task_id, **changes)
        self._changed()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As in rich."""
        super().advance(task_id, advance)
        self._changed()

    def _changed(self) -> None:
        self._stale = not self.disable and not self.moving
        if self._stale and time.monotonic() >= self._next:
            self._show()

    def _show(self) -> None:
        self._stale, self._next = False, time.monotonic() + self._between
        table = self.make_tasks_table(self.tasks)
        if not self.console.is_jupyter:
            self.console.print(table)
        elif self._output is None:
            self._output = import_module("IPython.display").display(table, display_id=True)
        else:
            self._output.update(table)


def bar_on(console: Console | None) -> Display:
    """A bar with the number of what is done, the time that has gone and the time that is left."""
    return Display(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
    )


def counted(bar: Display, what: str) -> Callable[[int, int], None]:
    """Shows (done, total), from the first call on."""
    task = cache(lambda: bar.add_task(what))
    return lambda done, total: bar.update(task(), completed=done, total=total)
