"""Several adapters trained on one base at once: `qgraft train a.yaml b.yaml c.yaml`, train_jobs() in Python.

Each job is a whole run as train() makes it: its own rows, schedule, optimizer, clipping, evaluations, checkpoints and
report, in its own thread (turns.py) and on its own replica of the model (jobs/replicas.py), which shares the weights.
Only what costs most is done for all jobs together: when each has handed in the batch of its next step, one pass computes
all their gradients (joint_step.py). A job that ends leaves; the others go on. So each job comes out as it would alone, up
to the rounding of sums in another order; data order and dropout masks are the same ones.

A job that fails (NaN three times in a row, a full disk) ends alone. Ctrl-C and SIGTERM end all, each with its checkpoint.

Not chosen: one loop of our own over all optimizers, which would have to do again what the Trainer does between two steps.
"""

import copy
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.attach import adapter_names, require_loras, use_adapter
from qgraft.data.batches import Batch
from qgraft.errors import OptionError, QgraftError, UnsupportedError
from qgraft.jobs.joint_step import HandIn, learn_together
from qgraft.jobs.replicas import adopt_lora, replicate
from qgraft.linear import computing
from qgraft.memory.budget import training_tokens
from qgraft.passes.decoder import padding_free
from qgraft.passes.fused import lean_modules
from qgraft.training.arguments import TrainArguments
from qgraft.training.callbacks import StopOnSignal, StopWith, Watch, run_display
from qgraft.training.run import Prepared, TrainReport, execute, prepare
from qgraft.training.trainer import LoraTrainer
from qgraft.training.turns import Turns

SHARED = (  # options that concern the base and the passes through it
    "model_name_or_path", "quantize", "quantization_bit", "compute", "compute_dtype", "use_cpu", "max_tokens_per_pass",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "label_smoothing_factor",
)  # fmt: skip
Outcome = TrainReport | QgraftError
Run = Turns[HandIn, Tensor, TrainReport]


def train_jobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[TrainArguments],
    *,
    console: Console | None = None,
) -> list[Outcome]:
    """Train the adapters of several runs at once, each saved in its output_dir; see the module's docstring.

    The model then has all adapters, of the names that name_jobs() gives them; that of the last job is active.

    Returns what came of each job, in order: its report, or the error that ended it. Raises OptionError for jobs that do
    not go together, and what train() raises for what is wrong with one of them before the first step.
    """
    jobs = name_jobs(jobs)
    check_jobs(jobs)
    require_loras(model, adapter_names(model), "training several adapters at once")
    nn.Module.to(model, jobs[0].device)
    display = run_display(console, labels=True) if console else None
    prepared = _prepare_all(model, tokenizer, jobs)
    every = [sample for each in prepared for sample in each.samples]
    # tried once: the replicas are made with the attention that was found
    with _heap_frozen(), padding_free(model, every) as problem:
        replicas = [replicate(model, args.adapter_name) for args in jobs]
        shared = replicate(model, "")
    with _stopped_by_signals() as stop, _shown(display), _heap_frozen():
        runs: list[Run] = []
        try:
            for each, replica in zip(prepared, replicas, strict=True):
                watch = Watch(each.folder, None, display, each.args.adapter_name)
                runs.append(Turns(partial(_run_job, replica, each, watch, StopWith(stop))))
            _drive(shared, runs, replicas, prepared, 0 if problem else training_tokens(jobs[0]))
        finally:
            for run in runs:
                run.end()
    for args, replica in zip(jobs, replicas, strict=True):
        if args.adapter_name in adapter_names(replica):
            adopt_lora(model, replica, args.adapter_name)
            use_adapter(model, args.adapter_name)
    return [_outcome(run) for run in runs]


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
    problems += [f"{args.output_dir}: do_train is off" for args in jobs if not args.do_train]
    problems += [
        f"{args.output_dir}: {option} acts on the shared base"
        for args in jobs
        for option in ("fp16", "cache_frozen_layers", "memory_limit")
        if getattr(args, option)
    ]
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


class _JointTrainer(LoraTrainer):
    """A LoraTrainer that hands its batches in instead of taking its steps alone."""

    def __init__(self, run: Run, *args: Any) -> None:
        super().__init__(*args)
        self._run, self._name = run, str(args[1].adapter_name)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As usual, once all runs are set up: the time of their first step is then that of a step."""
        self._run.pause()
        return super().train(*args, **kwargs)

    def learn(self, model: PreTrainedModel, parts: list[Batch], labels: Tensor) -> Tensor:
        """The gradients of the parts, computed together with those of the other jobs; see LoraTrainer."""
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
        zero = torch.zeros((), device=self.args.device)
        loss = self._run.hand_in(HandIn(self._name, parts, labels, generator, zero))
        torch.set_rng_state(generator.get_state())
        return loss


def _run_job(replica: PreTrainedModel, prepared: Prepared, watch: Watch, stop: StopWith, run: Run) -> TrainReport:
    return execute(replica, prepared, watch, stop, partial(_JointTrainer, run))


def _drive(
    shared: PreTrainedModel,
    runs: Sequence[Run],
    replicas: Sequence[PreTrainedModel],
    prepared: Sequence[Prepared],
    budget: int,
) -> None:
    """Let the runs take their steps together, until all have ended. Raises what ended one that is no error of ours."""
    options = prepared[0].args
    with computing(shared, options.compute), lean_modules(shared):
        _advance(runs)  # until they are set up
        joined = False
        while moving := _advance(runs):
            if not joined:  # by now the runs have attached their adapters, and their Trainers have set the replicas up
                _join(shared, [replicas[index] for index in moving], [prepared[index].args for index in moving])
                joined = True
            handed = [job for run in runs if (job := run.handed) is not None]
            learn_together(shared, handed, budget, options.label_smoothing_factor)
            for run in runs:
                run.answer = None if run.handed is None else run.handed.loss


def _advance(runs: Sequence[Run]) -> list[int]:
    """Move every run to its next batch, or its end. Returns which have a batch."""
    for run in runs:
        if not run.ended:
            run.advance()
        if run.error is not None and not isinstance(run.error, QgraftError):
            raise run.error
    return [index for index, run in enumerate(runs) if not run.ended]


def _join(shared: PreTrainedModel, replicas: Sequence[PreTrainedModel], jobs: Sequence[TrainArguments]) -> None:
    """Put the adapters of the replicas on the model of the shared passes, and let it train as they do."""
    for replica, args in zip(replicas, jobs, strict=True):
        adopt_lora(shared, replica, args.adapter_name)
    for path, module in replicas[0].named_modules():
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if name in vars(module):
                setattr(shared.get_submodule(path), name, vars(module)[name])
    shared.train()


@contextmanager
def _stopped_by_signals() -> Iterator[StopOnSignal]:
    stop = StopOnSignal()
    stop.listen()
    try:
        yield stop
    finally:
        stop.close()


@contextmanager
def _heap_frozen() -> Iterator[None]:
    """Within the block garbage is looked for among new objects only: in all of them it takes 0.3 s, once a Trainer."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _shown(display: Progress | None) -> Iterator[None]:
    try:
        yield
    finally:
        if display is not None:
            display.stop()


def _outcome(run: Run) -> Outcome:
    if run.result is not None:
        return run.result
    assert isinstance(run.error, QgraftError)
    return run.error
