"""Learning to classify texts, or their words: an Objective (objective.py) for models with the head of a classifier.

    single_label_classification    cross-entropy of the label
    multi_label_classification     binary cross-entropy of each label, in the mean
    regression                     (logit - number)^2
    words (TOKEN_CLS)              cross-entropy at the first token of each word

The loss of a step is the mean over its texts, or its words, whatever batches they pass in: what transformers' models compute
of one batch. Beside it the share that is right is logged, and of held-out rows macro-F1 as well: the mean of
F1 = 2 tp / (2 tp + fp + fn) over the labels that were expected or predicted, which one frequent label does not make look
well. Several labels of a text are right together or not; each counts where its probability is above a half.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.adapters.base import alone
from qgraft.data.batches import IGNORED
from qgraft.data.label_samples import LabelSample
from qgraft.data.label_schemes import NUMBER, SEVERAL
from qgraft.linear import computing
from qgraft.memory.budget import CPU_EVAL_TOKENS, GPU_EVAL_TOKENS
from qgraft.passes.decoder import evaluating
from qgraft.passes.labels import Classifier, labelled_logits
from qgraft.training.objective import Outcome
from qgraft.training.processes import ALONE, Processes

METRICS = ("accuracy", "macro_f1", "mse", "mae")  # whatever is said beside the loss of held-out rows


@dataclass(frozen=True)
class LabelEvaluation:
    """The mean loss over the texts, or words, and what of METRICS the problem has.

    Of the dataset's rows, `dropped` gave no sample, and `truncated` were cut at max_length; `labels` were measured.
    """

    loss: float
    samples: int
    labels: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    dropped: int = 0
    truncated: int = 0

    def as_dict(self) -> dict[str, float]:
        """All numbers by name, for JSON."""
        return {"loss": self.loss, **self.metrics, "samples": self.samples, "labels": self.labels,
                "dropped": self.dropped, "truncated": self.truncated}  # fmt: skip


class Classification:
    """An Objective, see objective.py."""

    def __init__(self, classifier: Classifier, label_smoothing: float = 0.0) -> None:
        self.classifier, self.smoothing = classifier, label_smoothing
        self.names: Sequence[str] = ("mse",) if classifier.problem == NUMBER else ("accuracy",)

    def begin(
        self,
        model: PreTrainedModel,
        every: Sequence[LabelSample],
        own: Sequence[LabelSample],
        tokens: int,
        processes: Processes,
        step: int,
    ) -> tuple[list[LabelSample], float]:
        """As they are, and how many there are: each text, or word, is learned by itself."""
        return list(own), self.count(every)

    def count(self, samples: Sequence[LabelSample]) -> float:
        """The texts, or the words with a label."""
        if not self.classifier.words:
            return float(len(samples))
        return float(sum(label != IGNORED for sample in samples for label in sample.labels))

    def batches(self, samples: Sequence[LabelSample], tokens: int) -> list[dict[str, Tensor]]:
        """Padded, see data/label_samples.py."""
        return self.classifier.batches(samples, tokens)

    def outcome(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Outcome:
        """The sum of the losses, and of what is right."""
        logits, labels = labelled_logits(model, batch, self.classifier)
        loss = summed_loss(logits, labels, self.classifier.problem, self.smoothing)
        if self.classifier.problem == NUMBER:
            return Outcome(loss, {"mse": loss.detach()})
        right = (predicted(logits.detach(), self.classifier.problem) == labels).reshape(len(labels), -1).all(-1)
        return Outcome(loss, {"accuracy": right.sum()})

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, float]:
        """As they are logged."""
        return {name: value / count for name, value in sums.items()}

    def evaluate(
        self, model: PreTrainedModel, samples: Sequence[LabelSample], tokens: int, processes: Processes = ALONE
    ) -> LabelEvaluation:
        """The mean loss on these rows, without smoothing; dropout is off, and the training mode is kept."""
        return evaluate_labelled(model, samples, self.classifier, tokens, processes=processes)


def summed_loss(logits: Tensor, labels: Tensor, problem: str, smoothing: float = 0.0) -> Tensor:
    """The sum over the texts, or words, of logits [n, labels]."""
    if problem == NUMBER:
        return F.mse_loss(logits[:, 0], labels, reduction="sum")
    if problem == SEVERAL:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / logits.shape[-1]
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)


def predicted(logits: Tensor, problem: str) -> Tensor:
    """Of logits [n, labels]: the likeliest label [n], which labels hold [n, labels] float32, or the number [n]."""
    if problem == NUMBER:
        return logits[:, 0]
    return (logits > 0).float() if problem == SEVERAL else logits.argmax(-1)


@torch.no_grad()
def passed(
    model: PreTrainedModel, samples: Sequence[LabelSample], classifier: Classifier, tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, labels) of batch after batch; in which order, label_batches says."""
    for batch in classifier.batches(samples, tokens):
        yield labelled_logits(model, batch, classifier)


@torch.no_grad()
@alone("evaluated")
def evaluate_labelled(
    model: PreTrainedModel,
    samples: Sequence[LabelSample],
    classifier: Classifier,
    tokens: int | None = None,
    compute: str | None = None,
    processes: Processes = ALONE,
) -> LabelEvaluation:
    """The loss and the metrics on samples, so many tokens in a pass. The model's training mode is kept.

    Args:
        compute: how products are computed, see QuantizedLinear; None for as they are.
        processes: those that share the work, each with all samples.
    """
    tokens = tokens or (GPU_EVAL_TOKENS if model.device.type == "cuda" else CPU_EVAL_TOKENS)
    problem, many = classifier.problem, len(classifier.scheme.names)
    sums = torch.zeros(4 + 3 * many, dtype=torch.float64, device=model.device)  # loss, n, right, |error|; tp, fp, fn
    with nullcontext() if compute is None else computing(model, compute), evaluating(model):
        for logits, labels in passed(model, processes.share(samples), classifier, tokens):
            sums += _sums(logits, labels, problem, many)
    loss, count, right, error, *each = processes.add(sums).tolist()
    n = count or 1.0
    metrics = {"mse": loss / n, "mae": error / n}
    if problem != NUMBER:
        metrics = {"accuracy": right / n, "macro_f1": macro_f1(each[:many], each[many : 2 * many], each[2 * many :])}
    return LabelEvaluation(loss / n, len(samples), int(count), metrics)


def macro_f1(hits: Sequence[float], false: Sequence[float], missed: Sequence[float]) -> float:
    """The mean of F1 over the labels that were expected or predicted; 0 where none was."""
    found = [2 * tp / (2 * tp + fp + fn) for tp, fp, fn in zip(hits, false, missed, strict=True) if tp + fp + fn]
    return sum(found) / len(found) if found else 0.0


def _sums(logits: Tensor, labels: Tensor, problem: str, many: int) -> Tensor:
    """What evaluate_labelled adds up, of one batch."""
    loss, said = summed_loss(logits, labels, problem), predicted(logits, problem)
    if problem == NUMBER:
        numbers = [loss, loss.new_tensor(len(labels)), loss.new_zeros(()), (said - labels).abs().sum()]
        return torch.cat([torch.stack(numbers), loss.new_zeros(3 * many)]).double()
    right = (said == labels).reshape(len(labels), -1).all(-1).sum()
    told, true = (each if problem == SEVERAL else F.one_hot(each, many).float() for each in (said, labels))
    counts = [(told * true).sum(0), (told * (1 - true)).sum(0), ((1 - told) * true).sum(0)]
    numbers = [loss, loss.new_tensor(len(labels)), right.to(loss), loss.new_zeros(())]
    return torch.cat([torch.stack(numbers), *counts]).double()
