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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from qgraft import plots, storage
from qgraft.adapter_files.folder import save_adapter
from qgraft.adapters.base import base_of, find_adapter
from qgraft.data.reading import Accounting
from qgraft.data.tokenizing import Sample, samples_sha256
from qgraft.errors import DataError, OptionError, option, worded
from qgraft.linear import computing
from qgraft.memory.settings import settle_noted
from qgraft.passes.decoder import padding_free
from qgraft.passes.frozen_cache import frozen_layers_cached
from qgraft.passes.fused import fused_modules
from qgraft.passes.limits import sample_limit
from qgraft.sizes import peak_memory_bytes
from qgraft.training.adapter import adapter_in_training, describe_adapter, positions_to_take
from qgraft.training.arguments import TrainArguments, changed_arguments
from qgraft.training.callbacks import METRICS, StopOnSignal, Watch
from qgraft.training.checkpoints import Bound, remove_later
from qgraft.training.evaluate import Evaluation, evaluate_samples, held_out_loss, template_of
from qgraft.training.events import Callback
from qgraft.training.loop import TrainingLoop
from qgraft.training.output_dir import check_output_dir, clear_earlier_run, trim_log
from qgraft.training.plan import plan_of
from qgraft.training.processes import ALONE, Processes
from qgraft.training.samples import Dataset, prepare_samples, read_samples
from qgraft.training.trainer_options import check_evaluation, tracking_callbacks


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
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
) -> TrainReport:
    """Train an adapter and save it in args.output_dir.

    The adapter `args.adapter_name` is trained on if the model has it, else attached with the options of `args`.

    Args:
        dataset: what read_dataset takes, or rows; None for args.dataset.
        eval_dataset: held-out rows likewise; None for args.eval_dataset or a split of val_size.
        callbacks: transformers' TrainerCallbacks, for example EarlyStoppingCallback.
        console: where the live display goes; None for none.

    In one of several processes that a launcher started (torchrun), trains with the others; the first of them writes.

    Raises DataError, OptionError, StorageError, TrainingError.
    """
    prepared = prepare(model, tokenizer, dataset, args, eval_dataset, callbacks)
    processes = Processes.of(args)
    with adapter_in_training(model, prepared.args):
        watch, stop = Watch(prepared.folder, console, writes=processes.first), StopOnSignal()
        run = Run(model, prepared, watch, stop, processes)
        try:
            with passes(model, prepared, console) as (tokens, estimated):
                run.start(tokens, estimated)
                run.loop.take_steps()
                return run.finish()
        finally:
            run.close()


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
    tokenizer: PreTrainedTokenizerBase | None = None
    callbacks: Sequence[Callback] = ()


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | None,
    args: TrainArguments,
    eval_dataset: Dataset | None = None,
    callbacks: Sequence[Callback] = (),
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
    plan_of(args, len(samples), Processes.of(args).count)  # or an error, before anything is touched
    every = [*tracking_callbacks(args), *callbacks]
    if any(isinstance(each, EarlyStoppingCallback) for each in every):
        _settle_early_stopping(args)
    return Prepared(
        args, Path(str(args.output_dir)), resume, samples, eval_samples, accounting, held_out, notes, tokenizer, every
    )


class Run:
    """A prepared run around its loop: what comes before the first step and after the last.

    Attributes:
        loop: once it is started.
    """

    loop: TrainingLoop

    def __init__(
        self,
        model: PreTrainedModel,
        prepared: Prepared,
        watch: Watch,
        stop: StopOnSignal,
        processes: Processes = ALONE,
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`alone()` holds while the model is evaluated, see TrainingLoop."""
        self.model, self.prepared, self.watch, self.stop = model, prepared, watch, stop
        self.processes, self._alone = processes, alone
        self._use_cache = model.config.use_cache

    def start(self, tokens: int, estimated: dict[str, float]) -> None:
        """Make room in output_dir, measure the held-out loss, begin with passes of at most so many tokens."""
        prepared, args = self.prepared, self.prepared.args
        self._estimated, self._before = estimated, None
        bound = Bound(self._fixed(), json.loads(json.dumps(changed_arguments(args), default=str)))
        self.processes.check_same(bound.fixed)
        if prepared.resume is None:
            if self.processes.first:  # only now, when nothing that is given can be wrong any more
                clear_earlier_run(prepared.folder)
            with self._alone():
                self._before = held_out_loss(self.model, args, prepared.eval_samples, self.processes)
        if self._before is not None and self.processes.first:
            line = {"step": 0, "eval_loss": self._before}
            storage.append_line(prepared.folder / METRICS, json.dumps(line))
        self.model.config.use_cache = False
        self.loop = TrainingLoop(
            self.model, args, prepared.samples, prepared.eval_samples, tokens, bound=bound,
            callbacks=[*prepared.callbacks, self.watch], stop=self.stop, tokenizer=prepared.tokenizer,
            processes=self.processes, alone=self._alone,
        )  # fmt: skip
        self.loop.start(prepared.resume)
        step = self.loop.events.state.global_step
        if prepared.resume is not None and self.processes.first:  # it is known to go on
            prepared.folder.mkdir(parents=True, exist_ok=True)
            trim_log(prepared.folder / METRICS, step)
            if gone := remove_later(prepared.folder, step):
                prepared.notes.append(f"goes on from step {step}: {', '.join(gone)} of later steps were deleted")
        if step > self.loop.plan.steps:
            prepared.notes.append(
                f"the checkpoint is at step {step}, behind the end that is asked for: {self.loop.plan.steps}"
            )
        self.watch.watch(self.loop.progress)
        prepared.notes += [f"goes on with another option than before: {change}" for change in self.loop.changes]

    def finish(self) -> TrainReport:
        """Measure, and write what came of it."""
        prepared, loop = self.prepared, self.loop
        loop.finish()
        after, signalled = self._last_eval_loss(), loop.events.signalled
        if after is None and not signalled:  # who stops a run does not wait for a measurement
            with self._alone():
                after = held_out_loss(self.model, prepared.args, prepared.eval_samples, self.processes)
        held_out = {"eval_loss_before": self._before, "eval_loss": after}
        metrics: dict[str, float] = {
            "train_loss": loop.train_loss,
            "seconds": self.watch.seconds,
            **{key: value for key, value in held_out.items() if value is not None},
            "tokens_per_second": self.watch.tokens_per_second,
            "tokens": loop.progress.tokens,
            "peak_memory_bytes": peak_memory_bytes(),
            **self._estimated,
            "skipped_steps": loop.progress.skipped,
        }
        report = TrainReport(
            output_dir=prepared.folder,
            steps=loop.events.state.global_step,
            finished=not signalled,
            signal=(self.stop.received or signal.SIGTERM) if signalled else None,
            parameters=find_adapter(self.model, prepared.args.adapter_name).size,
            metrics=metrics,
            accounting=prepared.accounting,
            held_out_accounting=prepared.held_out,
            notes=prepared.notes,
        )
        if self.processes.first:
            _save(self.model, prepared.args, report, prepared.samples, prepared.eval_samples)
        return report

    def close(self) -> None:
        """Leave the model, the terminal and the signals as they were, however the run ended."""
        if hasattr(self, "loop"):
            self.loop.close()
        self.watch.close()
        self.stop.close()
        self.model.config.use_cache = self._use_cache
        self.model.eval()

    def _fixed(self) -> dict[str, Any]:
        """What a run cannot go on without, and its processes must have in common."""
        args = self.prepared.args
        names = ("seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "optim")
        options = {name: getattr(getattr(args, name), "value", getattr(args, name)) for name in names}
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.processes.count
        adapter = describe_adapter(self.model, args.adapter_name)
        by_loss = SchedulerType(args.lr_scheduler_type).value in ("reduce_lr_on_plateau", "greedy")
        base = base_of(self.model).info
        return {
            "base (fingerprint)": None if base is None else base.fingerprint,
            "samples of a step": size,
            "steps of an epoch": plan_of(args, len(self.prepared.samples), self.processes.count).steps_per_epoch,
            "rows (SHA-256 of the samples)": samples_sha256(self.prepared.samples),
            "held-out rows (SHA-256 of the samples)": samples_sha256(self.prepared.eval_samples),
            **({name: getattr(args, name) for name in ("lr_scheduler_type", "learning_rate")} if by_loss else {}),
            **json.loads(json.dumps({**options, **{f"adapter: {key}": value for key, value in adapter.items()}})),
        }

    def _last_eval_loss(self) -> float | None:
        """The held-out loss of the adapter as it is, where it was measured after the last step; None where it was not."""
        state = self.loop.events.state
        if self.prepared.args.load_best_model_at_end:
            return None
        measured = [e for e in state.log_history if "eval_loss" in e and e["step"] == state.global_step]
        return float(measured[-1]["eval_loss"]) if measured else None


@contextmanager
def passes(
    model: PreTrainedModel, prepared: Prepared, console: Console | None
) -> Iterator[tuple[int, dict[str, float]]]:
    """Within the block samples take the fastest way through the model; yields the tokens of a pass, and metrics."""
    args, samples, notes = prepared.args, prepared.samples, prepared.notes
    with (
        computing(model, args.compute),
        padding_free(model, samples) as problem,
        fused_modules(model),
        ExitStack() as stack,
    ):
        if problem:
            notes.append(f"{problem}; every sample passes through the model alone")
        found = settle_noted(model, args, samples, bool(problem), notes, console)
        if args.cache_frozen_layers:
            every = [*samples, *prepared.eval_samples]
            said = stack.enter_context(frozen_layers_cached(model, every, prepared.folder))
            notes += said
            if console is not None:
                console.print(*said, sep="\n", highlight=False)
        yield found


def _settle_early_stopping(args: TrainArguments) -> None:
    """Let EarlyStoppingCallback go by the held-out loss. Raises OptionError where that is never measured."""
    if args.eval_strategy == IntervalStrategy.NO:
        raise OptionError(
            "EarlyStoppingCallback: the held-out loss is never measured",
            hint="eval_strategy='steps' with eval_steps, or 'epoch'",
        )
    args.metric_for_best_model, args.greater_is_better = "loss", False


def evaluate_held_out(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: TrainArguments
) -> tuple[Evaluation, Accounting]:
    """The loss of the model, with its active adapters, on args.eval_dataset; the same samples as train() would take."""
    if not args.eval_dataset:
        raise DataError("do_eval has no rows", hint=option("eval_dataset", "held_out.jsonl"))
    limit, template = sample_limit(model, args.max_length), template_of(tokenizer, args)
    samples, accounting = read_samples(model, tokenizer, args.eval_dataset, args, limit, template, held_out=True)
    return evaluate_samples(model, samples, compute=args.compute), accounting


def _remembering(args: TrainArguments, dataset: Dataset | None, eval_dataset: Dataset | None) -> TrainArguments:
    """`args` with the names of the datasets trained on, so that merging finds the rows again; rows themselves have none."""
    args = copy.copy(args)
    for name, given in (("dataset", dataset), ("eval_dataset", eval_dataset)):
        if given is not None:
            setattr(args, name, given if isinstance(given, str) else None)
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
    base = base_of(model).info
    storage.write_json(folder / "run.json", {**run, "base": None if base is None else dataclasses.asdict(base)})
    if args.plot_loss and (folder / METRICS).is_file():
        plots.plot_losses(folder / METRICS, folder / "loss.png")


def describe_signal(report: TrainReport) -> str:
    """What to tell somebody whose run was interrupted."""
    assert report.signal is not None
    name = signal.Signals(report.signal).name
    return (
        f"{name}: stopped after step {report.steps}; checkpoint-{report.steps} is saved in {report.output_dir}.\n"
        f"{worded(flags='Give the same command with', python='Call train() again with')} "
        f"{option('resume_from_checkpoint', 'auto')} to go on to the same result."
    )
