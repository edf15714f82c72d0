"""Whatever goes wrong in a run, wherever it does: the same command again ends in the bytes of a run where nothing did."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("faults.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


def outcomes(model: Path, folder: Path, seeds: range) -> list[dict[str, Any]]:
    words = [sys.executable, str(DRIVER), str(model), str(folder), *map(str, seeds)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "seeds",
    [*(range(start, 60, 4) for start in range(4)), pytest.param(range(60, 300), marks=pytest.mark.slow)],
    ids=["0", "1", "2", "3", "240 more"],
)
def test_a_fault_anywhere_leaves_no_trace(tiny_gguf: Any, tmp_path: Path, seeds: range) -> None:
    found = outcomes(tiny_gguf("llama").path, tmp_path, seeds)
    assert len(found) == len(seeds)
    for each in found:
        assert each["whole"] == "finished", each
        assert each["first"].startswith(("finished", "stopped", "error: StorageError", "signal 9")), each
        assert each["again"] == "finished" and each["same"] and each["left"] == [], each
    kinds = collections.Counter((each["fault"], each["first"].partition(":")[0]) for each in found)
    assert kinds["kill", "signal 9"] and kinds["full", "error"] and kinds["terminate", "stopped"]
