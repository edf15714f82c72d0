"""distill(): a teacher asked about the rows of a run, and no more: for students that learn from it later, or elsewhere."""

from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.data.reading import Dataset
from qgraft.errors import OptionError, option
from qgraft.locks import folder_locked
from qgraft.progress import shown
from qgraft.training.arguments import TrainArguments
from qgraft.training.given import check_arguments, check_pair
from qgraft.training.prepare import prepare
from qgraft.training.processes import Processes
from qgraft.training.stages import distill_options


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | None,
    args: TrainArguments,
    *,
    eval_dataset: Dataset | None = None,
    progress: bool | Console | None = None,
) -> list[str]:
    """Ask args.teacher_model_name_or_path about the rows, as train() does before its first step, and keep what it says.

    Everything is in args.teacher_cache, or the folder `teacher` of args.output_dir. train() with the same rows and options
    takes it from there, also without the teacher. Arguments as those of train(); the model is the student.

    Returns the notes of the run. Raises DataError, OptionError, StorageError, TrainingError.
    """
    check_pair(model, tokenizer)
    check_arguments(args)
    if args.stage != "distill":
        raise OptionError(f"stage={args.stage!r}: nothing is learned of a teacher", hint=option("stage", "distill"))
    if (options := distill_options(args)) is not None and options.draws:
        raise OptionError(
            "lmbda, seq_kd: drawn answers are judged in training, and are not there before",
            hint="leave them out: this asks about the rows' own answers, those held out too",
        )
    first = Processes.of(args).first and args.teacher_cache is None
    with folder_locked(Path(str(args.output_dir))) if first else nullcontext():
        return prepare(model, tokenizer, dataset, args, eval_dataset, console=shown(progress)).notes
