"""What a run has left in its folder, as the page shows it: where it stands, its losses, what it was made of.

Read from run.json, metrics.jsonl and the names of its checkpoints, which the child writes whole or line by line. A run is

    training      its process lives
    finished      run.json says so
    stopped       there is a checkpoint to go on from
    failed        it was started from the page and ended otherwise; its log says why
    begun         none of these
"""

import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qgraft import storage
from qgraft.json_files import parse_json
from qgraft.serving.studio.children import Children, Job
from qgraft.serving.studio.workplace import read_or_none

POINTS = 600  # of a curve
SHOWN = (
    "dataset", "num_train_epochs", "max_steps", "learning_rate", "r", "lora_alpha", "exact", "use_dora", "init_lora_weights",
    "val_size", "max_length", "system", "finetuning_type", "pre_seq_len", "per_device_train_batch_size", "seed",
)  # fmt: skip
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def summary(name: str, path: Path, children: Children) -> dict[str, Any]:
    """A run in a few numbers."""
    run, job = read_or_none(path / "run.json") or {}, children.jobs("train").get(name)
    entries = read_log(path / "metrics.jsonl")
    steps = [each["step"] for each in entries if type(each.get("step")) is int]
    last = entries[-1] if entries else {}
    arguments, metrics = _object(run.get("arguments")), _object(run.get("metrics"))
    newest = newest_checkpoint(path)
    log = path / "metrics.jsonl"
    return {
        "name": name,
        "state": _state(path, run, job, newest),
        "steps": max([*steps, 0]),
        "planned_steps": _number(run.get("planned_steps")),
        "epoch": _number(last.get("epoch")),
        "epochs": _number(arguments.get("num_train_epochs", 3.0)),
        "tokens_per_second": _number(last.get("tokens_per_second")),
        "memory_bytes": _number(last.get("memory_bytes")),
        "loss": _last(entries, "loss"),
        "eval_loss": _last(entries, "eval_loss"),
        "metrics": {key: _number(value) for key, value in metrics.items()},
        "rows": _rows(run),
        "notes": [str(note) for note in _list(run.get("notes"))][:20],
        "arguments": {key: arguments[key] for key in SHOWN if isinstance(arguments.get(key), str | int | float)},
        "checkpoint": newest[0] if newest else None,
        "has_adapter": (path / "adapter_config.json").is_file(),
        "can_go_on": job is not None,
        "error": error_of(job, children),
        "changed": log.stat().st_mtime if log.is_file() else None,
        "now": time.time(),
    }


def curves(path: Path) -> dict[str, Any]:
    """The losses and the speed over the steps, thinned to so many points that a screen can show them."""
    entries = read_log(path / "metrics.jsonl")
    found: dict[str, Any] = {}
    for key in ("loss", "eval_loss", "tokens_per_second", "learning_rate"):
        points = [
            [entry["step"], entry[key]]
            for entry in entries
            if _number(entry.get(key)) is not None and type(entry.get("step")) is int
        ]
        found[key] = thinned(points)
    return found


def thinned(points: list[list[float]], most: int = POINTS) -> list[list[float]]:
    """Every n-th point, with the last one."""
    if len(points) <= most:
        return points
    every = math.ceil(len(points) / (most - 1))
    return [*points[::every], *([points[-1]] if (len(points) - 1) % every else [])]


def newest_checkpoint(path: Path) -> tuple[int, Path] | None:
    """(step, folder) of the newest checkpoint that is whole."""
    there = path.iterdir() if path.is_dir() else ()
    found = [(int(match[1]), each) for each in there if (match := _CHECKPOINT.fullmatch(each.name))]
    whole = ((step, each) for step, each in sorted(found, reverse=True) if (each / storage.MANIFEST).is_file())
    return next(whole, None)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; its last one may be half written."""
    entries = []
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        with suppress(ValueError):
            entry = parse_json(line, finite=False)
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


def error_of(job: Job | None, children: Children) -> str | None:
    """What a job that failed said last."""
    if job is None or job.code in (None, 0, 143) or job.asked_to_stop:
        return None
    text = children.tail(job.kind, job.name)
    start = text.rfind("error: ")
    return (text[start:] if start >= 0 else text[-1500:]).strip() or f"it ended with code {job.code}"


def _state(path: Path, run: Mapping[str, Any], job: Job | None, newest: object) -> str:
    if (job is not None and job.code is None) or is_locked(path):
        return "training"
    if run.get("finished") is True:
        return "finished"
    if job is not None and job.code not in (0, 143) and not job.asked_to_stop:
        return "failed"
    return "stopped" if newest else "begun"


def is_locked(path: Path) -> bool:
    """Whether a process that lives writes there; its lock tells the number."""
    try:
        words = (path / storage.LOCK).read_text().split()
    except (FileNotFoundError, UnicodeDecodeError):
        return False
    try:
        os.kill(int(words[0]), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError, IndexError, OverflowError):
        return False
    return True


def _rows(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where the rows went."""
    dataset = _object(run.get("dataset"))
    accounting = _object(dataset.get("accounting"))
    if not accounting:
        return None
    counts = {key: _number(accounting.get(key)) for key in ("read", "kept", "truncated")}
    dropped = {str(key): _number(value) for key, value in _object(accounting.get("dropped")).items()}
    return {**counts, "dropped": dropped, "samples": _number(dataset.get("samples")),
            "held_out": _number(dataset.get("held_out"))}  # fmt: skip


def _last(entries: list[dict[str, Any]], key: str) -> float | None:
    return next((number for each in reversed(entries) if (number := _number(each.get(key))) is not None), None)


def _number(value: object) -> float | None:
    return value if type(value) in (int, float) and math.isfinite(value) else None  # type: ignore[arg-type, return-value]


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
