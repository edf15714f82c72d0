"""Training and merging in child processes: `python -m qgraft train ...`, at a lower priority than the server.

A child has a process of its own so that its memory, its threads and its end are not the server's. One runs at a time: two
would only slow each other down. What is started is written into a file, with the process's number and the time at which
it began, so that a server which was killed finds what still runs, and the page what became of it:

    .qgraft/train-NAME.json       {kind, name, words, pid, created, began, code, ended}
    .qgraft/train-NAME.log        what it writes to the terminal

Stopping is SIGTERM: training finishes its step and leaves a checkpoint, a merge leaves the layers that it has solved; the
same words go on from there.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from qgraft import storage
from qgraft.serving.fields import ApiError
from qgraft.serving.studio.workplace import read_or_none

NICE = 10
TAIL = 4000  # bytes of a log that are shown


@dataclass
class Job:
    """One command that was started. `code` is its exit code, None while it runs; -1 where nobody saw it end."""

    kind: str
    name: str
    words: list[str]
    pid: int
    created: float
    began: float
    code: int | None = None
    ended: float | None = None
    asked_to_stop: bool = False


class Children:
    """The jobs of a folder. Those that run are found again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._jobs: dict[tuple[str, str], Job] = {}
        self._own: list[subprocess.Popen[bytes]] = []
        for path in sorted(folder.glob("*-*.json")):
            job = _read(path)
            if job is not None:
                self._jobs[job.kind, job.name] = job
        self.settle()

    def jobs(self, kind: str) -> dict[str, Job]:
        """Those of a kind, by their names."""
        self.settle()
        with self._lock:
            return {name: job for (each, name), job in self._jobs.items() if each == kind}

    def running(self) -> Job | None:
        """The one that runs."""
        self.settle()
        with self._lock:
            return next((job for job in self._jobs.values() if job.code is None), None)

    def require_idle(self) -> None:
        """Raise ApiError 409 where one runs."""
        if (job := self.running()) is not None:
            raise ApiError(409, f"{job.kind} {job.name!r} is running: stop it, or wait for its end", retry_after=5)

    def start(self, kind: str, name: str, words: Sequence[str]) -> Job:
        """Start `qgraft words...`. Raises ApiError 409 where another one runs."""
        with self._lock:
            self.require_idle()
            with storage.child_log(self.log(kind, name)) as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "qgraft", *words], cwd=self.folder.parent, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log, start_new_session=True, env=_environment(),
                )  # fmt: skip
            child = psutil.Process(process.pid)
            with suppress(psutil.Error):  # it has ended already
                child.nice(lower_priority())
            job = Job(kind, name, list(words), process.pid, _created(process.pid) or 0.0, time.time())
            self._jobs[kind, name] = job
            self._own.append(process)
            self._write(job)
        threading.Thread(target=self._wait, args=(process, job), daemon=True).start()
        return job

    def stop(self, kind: str, name: str) -> None:
        """Ask a job to end in order. Raises ApiError 404 where it does not run."""
        self.settle()
        with self._lock:
            job = self._jobs.get((kind, name))
            if job is None or job.code is not None:
                raise ApiError(404, f"{kind} {name!r} is not running", kind="NotFoundError", param="name")
            with suppress(psutil.NoSuchProcess):
                if not job.asked_to_stop:  # a second signal would end it without a checkpoint
                    psutil.Process(job.pid).terminate()
            job.asked_to_stop = True
            self._write(job)

    def rename(self, kind: str, name: str, new: str) -> None:
        """Know what is remembered of a job that has ended under another name."""
        with self._lock:
            job = self._jobs.pop((kind, name), None)
            if job is not None:
                job.name = new
                self._jobs[kind, new] = job
                self._write(job)
                self._path(kind, name, "json").unlink(missing_ok=True)
                if self.log(kind, name).is_file():
                    self.log(kind, name).replace(self.log(kind, new))

    def forget(self, kind: str, name: str) -> None:
        """Remember nothing of a job that has ended."""
        with self._lock:
            if self._jobs.pop((kind, name), None) is not None:
                for path in (self._path(kind, name, "json"), self.log(kind, name)):
                    path.unlink(missing_ok=True)

    def close(self, seconds: float) -> None:
        """Ask what was started here to end in order, and wait for it so long."""
        for job in list(self._jobs.values()):
            if job.code is None and any(job.pid == process.pid for process in self._own):
                with suppress(ApiError):
                    self.stop(job.kind, job.name)
        end = time.monotonic() + seconds
        for process in self._own:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0.0))

    def settle(self) -> None:
        """Find out what has ended that this process did not start."""
        with self._lock:
            for job in self._jobs.values():
                own = any(process.pid == job.pid for process in self._own)
                if job.code is None and not own and (job.created == 0.0 or _created(job.pid) != job.created):
                    job.code, job.ended = -1, time.time()
                    self._write(job)

    def log(self, kind: str, name: str) -> Path:
        """What the job writes to the terminal."""
        return self._path(kind, name, "log")

    def tail(self, kind: str, name: str) -> str:
        """The end of it."""
        path = self.log(kind, name)
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - TAIL, 0))
            return file.read().decode("utf-8", "replace").replace("\r", "\n")

    def _wait(self, process: "subprocess.Popen[bytes]", job: Job) -> None:
        code = process.wait()
        with self._lock:
            job.code, job.ended = code, time.time()
            self._own.remove(process)
            self._write(job)

    def _write(self, job: Job) -> None:
        storage.write_json(self._path(job.kind, job.name, "json"), asdict(job))

    def _path(self, kind: str, name: str, suffix: str) -> Path:
        return self.folder / f"{kind}-{name.replace('/', '.')}.{suffix}"


def lower_priority() -> int:
    """That of a child: below the server's own, whatever that is."""
    return min(psutil.Process().nice() + NICE, 19) if psutil.POSIX else psutil.BELOW_NORMAL_PRIORITY_CLASS


def _environment() -> dict[str, str]:
    """This process's, for another current folder: what Python looks for beside its packages has whole paths."""
    places = [os.path.abspath(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)} if places else dict(os.environ)


def _read(path: Path) -> Job | None:
    given = read_or_none(path) or {}
    try:
        return Job(**given)  # type: ignore[arg-type]
    except TypeError:  # the options of a run lie beside it
        return None


def _created(pid: int) -> float | None:
    """When the process began, None where there is none (any more)."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
