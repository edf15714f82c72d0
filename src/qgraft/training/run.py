"""train(): one call from a model, a tokenizer and a dataset to a sealed adapter in a folder.

output_dir/
  adapter_config.json, adapter_model.safetensors, qgraft.json    the adapter (adapter_files/folder.py)
  calibration.safetensors    rows to merge it with (adapter_files/calibration.py)
  run.json        options, row accounting, base, losses, speed, memory, versions
  metrics.jsonl   one line a log
  reference.json  of preferences: what the model said of the rows before (reference.py)
  teacher/        of distillation: what the teacher says of them (teacher_cache.py)
  loss.png        training and held-out loss
  checkpoint-N/   to resume from
"""

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import SchedulerType

from qgraft import storage
from qgraft.adapters.base import base_of, find_adapter
from qgraft.data.reading import Dataset
from qgraft.data.tokenizing import samples_sha256
from qgraft.errors import OptionError, option
from qgraft.locks import folder_locked
from qgraft.memory.budget import evaluation_tokens
from qgraft.passes.broken import check_held_out
from qgraft.progress import shown
from qgraft.sizes import peak_memory_bytes
from qgraft.training.adapter import adapter_in_training, describe_adapter, keep_rows, misread_by_peft, take_saved
from qgraft.training.arguments import TrainArguments, changed_arguments
from qgraft.training.callbacks import METRICS, StopOnSignal, Watch
from qgraft.training.checkpoints import BASE, HELD_OUT, OF_ADAPTER, Bound, remove_later, remove_old
from qgraft.training.classification import METRICS as OF_LABELS
from qgraft.training.events import Callback
from qgraft.training.given import check_arguments, check_pair
from qgraft.training.loop import TrainingLoop
from qgraft.training.output_dir import begin_run, check_room, trim_log
from qgraft.training.passes import fastest_passes
from qgraft.training.plan import plan_of
from qgraft.training.prepare import Prepared, prepare
from qgraft.training.processes import ALONE, Processes
from qgraft.training.reference import said_by_reference, settle_objective, write_reference
from qgraft.training.report import TrainReport, save_run


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | None,
    args: TrainArguments,
    *,
    eval_dataset: Dataset | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool | Console | None = None,
) -> TrainReport:
    """Train an adapter and save it in args.output_dir.

    The adapter `args.adapter_name` is trained on if the model has it, else attached with the options of `args`.

    Args:
        dataset: what read_dataset takes, or rows; None for args.dataset.
        eval_dataset: held-out rows likewise; None for args.eval_dataset or a split of val_size.
        callbacks: transformers' TrainerCallbacks, for example EarlyStoppingCallback.
        progress: whether it is shown; None for in a terminal and a notebook (progress.py).

    In one of several processes that a launcher started (torchrun), trains with the others; the first of them writes.

    Raises DataError, OptionError, StorageError, TrainingError.
    """
    check_pair(model, tokenizer)
    check_arguments(args)
    if args.find_lr:
        raise OptionError(
            "find_lr: train() trains", hint="qgraft.find_lr(model, tokenizer, dataset, args) looks for a rate"
        )
    processes = Processes.of(args)
    with folder_locked(Path(str(args.output_dir))) if processes.first else nullcontext():
        prepared = prepare(model, tokenizer, dataset, args, eval_dataset, callbacks, shown(progress))
        return _train(model, prepared, processes, shown(progress))


def _train(model: PreTrainedModel, prepared: "Prepared", processes: Processes, console: Console | None) -> TrainReport:
    with adapter_in_training(model, prepared.args):
        watch, stop = Watch(prepared.folder, console, writes=processes.first), StopOnSignal()
        run = Run(model, prepared, watch, stop, processes)
        try:
            with fastest_passes(model, prepared, console) as (tokens, estimated):
                run.start(tokens, estimated)
                if (report := run.ended_before) is not None:
                    return report
                run.loop.take_steps()
                return run.finish()
        finally:
            run.close()


DIVERGED = 1.1  # times the loss before the first step


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
        self._use_cache = getattr(model.config, "use_cache", None)  # which encoders may not have

    def start(self, tokens: int, estimated: dict[str, float]) -> None:
        """Make room in output_dir, measure the held-out loss, begin with passes of at most so many tokens."""
        prepared, args = self.prepared, self.prepared.args
        resume = prepared.earlier.resume
        self._estimated, self._before, self.ended_before = estimated, None, None
        self._beside = dict[str, float]()
        self.objective = settle_objective(self.model, self.prepared, tokens, self.processes)
        self._bound = Bound(self._fixed(), json.loads(json.dumps(changed_arguments(args), default=str)))
        self.processes.check_same(self._bound.fixed)
        steps = plan_of(args, len(prepared.samples), self.processes.count).steps
        if prepared.earlier.is_all(self._bound, steps):
            self.ended_before = self._as_it_was(cast(dict[str, Any], prepared.earlier.run))
            return
        if self.processes.first:
            room = check_room(prepared.folder, args, find_adapter(self.model, args.adapter_name).size)
            for warning in (*room, *misread_by_peft(self.model, args.adapter_name)):
                self._say(warning)
        if resume is None:
            self._begin(steps)
        if self._use_cache is not None:
            self.model.config.use_cache = False
        self.loop = TrainingLoop(
            self.model, args, prepared.samples, prepared.eval_samples, tokens, bound=self._bound,
            callbacks=[*prepared.callbacks, self.watch], stop=self.stop, tokenizer=prepared.tokenizer,
            processes=self.processes, objective=self.objective, alone=self._alone, say=self._say,
        )  # fmt: skip
        self.loop.start(resume)
        if self.processes.first:
            write_reference(self.model, prepared)
        step = self.loop.events.state.global_step
        if resume is not None:
            self._before = self.loop.progress.eval_loss_before
            self.watch.say(f"going on from {resume.name}, step {step} of {self.loop.plan.steps}")
        self.loop.progress.eval_loss_before = self._before
        if resume is not None and self.processes.first:  # it is known to go on
            trim_log(prepared.folder / METRICS, step)
            if gone := remove_later(prepared.folder, step):
                prepared.notes.append(f"goes on from step {step}: {', '.join(gone)} of later steps were deleted")
            remove_old(prepared.folder, args.save_total_limit, self.loop.events.state.best_model_checkpoint)
        if step > self.loop.plan.steps:
            prepared.notes.append(
                f"the checkpoint is at step {step}, behind the end that is asked for: {self.loop.plan.steps}"
            )
        self.watch.watch(self.loop.progress)
        prepared.notes += [f"goes on with another option than before: {change}" for change in self.loop.changes]
        prepared.notes += [f"goes on as {option('force')} says: {line}" for line in self.loop.forced.values()]

    def _say(self, line: str) -> None:
        """A line for people, and a note of the run."""
        self.watch.say(line)
        self.prepared.notes.append(line)

    def _begin(self, steps: int) -> None:
        """Measure where the run starts from, and make room in output_dir."""
        prepared = self.prepared
        self._before = self._measure()
        if not self.processes.first:
            return
        begin_run(prepared.folder, prepared.args, self._bound, steps)  # now that nothing can be wrong any more
        if self._before is not None:
            entry = {"step": 0, "eval_loss": self._before, **self._beside}
            storage.append_line(prepared.folder / METRICS, json.dumps(entry))

    def _measure(self) -> float | None:
        """The held-out loss of the adapter as it is, where there are held-out rows. Raises TrainingError for NaN."""
        prepared = self.prepared
        if not prepared.eval_samples:
            return None
        with self._alone():
            tokens = evaluation_tokens(prepared.args)
            found = self.objective.evaluate(self.model, prepared.eval_samples, tokens, self.processes)
        self._beside = {f"eval_{name}": value for name, value in found.metrics.items()}
        check_held_out(self.model, found.loss)
        return found.loss

    def _as_it_was(self, run: Mapping[str, Any]) -> TrainReport:
        """The report of a run that came to its end before, as its run.json tells; the model has its adapter."""
        args, folder = self.prepared.args, self.prepared.folder
        take_saved(self.model, folder, args.adapter_name)
        prepared, steps, planned = self.prepared, run["steps"], run.get("planned_steps", run["steps"])
        goes_on = option("resume_from_checkpoint", f"{folder}/checkpoint-N")
        early = "" if steps == planned else f", where it was stopped early ({goes_on} goes on)"
        changes = self._bound.changes(Bound(run["bound"], run["arguments"]))
        return TrainReport(
            prepared.folder, steps, True, None, run.get("parameters", 0), run.get("metrics", {}),
            prepared.accounting, prepared.held_out,
            [*args.notes, *prepared.earlier.passed_over,
             f"already finished: step {steps} of {planned}{early}; nothing was changed",
             *(f"another option than before, without effect on a finished run: {change}" for change in changes)],
            unchanged=True,
        )  # fmt: skip

    def finish(self) -> TrainReport:
        """Measure, and write what came of it."""
        prepared, loop = self.prepared, self.loop
        last, signalled = self._last_eval_loss(), loop.events.signalled
        self.stop.doing = "measuring and saving the adapter"
        if last is None and not signalled:  # who stops a run does not wait for a measurement
            last = self._measure()
        state, best = loop.events.state, loop.best_before(last)
        loop.finish(best)
        held_out: dict[str, float | None] = {"eval_loss_before": self._before, "eval_loss": last}
        if best is not None:
            held_out |= {"eval_loss": state.best_metric, "eval_loss_last": last, "best_step": state.best_global_step}
        self._warn_of_divergence(last)
        if not signalled:
            sides = prepared.samples, prepared.eval_samples
            prepared.notes += keep_rows(self.model, prepared.args, prepared.tokenizer, *sides)
        metrics: dict[str, float] = {
            "train_loss": loop.train_loss,
            "seconds": self.watch.seconds,
            **{key: value for key, value in held_out.items() if value is not None},
            **self._beside_loss(state.global_step if best is None else state.best_global_step),
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
            about = prepared.samples, prepared.eval_samples, self._bound, loop.plan.steps
            save_run(self.model, prepared.args, report, *about)
        return report

    def _warn_of_divergence(self, last: float | None) -> None:
        """A note that cannot be missed where the run ended far above where it began."""
        losses = [entry["loss"] for entry in self.loop.events.state.log_history if "loss" in entry]
        if self.prepared.objective is not None:
            losses = []  # a denoiser's tell of the noise that was drawn, and less of what was learned
        if self._before is not None and last is not None and last > self._before * DIVERGED:
            what = f"the held-out loss rose from {self._before:.3f} to {last:.3f}"
        elif len(losses) > 1 and losses[-1] > max(losses[0] * DIVERGED, losses[0] + 0.5):
            what = f"the training loss rose from {losses[0]:.3f} to {losses[-1]:.3f}"
        else:
            return
        rate = option("learning_rate", self.prepared.args.learning_rate / 10)
        self.prepared.notes.append(f"warning: the run diverged: {what}; try a tenth of the learning rate, {rate}")

    def close(self) -> None:
        """Leave the model, the terminal and the signals as they were, however the run ended."""
        if hasattr(self, "loop"):
            self.loop.close()
        self.watch.close()
        self.stop.close()
        if self._use_cache is not None:
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
        loraplus = {} if args.loraplus_lr_ratio is None else {"loraplus_lr_ratio": args.loraplus_lr_ratio}
        base = base_of(self.model).info
        return {
            BASE: None if base is None else base.fingerprint,
            "samples of a step": size,
            "steps of an epoch": plan_of(args, len(self.prepared.samples), self.processes.count).steps_per_epoch,
            "rows (SHA-256 of the samples)": samples_sha256(self.prepared.samples),
            **said_by_reference(self.prepared),
            **self.prepared.bound,
            HELD_OUT: samples_sha256(self.prepared.eval_samples),
            **({name: getattr(args, name) for name in ("lr_scheduler_type", "learning_rate")} if by_loss else {}),
            **loraplus,
            **json.loads(json.dumps({**options, **{f"{OF_ADAPTER}{key}": value for key, value in adapter.items()}})),
        }

    def _beside_loss(self, step: int | None) -> dict[str, float]:
        """What was measured beside the held-out loss of the adapter that is kept, that of this step."""
        logged = [e for e in self.loop.events.state.log_history if "eval_loss" in e and e["step"] == step]
        names = {f"eval_{name}" for name in (*self.objective.names, *OF_LABELS)}
        return {key: value for key, value in (logged[-1] if logged else self._beside).items() if key in names}

    def _last_eval_loss(self) -> float | None:
        """The held-out loss of the adapter as it is, where it was measured after the last step; None where it was not."""
        state = self.loop.events.state
        measured = [e for e in state.log_history if "eval_loss" in e and e["step"] == state.global_step]
        return float(measured[-1]["eval_loss"]) if measured else None
