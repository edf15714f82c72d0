"""What watches a run: the live display, the log on disk, and the signals that end it in order."""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qgraft import storage
from qgraft.progress import LOGGER, Display
from qgraft.sizes import memory_now
from qgraft.training.checkpoints import Progress

METRICS = "metrics.jsonl"


class Watch(TrainerCallback):
    """Measures a run and shows it: one line a log on disk, a live bar on the terminal.

    `progress` is that of the loop, once it has begun; tokens a second count real tokens, of which batches hold no others.

    Args:
        display: where several runs show a line each, started and stopped by their caller; it stands in for the console.
        label: what the run's line begins with there.
        writes: whether this process keeps the log.
        unit: what is learned, as the bar says it.
    """

    def __init__(
        self,
        folder: Path,
        console: Console | None,
        display: Display | None = None,
        label: str = "",
        writes: bool = True,
        unit: str = "tok",
    ) -> None:
        self.unit = unit
        self.path, self.console, self.writes = folder / METRICS, console, writes
        self.display, self.label = display, label
        self.progress = Progress()
        self.seconds = 0.0
        self._before = 0  # tokens, when this process began
        self._bar: Display | None = None
        self._shown: dict[str, Any] = {"loss": "-", "eval_loss": "-", "rate": "-", "memory": "-", "epoch": "0.0"}

    @property
    def tokens_per_second(self) -> float:
        """Over the training steps so far, evaluation and saving left out."""
        return (self.progress.tokens - self._before) / self.seconds if self.seconds else 0.0

    def say(self, text: str) -> None:
        """A line for people, above the bar."""
        if self.console is not None:
            self.console.print(text, highlight=False)

    def watch(self, progress: Progress) -> None:
        """Begin with a run that has done so much."""
        self.progress, self._before = progress, progress.tokens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar."""
        self._step_began = time.perf_counter()
        self._bar = self.display or (run_display(self.console, unit=self.unit) if self.console else None)
        if self._bar is not None:
            total, done = state.max_steps, state.global_step
            self._task = self._bar.add_task(self.label, total=total, completed=done, **self._shown)
            self._bar.start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of a step."""
        self._step_began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop it; move the bar."""
        self.seconds += time.perf_counter() - self._step_began
        self._shown["rate"] = f"{self.tokens_per_second:.0f}"
        self._shown["memory"] = f"{memory_now() / 1e9:.2f} GB"
        self._shown["epoch"] = f"{state.epoch or 0:.1f}"
        self._move(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append what is logged to metrics.jsonl and show the losses."""
        logs = dict(logs or {})
        entry = {"step": state.global_step, **logs, "tokens_per_second": round(self.tokens_per_second, 1)}
        entry["memory_bytes"] = memory_now()
        entry["skipped_steps"] = self.progress.skipped
        if self.writes:
            storage.append_line(self.path, json.dumps(entry))
        losses = {key: logs[key] for key in ("loss", "eval_loss") if key in logs}
        LOGGER.info("step %d of %d: %s", state.global_step, state.max_steps, losses or logs)
        for key in ("loss", "eval_loss"):
            if key in logs:
                self._shown[key] = f"{logs[key]:.3f}"
        self._move(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the bar."""
        self.close()

    def close(self) -> None:
        """Stop the bar; called again when a run ends by an error."""
        if self._bar is not None and self._bar is not self.display:
            self._bar.stop()
        self._bar = None

    def _move(self, state: TrainerState) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, **self._shown)


def run_display(console: Console, labels: bool = False, unit: str = "tok") -> Display:
    """A live display with a line for each run, not started yet. It fits 80 columns; labels come in front.

    Several runs share the terminal's width, and the process its memory, so with labels the memory is left out.
    """
    memory = "" if labels else " {task.fields[memory]}"
    return Display(
        *([TextColumn("{task.description}")] if labels else []),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=8),
        TextColumn("epoch {task.fields[epoch]} loss {task.fields[loss]} eval {task.fields[eval_loss]}"),
        TextColumn(f"{{task.fields[rate]}} {unit}/s" + memory),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
    )


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM: finish the step, save a checkpoint, leave. A second signal ends the process at once."""

    def __init__(self) -> None:
        self._received: int | None = None
        self.doing = "finishing this step, then saving a checkpoint"  # what is done before the run ends
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen."""
        self.listen()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember which step it is, for who interrupts it."""
        self.doing = f"finishing step {state.global_step + 1}, then saving a checkpoint"

    @property
    def received(self) -> int | None:
        """The signal that came first; Events looks at it between two steps."""
        return self._received

    def listen(self) -> None:
        """Take the signals; only possible in the main thread, elsewhere the process's own handlers stay."""
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:
                return

    def close(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: Any) -> None:
        self._received = number
        self.close()  # the next signal acts as it always did
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        text = f"\n{name}: {self.doing}; once more leaves now, without that\n"
        with suppress(OSError):  # nobody may be there to read it
            os.write(sys.stderr.fileno(), text.encode()) if _has_fileno(sys.stderr) else sys.stderr.write(text)


def _has_fileno(stream: Any) -> bool:
    """Whether a stream is a file of the system's: written to past its buffer, which the handler may have interrupted."""
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True


class StopWith(StopOnSignal):
    """Ends a run with the others beside which it trains: on the signal that `leader`, in the main thread, received."""

    def __init__(self, leader: StopOnSignal) -> None:
        super().__init__()
        self._leader = leader

    @property
    def received(self) -> int | None:
        """What the leader received."""
        return self._leader.received

    def listen(self) -> None:
        """The leader listens."""
