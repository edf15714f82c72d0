"""What the page can have done in its folder: keep a file of rows, train, go on, merge, let a run answer, download,
delete.

Everything here is a method that raises ApiError or another error of ours, and knows nothing of HTTP; routes.py does.
"""

import json
import secrets
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qgraft import storage
from qgraft.ranges import AT_MOST_1, FINITE
from qgraft.serving.fields import ApiError
from qgraft.serving.lora_protocol import LoadBody
from qgraft.serving.service import MIXED, Service
from qgraft.serving.studio import adapters, recipes, rows, runs
from qgraft.serving.studio.children import Children
from qgraft.serving.studio.workplace import DATASETS, HIDDEN, Workplace, read_or_none

TICKET_SECONDS = 600
METHODS = ("auto", "scales", "codes", "feedback", "nearest", "grid")


class Work:
    """A server's folder, with what runs in it."""

    def __init__(self, service: Service, place: Workplace) -> None:
        self.service, self.place = service, place
        self.children = Children(place.root / HIDDEN)
        self._lock = threading.RLock()  # of what is kept, started, renamed and deleted: one after another
        self._tickets: dict[str, tuple[Path, float]] = {}
        self._trials: dict[str, str] = {}  # adapters that were loaded from checkpoints, by their runs

    def close(self, seconds: float = 30.0) -> None:
        """End what was started, in order: training leaves a checkpoint."""
        for name in self._trials.values():
            if name in self.service.catalogue.names():
                self.service.catalogue.unload(name)
        self.children.close(seconds)

    # -- rows --

    def keep(self, name: str, content: bytes) -> dict[str, Any]:
        """Keep a file of rows, whole; one of the same name is replaced, unless a run reads it."""
        path = self.place.dataset(name)
        with self._lock:
            job = self.children.running()
            if job is not None and job.kind == "train" and self._configuration(job.name).get("dataset") == str(path):
                raise ApiError(409, f"{name!r} is being trained on: choose another name", param="dataset")
            storage.write_file(path, content)
        return {"name": name, "bytes": len(content)}

    def datasets(self) -> list[dict[str, Any]]:
        """The files of rows that are there."""
        return [{"name": path.name, "bytes": path.stat().st_size} for path in self.place.datasets()]

    def preview(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """How a file is read; see rows.py."""
        return rows.read_rows(
            self.service, self._dataset(body.get("dataset")), recipes.checked(body.get("options", {}))
        )

    def _dataset(self, name: object) -> Path:
        path = self.place.dataset(name if isinstance(name, str) else "")
        if not path.is_file():
            raise ApiError(404, f"there is no file {name!r}", kind="NotFoundError", param="dataset")
        return path

    # -- training --

    def runs(self) -> list[dict[str, Any]]:
        """The runs of the folder; first those that were started and have written nothing yet, or failed before they did."""
        found = self.place.runs()
        begun = {name: self.place.root / name for name in self.children.jobs("train") if name not in found}
        return [runs.summary(name, path, self.children) for name, path in (begun | found).items()]

    def curves(self, name: str) -> dict[str, Any]:
        """The curves of a run; empty ones where it has written nothing yet."""
        return runs.curves(self._run(name))

    def _run(self, name: str) -> Path:
        """The folder of a run, which is there or will be."""
        return self.place.started(name) if name in self.children.jobs("train") else self.place.run(name)

    def train(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Start a run."""
        dataset, options = self._dataset(body.get("dataset")), recipes.checked(body.get("options", {}))
        with self._lock:
            output = self.place.new_run(body.get("name"))
            configuration = recipes.configuration(
                self.place.model, self.place.quantize, dataset, output, body.get("preset"), options
            )
            return self._begin(output.name, configuration)

    def go_on(self, name: str) -> dict[str, Any]:
        """Start a run again that was stopped, with the options that it had."""
        with self._lock:
            path, configuration = self._run(name), self._configuration(name)
            if not configuration:
                raise ApiError(409, f"{name!r} was not started here: give its own command again", param="name")
            return self._begin(name, {**configuration, "output_dir": str(path)})

    def _begin(self, name: str, configuration: Mapping[str, Any]) -> dict[str, Any]:
        file = self._file(name)
        self.children.require_idle()  # before an earlier configuration is replaced
        storage.write_json(file, configuration)
        storage.make_folder(Path(configuration["output_dir"]))
        job = self.children.start("train", name, ["train", str(file)])
        return {"name": name, "pid": job.pid}

    def _configuration(self, name: str) -> dict[str, Any]:
        return dict(read_or_none(self._file(name)) or {})

    def _file(self, name: str) -> Path:
        return self.place.root / HIDDEN / f"{name.replace('/', '.')}.train.json"

    def rename(self, name: str, new: str) -> None:
        """Another name for an adapter; what is known of its run goes along."""
        with self._lock:
            job = self.children.running()
            if job is not None and job.kind == "train" and job.name in (name, new):
                raise ApiError(409, f"{job.name!r} is being trained", param="name", retry_after=5)
            adapters.rename(self.service, name, new)
            self._renamed(name, new)

    def _renamed(self, name: str, new: str) -> None:
        if (self.place.root / name).exists():  # it had another name, and its folder stays
            return
        self.children.rename("train", name, new)
        if given := self._configuration(name):
            storage.write_json(self._file(new), {**given, "output_dir": str(self.place.root / new)})
            self._file(name).unlink()

    def delete_run(self, name: str) -> None:
        """Delete the folder of a run that has ended, with its adapter and checkpoints."""
        with self._lock:
            self._delete(self._run(name), self.place.root)

    def delete_adapter(self, name: str) -> None:
        """Delete an adapter of the folder, and the run that it is of."""
        with self._lock:
            path = adapters.removable(self.service, name)
            self._delete(path, path.parent)

    def _delete(self, path: Path, root: Path) -> None:
        job = self.children.running()
        if job is not None and job.kind == "merge" and str(path) in job.words:
            raise ApiError(409, f"{path.name!r} is being merged", param="name", retry_after=5)
        name = path.relative_to(self.place.root).as_posix() if self.place.root in path.parents else None
        if job is not None and (job.kind, job.name) == ("train", name):
            raise ApiError(409, f"{name!r} is being trained", param="name", retry_after=5)
        if path.exists():  # a run that failed may have left nothing
            adapters.remove(self.service, path, root)
        if name is not None:
            self.children.forget("train", name)
            self._file(name).unlink(missing_ok=True)

    # -- answers of runs --

    def sample(self, name: str) -> dict[str, Any]:
        """Have the adapter of a run loaded: its last, or of its newest checkpoint. How it is called, and what to ask it."""
        path, catalogue = self._run(name), self.service.catalogue
        asked = self._questions(path)
        step, folder = self._newest(name, path)
        if step is None and catalogue.available().get(name) == str(path):
            catalogue.need([name])
            return {"model": name, "questions": asked, "step": None}
        called = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in name)[:48]
        called += "-saved" if step is None else f"-at-{step}"
        before = self._trials.get(name)
        if before != called or called not in catalogue.names():
            if before is not None and before in catalogue.names():
                catalogue.unload(before)
            catalogue.load(LoadBody(called, str(folder.relative_to(self.place.root)), replace=True))
            self._trials[name] = called
        return {"model": called, "questions": asked, "step": step}

    def _newest(self, name: str, path: Path) -> tuple[int | None, Path]:
        """(step, folder) of the last adapter that a run has saved; None for the step where the run has ended."""
        newest = runs.newest_checkpoint(path)
        if (path / "adapter_config.json").is_file() and not runs.is_locked(path):
            return None, path
        if newest is None:
            raise ApiError(409, f"{name!r} has no checkpoint yet", retry_after=5)
        return newest

    def _questions(self, path: Path) -> list[str]:
        """What the rows of a run ask, where they lie in the folder."""
        arguments = (read_or_none(path / "run.json") or {}).get("arguments")
        name = arguments.get("dataset") if isinstance(arguments, dict) else None
        file = self.place.root / DATASETS / Path(name).name if isinstance(name, str) else None
        ours = file is not None and str(file) == name and file.is_file() and file.resolve() == file
        return rows.questions(file) if file is not None and ours else []

    # -- merging --

    def merges(self) -> dict[str, Any]:
        """The merged files with their reports, and what runs or failed."""
        files = {path.name: path for path in self.place.merges()}
        found = [{"name": name, "bytes": path.stat().st_size, **_report(path)} for name, path in files.items()]
        jobs = [
            {"name": name, "running": job.code is None, "began": job.began, "error": runs.error_of(job, self.children),
             "log": self.children.tail("merge", name), "stopped": job.asked_to_stop}
            for name, job in self.children.jobs("merge").items()
            if f"{name}.gguf" not in files
        ]  # fmt: skip
        return {"files": found, "jobs": jobs}

    def merge(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Start a merge. The same one that was stopped before goes on."""
        chosen, method = body.get("adapters"), body.get("method", "auto")
        least = body.get("min_retained", 0.9)
        target = self.place.new_merged(body.get("name"))
        if not isinstance(chosen, list) or not 1 <= len(chosen) <= MIXED:
            raise ApiError(400, f"adapters: expected 1 to {MIXED} with their weights", param="adapters")
        if method not in METHODS or least not in AT_MOST_1:
            raise ApiError(400, f"method: expected {', '.join(METHODS)}; min_retained: {AT_MOST_1}", param="method")
        words = ["merge", "--model", self.place.model, "--output", str(target), "--method", str(method)]
        words += ["--min-retained", f"{least!r}"]
        words += ["--quantize", self.place.quantize] if self.place.quantize else []
        with self._lock:
            for each in chosen:
                words += self._adapter_words(each)
            self.place.new_merged(target.stem)  # which another one may have written
            job = self.children.start("merge", target.stem, words)
        return {"name": target.name, "pid": job.pid}

    def _adapter_words(self, given: object) -> list[str]:
        if not isinstance(given, Mapping) or given.get("weight", 1.0) not in FINITE:
            raise ApiError(400, "adapters: expected objects with run and weight", param="adapters")
        path = self.place.run(given.get("run", ""))
        if not (path / "adapter_config.json").is_file():
            raise ApiError(409, f"{given['run']!r} has no adapter yet", param="adapters")
        return ["--adapter", str(path), "--weight", f"{float(given.get('weight', 1.0))!r}"]

    # -- downloads --

    def ticket(self, name: str) -> dict[str, str]:
        """An address for a download: a browser's own sends no key, so the address holds one, for a few minutes."""
        path = self.place.merged(name)
        now = time.monotonic()
        word = secrets.token_urlsafe(24)
        kept = {each: held for each, held in list(self._tickets.items()) if held[1] > now}
        self._tickets = {**kept, word: (path, now + TICKET_SECONDS)}
        return {"path": f"/studio/download/{word}/{path.name}"}

    def ticketed(self, word: str) -> Path:
        """The file that a ticket is for. Raises ApiError 404 for one that is not good any more."""
        path, until = self._tickets.get(word, (None, 0.0))
        if path is None or until < time.monotonic() or not path.is_file():
            raise ApiError(404, "this address has expired: ask for the download again", kind="NotFoundError")
        return path


def _report(path: Path) -> dict[str, Any]:
    """What the report beside a merged file says."""
    try:
        given = json.loads(path.with_name(f"{path.stem}.merge.json").read_text("utf-8"))
        kept = given["kept"]
        keys = ("retained_gain", "warning", "adapters", "method", "seconds", "notes", "distilled_steps")
        told = {key: given[key] for key in keys}
    except (OSError, ValueError, KeyError, TypeError):
        return {"retained_gain": None}
    return {**told, "kept": kept}
