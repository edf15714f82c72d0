"""What is in output_dir before a run: another run, a checkpoint to go on from, or nothing.

`resume_from_checkpoint=auto` makes one command that can be given again and again, whatever became of it before:

    a checkpoint                                  goes on from the newest whole one; the loop checks that it is the same run,
                                                  so a run.json that cannot be read is noted, and does not matter
    run.json of a run that ended, the same one    nothing is changed
    run.json of a run that was begun              killed before its first checkpoint: starts anew
    nothing, or a log                             starts

run.json is written before the first step, with what the run is bound to, and once more at its end. So a folder that holds an
adapter beside it is known to be this run's, and another run's is neither deleted nor mixed with.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from qgraft import plots, storage
from qgraft.adapter_files.folder import changed_files
from qgraft.adapter_files.seal import SEAL, read_seal
from qgraft.errors import AdapterError, CheckpointError, StorageError, option
from qgraft.json_files import read_object
from qgraft.sizes import format_size
from qgraft.training.arguments import TrainArguments, changed_arguments
from qgraft.training.callbacks import METRICS
from qgraft.training.checkpoints import (
    Bound,
    adapters_alone,
    check_resumable,
    checkpoints,
    newest_whole_checkpoint,
    step_of,
)
from qgraft.training.optimization import STATES
from qgraft.training.reference import REFERENCE
from qgraft.training.teacher_cache import TEACHER

RUN = "run.json"
RATES, RATES_PICTURE = "find_lr.json", "find_lr.png"
LATENTS = "latents.safetensors"  # of diffusion: what the VAE and the text encoders say of the images
_OF_NO_RUN = (RATES, RATES_PICTURE, TEACHER, LATENTS)  # one may begin beside them
LAST = "last"  # the folder of the last adapter, where an earlier one was better and is kept
_WITHOUT_RESULT = {METRICS, RUN, REFERENCE, "runs", "loss.png"}  # of a run that has no checkpoint yet


@dataclass(frozen=True)
class Earlier:
    """What output_dir holds of an earlier run.

    Attributes:
        resume: the checkpoint to go on from; None for a new run.
        passed_over: a sentence for each newer checkpoint that is not whole, and for a run.json that cannot be read.
        run: its run.json, where it matters whether that is the run that is asked for, which is known with the rows.
    """

    folder: Path
    resume: Path | None = None
    passed_over: tuple[str, ...] = ()
    run: dict[str, Any] | None = None

    def is_all(self, bound: Bound, steps: int) -> bool:
        """Whether the run that is asked for, of so many steps, has come to its end here, so that nothing is left to do.

        Raises StorageError where it is another run, unless there is a checkpoint: that one is compared when it is read.
        """
        if self.run is None:
            return False
        ended, then = self.run.get("finished") is True, Bound(self.run["bound"], self.run["arguments"])
        differ = [*bound.differences(then).values()]
        if ended:
            planned = self.run.get("planned_steps", self.run["steps"])
            differ += [f"steps: were {planned}, now {steps}"] if planned != steps else []
            differ += bound.changes(then) if self.run["steps"] != planned else []  # callbacks stopped it
        if differ and self.resume is None:
            raise StorageError(
                f"output_dir {self.folder} holds another run, without a checkpoint to go on from:\n  "
                + "\n  ".join(differ),
                hint=f"choose another folder, or {option('overwrite_output_dir')} without resume_from_checkpoint",
            )
        return ended and not differ


def check_output_dir(args: TrainArguments) -> Earlier:
    """What to go on from, and whether there is room for a new run; see the module's docstring.

    Raises StorageError when the folder holds another run, CheckpointError when the checkpoint that is named is none.
    """
    folder = Path(str(args.output_dir))
    with storage.named_errors(folder):  # a name too long, or with a zero in it
        if folder.exists() and not folder.is_dir():
            raise StorageError(f"output_dir {folder} is a file, expected a folder")
        every = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        names = sorted(name for name in every if name[0] != "." and name not in _OF_NO_RUN)
    if goes_on_from_newest(args):
        return _newest(args, folder, names)
    if str(args.resume_from_checkpoint or "none").lower() in ("false", "none", "0"):
        _require_room(folder, names, args)
        return Earlier(folder)
    path = Path(str(args.resume_from_checkpoint))
    if problems := storage.check_folder(path):
        raise CheckpointError(f"{path} is not a whole checkpoint: {problems[0]}")
    check_resumable(path)
    if path.resolve().parent != folder.resolve():
        _require_room(folder, names, args)
        return Earlier(folder, path)
    run, unreadable = _run_in(folder)
    nothing_left = run is not None and run.get("steps") == run.get("planned_steps") == step_of(path)
    return Earlier(folder, path, unreadable, run if run and nothing_left and _ended(folder, run) else None)


def goes_on_from_newest(args: TrainArguments) -> bool:
    """Whether a run goes on from whatever checkpoint there is, and not from one that is named or none."""
    return str(args.resume_from_checkpoint).lower() in ("true", "auto", "1")


def _newest(args: TrainArguments, folder: Path, names: list[str]) -> Earlier:
    """What a command that can be given again and again finds."""
    run, unreadable = _run_in(folder)
    alone = adapters_alone(folder) if args.save_only_model else []
    newest, passed_over = newest_whole_checkpoint(folder, besides=alone)
    if newest is not None:
        check_resumable(newest)
        notes = (*unreadable, *passed_over)
        return Earlier(folder, newest, notes, run if run and _ended(folder, run) else None)
    if passed_over:
        anew = f"{option('overwrite_output_dir')} without resume_from_checkpoint starts anew"
        raise CheckpointError("\n".join([f"no whole checkpoint to go on from in {folder}", *passed_over]), hint=anew)
    if set(names) <= _WITHOUT_RESULT:
        return Earlier(folder, passed_over=unreadable)
    if run is None:
        _require_room(folder, names, args, *unreadable)
    note = f"no checkpoint to go on from in {folder}: {len(alone)} hold an adapter alone (save_only_model)"
    return Earlier(folder, passed_over=(*unreadable, *([note] if alone else [])), run=run)


def _require_room(folder: Path, names: list[str], args: TrainArguments, *why: str) -> None:
    """Raise StorageError for a folder that holds something which is not to be overwritten; `why` says more of it."""
    if names and not args.overwrite_output_dir:
        raise StorageError(
            "\n".join([f"output_dir {folder} is not empty: {', '.join(names[:5])}", *why]),
            hint=f"choose another folder, {option('resume_from_checkpoint', 'auto')} to go on, or "
            f"{option('overwrite_output_dir')}",
        )


def _run_in(folder: Path) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """(run.json, where there is one that says what the run is bound to; a sentence where it cannot be read).

    Checkpoints say themselves what they belong to, so a run goes on from them without it.
    """
    path = folder / RUN
    try:
        run = read_object(path, CheckpointError) if path.is_file() else None
    except CheckpointError as error:
        return None, (f"{error.message}, so it says nothing of the run here",)
    if run is None:
        return None, ()
    if odd := [key for key, right in _OF_RUN.items() if not right(run.get(key))]:
        return None, (f"{path} is not as a run writes it ({', '.join(odd)}), so it says nothing of the run here",)
    return run, ()


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(type(number) in (int, float, NoneType) for number in value.values())


_OF_RUN: dict[str, Callable[[Any], bool]] = {  # of run.json, what is used again
    "bound": lambda value: isinstance(value, dict),
    "arguments": lambda value: isinstance(value, dict),
    "steps": _is_count,
    "planned_steps": lambda value: value is None or _is_count(value),  # earlier releases did not write it
    "parameters": lambda value: value is None or _is_count(value),  # nor does a run that has only begun; as metrics
    "metrics": lambda value: value is None or _are_numbers(value),
}


def _ended(folder: Path, run: dict[str, Any]) -> bool:
    """Whether this run came to its end, and its adapter is there as it was saved."""
    if run.get("finished") is not True:
        return False
    try:
        seal = read_seal(folder)
        return seal is not None and not changed_files(folder, seal)
    except AdapterError:
        return False


def check_room(folder: Path, args: TrainArguments, parameters: int) -> list[str]:
    """A warning where the checkpoints of a run that trains so many numbers may fill the disk.

    Raises StorageError where not even the first one fits beside the adapter: hours of training would end there.
    """
    adapter = 4 * parameters
    saves = args.save_strategy != SaveStrategy.NO
    full = adapter * (1 if args.save_only_model else 1 + STATES.get(OptimizerNames(args.optim).value, 0))
    kept = max(args.save_total_limit or 0, 1 + bool(args.load_best_model_at_end)) + 1  # one while it replaces another
    with storage.named_errors(folder):
        held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    free = storage.free_bytes(folder) + held  # what is there is replaced
    least = adapter + saves * full
    if free < least:
        raise StorageError(
            f"{folder}: its disk has {free} bytes free, and this run writes {least} at least: "
            f"{adapter} of the adapter{f', {full} of a checkpoint' if saves else ''}",
            hint="free some space or choose another folder",
        )
    if saves and free < adapter + kept * full:
        return [
            f"warning: the disk of {folder} has {format_size(free)} free, and checkpoints of this run take "
            f"{format_size(full)} each, {kept} of them at a time"
        ]
    return []


def begin_run(folder: Path, args: TrainArguments, bound: Bound, steps: int) -> None:
    """Delete what a new run would be mixed up with, older checkpoints and the log, and say whose folder it is.

    Args:
        steps: how many the run has.
    """
    storage.make_folder(folder)
    for path in checkpoints(folder):
        storage.remove_folder(path)
    if (folder / LAST / SEAL).is_file():
        storage.remove_folder(folder / LAST)
    with storage.named_errors(folder):
        (folder / METRICS).unlink(missing_ok=True)
    begun = {"finished": False, "steps": 0, "planned_steps": steps}
    storage.write_json(folder / RUN, {**begun, "arguments": changed_arguments(args), "bound": bound.fixed})


def trim_log(log: Path, step: int) -> None:
    """Drop what an interrupted run logged after the checkpoint: those steps are taken again."""
    if log.is_file():
        entries = [entry for entry in plots.read_metrics(log) if entry.get("step", 0) <= step]
        kept = [entry for entry in entries if "train_runtime" not in entry]
        storage.write_file(log, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
