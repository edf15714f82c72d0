"""What is in output_dir before a run: another run, a checkpoint to go on from, or nothing."""

import json
from pathlib import Path

from qgraft import plots, storage
from qgraft.errors import CheckpointError, StorageError, option
from qgraft.training.arguments import TrainArguments
from qgraft.training.callbacks import METRICS
from qgraft.training.checkpoints import check_resumable, checkpoints, newest_whole_checkpoint


def check_output_dir(args: TrainArguments) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from (None for a new run), and a sentence for each newer one that is not whole.

    Raises StorageError when the folder holds another run, CheckpointError when there is nothing to resume from.
    """
    folder = Path(str(args.output_dir))
    wanted = str(args.resume_from_checkpoint or "false")
    resume, passed_over = (None, []) if wanted.lower() in ("false", "none", "0") else _resume_point(folder, wanted)
    if resume is not None and resume.resolve().parent == folder.resolve():
        return resume, passed_over
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"output_dir {folder} is a file, expected a folder")
    earlier = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if earlier and not args.overwrite_output_dir:
        raise StorageError(
            f"output_dir {folder} is not empty: {', '.join(sorted(path.name for path in earlier)[:5])}",
            hint=f"choose another folder, {option('resume_from_checkpoint', 'auto')} to go on, or "
            f"{option('overwrite_output_dir')}",
        )
    return resume, passed_over


def clear_earlier_run(folder: Path) -> None:
    """Delete what a new run would be mixed up with: older checkpoints and the log."""
    for path in checkpoints(folder):
        storage.remove_folder(path)
    (folder / METRICS).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def trim_log(log: Path, step: int) -> None:
    """Drop what an interrupted run logged after the checkpoint: those steps are taken again."""
    if log.is_file():
        entries = [entry for entry in plots.read_metrics(log) if entry.get("step", 0) <= step]
        kept = [entry for entry in entries if "train_runtime" not in entry]
        storage.write_file(log, "".join(json.dumps(entry) + "\n" for entry in kept).encode())


def _resume_point(folder: Path, wanted: str) -> tuple[Path, list[str]]:
    path, passed_over = Path(wanted), list[str]()
    if wanted.lower() in ("true", "auto", "1"):
        newest, passed_over = newest_whole_checkpoint(folder)
        if newest is None:
            raise CheckpointError("\n".join([f"no checkpoint to resume from in {folder}", *passed_over]))
        path = newest
    elif problems := storage.check_folder(path):
        raise CheckpointError(f"{wanted} is not a whole checkpoint: {problems[0]}")
    check_resumable(path)
    return path, passed_over
