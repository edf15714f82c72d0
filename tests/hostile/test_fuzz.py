"""A little of what fuzz.py does for as long as one likes: every change to a file is read, or refused by an error of ours."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fuzz import KINDS, run

from qgraft.errors import CheckpointError


@pytest.mark.parametrize(("kind", "cases"), [("adapter", 120), ("folder", 25), ("yaml", 25)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_changed_files_end_well(kind: str, cases: int, seed: int, tmp_path: Path) -> None:
    sources, read = KINDS[kind](tmp_path)
    for source in sources:
        read(source)  # as it is, it loads
    tally = run(sources, read, tmp_path / "case", random.Random(seed), cases=cases * (1 if seed == 0 else 20))
    assert not tally.faults, str(tally)
    assert min(tally.ends["read"], tally.ends["refused"]) > 0


def test_a_token_with_an_id_beyond_any_vocabulary(tmp_path: Path) -> None:
    """Found by fuzzing: the tokenizers package counts up to it, for minutes and gigabytes."""
    sources, read = KINDS["folder"](tmp_path)
    path = sources[0] / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"][list(content["model"]["vocab"])[-1]] = 2**28
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="id 268435456, expected at most"):
        read(sources[0])
