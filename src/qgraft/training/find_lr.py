"""find_lr(): which learning rate a run should try, from a few steps whose rate grows until the loss goes up.

    step    1      2       ...   40          the steps that the run would begin with, on its own rows
    rate    1e-6   1.4e-6  ...   1           exponentially; each group of parameters by the same factor
    loss    2.9    2.9     ...   1.7   9.1   smoothed: it falls, is lowest, diverges, and there the steps end

Suggested is a tenth of the rate at which the smoothed loss was lowest: smoothing lags a few steps behind, and a rate that
is good for one step is too high for hundreds (Smith 2015, arXiv:1506.01186; fastai has the same rule). It is where to begin
to try, no more: a short run can be wrong about a long one.

Nothing is kept but the two files in output_dir: an adapter that was there is as it was, a new one is gone.

    find_lr.json    the rates, losses and smoothed losses, and what is suggested
    find_lr.png     the picture
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

from qgraft import plots, storage
from qgraft.adapters.attach import detach_adapter
from qgraft.adapters.base import adapter_names, find_adapter
from qgraft.adapters.choose import active_adapters, use_adapter
from qgraft.data.reading import Dataset
from qgraft.errors import OptionError, TrainingError
from qgraft.passes.broken import where_it_comes_from
from qgraft.progress import shown
from qgraft.training.adapter import adapter_in_training
from qgraft.training.arguments import TrainArguments
from qgraft.training.given import check_arguments, check_pair
from qgraft.training.loop import TrainingLoop
from qgraft.training.output_dir import RATES, RATES_PICTURE
from qgraft.training.passes import fastest_passes
from qgraft.training.prepare import Prepared, prepare
from qgraft.training.processes import ALONE
from qgraft.training.random_state import RandomState
from qgraft.training.reference import settle_objective

STEPS, LOWEST, HIGHEST = 40, 1e-6, 1.0
SMOOTHING = 0.8  # of the mean so far, 0.2 of the new loss
DIVERGED = 0.5  # of the first loss, which the smoothed one may rise above its lowest
SAFETY = 10  # how far below the rate with the lowest loss the suggested one is


@dataclass(frozen=True)
class RateSearch:
    """What find_lr() found.

    Attributes:
        rates, losses, smoothed: of each step that was taken.
        suggested: a learning rate to try; None where the loss did not fall at any.
        diverged: whether the loss went up, or was not finite, before the last rate.
        signal: what ended it early, if one did.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggested: float | None
    diverged: bool
    signal: int | None = None


def find_lr(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | None,
    args: TrainArguments,
    *,
    progress: bool | Console | None = None,
) -> RateSearch:
    """Take steps with growing learning rates, see the module's docstring; arguments as those of train().

    Raises DataError, OptionError, StorageError, TrainingError.
    """
    check_pair(model, tokenizer)
    check_arguments(args)
    if args.world_size > 1:
        raise OptionError(f"find_lr: started in {args.world_size} processes; one is enough")
    prepared = prepare(model, tokenizer, dataset, _trial(args))
    _only_steps(prepared.args)
    console = shown(progress)
    with (
        RandomState.now().drawn_from(),
        _as_it_was(model, args.adapter_name),
        adapter_in_training(model, prepared.args),
        fastest_passes(model, prepared, console) as (tokens, _),
    ):
        found = _search(model, prepared, tokens)
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    told = {key: [each if math.isfinite(each) else None for each in value] if isinstance(value, list) else value
            for key, value in asdict(found).items()}  # fmt: skip
    storage.write_json(folder / RATES, told)
    if args.plot_loss:
        plots.plot_rates(folder / RATES, folder / RATES_PICTURE)
    return found


def growing_rates(steps: int = STEPS, lowest: float = LOWEST, highest: float = HIGHEST) -> list[float]:
    """Rates from the lowest to the highest, each the same factor above the one before."""
    return [lowest * (highest / lowest) ** (step / (steps - 1)) for step in range(steps)]


def smooth(losses: Sequence[float]) -> list[float]:
    """The exponential moving average at each loss, without the pull of the zero that it begins with (as Adam's)."""
    mean, found = 0.0, []
    for step, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        found.append(mean / (1 - SMOOTHING**step))
    return found


def suggested_rate(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """A part of the rate with the lowest smoothed loss, to two digits; None where that is the first rate's."""
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    return float(f"{rates[lowest] / SAFETY:.1e}") if lowest else None


def has_diverged(smoothed: Sequence[float]) -> bool:
    """Whether the last smoothed loss is far above the lowest, or is none."""
    return not math.isfinite(smoothed[-1]) or smoothed[-1] > min(smoothed) + DIVERGED * abs(smoothed[0])


def _trial(args: TrainArguments) -> TrainArguments:
    """`args` of the first steps of the run, beside whatever is in output_dir: nothing is deleted where no run begins."""
    args = copy.copy(args)
    args.max_steps, args.overwrite_output_dir, args.find_lr = STEPS, True, True
    args.resume_from_checkpoint, args.early_stopping_patience = None, None
    args.lr_scheduler_type, args.lr_scheduler_kwargs, args.warmup_steps = SchedulerType.CONSTANT, None, 0
    return args


def _only_steps(args: TrainArguments) -> None:
    """Let the loop do nothing between two steps."""
    args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
    args.save_strategy, args.load_best_model_at_end, args.metric_for_best_model = SaveStrategy.NO, False, None


@contextmanager
def _as_it_was(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model afterwards as before: which adapters it has, which are active, the weights of this one."""
    active, is_new = active_adapters(model), name not in adapter_names(model)
    use_cache = getattr(model.config, "use_cache", None)  # which encoders may not have
    before = {} if is_new else {key: value.clone() for key, value in find_adapter(model, name).state_dict().items()}
    if use_cache is not None:
        model.config.use_cache = False
    try:
        yield
    finally:
        if use_cache is not None:
            model.config.use_cache = use_cache
        if not is_new:
            find_adapter(model, name).take(before)
        elif name in adapter_names(model):
            detach_adapter(model, name)
        use_adapter(model, active or None)
        model.eval()


def _search(model: PreTrainedModel, prepared: Prepared, tokens: int) -> RateSearch:
    """The steps, with the adapter in training."""
    objective = settle_objective(model, prepared, tokens, ALONE)
    loop = TrainingLoop(
        model, prepared.args, prepared.samples, [], tokens, objective=objective, tokenizer=prepared.tokenizer
    )
    rates, losses, smoothed, diverged = growing_rates(), list[float](), list[float](), False
    try:
        loop.start()
        asked = prepared.args.learning_rate
        peaks = [group["lr"] / asked if asked else 1.0 for group in loop.optimization.optimizer.param_groups]
        while not (loop.ended or diverged):
            losses.append(_step(loop, [rates[len(losses)] * peak for peak in peaks]))
            if len(losses) == 1 and not math.isfinite(losses[0]) and (where := where_it_comes_from(model)):
                raise TrainingError("find_lr: the loss of the first step is no number at any learning rate", hint=where)
            smoothed = smooth(losses)
            diverged = has_diverged(smoothed)
        finite = [loss for loss in smoothed if math.isfinite(loss)]
        signal = loop.stop.received if loop.events.signalled else None
        suggested = None if signal else suggested_rate(rates, finite)
        return RateSearch(rates[: len(losses)], losses, smoothed, suggested, diverged, signal)
    finally:
        loop.close()


def _step(loop: TrainingLoop, rates: Sequence[float]) -> float:
    """The loss of the next step, NaN where it or its gradient is not finite, which moves by these rates of the groups."""
    before = loop.progress.pending_loss, loop.progress.pending_steps
    loop.learn(loop.begin_step())
    for group, rate in zip(loop.optimization.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    try:
        loop.end_step()
    except TrainingError:  # not finite several times in a row
        return math.nan
    taken = loop.progress.pending_steps > before[1]
    return loop.progress.pending_loss - before[0] if taken else math.nan
