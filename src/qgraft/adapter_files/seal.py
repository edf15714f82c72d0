"""qgraft.json: the seal of an adapter's folder.

    base           which base it was trained on: fingerprint, source, formats; null where the model had none
    files          {name: {bytes, sha256}} of the files beside it
    kind, parameters, saved, versions; arguments, dataset, metrics of the run, prefix
    exact          whether all of a LoRA changes minimums of the base only (adapters/exact.py)
    sha256         of the seal itself, with 64 zeros in the place of this value

So every byte of an adapter is covered: a bit that flips, in the weights, the options or the seal, is found when the adapter
is loaded. It is no signature: whoever changes the files on purpose can seal them again.
"""

import datetime
import platform
import re
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from qgraft import __version__, storage
from qgraft.adapter_files.calibration import CALIBRATION
from qgraft.errors import AdapterError
from qgraft.json_files import OWN, covered_text, is_covered, read_object

SEAL, EXACT = "qgraft.json", "exact"
_SHA256 = re.compile("[0-9a-f]{64}")
_TEXTS = (
    "dataset", "dataset_dir", "eval_dataset", "name", "author", "system", "template", "system_text", "prompt_column",
    "response_column", "history_column",
)  # fmt: skip
_COUNTS, _MOST = ("max_length", "max_samples", "max_train_samples"), 10**12
_SWITCHES = ("enable_thinking", "mask_reasoning")


def write_seal(folder: Path, files: list[str], details: Mapping[str, Any]) -> None:
    """Seal the files of `folder` that these names stand for. Raises StorageError."""
    seal = {
        **details,
        "base": details.get("base"),
        "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "files": {file: storage.describe_file(folder / file) for file in files},
    }
    storage.write_file(folder / SEAL, covered_text(seal).encode())


def read_seal(folder: Path) -> dict[str, Any] | None:
    """The contents of qgraft.json, or None where there is none. Raises AdapterError when it is broken, or no seal."""
    path = folder / SEAL
    if not path.is_file():
        return None
    seal = read_object(path, AdapterError)
    if OWN in seal and not is_covered(path.read_bytes().decode(), seal[OWN]):
        raise AdapterError(f"{path} changed since it was written", hint="take the folder from where it was saved again")
    if OWN not in seal and any(isinstance(value, str) and _SHA256.fullmatch(value) for value in seal.values()):
        raise AdapterError(f"{path} changed since it was written: its own {OWN} is called otherwise")
    return seal


def sealed_files(path: Path, seal: Mapping[str, Any], needed: list[str]) -> dict[str, dict[str, Any]]:
    """What the seal at `path` says of the files beside it, for storage.check_files; rows that were deleted are passed over.

    Args:
        needed: the files that make up the adapter, which a seal has to name.

    Raises AdapterError for what is no seal.
    """
    files, base = seal.get("files"), seal.get("base")
    if not isinstance(files, dict) or not (base is None or isinstance(base, dict)):
        raise AdapterError(f"{path} is not a seal: expected objects under `files` and `base`")
    if missing := [name for name in needed if name not in files]:
        raise AdapterError(f"{path} is not a seal: it says nothing of {', '.join(missing)}")
    if base is not None and not isinstance(base.get("fingerprint"), str):
        raise AdapterError(f"{path} is not a seal: `base` has no fingerprint")
    return {name: about for name, about in files.items() if name != CALIBRATION or path.with_name(name).exists()}


def is_exact(seal: Mapping[str, Any] | None) -> bool:
    """Whether the seal says that the adapter is an exact LoRA; one without a seal may be, but goes on training freely."""
    return (seal or {}).get(EXACT) is True


def remembered_arguments(seal: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that the adapter was trained with, without those that are used again and that no run can have had.

    Beside them `rows_sha256` and `held_out_rows_sha256`, of the rows that were read then (data.reading.Accounting).
    """
    arguments = (seal or {}).get("arguments")
    held = arguments if isinstance(arguments, dict) else {}
    return {key: value for key, value in held.items() if _can_be(key, value)} | _rows(seal or {})


def _can_be(key: str, value: object) -> bool:
    """Whether the option can have had this value; true of every option that nothing asks for after the training."""
    if key in _TEXTS:
        return isinstance(value, str)
    if key in _SWITCHES:
        return isinstance(value, bool)
    if key in _COUNTS:
        return type(value) is int and (2 if key == "max_length" else 1) <= value <= _MOST
    if key == "seed":
        return type(value) is int and 0 <= value < 2**32
    return key != "val_size" or (type(value) in (int, float) and 0 <= cast(float, value) <= _MOST)


def _rows(seal: Mapping[str, Any]) -> dict[str, str]:
    dataset, found = seal.get("dataset"), {}
    for key, part in (("rows_sha256", "accounting"), ("held_out_rows_sha256", "held_out_accounting")):
        accounting = dataset.get(part) if isinstance(dataset, dict) else None
        value = accounting.get("sha256") if isinstance(accounting, dict) else None
        if isinstance(value, str) and value:
            found[key] = value
    return found


def seal_notes(seal: Mapping[str, Any] | None) -> list[str]:
    """What a reader should know of an adapter with this seal."""
    if seal is None:
        return [f"no {SEAL} beside it: which base it was trained on cannot be verified"]
    notes = []
    if not seal.get("base"):
        notes.append(f"{SEAL} names no base: which one it was trained on cannot be verified")
    if "files" in seal and OWN not in seal:  # that of a GGUF-LoRA is a part of its file
        notes.append(f"{SEAL} is of an earlier qgraft, whose seals did not cover themselves")
    return notes


@cache  # reading them takes longer than saving a small adapter
def _versions() -> dict[str, str]:
    libraries = {package: version(package) for package in ("torch", "transformers")}
    return {"python": platform.python_version(), "qgraft": __version__, **libraries}
