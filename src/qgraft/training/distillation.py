"""Learning from a teacher: stage distill, beside supervised fine-tuning on the same loop.

    before     the teacher passes all rows once, and what it says at each label is kept (teacher.py)
    loss       of a label kd_ratio * divergence(teacher, student) + (1 - kd_ratio) * -log q(label), chunk by chunk
               (passes/divergence.py); the mean over the labels of a step, each times its weight

The samples are those of supervised fine-tuning, and pass as they do: one after another, without padding. Answers that are
drawn in training, and what the teacher says of them, come from on_policy.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.data.batches import Batch, collate, count_labels, label_weights, neighbours, weigh_labels, weigh_samples
from qgraft.data.tokenizing import Sample
from qgraft.passes.decoder import evaluating, label_states, output_head
from qgraft.passes.divergence import Divergence, Said
from qgraft.passes.loss import weighted_loss
from qgraft.training.objective import Outcome
from qgraft.training.processes import ALONE, Processes
from qgraft.training.stages import DistillOptions

if TYPE_CHECKING:
    from qgraft.training.on_policy import DrawnAnswers


@dataclass(frozen=True, eq=False)
class Taught(Sample):
    """A sample with what the teacher says at each of its labels."""

    said: Said | None = None

    @classmethod
    def of(cls, sample: Sample, said: Said) -> "Taught":
        """The sample with that."""
        return cls(**{each.name: getattr(sample, each.name) for each in fields(sample)}, said=said)


@dataclass(frozen=True)
class DistillEvaluation:
    """What held-out rows came to: the mean loss over all labels, and of the two it is made of."""

    loss: float
    samples: int
    labels: int
    metrics: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        """All numbers by name, for JSON."""
        return {"loss": self.loss, "samples": self.samples, "labels": self.labels, **self.metrics}


@dataclass(frozen=True)
class Distillation:
    """An Objective, see objective.py.

    Attributes:
        width: ids that teacher and student both have.
        answers: where those come from that are drawn in training; None where the rows' own are learned.
        names: kd_loss, the divergence; nll_loss, the cross-entropy of the labels.
    """

    options: DistillOptions
    width: int
    answers: "DrawnAnswers | None" = None
    names: Sequence[str] = ("kd_loss", "nll_loss")

    def begin(
        self, model: PreTrainedModel, every: Sequence[Taught], own: Sequence[Taught], tokens: int, processes: Processes,
        step: int,
    ) -> tuple[list[Taught], float]:  # fmt: skip
        """As they are, or with answers that are drawn now; and the weight of all labels: each is learned by itself."""
        if self.answers is None:
            return list(own), self.count(every)
        taught = self.answers.taught(every, own, step)
        weight = torch.tensor([self.count(taught)], dtype=torch.float64, device=model.device)
        return taught, float(processes.add(weight))

    def count(self, samples: Sequence[Taught]) -> float:
        """The weight of all labels that are learned."""
        return weigh_samples(samples)

    def batches(self, samples: Sequence[Taught], tokens: int) -> list[tuple[Batch, Said]]:
        """As those of supervised fine-tuning, each with what the teacher says of it."""
        lengths = [len(sample.input_ids) for sample in samples]
        return [_with_teacher(samples[part]) for part in neighbours(lengths, tokens)]

    def outcome(self, model: PreTrainedModel, batch: tuple[Batch, Said]) -> Outcome:
        """The weighted sum of the losses at the labels."""
        tokens, said = batch
        states_NH, labels_N = label_states(model, tokens)
        weights_N = label_weights(tokens)
        weights_N = None if weights_N is None else weights_N.to(states_NH.device, non_blocking=True)
        loss = Divergence(
            labels_N, said.to(states_NH.device), width=self.width, beta=self.options.beta,
            temperature=self.options.temperature, share=self.options.share,
        )  # fmt: skip
        total = weighted_loss(states_NH, weights_N, output_head(model), loss)[0]
        return Outcome(total, {"kd_loss": _sum(loss.apart, weights_N), "nll_loss": _sum(loss.missed, weights_N)})

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """By label."""
        return {name: value / count for name, value in sums.items()}

    def evaluate(
        self, model: PreTrainedModel, samples: Sequence[Taught], tokens: int, processes: Processes = ALONE
    ) -> DistillEvaluation:
        """The mean over all labels; dropout is off, and the training mode is kept."""
        own, sums = processes.share(samples), torch.zeros(5, dtype=torch.float64)
        with torch.no_grad(), evaluating(model):
            for batch in self.batches(own, tokens):
                found = self.outcome(model, batch)
                values = [found.loss, *(found.metrics[name] for name in self.names)]
                sums += torch.tensor([*map(float, values), weigh_labels(batch[0]), count_labels(batch[0])])
        loss, apart, missed, weight, labels = processes.add(sums.to(model.device)).tolist()
        metrics = self.means({"kd_loss": apart, "nll_loss": missed}, weight or 1.0)
        return DistillEvaluation(loss / (weight or 1.0), len(samples), int(labels), metrics)


def _with_teacher(samples: Sequence[Taught]) -> tuple[Batch, Said]:
    """The samples in one row, and what the teacher says at their labels."""
    said = [sample.said for sample in samples if sample.said is not None]
    batch = collate(samples)
    assert sum(map(len, said)) == count_labels(batch)
    return batch, Said.joined(said)


def _sum(each_N: Tensor, weights_N: Tensor | None) -> Tensor:
    return each_N.sum() if weights_N is None else each_N @ weights_N
