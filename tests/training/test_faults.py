"""Whatever goes wrong in a run, wherever it does: the same command again ends in what a run comes to that nothing befell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("faults.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


@pytest.mark.parametrize("first, count", [(0, 15), pytest.param(15, 285, marks=pytest.mark.slow)])
def test_a_run_that_something_befell_ends_as_if_nothing_had(first: int, count: int) -> None:
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(first), str(count)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert not found["wrong"], "\n\n".join(found["wrong"])
    endings = {"killed", "error", "signalled"}
    assert sum(found["counts"].values()) == count
    assert all(any(ending in name for name in found["counts"]) for ending in endings), found["counts"]
