"""checkpoint-N: all that a run needs to go on to the same result, published whole or not at all.

    adapter_config.json, adapter_model.safetensors, qgraft.json, ...    the adapter, as save_adapter() writes it
    optimizer.pt          of torch: optimizer, schedule, and in fp16 the scaler
    random_state.pt       the random generators of each process
    trainer_state.json    transformers' TrainerState: step, log, best checkpoint, callbacks' states
    progress.json         sums that the state has no place for, and what the run is bound to
    manifest.json         size and SHA-256 of each file (storage.py)

With save_only_model there is the adapter alone, with trainer_state.json.

A run that is gone on with is the same run: its samples, its adapter's options and whatever says which samples a step
learns must be what they were (`Bound`), or going on is refused; with `force` what is now is taken, but for another base or
an adapter of another shape, which no checkpoint fits. Other options may be changed, and are then obeyed from that step on:
learning rate, schedule and length are computed from the options of now, not restored. Each is named.
"""

import dataclasses
import io
import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qgraft import storage
from qgraft.checkpoints.foreign import one_line
from qgraft.checkpoints.pickles import load_pickle
from qgraft.errors import CheckpointError, option
from qgraft.json_files import read_object
from qgraft.training.random_state import RandomState

OPTIMIZER, RANDOM = "optimizer.pt", "random_state.pt"
STATE, PROGRESS = "trainer_state.json", "progress.json"
BASE, HELD_OUT = "base (fingerprint)", "held-out rows (SHA-256 of the samples)"
OF_ADAPTER = "adapter: "
_OF_ITS_SHAPE = {"kind", "layers", "r", "rank_pattern", "use_dora", "target_modules", "target_parameters",
                 "layers_to_transform", "pre_seq_len", "prefix_projection", "prefix_hidden_size", "layout"}  # fmt: skip
NEVER_FORCED = {BASE, *(OF_ADAPTER + name for name in _OF_ITS_SHAPE)}
_HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def take_its_adapter() -> str:
    """What to do with a checkpoint that the run cannot go on from."""
    return f"{option('adapter_name_or_path', 'CHECKPOINT')} takes its adapter for a new run"


@dataclass
class Progress:
    """What a run has done since its first step, whatever it was interrupted by.

    Attributes:
        position: in the plan, the step that comes next; the number of steps taken, unless an epoch was cut short.
        tokens: that passed through the model, of all processes.
        loss, steps: the sum of the losses of the steps whose loss was finite, and how many those are.
        pending_loss, pending_steps: of these, what came after the last log.
        logged: the step of that log.
        skipped, skipped_in_a_row: steps that were not finite.
        eval_loss_before: the held-out loss before the first step.
        stopped: whether callbacks ended the run here, before its last step.
        metrics, count: sums of what else the objective measures, since the last log, and what they are divided by.
    """

    position: int = 0
    tokens: int = 0
    loss: float = 0.0
    steps: int = 0
    pending_loss: float = 0.0
    pending_steps: int = 0
    logged: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    count: float = 0.0
    eval_loss_before: float | None = None
    stopped: bool = False

    def logged_at(self, step: int) -> None:
        """What came after the last log is told in that of this step."""
        self.loss, self.steps = self.loss + self.pending_loss, self.steps + self.pending_steps
        self.pending_loss, self.pending_steps, self.logged = 0.0, 0, step
        self.metrics, self.count = {}, 0.0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add the sums of a batch to `metrics`; a GPU is waited for once."""
        values = torch.stack([value.double() for value in metrics.values()]).tolist() if metrics else []
        for name, value in zip(metrics, values, strict=True):
            self.metrics[name] = self.metrics.get(name, 0.0) + value


@dataclass(frozen=True)
class Bound:
    """What cannot change while a run goes on, and the options that may, as JSON values.

    Attributes:
        fixed: name -> value; what is compared word for word.
        options: those of the run that differ from their defaults.
    """

    fixed: dict[str, Any]
    options: dict[str, Any]

    def differences(self, before: "Bound") -> dict[str, str]:
        """Of what is fixed, by name: a line each; of a hash its first digits."""
        return {
            key: f"{key}: was {_short(before.fixed.get(key))}, now {_short(self.fixed.get(key))}"
            for key in sorted({*self.fixed, *before.fixed})
            if before.fixed.get(key) != self.fixed.get(key)
        }

    def check(self, before: "Bound", folder: Path, force: bool) -> dict[str, str]:
        """The differences, which `force` lets pass. Raises CheckpointError where a run of `before` cannot go on."""
        differ = self.differences(before)
        never = differ.keys() & NEVER_FORCED
        if differ and (never or not force):
            forced = "" if never else f"{option('force')} to go on with those of now, "
            raise CheckpointError(
                f"{folder} is of another run:\n  " + "\n  ".join(differ.values()),
                hint=f"give the options and rows of then, {forced}or {take_its_adapter()}",
            )
        return differ

    def changes(self, before: "Bound") -> list[str]:
        """Of the options that may change: a line each."""
        passing = {"resume_from_checkpoint", "overwrite_output_dir"}
        keys = sorted({*self.options, *before.options} - passing - self.fixed.keys())
        return [
            f"{key} {before.options.get(key, 'default')} -> {self.options.get(key, 'default')}"
            for key in keys
            if before.options.get(key) != self.options.get(key)
        ]


def _short(value: object) -> str:
    return _HASH.sub(r"\1", str(value))


@dataclass
class Saved:
    """What a checkpoint holds beside the adapter and TrainerState."""

    optimization: dict[str, Any]
    random: list[RandomState]
    progress: Progress
    bound: Bound


def write_saved(folder: Path, saved: Saved) -> None:
    """Write the files of `saved` into a staging folder. Raises StorageError."""
    _save(folder / OPTIMIZER, saved.optimization)
    _save(folder / RANDOM, [vars(state) for state in saved.random])
    about = {"progress": dataclasses.asdict(saved.progress), **dataclasses.asdict(saved.bound)}
    storage.write_json(folder / PROGRESS, about)


def read_saved(folder: Path) -> Saved:
    """What write_saved wrote. Raises CheckpointError for files of another kind."""
    check_resumable(folder)
    try:
        about = read_object(folder / PROGRESS, CheckpointError)
        return Saved(
            load_pickle(folder / OPTIMIZER, CheckpointError),
            [RandomState(**state) for state in load_pickle(folder / RANDOM, CheckpointError)],
            Progress(**about["progress"]), Bound(about["fixed"], about["options"]),
        )  # fmt: skip
    except CheckpointError as error:
        raise CheckpointError(error.message, hint=error.hint or take_its_adapter()) from error
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {one_line(error)}", hint=take_its_adapter()) from error


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, oldest step first."""
    return [path for _, path in _by_step(folder)]


def step_of(path: Path) -> int | None:
    """The step that a checkpoint is named after."""
    match = _CHECKPOINT.fullmatch(path.name)
    return None if match is None else int(match[1])


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    return sorted((step, path) for path in folder.glob("checkpoint-*") if (step := step_of(path)) is not None)


def adapters_alone(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that hold an adapter and nothing to go on with, as save_only_model leaves them."""
    return [path for path in checkpoints(folder) if not (path / OPTIMIZER).is_file()]


def newest_whole_checkpoint(folder: Path, besides: Container[Path] = ()) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose manifest holds, and a sentence for each newer one that was passed over.

    Args:
        besides: checkpoints that are not looked at.
    """
    passed_over: list[str] = []
    for retired in folder.glob(".checkpoint-*.old-*"):  # killed while a checkpoint was being replaced
        storage.recover_folder(folder / retired.name[1:].partition(".old-")[0])
    for path in reversed([each for each in checkpoints(folder) if each not in besides]):
        problems = storage.check_folder(path)
        if not problems:
            return path, passed_over
        passed_over.append(f"{path} is not whole and was passed over: {problems[0]}")
    return None, passed_over


def check_resumable(path: Path) -> None:
    """Raise CheckpointError for a checkpoint that a run cannot go on from."""
    if not (path / OPTIMIZER).is_file():
        raise CheckpointError(
            f"{path} holds an adapter without {OPTIMIZER} (save_only_model), so a run cannot go on from it",
            hint=take_its_adapter(),
        )
    if not (path / PROGRESS).is_file():
        raise CheckpointError(
            f"{path} has no {PROGRESS}: an earlier qgraft wrote it, with another loop, which no run can go on from",
            hint=take_its_adapter(),
        )


def remove_later(folder: Path, step: int) -> list[str]:
    """Delete the checkpoints of steps that are taken again, behind `step`; returns their names."""
    later = [path for number, path in _by_step(folder) if number > step]
    for path in later:
        storage.remove_folder(path)
    return [path.name for path in later]


def remove_old(folder: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, the last one and the best one never: both count, as in transformers."""
    every = checkpoints(folder)
    if limit is None or limit <= 0 or not every:
        return
    kept = {every[-1].resolve()} | ({Path(best).resolve()} if best is not None else set())
    others = [path for path in every if path.resolve() not in kept]
    for path in others[: len(every) - max(limit, len(every) - len(others))]:
        storage.remove_folder(path)


def _save(path: Path, value: Any) -> None:
    buffer = io.BytesIO()  # torch would raise something else than an OSError for a full disk
    torch.save(value, buffer)
    storage.write_file(path, buffer.getvalue())
