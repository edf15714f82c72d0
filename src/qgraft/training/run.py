"""train(): one call from a model, a tokenizer and a dataset to a sealed adapter in a folder.

output_dir/
  adapter_config.json, adapter_model.safetensors, qgraft.json    the adapter (adapter_files/folder.py)
  run.json        options, row accounting, base, losses, speed, memory, versions
  metrics.jsonl   one line a log
  loss.png        training and held-out loss
  checkpoint-N/   to resume from
"""

import copy
import dataclasses
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft import plots, storage
from qgraft.adapter_files.folder import save_adapter
from qgraft.adapters.attach import count_parameters
from qgraft.data.reading import Accounting
from qgraft.data.tokenizing import (
    Sample,
    samples_sha256,
)
from qgraft.errors import CheckpointError, DataError, StorageError
from qgraft.linear import computing
from qgraft.memory.settings import settle_noted
from qgraft.passes.decoder import padding_free
from qgraft.passes.frozen_cache import frozen_layers_cached
from qgraft.passes.fused import lean_modules
from qgraft.passes.limits import sample_limit
from qgraft.sizes import peak_memory_bytes
from qgraft.training.adapter import adapter_in_training, describe_adapter, positions_to_take, prepare_adapter
from qgraft.training.arguments import TrainArguments, changed_arguments
from qgraft.training.callbacks import METRICS, StopOnSignal, Watch
from qgraft.training.evaluate import (
    Evaluation,
    evaluate_samples,
    held_out_loss,
    template_of,
)  # fmt: skip
from qgraft.training.samples import Dataset, prepare_samples, read_samples
from qgraft.training.trainer import LoraTrainer, check_resumable, checkpoints, newest_whole_checkpoint
from qgraft.training.trainer_options import check_evaluation


@dataclass(frozen=True)
class TrainReport:
    """What a run did; the same numbers stand in run.json.

    Attributes:
        output_dir: where everything is.
        steps: optimizer steps in all; `finished` tells whether these are all that were planned.
        signal: the number of the signal that ended the run early, or None.
        metrics: train_loss, eval_loss_before, eval_loss, tokens_per_second, seconds, peak_memory_bytes, ...
        accounting: where every row of the dataset went; held_out_accounting likewise of the held-out one, if given.
        notes: what a reader should know, each one sentence.
    """

    output_dir: Path
    steps: int
    finished: bool
    signal: int | None
    parameters: int
    metrics: dict[str, float]
    accounting: Accounting
    held_out_accounting: Accounting | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0, or the shell's code for the signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | None,
    args: TrainArguments,
    *,
    eval_dataset: Dataset | None = None,
    console: Console | None = None,
) -> TrainReport:
    """Train an adapter and save it in args.output_dir.

    The adapter `args.adapter_name` is trained on if the model has it, else attached with the options of `args`.

    Args:
        dataset: what read_dataset takes, or rows; None for args.dataset.
        eval_dataset: held-out rows likewise; None for args.eval_dataset or a split of val_size.
        console: where the live display goes; None for none.

    Raises DataError, OptionError, StorageError, TrainingError.
    """
    prepared = prepare(model, tokenizer, dataset, args, eval_dataset)
    with adapter_in_training(model, prepared.args):
        return execute(model, prepared, Watch(prepared.folder, console), StopOnSignal())


@dataclass
class Prepared:
    """A run of which nothing that is given can be wrong any more, and which has changed nothing yet."""

    args: TrainArguments
    folder: Path
    resume: Path | None
    samples: list[Sample]
    eval_samples: list[Sample]
    accounting: Accounting
    held_out: Accounting | None
    notes: list[str]


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | None,
    args: TrainArguments,
    eval_dataset: Dataset | None = None,
) -> Prepared:
    """Check the options of a run and tokenize its rows; see train()."""
    args = _remembering(args, dataset, eval_dataset)
    resume, passed_over = check_output_dir(args)
    notes = [*args.notes, *passed_over]
    limit = sample_limit(model, args.max_length, positions_to_take(model, args))
    if limit < args.max_length:
        notes.append(f"max_length {args.max_length}: the model's context is {limit} tokens, so samples end there")
    parts = prepare_samples(model, tokenizer, dataset, eval_dataset, args, limit, notes)
    samples, eval_samples, accounting, held_out = parts
    check_evaluation(args, eval_samples)
    return Prepared(args, Path(str(args.output_dir)), resume, samples, eval_samples, accounting, held_out, notes)


def execute(
    model: PreTrainedModel,
    prepared: Prepared,
    watch: Watch,
    stop: StopOnSignal,
    make_trainer: Callable[..., LoraTrainer] | None = None,
) -> TrainReport:
    """Take the steps of a prepared run, and save what came of it."""
    args, folder, resume, notes = prepared.args, prepared.folder, prepared.resume, prepared.notes
    samples, eval_samples = prepared.samples, prepared.eval_samples
    prepare_adapter(model, args)
    use_cache = model.config.use_cache  # the Trainer turns it off
    try:
        with _passes(model, args, samples, eval_samples, notes, watch.console) as (budget, estimated):
            if resume is None:  # only now, when nothing that is given can be wrong any more
                _clear_earlier_run(folder)
            else:
                _trim_log(folder / METRICS, int(resume.name.rpartition("-")[2]))
            before = held_out_loss(model, args, eval_samples) if resume is None else None
            if before is not None:
                storage.append_line(folder / METRICS, json.dumps({"step": 0, "eval_loss": before}))
            make = make_trainer or LoraTrainer
            watch.trainer = trainer = make(model, args, samples, eval_samples, budget, [watch, stop])
            output = trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
            after = _last_eval_loss(trainer) or held_out_loss(model, args, eval_samples)
    finally:
        watch.close()
        stop.close()
        model.config.use_cache = use_cache
        model.eval()
    held_out = {"eval_loss_before": before, "eval_loss": after}
    metrics: dict[str, float] = {
        "train_loss": output.training_loss,
        "seconds": watch.seconds,
        **{key: value for key, value in held_out.items() if value is not None},
        "tokens_per_second": watch.tokens_per_second,
        "tokens": trainer.tokens_seen,
        "peak_memory_bytes": peak_memory_bytes(),
        **estimated,
        "skipped_steps": trainer.skipped_steps,
    }
    report = TrainReport(
        output_dir=folder,
        steps=trainer.state.global_step,
        finished=stop.received is None,
        signal=stop.received,
        parameters=count_parameters(model, args.adapter_name),
        metrics=metrics,
        accounting=prepared.accounting,
        held_out_accounting=prepared.held_out,
        notes=notes,
    )
    _save(model, args, report, samples, eval_samples)
    return report


@contextmanager
def _passes(
    model: PreTrainedModel,
    args: TrainArguments,
    samples: list[Sample],
    eval_samples: list[Sample],
    notes: list[str],
    console: Console | None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Within the block samples take the fastest way through the model; yields the budget of split_batch, and metrics."""
    with (
        computing(model, args.compute),
        padding_free(model, samples) as problem,
        lean_modules(model),
        ExitStack() as stack,
    ):
        if problem:
            notes.append(f"{problem}; every sample passes through the model alone")
        passes = settle_noted(model, args, samples, bool(problem), notes, console)
        if args.cache_frozen_layers:
            folder, every = Path(str(args.output_dir)), [*samples, *eval_samples]
            said = stack.enter_context(frozen_layers_cached(model, every, folder, alone=bool(problem)))
            notes += said
            if console is not None:
                console.print(*said, sep="\n", highlight=False)
        yield passes


def evaluate_held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TrainArguments
) -> tuple[Evaluation, Accounting]:
    """The loss of the model, with its active adapters, on args.eval_dataset; the same samples as train() would take."""
    if not args.eval_dataset:
        raise DataError("do_eval has no rows", hint="--validation_file held_out.jsonl (or --eval_dataset)")
    limit, template = sample_limit(model, args.max_length), template_of(tokenizer, args)
    samples, accounting = read_samples(model, tokenizer, args.eval_dataset, args, limit, template, held_out=True)
    return evaluate_samples(model, samples, compute=args.compute), accounting


def _last_eval_loss(trainer: LoraTrainer) -> float | None:
    """The held-out loss of the adapter as it is, where it was measured after the last step; None where it was not."""
    if trainer.args.load_best_model_at_end:
        return None
    measured = [e for e in trainer.state.log_history if "eval_loss" in e and e["step"] == trainer.state.global_step]
    return float(measured[-1]["eval_loss"]) if measured else None


def check_output_dir(args: TrainArguments) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from (None for a new run), and a sentence for each newer one that is not whole.

    Raises StorageError when the folder holds another run, CheckpointError when there is nothing to resume from.
    """
    folder = Path(str(args.output_dir))
    if args.resume_from_checkpoint:
        return _resume_point(folder, str(args.resume_from_checkpoint))
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"output_dir {folder} is a file, expected a folder")
    earlier = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if earlier and not args.overwrite_output_dir:
        raise StorageError(
            f"output_dir {folder} is not empty: {', '.join(sorted(path.name for path in earlier)[:5])}",
            hint="choose another folder, --resume_from_checkpoint true to go on, or --overwrite_output_dir",
        )
    return None, []


def _clear_earlier_run(folder: Path) -> None:
    """Delete what a new run would be mixed up with: older checkpoints and the log."""
    for path in checkpoints(folder):
        storage.remove_folder(path)
    (folder / METRICS).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def _trim_log(log: Path, step: int) -> None:
    """Drop what an interrupted run logged after the checkpoint: those steps are taken again."""
    if log.is_file():
        kept = [entry for entry in plots.read_metrics(log) if entry["step"] <= step]
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


def _remembering(args: TrainArguments, dataset: Dataset | None, eval_dataset: Dataset | None) -> TrainArguments:
    """`args` with the names of the datasets trained on, so that merging finds the rows again; rows themselves have none."""
    args = copy.copy(args)
    for option, given in (("dataset", dataset), ("eval_dataset", eval_dataset)):
        if given is not None:
            setattr(args, option, given if isinstance(given, str) else None)
    return args


def _save(
    model: PreTrainedModel, args: TrainArguments, report: TrainReport, samples: list[Sample], held_out: list[Sample]
) -> None:
    """The adapter, run.json and loss.png; a run that a signal ended leaves its checkpoint and run.json only."""
    folder = report.output_dir
    run = {
        "finished": report.finished,
        "compute": args.compute,
        "steps": report.steps,
        "adapter": describe_adapter(model, args.adapter_name),
        "parameters": report.parameters,
        "metrics": report.metrics,
        "dataset": {
            "name": args.dataset,
            "samples": len(samples),
            "held_out": len(held_out),
            "sha256": samples_sha256(samples),
            "accounting": report.accounting.as_dict(),
            "held_out_accounting": report.held_out_accounting.as_dict() if report.held_out_accounting else None,
        },
        "arguments": changed_arguments(args),
        "notes": report.notes,
    }
    if report.finished:
        details = {key: run[key] for key in ("dataset", "arguments", "metrics")}
        save_adapter(model, folder, args.adapter_name, details)
    base = getattr(model, "qgraft_base", None)
    storage.write_json(folder / "run.json", {**run, "base": None if base is None else dataclasses.asdict(base)})
    if args.plot_loss and (folder / METRICS).is_file():
        plots.plot_losses(folder / METRICS, folder / "loss.png")


def describe_signal(report: TrainReport) -> str:
    """What to tell somebody whose run was interrupted."""
    assert report.signal is not None
    name = signal.Signals(report.signal).name
    return (
        f"{name}: stopped after step {report.steps}; checkpoint-{report.steps} is saved in {report.output_dir}.\n"
        "Give the same command with --resume_from_checkpoint true to go on to the same result."
    )
