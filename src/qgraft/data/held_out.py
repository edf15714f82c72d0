"""Which rows of a dataset a run keeps back for evaluation: the same ones whenever they are asked for again.

The choice depends on the number of rows that gave samples, the share, and the seed alone. A merge asks for it long after
the training, so that it measures on rows that the adapter has not seen.
"""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

from qgraft.data.label_samples import LabelSample
from qgraft.data.pairs import PairSample
from qgraft.data.preference_samples import Preference
from qgraft.data.tokenizing import Sample
from qgraft.errors import DataError

Row = TypeVar("Row", bound=Sample | Preference | LabelSample | PairSample)


def hold_out(samples: Sequence[Row], val_size: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and held-out samples; all of a row are on one side."""
    rows: list[list[Row]] = []
    for sample in samples:
        if not sample.part:
            rows.append([])
        rows[-1].append(sample)
    count = math.ceil(len(rows) * val_size) if val_size < 1 else int(val_size)
    if count >= len(rows):
        raise DataError(f"val_size={val_size} leaves no sample to train on: there are {len(rows)}")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    sides = [[row for number, row in enumerate(rows) if (number in chosen) == held_out] for held_out in (False, True)]
    training, held = ([sample for row in side for sample in row] for side in sides)
    return training, held
