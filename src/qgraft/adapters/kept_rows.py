"""Rows of its training that an adapter brings, so that it can be merged where the training set is not.

    learned    up to KEPT_TOKENS tokens, drawn from all rows that the run learned: a merge calibrates on them
    held out   up to HELD_TOKENS tokens, drawn from all rows that it held out: what the merge kept is measured on them

A row is kept as the run saw it, in token ids, so nothing has to be read, templated or tokenized again. What a merge computes
from rows (second moments of the inputs of each layer) was not chosen: for a model of 6 billion weights these are 20 GB; those
gathered while training belong to an adapter that has moved on since; and a merge solves each layer on what the merged
layers before it give, measures, and tunes layers together, for which moments are of no use. The file of these rows is
described in adapter_files/calibration.py.
"""

import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KEPT_TOKENS, HELD_TOKENS = 16384, 2048
LONGEST = 512  # tokens of a row; longer ones are cut


@dataclass(frozen=True)
class KeptRow:
    """One sample.

    Attributes:
        ids: of its tokens, int32.
        weights: of the loss of each token, float32; 0 where it is not learned.
        text: a hash of what the tokenizer called these ids: with another one they may mean something else.
    """

    ids: "array[int]"
    weights: "array[float]"
    held_out: bool
    text: int

    @property
    def key(self) -> tuple[bytes, bytes]:
        """What two rows have in common that are one."""
        return self.ids.tobytes(), self.weights.tobytes()


@dataclass(frozen=True)
class KeptRows:
    """The rows of an adapter, in the order of its training set.

    Attributes:
        learned: how many rows there were to choose those from that were learned.
    """

    rows: tuple[KeptRow, ...]
    learned: int

    def of(self, held_out: bool) -> list[KeptRow]:
        """Those that were held out, or those that were learned."""
        return [row for row in self.rows if row.held_out == held_out]


def united_rows(every: Sequence[KeptRows]) -> KeptRows:
    """The rows of several adapters; those of one as they are.

    Held-out rows are those that no adapter learned, and there are some only where every one of them held some out.
    """
    if len(every) == 1:
        return every[0]
    learned, held = (_once(each.of(part) for each in every) for part in (False, True))
    known = {row.key for row in learned}
    if not all(each.of(held_out=True) for each in every):
        held = []
    few = [*_few(learned, KEPT_TOKENS), *_few([row for row in held if row.key not in known], HELD_TOKENS)]
    shared = sum(len(each.of(held_out=False)) for each in every) - len(learned)
    return KeptRows(tuple(few), sum(each.learned for each in every) - shared)


def rows_of_all(every: Sequence[KeptRows | None]) -> KeptRows | None:
    """The rows of an adapter that is made of several; None where one of them keeps none.

    A merge on the rows of some would keep what these learned and lose the others, so there it has to be given rows.
    """
    found = [each for each in every if each is not None]
    return united_rows(found) if found and len(found) == len(every) else None


def _few(rows: Sequence[KeptRow], tokens: int) -> list[KeptRow]:
    return [rows[number] for number in drawn([len(row.ids) for row in rows], tokens, 0)]


def _once(every: Iterable[Iterable[KeptRow]]) -> list[KeptRow]:
    """The rows of several adapters; one that an adapter before had is left out, one that stands twice in its set is not."""
    rows, known = list[KeptRow](), set[tuple[bytes, bytes]]()
    for own in every:
        new = [row for row in own if row.key not in known]
        rows += new
        known |= {row.key for row in new}
    return rows


def drawn(sizes: Sequence[int], tokens: int, seed: int) -> list[int]:
    """The numbers of rows of these sizes, at random, with at most so many tokens together; in their order."""
    taken, total = list[int](), 0
    for number in random.Random(seed).sample(range(len(sizes)), len(sizes)):
        total += sizes[number]
        if total > tokens:
            break
        taken.append(number)
    return sorted(taken)
