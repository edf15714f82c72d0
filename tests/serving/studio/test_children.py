"""Jobs in processes of their own: one at a time, lower priority, ended in order, found again."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from waiting import until

import qgraft
from qgraft.serving.fields import ApiError
from qgraft.serving.studio import children
from qgraft.serving.studio.children import NICE, Children, Job


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is started instead of Python: it says its words, and ends with 143 when it is asked to."""
    script = tmp_path / "sleeper"
    script.write_text('#!/bin/sh\ntrap "echo leaving; exit 143" TERM\necho "$@"\nwhile :; do sleep 0.05; done\n')
    script.chmod(0o755)
    monkeypatch.setattr(children.sys, "executable", str(script))
    folder = tmp_path / "work" / ".qgraft"
    folder.mkdir(parents=True)
    return folder


def test_one_job_runs_at_a_time_and_ends_when_asked(sleeper: Path) -> None:
    jobs = Children(sleeper)
    job = jobs.start("train", "law", ["train", "x.json"])
    assert psutil.Process(job.pid).nice() == min(os.nice(0) + NICE, 19)
    until(lambda: "-m qgraft train x.json" in jobs.tail("train", "law"))
    with pytest.raises(ApiError, match="'law' is running"):
        jobs.start("merge", "other", ["merge"])
    with pytest.raises(ApiError, match="not running"):
        jobs.stop("merge", "law")
    jobs.stop("train", "law")
    jobs.stop("train", "law")  # asked once more it is not killed: that would lose its checkpoint
    until(lambda: jobs.jobs("train")["law"].code is not None)
    assert jobs.jobs("train")["law"].code == 143 and jobs.running() is None
    assert jobs.tail("train", "law").endswith("leaving\n")
    jobs.start("merge", "other", ["merge"])
    jobs.close(60)
    assert not psutil.pid_exists(job.pid)
    until(lambda: jobs.running() is None)


def test_a_server_that_was_killed_finds_its_jobs(sleeper: Path) -> None:
    process = subprocess.Popen([children.sys.executable, "train"])  # as one that is no more has left it
    created = psutil.Process(process.pid).create_time()
    job = Job("train", "law", ["train"], process.pid, created, created)
    (sleeper / "train-law.json").write_text(json.dumps(asdict(job)))
    jobs = Children(sleeper)
    running = jobs.running()
    assert running is not None and (running.name, running.pid) == ("law", process.pid)
    with pytest.raises(ApiError, match="is running"):
        jobs.start("merge", "other", ["merge"])
    jobs.close(0.0)  # it is not this server's
    assert process.poll() is None
    jobs.stop("train", "law")
    assert process.wait(60) in (143, -signal.SIGTERM)  # it may not have come to its own word yet
    until(lambda: jobs.running() is None)
    ended = Children(sleeper).jobs("train")["law"]
    assert ended.code == -1 and ended.asked_to_stop


def test_a_number_that_another_process_has_now_is_not_a_job(sleeper: Path) -> None:
    jobs = Children(sleeper)
    jobs.start("train", "law", ["train"])
    jobs.close(60)
    until(lambda: jobs.running() is None)
    path = sleeper / "train-law.json"
    text = re.sub(r'"code": -?\d+', '"code": null', path.read_text())
    path.write_text(text.replace(f'"pid": {jobs.jobs("train")["law"].pid}', f'"pid": {os.getpid()}'))
    again = Children(sleeper)
    assert again.running() is None and again.jobs("train")["law"].code == -1
    (sleeper / "train-odd.json").write_text("[1]")
    (sleeper / "train-odder.json").write_text("{")
    assert set(Children(sleeper).jobs("train")) == {"law"}


def test_the_command_is_this_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was found by a path that begins in the current folder, which a child's is not."""
    monkeypatch.setenv("PYTHONPATH", os.path.relpath(Path(qgraft.__file__).parents[1]))
    folder = tmp_path / ".qgraft"
    folder.mkdir()
    jobs = Children(folder)
    jobs.start("train", "said", ["version"])
    until(lambda: jobs.running() is None)
    assert jobs.jobs("train")["said"].code == 0 and jobs.tail("train", "said").startswith("qgraft ")
    assert os.path.exists(sys.executable)
