"""Learning from sequence to sequence: T5, BART and their kind, on the loop that all runs have.

    sample   a pair of source and target (data/pairs.py)
    loss     cross-entropy of the target's tokens given the source and the tokens before, each times its pair's weight; the
             mean over the labels of a step, as of supervised fine-tuning
    pass     pairs of similar lengths, padded (passes/pairs.py)

Which kind of model it is decides, not an option: `stage: sft` on an encoder-decoder learns so. What has no meaning there is
refused by `check_pair_run`, all at once, and on the command line before the weights are read.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qgraft.adapters.base import alone
from qgraft.data.pairs import PairOptions, PairSample, build_pairs, check_pair_options
from qgraft.data.reading import Accounting, Dataset, named_columns, read_dataset
from qgraft.linear import computing
from qgraft.memory.budget import CPU_EVAL_TOKENS, CPU_TOKENS
from qgraft.memory.settings import UNCOUNTED
from qgraft.passes.decoder import evaluating
from qgraft.passes.pairs import padded_together, pair_losses, split_pairs
from qgraft.training.objective import Evaluation, Outcome
from qgraft.training.option_names import PACKED
from qgraft.training.processes import ALONE, Processes

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments


@dataclass(frozen=True)
class SequenceToSequence:
    """An Objective, see objective.py. `alone`: every pair passes through the model by itself."""

    label_smoothing: float = 0.0
    alone: bool = False
    names: Sequence[str] = ()

    def begin(
        self,
        model: PreTrainedModel,
        every: Sequence[PairSample],
        own: Sequence[PairSample],
        tokens: int,
        processes: Processes,
        step: int,
    ) -> tuple[list[PairSample], float]:
        """As they are, and the weight of all labels: each is learned by itself."""
        return list(own), self.count(every)

    def count(self, samples: Sequence[PairSample]) -> float:
        """The weight of all labels."""
        return float(sum(len(sample.labels) * sample.weight for sample in samples))

    def batches(self, samples: Sequence[PairSample], tokens: int) -> list[list[PairSample]]:
        """See split_pairs."""
        return split_pairs(samples, 0 if self.alone else tokens)

    def outcome(self, model: PreTrainedModel, batch: Sequence[PairSample]) -> Outcome:
        """The weighted sum of the losses at the labels."""
        return Outcome(pair_losses(model, batch, self.label_smoothing)[0])

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """None, as there are no metrics."""
        return {name: value / count for name, value in sums.items()}

    def evaluate(
        self, model: PreTrainedModel, samples: Sequence[PairSample], tokens: int, processes: Processes
    ) -> Evaluation:
        """The mean over all labels, without smoothing."""
        return evaluate_pairs(model, samples, 0 if self.alone else tokens, processes=processes, found_out=True)


@torch.no_grad()
@alone("evaluated")
def evaluate_pairs(
    model: PreTrainedModel,
    samples: Sequence[PairSample],
    tokens: int | None = None,
    compute: str | None = None,
    processes: Processes = ALONE,
    passed: Callable[[int], None] = lambda _: None,
    *,
    found_out: bool = False,
) -> Evaluation:
    """The loss on pairs that are tokenized already; the arguments are those of evaluate_samples, and:

    Args:
        found_out: whether it is known already how pairs pass through the model.
    """
    tokens = CPU_EVAL_TOKENS if tokens is None else tokens  # of logits of a whole vocabulary, on a GPU too
    total, labels, weight = 0.0, 0, 0.0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(nullcontext() if compute is None else computing(model, compute))
        apart = None if found_out else stack.enter_context(padded_together(model, samples))
        own = processes.share(samples)
        for part in split_pairs(own, 0 if apart else tokens):
            total += float(pair_losses(model, part)[0])
            labels += sum(len(sample.labels) for sample in part)
            weight += sum(len(sample.labels) * sample.weight for sample in part)
            passed(len(part))
    sums = torch.tensor([total, labels, weight], dtype=torch.float64, device=model.device)
    total, labels, weight = processes.add(sums).tolist()
    loss = total / (weight or 1.0)
    return Evaluation(loss, math.exp(min(loss, 700.0)), len(samples), int(labels))


@contextmanager
def pair_passes(
    model: PreTrainedModel, args: "TrainArguments", samples: Sequence[PairSample], notes: list[str]
) -> Iterator[int]:
    """Within the block a run's pairs take the fastest way through the model; yields the tokens of a pass, 0 for one pair."""
    with computing(model, args.compute), padded_together(model, samples) as apart:
        if apart:
            notes.append(apart)
        yield 0 if apart else args.max_tokens_per_pass or (UNCOUNTED if model.device.type == "cuda" else CPU_TOKENS)


def read_pairs(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, args: "TrainArguments", limit: int, *, held_out: bool
) -> tuple[list[PairSample], Accounting]:
    """The pairs of one dataset, with sources and targets of at most `limit` tokens, as the options of a run ask for them."""
    most = args.max_eval_samples if held_out else args.max_train_samples
    longest = args.val_max_target_length if held_out else None
    conversations, accounting = read_dataset(
        dataset, args.dataset_dir, name=args.name, author=args.author, columns=named_columns(vars(args)),
        max_samples=most or args.max_samples, allow_outside_files=args.allow_outside_files,
    )  # fmt: skip
    return build_pairs(tokenizer, conversations, accounting, pair_options(args, limit, longest)), accounting


def pair_options(args: "TrainArguments", limit: int, longest: int | None = None) -> PairOptions:
    """How a run writes pairs, both sides of at most `limit` tokens; `longest` goes before args.max_target_length."""
    source, target = args.max_source_length or limit, longest or args.max_target_length or limit
    return PairOptions(args.source_prefix, min(source, limit), min(target, limit))


def check_pair_run(args: "TrainArguments") -> None:
    """Raise OptionError for options of a run that have no meaning for an encoder-decoder, at once."""
    packed = any(PACKED in note for note in args.notes)
    check_pair_options(vars(args), *(["packing: samples pass padded, side by side"] if packed else []))
