"""TrainingLoop: the optimizer steps of one run, and what happens between two of them.

    begin_step()  the batches of the next step, each at most `tokens_per_pass` tokens            -> Step
    learn()       their gradients: sum of losses / what the objective counts, whatever the batches
    end_step()    sum over processes, look for NaN, clip, optimizer, schedule; then log, evaluate, save, stop

run() does these in turn. Several runs on one base take begin_step and end_step each by itself, and learn together
(jobs/). Nothing of a run is in global state but the random generators.

Callbacks hear and ask what they do in transformers' Trainer (events.py), but for two things:

    NaN        a step whose loss or gradient is not finite is skipped and counted; three in a row, or all, end the run
    epoch end  on_epoch_end comes right after on_step_end of an epoch's last step, and then all that both ask for is done
               at once, saving last: a run that goes on from that checkpoint has lost no evaluation
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, enable_full_determinism, logging, set_seed
from transformers.trainer_utils import SaveStrategy

from qgraft import storage
from qgraft.adapter_files.folder import save_adapter
from qgraft.adapter_files.seal import SEAL
from qgraft.compat import activation_checkpointing
from qgraft.errors import CheckpointError, TrainingError, option
from qgraft.kernels.summed_lora import casts_kept
from qgraft.memory.budget import evaluation_tokens
from qgraft.passes.broken import check_held_out, where_it_comes_from
from qgraft.training.adapter import decaying_vectors, learning_rates, take_trained, trained_parameters
from qgraft.training.arguments import TrainArguments
from qgraft.training.callbacks import StopOnSignal
from qgraft.training.checkpoints import (
    HELD_OUT,
    STATE,
    Bound,
    Progress,
    Saved,
    read_saved,
    remove_old,
    write_saved,
)
from qgraft.training.events import Callback, Events
from qgraft.training.objective import Objective, SupervisedFineTuning
from qgraft.training.optimization import OF_OPTIMIZER, Optimization
from qgraft.training.output_dir import LAST, goes_on_from_newest
from qgraft.training.passes import Passes, graphs_of, may_be_learned
from qgraft.training.plan import plan_of
from qgraft.training.processes import ALONE, Processes
from qgraft.training.random_state import RandomState

MAX_SKIPPED_IN_A_ROW = 3


@dataclass(eq=False)
class Step:
    """What one optimizer step learns in this process: its batches, and what their losses are divided by."""

    batches: list[Any]
    count: float


class TrainingLoop:
    """See the module's docstring.

    Attributes:
        events: the callbacks, with transformers' state and control.
        progress: what has been done since the run's first step.
        changes: options that are other ones than before the checkpoint that the run went on from.
        forced: what else is another than then, by name, and is taken because args.force says so.
        ended: whether no step is left, or somebody asked to stop.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainArguments,
        samples: Sequence[Any],
        eval_samples: Sequence[Any],
        tokens_per_pass: int,
        *,
        bound: Bound | None = None,
        callbacks: Sequence[Callback] = (),
        stop: StopOnSignal | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processes: Processes = ALONE,
        objective: Objective | None = None,
        alone: Callable[[], AbstractContextManager[None]] = nullcontext,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`alone()` holds while the model is evaluated: with the adapter of this run, where others train on it too."""
        self.model, self.args, self.samples, self.eval_samples = model, args, samples, eval_samples
        self.tokens_per_pass, self.bound = tokens_per_pass, bound or Bound({}, {})
        self.processes, self.alone, self.say = processes, alone, say
        self.objective: Objective = objective or SupervisedFineTuning(args.label_smoothing_factor)
        self.plan = plan_of(args, len(samples), processes.count)
        self.stop = stop or StopOnSignal()
        self.events = Events(args, self.plan, processes, callbacks, self.stop)
        self.events.context |= {"model": model, "processing_class": tokenizer}
        self.progress, self.ended = Progress(), False
        self.changes, self.forced = list[str](), dict[str, str]()
        self._left = ExitStack()
        self._loss = torch.zeros((), device=model.device)  # of this step

    def run(self, resume: Path | None = None) -> None:
        """All steps, from the first or from those that the checkpoint `resume` had taken."""
        try:
            self.start(resume)
            self.take_steps()
            self.finish()
        finally:
            self.close()

    def take_steps(self) -> None:
        """Those that are left, one after another."""
        while not self.ended:
            self.learn(self.begin_step())
            self.end_step()

    # --- from start to finish

    def start(self, resume: Path | None = None) -> None:
        """Everything before the first step."""
        logging.set_verbosity(self.args.get_process_log_level())
        seed = self.args.seed + self.processes.rank  # other processes drop other inputs
        enable_full_determinism(seed) if self.args.full_determinism else set_seed(seed)
        self._left.enter_context(activation_checkpointing(self.model, self.args))
        self.model.train()
        self.parameters = trained_parameters(self.model, self.args.adapter_name)
        rates = learning_rates(self.model, self.args)
        vectors = decaying_vectors(self.model, self.args.adapter_name)
        self.optimization = Optimization(self.args, self.parameters, self.plan.steps, rates, vectors)
        optimization = {"optimizer": self.optimization.optimizer, "lr_scheduler": self.optimization.schedule}
        self.events.context |= optimization
        graphs = graphs_of(self.model, self.args, self.objective, self.parameters, self.tokens_per_pass, self.say)
        self.passes = Passes(self.model, self.args, self.objective, self.optimization, graphs)
        self.events.tell("on_init_end")
        random = None if resume is None else self._go_on_from(resume)
        self.optimization.gradients.clear()
        self._began = time.perf_counter()
        self.events.tell("on_train_begin")
        self.events.tell("on_epoch_begin")
        if self.changes or self.forced or not goes_on_from_newest(self.args):  # another command: more of it is wanted
            self.progress.stopped = False
        self.ended = self.progress.stopped or self.progress.position >= self.plan.steps
        if random is not None:
            random.restore()

    def best_before(self, last: float | None) -> Path | None:
        """The checkpoint of the best adapter, where it is to be kept and the last one, with this loss, is another."""
        state = self.events.state
        if not self.args.load_best_model_at_end or state.best_model_checkpoint is None or self.events.signalled:
            return None
        better = last is None or (state.best_metric is not None and state.best_metric < last)
        return Path(state.best_model_checkpoint) if better and state.best_global_step != state.global_step else None

    def finish(self, best: Path | None = None) -> None:
        """Everything behind the last step: the last log, the adapter that is kept, the callbacks' farewell.

        Args:
            best: the checkpoint whose adapter is kept; the last one is saved beside it, in the folder `last`.
        """
        seconds = time.perf_counter() - self._began
        if not self.events.signalled:
            self.events.log({"train_runtime": round(seconds, 4), "train_loss": self.train_loss})
        if self.processes.first and not self.events.signalled:
            self._keep_last(best is not None)
        if best is not None:
            take_trained(self.model, best, self.args.adapter_name)
        self.events.tell("on_train_end")

    def _keep_last(self, beside: bool) -> None:
        """The adapter as it is, beside the one that is kept; or none there, where an earlier end of the run left one."""
        folder = Path(str(self.args.output_dir)) / LAST
        if beside:
            save_adapter(self.model, folder, self.args.adapter_name)
        elif (folder / SEAL).is_file():
            storage.remove_folder(folder)

    def close(self) -> None:
        """Leave the model as it was found, however the run ended."""
        self.stop.close()
        self._left.close()
        self.__dict__.pop("passes", None)  # with its graphs
        for parameter in getattr(self, "parameters", ()):
            parameter.grad = None

    @property
    def train_loss(self) -> float:
        """The mean over the steps of the run whose loss was finite."""
        done = self.progress
        return (done.loss + done.pending_loss) / max(done.steps + done.pending_steps, 1)

    # --- a step

    def begin_step(self) -> Step:
        """The batches of the next step; they stay on the CPU, see passes.decoder.label_states."""
        self.events.forget_wishes()
        self.events.tell("on_step_begin")
        position = self.progress.position
        chosen = [self.samples[index] for index in self.plan.step(position)]
        if not self.model.training:  # the walk over all modules costs milliseconds
            self.model.train()
        self._loss = torch.zeros_like(self._loss)
        given = self.model, chosen, self.processes.share(chosen), self.tokens_per_pass, self.processes, position
        own, count = self.objective.begin(*given)
        self._tokens = sum(sample.length for sample in own)
        return Step(self.objective.batches(own, self.tokens_per_pass), count or 1.0)  # all labels may weigh nothing

    def learn(self, step: Step) -> None:
        """Forward and backward of the batches, one after another."""
        with casts_kept():
            for batch in step.batches:
                outcome = self.passes.learn(batch, step.count)
                self.note(outcome.loss)
                if not may_be_learned(outcome.loss):
                    return
                self.progress.add(outcome.metrics)
        self.progress.count += step.count

    def note(self, loss: Tensor) -> None:
        """Add the loss of a batch to that of the step."""
        self._loss = self._loss + loss

    def end_step(self) -> None:
        """What follows when the gradients of all batches are there."""
        loss = self._sum_over_processes()
        for _ in range(self.plan.batches(self.progress.position) - 1):
            self.events.tell("on_substep_end")
        rate = self._optimize(loss)
        if isfinite(loss):
            self.progress.pending_loss += loss
            self.progress.pending_steps += 1
        self.progress.position += 1
        self.events.state.global_step += 1
        self.events.state.epoch = self.plan.epoch_after(self.progress.position)
        self.events.tell("on_step_end")
        self.events.agree()
        control = self.events.control
        epoch_ends = self.progress.position % self.plan.steps_per_epoch == 0 or control.should_epoch_stop
        if epoch_ends or control.should_training_stop:
            self.events.tell("on_epoch_end")
            self.events.agree()
        if self.events.control.should_epoch_stop:
            self.progress.position = self.plan.next_epoch(self.progress.position - 1)
        self._log_evaluate_save(rate)
        self.ended = (
            self.events.control.should_training_stop
            or self.events.signalled
            or self.progress.position >= self.plan.steps
        )
        if epoch_ends and not self.ended:
            self.events.control.should_epoch_stop = False
            self.events.tell("on_epoch_begin")

    def _sum_over_processes(self) -> float:
        """Let each process have the gradients of all; returns the loss of the step."""
        gradients = self.optimization.gradients
        sums = gradients.sent[-gradients.SUMS :]
        sums[0], sums[1] = self._loss, self._tokens
        self.processes.add(gradients.sent)
        loss, tokens = sums.tolist()
        self.progress.tokens += int(tokens)
        return float(loss)

    def _optimize(self, loss: float) -> float:
        """Move the parameters, unless something is not finite. Returns the learning rate."""
        finite = self.optimization.clip()
        self.events.tell("on_pre_optimizer_step")
        if self.optimization.scaler is None:  # that of float16 skips and counts on its own
            self._guard(finite and isfinite(loss))
        rate = self.optimization.rate
        self.optimization.step()
        self.events.tell("on_optimizer_step")
        self.optimization.gradients.clear()
        return rate

    def _guard(self, finite: bool) -> None:
        """A step with NaN or infinity anywhere leaves no gradient, so the optimizer does nothing."""
        if finite:
            self.progress.skipped_in_a_row = 0
            return
        self.progress.skipped += 1
        self.progress.skipped_in_a_row += 1
        self.optimization.gradients.drop()
        row = self.progress.skipped_in_a_row
        if row >= min(MAX_SKIPPED_IN_A_ROW, self.plan.steps):  # of a shorter run, all
            times = f"{row} times in a row" if row > 1 else "in the only step"
            raise TrainingError(
                f"step {self.events.state.global_step}: loss or gradient was NaN or infinite {times}; the adapter was not "
                "changed by that",
                hint=where_it_comes_from(self.model)
                or "lower learning_rate, or resume from the last checkpoint; look for broken rows in the dataset",
            )

    # --- between steps

    def _log_evaluate_save(self, rate: float) -> None:
        if self.events.control.should_log and self.events.state.global_step > self.progress.logged:
            self._log_steps(rate)
        if self.events.control.should_evaluate:
            kept = self.args.save_strategy == SaveStrategy.BEST or self.args.load_best_model_at_end
            if self._evaluate() and kept:
                self.events.control.should_save = True
        self.events.agree()
        if self.events.control.should_save or (self._stopped and self.args.save_strategy != SaveStrategy.NO):
            self._save()  # also where callbacks end the run between two saves: whoever wants more goes on from here
            self.events.tell("on_save")
            self.events.agree()

    @property
    def _stopped(self) -> bool:
        """Whether callbacks end the run before its last step."""
        return self.events.control.should_training_stop and self.progress.position < self.plan.steps

    def _log_steps(self, rate: float) -> None:
        """The means over the steps since the last log."""
        done = self.progress
        logs = {"loss": done.pending_loss / done.pending_steps} if done.pending_steps else {}
        logs |= {"grad_norm": self.optimization.norm} if isfinite(self.optimization.norm) else {}
        logs |= {"learning_rate": rate}
        if self.objective.names and done.count:
            sums = torch.tensor([done.metrics.get(name, 0.0) for name in self.objective.names], dtype=torch.float64)
            added = self.processes.add(sums.to(self.model.device)).tolist()
            logs |= self.objective.means(dict(zip(self.objective.names, added, strict=True)), done.count)
        done.logged_at(self.events.state.global_step)
        self.events.log(logs)

    def _evaluate(self) -> bool:
        """Measure the held-out loss, and say whether it is the lowest so far."""
        tokens, state = evaluation_tokens(self.args), self.events.state
        with self.alone():
            found = self.objective.evaluate(self.model, self.eval_samples, tokens, self.processes)
        check_held_out(self.model, found.loss)
        metrics = {f"eval_{key}": value for key, value in found.as_dict().items()}
        self.events.log(metrics)
        self.events.tell("on_evaluate", metrics=metrics)
        if self.optimization.by_loss:
            self.optimization.schedule.step(found.loss)
        best = inf if state.best_metric is None else state.best_metric
        if self.args.metric_for_best_model is None or found.loss >= best:
            return False
        state.best_metric, state.best_global_step = found.loss, state.global_step
        return True

    # --- checkpoints

    def _save(self) -> None:
        """Publish a checkpoint of this step, and delete the oldest beyond save_total_limit."""
        random = self.processes.gather(RandomState.now())
        folder, state = Path(str(self.args.output_dir)), self.events.state
        target, best = (folder / f"checkpoint-{step}" for step in (state.global_step, state.best_global_step))
        if best.is_dir() or best == target:
            state.best_model_checkpoint = str(best)
        if not self.processes.first:
            return
        self.progress.stopped = self._stopped
        with storage.publish_folder(target) as staging:
            save_adapter(self.model, staging, self.args.adapter_name)
            if not self.args.save_only_model or self.events.signalled:  # or nobody could go on from it
                write_saved(staging, Saved(self.optimization.state(), random, self.progress, self.bound))
            storage.write_json(staging / STATE, self.events.saved())
        remove_old(folder, self.args.save_total_limit, state.best_model_checkpoint)

    def _go_on_from(self, folder: Path) -> RandomState | None:
        """Take over what a checkpoint holds; returns the random generators, for the first step. Raises CheckpointError."""
        saved = read_saved(folder)
        self.forced = self.bound.check(saved.bound, folder, self.args.force)
        if self.forced and saved.progress.position >= self.plan.steps:
            raise CheckpointError(
                f"{folder} is at step {saved.progress.position} of {self.plan.steps}: none is left for what is new",
                hint=f"more {option('num_train_epochs')} or {option('max_steps')}",
            )
        take_trained(self.model, folder, self.args.adapter_name)
        try:
            self.events.load(folder / STATE)
            if self.forced.keys() & OF_OPTIMIZER:
                self.optimization.go_to(saved.progress.position)
            else:
                self.optimization.load(saved.optimization)
        except (OSError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder} cannot be read: {error!r}") from error
        self.progress, self.changes = saved.progress, self.bound.changes(saved.bound)
        if HELD_OUT in self.forced:  # losses of other rows say nothing of these
            self.events.forget_best()
            self.progress.eval_loss_before = None
        if self.processes.rank < len(saved.random) and "seed" not in self.forced:
            return saved.random[self.processes.rank]
        set_seed((self.args.seed + self.processes.rank + 1000 * self.progress.position) % 2**32)
        return None  # one process more than then, or another seed
