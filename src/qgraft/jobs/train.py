"""Several adapters trained on one base at once: `qgraft train a.yaml b.yaml c.yaml`, train_jobs() in Python.

Each job is a whole run as train() makes it: its own rows, schedule, optimizer, clipping, evaluations, checkpoints and
report, with its own loop and its own random numbers. Only what costs most is done for all jobs together: when each has
begun its next step, one pass computes the gradients of all (joint_step.py); then each ends its step.

    a   begin_step ...............  end_step: optimizer, log, evaluate, save
    b               begin_step ...           end_step
                               one pass

A job that ends leaves; the others go on. So each job comes out as it would alone, up to the rounding of sums in another
order; data order and dropout masks are the same ones. A job that fails (NaN three times in a row, a full disk) ends
alone. Ctrl-C and SIGTERM end all, each with its checkpoint.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.base import adapter_names, require_loras, selection_of
from qgraft.adapters.choose import use_adapter
from qgraft.checkpoints.foreign import one_line
from qgraft.compat import activation_checkpointing
from qgraft.errors import OptionError, QgraftError, TrainingError, UnsupportedError
from qgraft.jobs.joint_step import HandIn, learn_together
from qgraft.linear import computing
from qgraft.locks import folder_locked
from qgraft.memory.budget import training_tokens
from qgraft.model_parts import CAUSAL, is_encoder_decoder, pairs_unsupported, task_of
from qgraft.passes.decoder import padding_free
from qgraft.passes.fused import fused_modules
from qgraft.progress import Display, shown
from qgraft.training.adapter import prepare_adapter
from qgraft.training.arguments import TrainArguments
from qgraft.training.callbacks import StopOnSignal, StopWith, Watch, run_display
from qgraft.training.images import holds_images
from qgraft.training.new_tokens import trains_rows
from qgraft.training.prepare import Prepared, prepare
from qgraft.training.random_state import RandomState, undisturbed
from qgraft.training.report import TrainReport
from qgraft.training.run import Run

SHARED = (  # options that concern the base and the passes through it
    "model_name_or_path", "quantize", "quantization_bit", "compute", "compute_dtype", "use_cpu", "max_tokens_per_pass",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "label_smoothing_factor",
)  # fmt: skip
Outcome = TrainReport | QgraftError
Result = TypeVar("Result")


def train_jobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[TrainArguments],
    *,
    progress: bool | Console | None = None,
) -> list[Outcome]:
    """Train the adapters of several runs at once, each saved in its output_dir; see the module's docstring.

    The model then has all adapters, of the names that name_jobs() gives them; that of the last job is active.

    Returns what came of each job, in order: its report, or the error that ended it. Raises OptionError for jobs that do
    not go together, and what train() raises for what is wrong with one of them before the first step.
    """
    jobs = name_jobs(jobs)
    check_jobs(jobs)
    require_loras(model, adapter_names(model), "training several adapters at once")
    if is_encoder_decoder(model.config):
        raise pairs_unsupported("training several adapters at once")
    if task_of(model) != CAUSAL:
        raise UnsupportedError(
            f"training several adapters at once: the model is a classifier ({task_of(model)}), whose texts are padded",
            hint="train one after another",
        )
    nn.Module.to(model, jobs[0].device)
    console = shown(progress)
    display = run_display(console, labels=True) if console else None
    with ExitStack() as stack:
        for args in jobs:
            stack.enter_context(folder_locked(Path(str(args.output_dir))))
        prepared = _prepare_all(model, tokenizer, jobs)
        if any(holds_images(each.samples) for each in prepared):
            raise UnsupportedError(
                "training several adapters at once: rows hold images, which pass padded", hint="train one after another"
            )
        return _train_all(model, jobs, prepared, display)


def _train_all(
    model: PreTrainedModel, jobs: Sequence[TrainArguments], prepared: Sequence[Prepared], display: Display | None
) -> list[Outcome]:
    with _stopped_by_signals() as stop, _shown(display):
        labels = short_names([each.folder for each in prepared])
        every = [Job(model, *each, display, stop) for each in zip(prepared, labels, strict=True)]
        try:
            for job in every:
                job.turn(lambda job=job: prepare_adapter(model, job.args))  # type: ignore[misc]
            _train(model, [job for job in every if job.outcome is None])
        finally:
            for job in every:
                job.run.close()
    attached = [args.adapter_name for args in jobs if args.adapter_name in adapter_names(model)]
    use_adapter(model, attached[-1] if attached else None)
    return [job.outcome for job in every if job.outcome is not None]


def name_jobs(jobs: Sequence[TrainArguments]) -> list[TrainArguments]:
    """The jobs with different adapter names: a second "default" becomes "default-2"."""
    named: list[TrainArguments] = []
    taken = {args.adapter_name for args in jobs}
    for args in jobs:
        name, number = args.adapter_name, 1
        while name in {earlier.adapter_name for earlier in named} or (number > 1 and name in taken):
            number += 1
            name = f"{args.adapter_name}-{number}"
        changed = copy.copy(args)
        changed.adapter_name = name
        named.append(changed)
    return named


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of those above them as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def check_jobs(jobs: Sequence[TrainArguments]) -> None:
    """Raise for what keeps jobs from training together, all at once: OptionError, or UnsupportedError for a prefix."""
    problems = []
    for name in SHARED:
        values = [(getattr(args, name, None), args.output_dir) for args in jobs]
        if any(value != values[0][0] for value, _ in values):
            problems.append(f"{name} differs: " + ", ".join(f"{value} ({folder})" for value, folder in values))
    folders = [str(Path(str(args.output_dir)).resolve()) for args in jobs]
    problems += [f"output_dir {folder} is given to {folders.count(folder)} jobs"
                 for folder in dict.fromkeys(folders) if folders.count(folder) > 1]  # fmt: skip
    problems += [f"{args.output_dir}: stage {args.stage} trains alone" for args in jobs if args.stage != "sft"]
    problems += [f"{args.output_dir}: rows of tokens are for a run alone" for args in jobs if trains_rows(args)]
    problems += [f"{args.output_dir}: find_lr is for a run alone" for args in jobs if args.find_lr]
    problems += [f"{args.output_dir}: do_train is off" for args in jobs if not args.do_train]
    problems += [
        f"{args.output_dir}: {option} acts on the shared base"
        for args in jobs
        for option in ("fp16", "cache_frozen_layers", "memory_limit")
        if getattr(args, option)
    ]
    problems += [f"{args.output_dir}: cuda_graphs=yes is for a run alone" for args in jobs if args.cuda_graphs == "yes"]
    problems += [f"{args.output_dir}: started in {args.world_size} processes" for args in jobs if args.world_size > 1]
    if problems:
        raise OptionError(
            "these jobs cannot train on one base at once:\n  " + "\n  ".join(problems),
            hint="an option=value word after the files applies to all of them",
        )
    prefixes = [str(args.output_dir) for args in jobs if args.finetuning_type != "lora"]
    if prefixes:
        raise UnsupportedError(
            f"several jobs at once train LoRAs only; p_tuning is asked for by {', '.join(prefixes)}",
            hint="train a prefix in a run of its own",
        )


def _prepare_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, jobs: Sequence[TrainArguments]
) -> list[Prepared]:
    """Check every job before any begins. Raises the error of the first that is wrong, with those of the others."""
    prepared, errors = [], []
    for args in jobs:
        try:
            prepared.append(prepare(model, tokenizer, None, args))
        except QgraftError as error:
            errors.append((args, error))
    raise_all(errors)
    return prepared


def raise_all(errors: Sequence[tuple[TrainArguments, QgraftError]]) -> None:
    """Raise one error that tells what is wrong with each of these jobs, if there is any."""
    if errors:
        kinds = {type(error) for _, error in errors}
        kind = kinds.pop() if len(kinds) == 1 else OptionError
        raise kind("\n".join(f"{args.output_dir}: {error}" for args, error in errors))


class Job:
    """One run among several.

    Attributes:
        random: what it draws from in its turns.
        outcome: what came of it, once it has ended.
    """

    def __init__(
        self, model: PreTrainedModel, prepared: Prepared, label: str, display: Display | None, stop: StopOnSignal
    ) -> None:
        self.args, self.outcome, self.random = prepared.args, None, RandomState.now()
        self._model = model
        watch = Watch(prepared.folder, None, display, label)
        self.run = Run(model, prepared, watch, StopWith(stop), alone=self._alone)

    outcome: Outcome | None

    def turn(self, work: Callable[[], Result]) -> Result | None:
        """What `work` gives; or None where it raises an error of ours or torch's, which ends this job alone."""
        with self.random.drawn_from():
            try:
                return work()
            except QgraftError as error:
                self.outcome = error
            except RuntimeError as error:
                self.outcome = TrainingError(f"{type(error).__name__}: {one_line(error)}")
                self.outcome.__cause__ = error
            self.run.close()
            return None

    def hand_in(self) -> HandIn | None:
        """The batches of the next step, with a generator that drops what the job alone would drop."""
        step = self.turn(self.run.loop.begin_step)
        if step is None:
            return None
        generator = torch.Generator()
        generator.set_state(self.random.torch)
        zero = torch.zeros((), device=self._model.device)
        alpha = self.args.neftune_noise_alpha
        return HandIn(self.args.adapter_name, step.batches, step.count, generator, alpha, zero)

    def take_back(self, handed: HandIn) -> None:
        """End the step whose gradients are there, and the run with its last one."""
        self.random.torch = handed.generator.get_state()
        self.run.loop.note(handed.loss)
        self.turn(self.run.loop.end_step)
        if self.outcome is None and self.run.loop.ended:
            self.finish()

    def finish(self) -> None:
        """Write what came of the run."""
        report = self.turn(self.run.finish)
        if report is not None:
            self.outcome = report
            self.run.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The model with this job's adapter alone, whatever others train on it."""
        with selection_of(self._model).within(None, weights={self.args.adapter_name: 1.0}):
            yield


def _train(model: PreTrainedModel, jobs: Sequence[Job]) -> None:
    """Take the steps of the jobs together, until all have ended."""
    if not jobs:
        return
    use_adapter(model, {job.args.adapter_name: 1.0 for job in jobs})  # so all of them learn
    every, options = [sample for job in jobs for sample in job.run.prepared.samples], jobs[0].args
    with (
        undisturbed(),
        selection_of(model).taken("trained"),
        computing(model, options.compute),
        padding_free(model, every) as problem,
        fused_modules(model),
        activation_checkpointing(model, options),
        _without_cache(model),
    ):
        budget = 0 if problem else training_tokens(options)
        for job in jobs:
            job.run.prepared.notes += [f"{problem}; every sample passes through the model alone"] if problem else []
            job.turn(lambda job=job: job.run.start(budget, {}))  # type: ignore[misc]
            job.outcome = job.outcome or job.run.ended_before
            if job.outcome is None and job.run.loop.ended:
                job.finish()
        while moving := [job for job in jobs if job.outcome is None]:
            handed = [(job, step) for job in moving if (step := job.hand_in()) is not None]
            model.train()
            learn_together(model, [step for _, step in handed], budget, options.label_smoothing_factor)
            for job, step in handed:
                job.take_back(step)


@contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    before, model.config.use_cache = model.config.use_cache, False
    try:
        yield
    finally:
        model.config.use_cache = before


@contextmanager
def _stopped_by_signals() -> Iterator[StopOnSignal]:
    stop = StopOnSignal()
    stop.listen()
    try:
        yield stop
    finally:
        stop.close()


@contextmanager
def _shown(display: Display | None) -> Iterator[None]:
    try:
        yield
    finally:
        if display is not None:
            display.stop()
