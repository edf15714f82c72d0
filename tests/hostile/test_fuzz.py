"""A little of what fuzz.py does for as long as one likes: every change to a file is read, or refused by an error of ours."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fuzz import KINDS, run


@pytest.mark.parametrize(("kind", "cases"), [("adapter", 120), ("folder", 25), ("yaml", 25)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_changed_files_end_well(kind: str, cases: int, seed: int, tmp_path: Path) -> None:
    sources, read = KINDS[kind](tmp_path)
    for source in sources:
        read(source)  # as it is, it loads
    tally = run(sources, read, tmp_path / "case", random.Random(seed), cases=cases * (1 if seed == 0 else 20))
    assert not tally.faults, str(tally)
    assert min(tally.ends["read"], tally.ends["refused"]) > 0
