"""What is in output_dir before a run: another run, a checkpoint to go on from, or nothing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qgraft import plots, storage
from qgraft.errors import CheckpointError, StorageError, option
from qgraft.json_files import read_object
from qgraft.training.arguments import TrainArguments
from qgraft.training.callbacks import METRICS
from qgraft.training.checkpoints import check_resumable, checkpoints, newest_whole_checkpoint

RUN = "run.json"


@dataclass(frozen=True)
class Earlier:
    """What output_dir holds of an earlier run.

    Attributes:
        resume: the checkpoint to go on from; None for a new run.
        passed_over: a sentence for each newer checkpoint that is not whole.
        finished: run.json of a run that came to its end; whether it is this one is known with the rows.
    """

    resume: Path | None = None
    passed_over: tuple[str, ...] = ()
    finished: dict[str, Any] | None = None


def check_output_dir(args: TrainArguments) -> Earlier:
    """What to go on from, and whether there is room for a new run.

    `resume_from_checkpoint=auto` (or true) goes on from the newest whole checkpoint, starts where there is none yet, and
    leaves a run as it is that has ended: one command that can be given again and again, whatever became of it before.

    Raises StorageError when the folder holds another run, CheckpointError when the checkpoint that is named is none.
    """
    folder = Path(str(args.output_dir))
    wanted = str(args.resume_from_checkpoint or "false").lower()
    with storage.named_errors(folder):  # a name too long, or with a zero in it
        if folder.exists() and not folder.is_dir():
            raise StorageError(f"output_dir {folder} is a file, expected a folder")
        names = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    going_on = wanted in ("true", "auto", "1")
    finished = _finished(folder) if going_on else None
    if going_on:
        newest, passed_over = newest_whole_checkpoint(folder)
        if newest is not None:
            check_resumable(newest)
            return Earlier(newest, tuple(passed_over), finished)
        if passed_over:
            raise CheckpointError("\n".join([f"no whole checkpoint to go on from in {folder}", *passed_over]),
                                  hint=f"{option('overwrite_output_dir')} starts anew")  # fmt: skip
        if finished is not None or set(names) <= {METRICS, "runs"}:  # killed before its first checkpoint
            return Earlier(finished=finished)
    elif wanted not in ("false", "none", "0"):
        path = Path(str(args.resume_from_checkpoint))
        if problems := storage.check_folder(path):
            raise CheckpointError(f"{path} is not a whole checkpoint: {problems[0]}")
        check_resumable(path)
        if path.resolve().parent == folder.resolve():
            return Earlier(path)
        _require_room(folder, names, args)
        return Earlier(path)
    _require_room(folder, names, args)
    return Earlier()


def _require_room(folder: Path, names: list[str], args: TrainArguments) -> None:
    if names and not args.overwrite_output_dir:
        raise StorageError(
            f"output_dir {folder} is not empty: {', '.join(names[:5])}",
            hint=f"choose another folder, {option('resume_from_checkpoint', 'auto')} to go on, or "
            f"{option('overwrite_output_dir')}",
        )


def _finished(folder: Path) -> dict[str, Any] | None:
    """run.json, where it says that the run came to its end."""
    path = folder / RUN
    if not path.is_file():
        return None
    run = read_object(path, CheckpointError)
    return run if run.get("finished") is True else None


def clear_earlier_run(folder: Path) -> None:
    """Delete what a new run would be mixed up with: older checkpoints and the log."""
    storage.make_folder(folder)
    for path in checkpoints(folder):
        storage.remove_folder(path)
    with storage.named_errors(folder):
        (folder / METRICS).unlink(missing_ok=True)


def trim_log(log: Path, step: int) -> None:
    """Drop what an interrupted run logged after the checkpoint: those steps are taken again."""
    if log.is_file():
        entries = [entry for entry in plots.read_metrics(log) if entry.get("step", 0) <= step]
        kept = [entry for entry in entries if "train_runtime" not in entry]
        storage.write_file(log, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
