"""transformers' protocol of callbacks: what a run tells them, and what they ask for.

A callback is any TrainerCallback: transformers' own (EarlyStoppingCallback, those that report_to names) or a user's. It
gets TrainerState and TrainerControl; DefaultFlowCallback, always the first, says when to log, evaluate and save.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback, ExportableState

from qgraft.json_files import parse_json
from qgraft.training.callbacks import StopOnSignal
from qgraft.training.plan import Plan
from qgraft.training.processes import Processes

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments

Callback = TrainerCallback | type[TrainerCallback]
_WISHES = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


class Events:
    """The callbacks of a run, with the state that they read and the control that they set.

    Attributes:
        context: what they are handed beside these: model, processing_class, optimizer, lr_scheduler.
        signalled: whether a signal ends the run, whichever process it reached. It is none of the wishes in `control`: a
            run that callbacks ended is over, one that a signal ended goes on another time.
    """

    def __init__(
        self,
        args: "TrainArguments",
        plan: Plan,
        processes: Processes,
        callbacks: Sequence[Callback],
        stop: StopOnSignal,
    ) -> None:
        every = [DefaultFlowCallback, *callbacks, stop]
        self.callbacks = [each() if isinstance(each, type) else each for each in every]
        self.context: dict[str, Any] = {"train_dataloader": None, "eval_dataloader": None}
        self.control, self.signalled = TrainerControl(), False
        self._args, self._plan, self._processes, self._stop = args, plan, processes, stop
        self.state = self._sized(TrainerState())

    def tell(self, event: str, **more: Any) -> None:
        """Call `event` of every callback, each of which may hand back another control."""
        for each in self.callbacks:
            answer = getattr(each, event)(self._args, self.state, self.control, **self.context, **more)
            self.control = self.control if answer is None else answer

    def log(self, logs: Mapping[str, float]) -> None:
        """Tell what was measured, and remember it."""
        logs = {**logs, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.tell("on_log", logs=logs)

    def forget_wishes(self) -> None:
        """At the beginning of a step: what was asked for is done."""
        self.control.should_save = self.control.should_evaluate = self.control.should_log = False

    def agree(self) -> None:
        """What one process wants (a signal reached it, a callback of its own asks for a save) all do."""
        wishes = [getattr(self.control, name) for name in _WISHES]
        *wishes, self.signalled = self._processes.any([*wishes, self._stop.received is not None])
        if self.signalled:
            wishes[_WISHES.index("should_save")] = True
        for name, wish in zip(_WISHES, wishes, strict=True):
            setattr(self.control, name, wish)

    def saved(self) -> dict[str, Any]:
        """trainer_state.json, with the states of the callbacks that have one."""
        states: dict[str, list[Any]] = {}
        for each in self._stateful():
            states.setdefault(type(each).__name__, []).append(each.state())
        return {**dataclasses.asdict(self.state), "stateful_callbacks": states}

    def load(self, path: Path) -> None:
        """Take over what saved() gave; raises OSError, ValueError or TypeError for anything else."""
        self.state = self._sized(TrainerState(**parse_json(path.read_bytes(), finite=False)))
        if self.state.best_model_checkpoint:  # beside this one, wherever the folder was called so
            best = path.parent.parent / Path(self.state.best_model_checkpoint).name
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
            self.state.best_metric = self.state.best_metric if best.is_dir() else None
        saved: Any = self.state.stateful_callbacks
        held = {name: list(states) for name, states in saved.items()}
        for each in self._stateful():
            states = held.get(type(each).__name__)
            for name, value in states.pop(0)["attributes"].items() if states else ():
                setattr(each, name, value)

    def forget_best(self) -> None:
        """Let whatever is measured next be the best so far."""
        self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None

    def _stateful(self) -> list[Any]:
        return [each for each in self.callbacks if isinstance(each, ExportableState)]

    def _sized(self, state: TrainerState) -> TrainerState:
        """The state of a run of this length, seen from this process."""
        state.max_steps, state.num_train_epochs = self._plan.steps, self._plan.epochs
        state.train_batch_size = self._args.per_device_train_batch_size
        state.is_local_process_zero = self._args.local_process_index == 0
        state.is_world_process_zero = self._processes.first
        state.compute_steps(self._args, self._plan.steps)
        return state
