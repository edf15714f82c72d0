"""What a run learns: samples -> batches, and of a batch a sum of losses. The loop knows no more of it.

The loss of an optimizer step is the sum over all its batches divided by what `count` says of its samples, whatever
parts they pass through the model in and whichever process computes them. For supervised fine-tuning that is the mean
over all label tokens, each times its weight: sum w l / sum w.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from qgraft.data.batches import Batch, collate, split_batch, weigh_samples
from qgraft.data.tokenizing import Sample
from qgraft.passes.loss import batch_loss


@dataclass(frozen=True, eq=False)
class Outcome:
    """Of one batch: the summed loss with its gradient, and sums of whatever else is worth a line in the log, without."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """See the module's docstring."""

    def count(self, samples: Sequence[Sample]) -> float:
        """What sums over these samples are divided by."""

    def batches(self, samples: Sequence[Sample], tokens: int) -> list[Batch]:
        """The samples in batches of at most so many tokens, as few as possible; 0 for one sample in each."""

    def outcome(self, model: PreTrainedModel, batch: Batch) -> Outcome:
        """The sums over a batch."""


@dataclass(frozen=True)
class SupervisedFineTuning:
    """Cross-entropy at the labels, times their weights."""

    label_smoothing: float = 0.0

    def count(self, samples: Sequence[Sample]) -> float:
        """The weight of all labels that are learned."""
        return weigh_samples(samples)

    def batches(self, samples: Sequence[Sample], tokens: int) -> list[Batch]:
        """Padding-free, see data/batches.py."""
        return split_batch(collate(samples), tokens) if samples else []

    def outcome(self, model: PreTrainedModel, batch: Batch) -> Outcome:
        """The weighted sum of the losses at the labels."""
        return Outcome(batch_loss(model, batch, self.label_smoothing))
