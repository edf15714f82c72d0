"""What a run is given, checked, and its rows as samples: all that can be wrong is found before anything is touched."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy

from qgraft.adapters.base import adapter_names
from qgraft.data.reading import Accounting, Dataset, as_dataset
from qgraft.errors import OptionError, option
from qgraft.model_parts import is_encoder_decoder
from qgraft.passes.limits import sample_limit
from qgraft.training.adapter import positions_to_take
from qgraft.training.arguments import TrainArguments
from qgraft.training.classification_options import check_task
from qgraft.training.drawn import longest_samples
from qgraft.training.events import Callback
from qgraft.training.given import ready_callbacks
from qgraft.training.new_tokens import take_tokens
from qgraft.training.objective import Objective
from qgraft.training.output_dir import Earlier, check_output_dir
from qgraft.training.plan import plan_of
from qgraft.training.precision import check_device
from qgraft.training.processes import Processes
from qgraft.training.samples import prepare_samples
from qgraft.training.speech import check_run, check_speech_options
from qgraft.training.stages import distill_options
from qgraft.training.teacher import Lesson, ask_teacher
from qgraft.training.trainer_options import check_evaluation, settle_best, tracking_callbacks, unsaid_strategy
from qgraft.training.unread import unread_of_held_out


@dataclass
class Prepared:
    """A run of which nothing that is given can be wrong any more, and which has changed nothing yet.

    `refers_to_base` says whether its adapter is new, so that the base is what preferences are compared with.
    """

    args: TrainArguments
    folder: Path
    earlier: Earlier
    samples: list[Any]  # Sample; of preferences Preference, of a teacher Taught, of encoder-decoders PairSample, ...
    eval_samples: list[Any]
    accounting: Accounting
    held_out: Accounting | None
    notes: list[str]
    tokenizer: PreTrainedTokenizerBase | None = None
    callbacks: Sequence[Callback] = ()
    refers_to_base: bool = True
    lesson: Lesson | None = None
    limit: int = 0
    objective: Objective | None = None  # where it does not follow from the options
    bound: Mapping[str, str] = field(default_factory=dict)  # what else the run cannot go on without

    @property
    def longest(self) -> list[Any]:
        """The samples as long as they may become: answers may be drawn in training."""
        taught = distill_options(self.args)
        return longest_samples(self.samples, self.limit, taught) if taught and taught.draws else self.samples


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | None,
    args: TrainArguments,
    eval_dataset: Dataset | None = None,
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
) -> Prepared:
    """Check the options of a run, tokenize its rows, and ask the teacher about them where there is one; see train()."""
    dataset, eval_dataset = (None if each is None else as_dataset(each) for each in (dataset, eval_dataset))
    args, every = _remembering(args, dataset, eval_dataset), [*tracking_callbacks(args), *ready_callbacks(callbacks)]
    check_device(args, model)
    check_task(args, model)
    if is_encoder_decoder(model.config):
        check_run(model.config, args)
    else:
        check_speech_options(model.config, vars(args))
    earlier = check_output_dir(args)
    notes = [*args.notes, *earlier.passed_over, *balance_note(model), *take_tokens(model, tokenizer, args)]
    limit = sample_limit(model, args.max_length, positions_to_take(model, args))
    parts = prepare_samples(model, tokenizer, dataset, eval_dataset, args, limit, notes)
    notes += unread_of_held_out(args, args.eval_dataset if eval_dataset is None else eval_dataset)
    samples, eval_samples, accounting, held_out = parts
    given = args.max_length != TrainArguments.max_length
    if limit < args.max_length and (given or accounting.truncated or (held_out and held_out.truncated)):
        notes.append(f"max_length {args.max_length}: the model's context is {limit} tokens, so samples end there")
    if eval_samples and args.eval_unsaid and args.eval_strategy == IntervalStrategy.NO:  # rows beside the options
        args.eval_strategy = IntervalStrategy(unsaid_strategy(args))
        args.load_best_model_at_end = args.load_best_model_at_end or None
        notes += settle_best(args)
    check_evaluation(args, eval_samples)
    plan_of(args, len(samples), Processes.of(args).count)  # or an error, before anything is touched
    add_early_stopping(args, every)
    lesson = None
    if args.stage == "distill":
        rows = (dataset or args.dataset, eval_dataset or args.eval_dataset), (samples, eval_samples), limit
        lesson = ask_teacher(model, tokenizer, args, *rows, Processes.of(args), notes, console)
        samples, eval_samples = list(lesson.learned), list(lesson.held_out)
    return Prepared(
        args, Path(str(args.output_dir)), earlier, samples, eval_samples, accounting, held_out, notes, tokenizer, every,
        args.adapter_name not in adapter_names(model), lesson, limit,
    )  # fmt: skip


def add_early_stopping(args: TrainArguments, callbacks: list[Callback]) -> None:
    """Put EarlyStoppingCallback among the callbacks where it is asked for, and let it go by the held-out loss.

    Raises OptionError where that is never measured.
    """
    if args.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
    if not any(isinstance(each, EarlyStoppingCallback) for each in callbacks):
        return
    if args.eval_strategy == IntervalStrategy.NO:
        who = "EarlyStoppingCallback" if args.early_stopping_patience is None else "early_stopping_patience"
        raise OptionError(
            f"{who}: the held-out loss is never measured",
            hint=f"{option('eval_strategy', 'epoch')}, or {option('eval_strategy', 'steps')} with eval_steps",
        )
    args.metric_for_best_model, args.greater_is_better = "loss", False


def balance_note(model: PreTrainedModel) -> list[str]:
    """One sentence where transformers would add what balances the experts of a mixture to the loss."""
    if not getattr(model.config.get_text_config(), "output_router_logits", False):
        return []
    return [
        "output_router_logits: the loss that balances the experts (router_aux_loss_coef) is not added, as routers are frozen"
    ]


def _remembering(args: TrainArguments, dataset: Dataset | None, eval_dataset: Dataset | None) -> TrainArguments:
    """`args` with the names of the datasets trained on, so that merging finds the rows again; rows themselves have none."""
    args = copy.copy(args)
    for name, given in (("dataset", dataset), ("eval_dataset", eval_dataset)):
        if given is not None:
            setattr(args, name, given if isinstance(given, str) else None)
    return args
