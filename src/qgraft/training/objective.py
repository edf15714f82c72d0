"""What a run learns: samples -> batches, and of a batch a sum of losses. The loop knows no more of it.

The loss of an optimizer step is the sum over all its batches divided by what `count` says of its samples, whatever
parts they pass through the model in and whichever process computes them. For supervised fine-tuning that is the mean
over all label tokens, each times its weight: sum w l / sum w. Learning from preferences is in preferences.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.adapters.base import alone
from qgraft.data.batches import Batch, collate, count_labels, split_batch, weigh_labels, weigh_samples
from qgraft.data.tokenizing import Sample
from qgraft.linear import computing
from qgraft.memory.budget import CPU_EVAL_TOKENS, GPU_EVAL_TOKENS
from qgraft.passes.decoder import evaluating, padding_free
from qgraft.passes.loss import batch_loss
from qgraft.training.processes import ALONE, Processes


@dataclass(frozen=True, eq=False)
class Outcome:
    """Of one batch: the summed loss with its gradient, and sums of whatever else is worth a line in the log, without."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Measured(Protocol):
    """What an objective says of held-out samples: the loss, and the metrics that it logs beside it."""

    @property
    def loss(self) -> float:
        """That of one sample, or label, in the mean."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """By name."""

    def as_dict(self) -> dict[str, float]:
        """All numbers by name, for JSON."""


class Objective(Protocol):
    """See the module's docstring. What samples and batches are is its own affair."""

    @property
    def names(self) -> Sequence[str]:
        """Of the metrics of an Outcome."""

    def begin(
        self,
        model: PreTrainedModel,
        every: Sequence[Any],
        own: Sequence[Any],
        tokens: int,
        processes: Processes,
        step: int,
    ) -> tuple[Sequence[Any], float]:
        """Learn what must be known of all samples of a step, `every`, before those of this process pass, `own`.

        Returns what this process passes, and what the sums of all processes are divided by.
        """

    def count(self, samples: Sequence[Any]) -> float:
        """What sums over these samples are divided by."""

    def batches(self, samples: Sequence[Any], tokens: int) -> list[Any]:
        """The samples in batches of at most so many tokens, as few as possible; 0 for one sample in each."""

    def outcome(self, model: PreTrainedModel, batch: Any) -> Outcome:
        """The sums over a batch."""

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """What metrics summed over samples that `count` so much come to."""

    def evaluate(self, model: PreTrainedModel, samples: Sequence[Any], tokens: int, processes: Processes) -> Measured:
        """The same of held-out samples, so many tokens in a pass; the training mode is kept."""


@dataclass(frozen=True)
class SupervisedFineTuning:
    """Cross-entropy at the labels, times their weights."""

    label_smoothing: float = 0.0
    names: Sequence[str] = ()

    def begin(
        self, model: PreTrainedModel, every: Sequence[Sample], own: Sequence[Sample], tokens: int, processes: Processes,
        step: int,
    ) -> tuple[list[Sample], float]:  # fmt: skip
        """As they are, and the weight of all labels: each is learned by itself."""
        return list(own), self.count(every)

    def count(self, samples: Sequence[Sample]) -> float:
        """The weight of all labels that are learned."""
        return weigh_samples(samples)

    def batches(self, samples: Sequence[Sample], tokens: int) -> list[Batch]:
        """Padding-free, see data/batches.py."""
        return split_batch(collate(samples), tokens) if samples else []

    def outcome(self, model: PreTrainedModel, batch: Batch) -> Outcome:
        """The weighted sum of the losses at the labels."""
        return Outcome(batch_loss(model, batch, self.label_smoothing))

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """None, as there are no metrics."""
        return {name: value / count for name, value in sums.items()}

    def evaluate(
        self, model: PreTrainedModel, samples: Sequence[Sample], tokens: int, processes: Processes
    ) -> "Evaluation":
        """The mean over all label tokens, without smoothing."""
        return evaluate_samples(model, samples, tokens, processes=processes)


@dataclass(frozen=True)
class Evaluation:
    """What evaluate() measured: `loss` in nats a label token, `perplexity` = exp(loss).

    Of the dataset's rows, `dropped` gave no sample, and `truncated` were cut at max_length.
    """

    loss: float
    perplexity: float
    samples: int
    labels: int
    dropped: int = 0
    truncated: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        """Of this objective, nothing beside the loss."""
        return {}

    def as_dict(self) -> dict[str, float]:
        """The fields by name, for JSON."""
        return asdict(self)


@torch.no_grad()
@alone("evaluated")
def evaluate_samples(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    tokens: int | None = None,
    compute: str | None = None,
    processes: Processes = ALONE,
    passed: Callable[[int], None] = lambda _: None,
) -> Evaluation:
    """The loss on samples that are tokenized already, so many tokens in a pass. The model's training mode is kept.

    Args:
        compute: how products are computed, see QuantizedLinear; None for as they are.
        processes: those that share the work, each with all samples.
        passed: called after each pass with the number of samples that were in it.
    """
    tokens = tokens or (GPU_EVAL_TOKENS if model.device.type == "cuda" else CPU_EVAL_TOKENS)
    total, labels, weight = 0.0, 0, 0.0
    products = nullcontext() if compute is None else computing(model, compute)
    with products, evaluating(model), padding_free(model, samples) as problem:
        # neighbours of similar length waste least where attention is masked
        ordered = sorted(processes.share(samples), key=lambda sample: len(sample.input_ids))
        for part in split_batch(collate(ordered), 0 if problem else tokens) if ordered else ():
            total += float(batch_loss(model, part))
            labels += count_labels(part)
            weight += weigh_labels(part)
            passed(int((part["position_ids"] == 0).sum()))  # each sample begins with one
    sums = torch.tensor([total, labels, weight], dtype=torch.float64, device=model.device)
    total, labels, weight = processes.add(sums).tolist()
    loss = total / (weight or 1.0)
    return Evaluation(loss, math.exp(min(loss, 700.0)), len(samples), int(labels))
