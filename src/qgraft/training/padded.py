"""Learning from samples that pass through the model padded, side by side: pairs of an encoder-decoder, texts with images.

    loss     cross-entropy of the labels given what is before them, each times its weight; the mean over those of a step, as
             of supervised fine-tuning
    pass     samples of similar lengths, or each alone where its neighbours would change what the model says of it

What the samples are is a `Kind`: seq2seq.py has one, images.py another.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.adapters.base import alone
from qgraft.linear import computing
from qgraft.memory.budget import CPU_EVAL_TOKENS, CPU_TOKENS
from qgraft.memory.settings import UNCOUNTED
from qgraft.passes.decoder import evaluating
from qgraft.training.objective import Evaluation, Outcome
from qgraft.training.processes import ALONE, Long, Processes

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments

S = TypeVar("S", bound=Long)
Given = TypeVar("Given", bound=Long, contravariant=True)


class Losses(Protocol[Given]):
    """(The sum of the losses of a pass's labels, each times its weight; each of them without)."""

    def __call__(
        self, model: PreTrainedModel, samples: Sequence[Given], label_smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Of samples that pass together."""


@dataclass(frozen=True)
class Kind(Generic[S]):
    """What is asked of samples of one kind.

    Attributes:
        split: the passes of samples, with at most so many tokens in each; 0 for one sample in each.
        losses: see Losses.
        together: within the block samples share passes; yields why not, where each has to pass alone.
        labels: how many a sample has.
        weight: the sum of their weights.
    """

    split: Callable[[Sequence[S], int], list[list[S]]]
    losses: Losses[S]
    together: Callable[[PreTrainedModel, Sequence[S]], AbstractContextManager[str | None]]
    labels: Callable[[S], int]
    weight: Callable[[S], float]


@dataclass(frozen=True)
class Padded(Generic[S]):
    """An Objective, see objective.py. `alone`: every sample passes through the model by itself."""

    kind: Kind[S]
    label_smoothing: float = 0.0
    alone: bool = False
    names: Sequence[str] = ()

    def begin(
        self, model: PreTrainedModel, every: Sequence[S], own: Sequence[S], tokens: int, processes: Processes, step: int
    ) -> tuple[list[S], float]:
        """As they are, and the weight of all labels: each is learned by itself."""
        return list(own), self.count(every)

    def count(self, samples: Sequence[S]) -> float:
        """The weight of all labels."""
        return float(sum(map(self.kind.weight, samples)))

    def batches(self, samples: Sequence[S], tokens: int) -> list[list[S]]:
        """See Kind.split."""
        return self.kind.split(samples, 0 if self.alone else tokens)

    def outcome(self, model: PreTrainedModel, batch: Sequence[S]) -> Outcome:
        """The weighted sum of the losses at the labels."""
        return Outcome(self.kind.losses(model, batch, self.label_smoothing)[0])

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """None, as there are no metrics."""
        return {name: value / count for name, value in sums.items()}

    def evaluate(self, model: PreTrainedModel, samples: Sequence[S], tokens: int, processes: Processes) -> Evaluation:
        """The mean over all labels, without smoothing."""
        tokens = 0 if self.alone else tokens
        return evaluate_padded(model, self.kind, samples, tokens, processes=processes, found_out=True)


@torch.no_grad()
@alone("evaluated")
def evaluate_padded(
    model: PreTrainedModel,
    kind: Kind[S],
    samples: Sequence[S],
    tokens: int | None = None,
    compute: str | None = None,
    processes: Processes = ALONE,
    passed: Callable[[int], None] = lambda _: None,
    *,
    found_out: bool = False,
) -> Evaluation:
    """The loss on samples that are tokenized already; the arguments are those of evaluate_samples, and:

    Args:
        found_out: whether it is known already how samples pass through the model.
    """
    tokens = CPU_EVAL_TOKENS if tokens is None else tokens  # of logits of a whole vocabulary, on a GPU too
    total, labels, weight = 0.0, 0, 0.0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(nullcontext() if compute is None else computing(model, compute))
        apart = None if found_out else stack.enter_context(kind.together(model, samples))
        for part in kind.split(processes.share(samples), 0 if apart else tokens):
            total += float(kind.losses(model, part)[0])
            labels += sum(map(kind.labels, part))
            weight += sum(map(kind.weight, part))
            passed(len(part))
    sums = torch.tensor([total, labels, weight], dtype=torch.float64, device=model.device)
    total, labels, weight = processes.add(sums).tolist()
    loss = total / (weight or 1.0)
    return Evaluation(loss, math.exp(min(loss, 700.0)), len(samples), int(labels))


@contextmanager
def padded_passes(
    model: PreTrainedModel, kind: Kind[S], args: "TrainArguments", samples: Sequence[S], notes: list[str]
) -> Iterator[int]:
    """Within the block samples take the fastest way through the model; yields the tokens of a pass, 0 for one sample."""
    with computing(model, args.compute), kind.together(model, samples) as apart:
        if apart:
            notes.append(apart)
        yield 0 if apart else args.max_tokens_per_pass or (UNCOUNTED if model.device.type == "cuda" else CPU_TOKENS)
