"""Padding-free batches: the samples of a batch one after another in one row, told apart by their positions.

    tokens      a0 a1 a2 a3 | b0 b1 b2 | c0 c1 ...
    positions    0  1  2  3 |  0  1  2 |  0  1 ...       transformers separates the samples where a position is 0
    labels      a1 a2 a3  - | b1 b2  - | c1 c2 ...       already shifted: the token that each position predicts
    weights     of the labels, shifted likewise; only where a sample has some that are not 1

Random batches of short instructions are 40 to 60 % padding in the usual layout; here they have none. A batch is the
`per_device_train_batch_size` samples that one would expect, so steps and epochs mean what they mean everywhere; when
it has more tokens than the budget, it passes through the model in several parts whose gradients add up to exactly the
gradient of the whole. The budget bounds the memory of activations, whatever the batch size.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from qgraft.data.tokenizing import IGNORED, Sample

Batch = dict[str, Tensor]  # input_ids, position_ids, labels: int64 [1, tokens]; weights: float32, or not there

__all__ = [
    "IGNORED",
    "Batch",
    "collate",
    "count_labels",
    "label_weights",
    "neighbours",
    "spans",
    "split_batch",
    "weigh_labels",
    "weigh_samples",
]


def collate(samples: Sequence[Sample]) -> Batch:
    """One padding-free batch of whole samples, in their order."""
    ids = list(chain.from_iterable(sample.input_ids for sample in samples))
    positions = [torch.arange(len(sample.input_ids)) for sample in samples]
    labels = list(chain.from_iterable((*sample.labels[1:], IGNORED) for sample in samples))
    batch = {
        "input_ids": torch.tensor([ids], dtype=torch.int64),
        "position_ids": torch.cat(positions or [torch.arange(0)])[None],
        "labels": torch.tensor([labels], dtype=torch.int64),
    }
    if any(sample.weights is not None for sample in samples):
        weights = [weight for sample in samples for weight in (*_weights(sample)[1:], 0.0)]
        batch["weights"] = torch.tensor([weights], dtype=torch.float32)
    return batch


def _weights(sample: Sample) -> list[float]:
    return sample.weights or [float(label != IGNORED) for label in sample.labels]


def split_batch(batch: Batch, budget: int) -> list[Batch]:
    """Parts of at most `budget` tokens each, cut between samples; a longer sample is a part of its own.

    As few parts as possible, and of those cuts one whose largest part is smallest: it takes the least memory.
    """
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], batch["input_ids"].shape[1]]
    bounds = spans(list(zip(starts, ends, strict=True)), budget)
    return [{key: value[:, start:end] for key, value in batch.items()} for start, end in bounds]


def spans(samples: list[tuple[int, int]], budget: int) -> list[tuple[int, int]]:
    """The bounds of parts of samples with these (start, end), as split_batch cuts them."""
    bounds = _cut(samples, budget)
    low, high = 0, max((end - start for start, end in bounds), default=0)
    while low < high:
        middle = (low + high) // 2
        fewer = _cut(samples, middle)
        low, high, bounds = (low, middle, fewer) if len(fewer) == len(bounds) else (middle + 1, high, bounds)
    return bounds


def neighbours(lengths: Sequence[int], tokens: int) -> Iterator[slice]:
    """Which of some samples of these lengths go together, with at most so many tokens; one alone may have more."""
    bounds = [0, *accumulate(lengths)]
    places = {bound: place for place, bound in enumerate(bounds)}
    for start, end in spans(list(pairwise(bounds)), tokens):
        yield slice(places[start], places[end])


def _cut(samples: list[tuple[int, int]], budget: int) -> list[tuple[int, int]]:
    """The bounds of parts, each of which takes as many samples as the budget allows."""
    bounds: list[tuple[int, int]] = []
    for start, end in samples:
        if bounds and end - bounds[-1][0] <= budget:
            bounds[-1] = (bounds[-1][0], end)
        else:
            bounds.append((start, end))
    return bounds


def count_labels(batch: Batch) -> int:
    """How many tokens of the batch are learned."""
    return int((batch["labels"] != IGNORED).sum())


def label_weights(batch: Batch) -> Tensor | None:
    """What the loss of each label is multiplied by, [labels] float32; None where each counts once."""
    weights = batch.get("weights")
    return None if weights is None else weights[0][batch["labels"][0] != IGNORED]


def weigh_labels(batch: Batch) -> float:
    """What a loss summed over the labels of the batch is divided by for their mean: the sum of their weights."""
    weights = label_weights(batch)
    return float(count_labels(batch)) if weights is None else float(weights.double().sum())


def weigh_samples(samples: Sequence[Sample]) -> float:
    """The same of samples that are no batch yet."""
    if all(sample.weights is None for sample in samples):  # a GPU waits while its next batch is made
        return float(sum(len(sample.labels[1:]) - sample.labels[1:].count(IGNORED) for sample in samples))
    weights = [weight for sample in samples for weight in _weights(sample)[1:]]
    return float(torch.tensor(weights, dtype=torch.float32).double().sum())
