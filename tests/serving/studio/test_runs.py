"""What is read of a run, whatever state its files are in."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qgraft.serving.studio.children import Children, Job
from qgraft.serving.studio.runs import curves, newest_checkpoint, summary, thinned


@pytest.fixture
def jobs(tmp_path: Path) -> Children:
    (tmp_path / ".qgraft").mkdir()
    return Children(tmp_path / ".qgraft")


def written(tmp_path: Path, run: Any = None, lines: str = "") -> Path:
    path = tmp_path / "run"
    path.mkdir(exist_ok=True)
    if run is not None:
        (path / "run.json").write_text(run if isinstance(run, str) else json.dumps(run))
    (path / "metrics.jsonl").write_text(lines)
    return path


def test_a_line_that_is_being_written_and_numbers_that_are_none(tmp_path: Path, jobs: Children) -> None:
    lines = '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n\nnoise\n{"step": 3, "loss": 1.5, "epoch": 1.0}\n'
    lines += '{"step": 4, "lo'
    path = written(tmp_path, {"planned_steps": 9, "steps": 0, "metrics": {"x": float("inf")}}, lines)
    assert curves(path)["loss"] == [[1, 2.5], [3, 1.5]]
    told = summary("run", path, jobs)
    assert (told["steps"], told["planned_steps"], told["loss"], told["epoch"]) == (3, 9, 1.5, 1.0)
    assert told["state"] == "begun" and told["metrics"] == {"x": None}
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize("run", ["", "{", "[]", '{"arguments": 3, "metrics": [], "dataset": "x", "notes": 5}'])
def test_a_run_json_that_is_none(tmp_path: Path, jobs: Children, run: str) -> None:
    assert summary("run", written(tmp_path, run), jobs)["state"] == "begun"


def test_states(tmp_path: Path, jobs: Children) -> None:
    path = written(tmp_path, {"finished": False})
    (path / "checkpoint-3").mkdir()
    assert newest_checkpoint(path) is None  # it is being written
    for step in (3, 20):
        (path / f"checkpoint-{step}").mkdir(exist_ok=True)
        (path / f"checkpoint-{step}" / "manifest.json").write_text("{}")
    assert newest_checkpoint(path) == (20, path / "checkpoint-20")
    assert summary("run", path, jobs)["state"] == "stopped"
    (path / ".lock").write_text(f"{os.getpid()} here\n")
    assert summary("run", path, jobs)["state"] == "training"
    (path / ".lock").write_text("999999999 here\n")
    assert summary("run", path, jobs)["state"] == "stopped"
    jobs._jobs["train", "run"] = Job("train", "run", [], 999999999, 1.0, 1.0, code=2, ended=2.0)
    jobs.log("train", "run").write_text("note: x\nerror: the disk is full\nhint: free some\n")
    failed = summary("run", path, jobs)
    assert failed["state"] == "failed" and failed["error"] == "error: the disk is full\nhint: free some"
    written(tmp_path, {"finished": True})
    assert summary("run", path, jobs)["state"] == "finished"


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    points = [[step, 1.0] for step in range(10_001)]
    few = thinned(points, 100)
    assert len(few) <= 101 and few[0] == points[0] and few[-1] == points[-1]
    assert thinned(points[:50], 100) == points[:50]
