"""Samples that begin alike in one row, with their beginnings in it once: rows of a template begin with its system prompt.

    samples    s s s q q a a | s s s q a | t t
    row        s s s q q a a   q a         t t        positions 0 1 2 3 4 5 6  3 4  0 1

What a model computes of a token depends on what is before it in its sample alone, so it is the same in all of them, and
attention is the only part that must be told (shared_prompts.py). Whether a model does no more than that over its row is found
out on the two samples that have most in common. Of the rows that a merge of SmolLM2-135M is given a quarter is its system
prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.attention import SAMPLES, attention_of
from qgraft.data.tokenizing import IGNORED, Sample
from qgraft.passes.log_probs import Texts, agree, lay_out
from qgraft.shared_prompts import SharedPrompts

LEAST = 1 / 16  # of all tokens that must be copies of others for it to be worth a trial


@dataclass(frozen=True)
class Row:
    """Tokens as they pass.

    Attributes:
        ids, positions: of each.
        texts: of each sample the places of its tokens.
    """

    ids: list[int]
    positions: list[int]
    texts: list[list[int]]

    def shared(self, streams: int = 1) -> SharedPrompts | None:
        """How attention sees it, where it is in a row so many times; None where no token stands for several."""
        count = len(self.ids)
        if sum(map(len, self.texts)) == count:
            return None
        texts = [[place + n * count for place in text] for n in range(streams) for text in self.texts]
        return SharedPrompts.of(texts, streams * count)


def row_of(samples: Sequence[list[int]], share: bool) -> Row:
    """The samples' tokens, in alphabetical order where beginnings are shared, else one sample after another."""
    row, before = Row([], [], [[] for _ in samples]), -1
    order = sorted(range(len(samples)), key=lambda n: samples[n]) if share else range(len(samples))
    for number in order:
        ids = samples[number]
        same = _common(samples[before], ids) if share and before >= 0 else 0
        places = range(len(row.ids), len(row.ids) + len(ids) - same)
        row.texts[number].extend([*row.texts[before][:same], *places])
        row.ids.extend(ids[same:])
        row.positions.extend(range(same, len(ids)))
        before = number
    return row


def lay_out_samples(samples: Sequence[Sample], share: bool) -> Texts:
    """The samples' labels in their order, whatever the order of the tokens."""
    row = row_of([sample.input_ids for sample in samples], share)
    places, targets, counts = list[int](), list[int](), list[int]()
    for sample, text in zip(samples, row.texts, strict=True):
        learned = [at for at, label in enumerate(sample.labels) if at and label != IGNORED]
        places += [text[at - 1] for at in learned]
        targets += [sample.labels[at] for at in learned]
        counts.append(len(learned))
    return Texts(
        _tensor(row.ids)[None],
        _tensor(row.positions)[None],
        _tensor(places),
        _tensor(targets),
        tuple(counts),
        row.shared(),
    )


def shares_beginnings(model: PreTrainedModel, samples: Sequence[Sample]) -> bool:
    """Whether these samples can have what they begin with in a pass once, and it is worth it."""
    if attention_of(model) != SAMPLES or len(samples) < 2:
        return False
    pairs = list(pairwise(sorted(samples, key=lambda sample: sample.input_ids)))
    common = [_common(one.input_ids, other.input_ids) for one, other in pairs]
    if sum(common) < LEAST * sum(sample.length for sample in samples):
        return False

    def rank(number: int) -> tuple[bool, int, int]:
        """Pairs of which neither is a part of the other come first: a mere copy would not show what a pass mixes."""
        lengths = [sample.length for sample in pairs[number]]
        return common[number] < min(lengths), common[number], sum(lengths)

    pair = pairs[max(range(len(pairs)), key=rank)]
    return agree(model, lay_out([pair], [0]), lay_out_samples(pair, share=True))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def multiplicities(texts: Sequence[Sequence[int]], tokens: int) -> Tensor:
    """In how many of these texts each token of a row is, [tokens] int64."""
    return torch.bincount(_tensor([place for text in texts for place in text]), minlength=tokens)


def _tensor(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)
