"""Samples whose last answer is another one, drawn in training: all before the last stretch that is learned is its prompt."""

from collections.abc import Sequence

from qgraft.data.tokenizing import IGNORED, Sample
from qgraft.training.stages import DistillOptions


def answer_begins(sample: Sample) -> int:
    """Where the last stretch of a sample begins that is learned."""
    last = max(place for place, label in enumerate(sample.labels) if label != IGNORED)
    while last > 1 and sample.labels[last - 1] != IGNORED:  # the first token has none before it to be predicted from
        last -= 1
    return last


def answered(sample: Sample, begins: int, answer: list[int]) -> Sample:
    """The sample with another answer, which weighs what the first token of its own does."""
    weights = None if sample.weights is None else [0.0] * begins + [sample.weights[begins]] * len(answer)
    labels = [IGNORED] * begins + answer
    return Sample([*sample.input_ids[:begins], *answer], labels, sample.source, weights, sample.part)


def room_behind(begins: int, limit: int, options: DistillOptions) -> int:
    """How many tokens may be drawn behind a prompt; one at least."""
    return max(min(options.max_new_tokens, limit - begins), 1)


def longest_samples(samples: Sequence[Sample], limit: int, options: DistillOptions) -> list[Sample]:
    """The samples as long as they may become: their own answers again and again."""
    grown = []
    for sample in samples:
        begins = answer_begins(sample)
        own = sample.input_ids[begins:]
        room = max(room_behind(begins, limit, options), len(own) if options.learns_rows else 0)
        grown.append(answered(sample, begins, (own * (room // len(own) + 1))[:room]))
    return grown
