"""What the page says of adapters: what each was trained on, and whether its seal holds; renaming and deleting them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qgraft import storage
from qgraft.adapter_files.folder import changed_files
from qgraft.adapter_files.peft_config import CONFIG
from qgraft.adapter_files.seal import SEAL, read_seal
from qgraft.adapters.attach import check_name
from qgraft.adapters.base import base_of
from qgraft.errors import AdapterError, OptionError, StorageError
from qgraft.json_files import read_object
from qgraft.locks import folder_locked
from qgraft.serving.fields import ApiError
from qgraft.serving.keys import Permission
from qgraft.serving.lora_protocol import LoadBody
from qgraft.serving.service import Service

_TOLD = ("dataset", "system", "template", "num_train_epochs", "learning_rate", "exact", "name", "author")
_LOSSES = ("eval_loss_before", "eval_loss", "train_loss", "tokens", "seconds")
_State = tuple[tuple[str, int, int], ...]
_checked: dict[Path, tuple[_State, list[str]]] = {}  # hashing a file again that has not changed takes time for nothing


def listed(service: Service, permission: Permission) -> list[dict[str, Any]]:
    """Every adapter that this key may ask for."""
    catalogue = service.catalogue
    loaded = catalogue.names()
    found = []
    for name, path in catalogue.available().items():
        if permission.allows(name):
            entry = catalogue.entries.get(name)
            state = {"loaded": name in loaded, "pinned": entry is not None and entry.pinned}
            told = about(_absolute(service, path), _fingerprint(service))
            found.append({"name": name, "path": _relative(service, path), **state, **told})
    return found


def about(path: Path, fingerprint: str | None) -> dict[str, Any]:
    """What the files of an adapter tell. `seal` is whole, none, changed (with `problem`), or of another base.

    Args:
        fingerprint: of the base that is served.
    """
    if path.is_file():
        return {"kind": "gguf", "seal": "none"}
    try:
        seal = read_seal(path)
        config = read_object(path / CONFIG, AdapterError) if (path / CONFIG).is_file() else {}
        changed = _changed(path, seal)
    except AdapterError as error:
        return {"kind": "?", "seal": "changed", "problem": error.message}
    if seal is None:
        return {"kind": _kind(config), "seal": "none", **_shape(config)}
    base, dataset = _object(seal.get("base")), _object(seal.get("dataset"))
    state = "changed" if changed else "whole"
    if state == "whole" and base and fingerprint is not None and base.get("fingerprint") != fingerprint:
        state = "other base"
    metrics, arguments = _object(seal.get("metrics")), _object(seal.get("arguments"))
    return {
        "kind": _kind(config),
        "seal": state,
        "problem": "; ".join(changed) or None,
        **_shape(config),
        "parameters": seal.get("parameters"),
        "saved": seal.get("saved"),
        "base": Path(str(base.get("source", ""))).name or None,
        "formats": sorted(_object(base.get("formats"))),
        "rows": dataset.get("samples"),
        "held_out": dataset.get("held_out"),
        "trained": {key: _plain(arguments[key]) for key in _TOLD if key in arguments},
        "metrics": {key: metrics[key] for key in _LOSSES if isinstance(metrics.get(key), int | float)},
    }


def rename(service: Service, name: object, new: object) -> None:
    """Give an adapter of the folder another name: its folder or file, or what somebody loaded it as. Raises ApiError."""
    catalogue = service.catalogue
    if not isinstance(name, str) or not isinstance(new, str):
        raise ApiError(400, "expected name and new_name", param="name")
    _check_free(service, new)
    path = catalogue.available().get(name)
    entry = catalogue.entries.get(name)
    if path is None:
        raise ApiError(404, f"there is no adapter {name[:200]!r}", kind="NotFoundError", param="name")
    if entry is not None and entry.pinned:
        raise ApiError(403, f"{name!r} was named when the server was started", kind="permission_error", param="name")
    if service.engine.uses(name):
        raise ApiError(409, f"adapter {name!r} is in use: it is renamed when no answer needs it", retry_after=1)
    source = _absolute(service, path)
    if source.name.removesuffix(".gguf") != name:  # a name that somebody loaded it under
        relative = _relative(service, path)
        assert relative is not None
        catalogue.load(LoadBody(new, relative))
        catalogue.unload(name)
        return
    _check_alone(service, name, source)
    if name in catalogue.names():
        catalogue.unload(name)
    _move(source, source.with_name(new + (".gguf" if source.is_file() else "")))
    if entry is not None:
        catalogue.need([new])


def removable(service: Service, name: str) -> Path:
    """The folder or file of an adapter of this name that may be deleted. Raises ApiError."""
    path = service.catalogue.available().get(name)
    if path is None:
        raise ApiError(404, f"there is no adapter {name[:200]!r}", kind="NotFoundError", param="name")
    source = _absolute(service, path)
    if source.name.removesuffix(".gguf") != name:
        raise ApiError(409, f"{name!r} is {source.name!r} under another name: unload it", param="name")
    _check_alone(service, name, source)
    return source


def remove(service: Service, source: Path, root: Path) -> None:
    """Delete a folder or file below `root`; the adapters that were loaded from it go first.

    Raises ApiError where it lies elsewhere, where a run writes, and where one of these adapters is pinned or answers.
    """
    if root not in source.parents or source.resolve() != source:
        raise ApiError(
            403, f"{source.name!r} does not lie in the server's folder", kind="permission_error", param="name"
        )
    catalogue = service.catalogue
    paths = {name: _absolute(service, path) for name, path in catalogue.available().items()}
    inside = [name for name, path in paths.items() if source in (path, *path.parents)]
    for name in inside:
        entry = catalogue.entries.get(name)
        if entry is not None and entry.pinned:
            raise ApiError(
                403, f"{name!r} was named when the server was started", kind="permission_error", param="name"
            )
        if service.engine.uses(name):
            raise ApiError(409, f"adapter {name!r} is in use: it is deleted when no answer needs it", retry_after=1)
    if source.is_file():
        source.unlink()
    else:
        with _written_by_nobody(source):
            storage.remove_folder(source)
    for name in inside:
        if catalogue.holds(name):
            catalogue.unload(name)


@contextmanager
def _written_by_nobody(folder: Path) -> Iterator[None]:
    """Within the block no run writes there. Raises ApiError where one does, or the block fails at the disk."""
    try:
        with folder_locked(folder):
            yield
    except StorageError as error:
        raise ApiError(409, error.message, hint=error.hint) from error


def _check_alone(service: Service, name: str, source: Path) -> None:
    """Raise ApiError unless it lies in the server's folder, is not the base, and nobody has loaded it under another name."""
    info = base_of(service.engine.model).info
    if info is not None and source.resolve() == Path(info.source).resolve():
        raise ApiError(403, f"{name!r} is the base that is served", kind="permission_error", param="name")
    if source.parent != service.catalogue.folder:
        raise ApiError(403, f"{name!r} does not lie in the server's folder", kind="permission_error", param="name")
    others = [each for each, path in service.catalogue.available().items() if _absolute(service, path) == source]
    if others != [name]:
        also = next(each for each in others if each != name)
        raise ApiError(409, f"{name!r} is loaded as {also!r}, too: unload that first", param="name")


def _move(source: Path, target: Path) -> None:
    """Another name for a folder in which no run writes, or a file."""
    if source.is_file():
        storage.move(source, target)
        return
    with _written_by_nobody(source):
        storage.move(source, target)
    (target / storage.LOCK).unlink(missing_ok=True)  # it was ours, and went along


def _check_free(service: Service, new: str) -> None:
    try:
        check_name(new)
    except OptionError as error:
        raise ApiError(400, error.message, param="new_name", hint=error.hint) from error
    folder = service.catalogue.folder
    there = folder is not None and any(os.path.lexists(folder / each) for each in (new, f"{new}.gguf"))
    if there or new == service.base or new in service.catalogue.available():
        raise ApiError(409, f"{new!r} is taken", param="new_name")


def _absolute(service: Service, path: str) -> Path:
    """Paths of the list are relative to the folder."""
    folder = service.catalogue.folder
    return Path(path) if folder is None else folder / path


def _relative(service: Service, path: str) -> str | None:
    """The path as loading takes it; None for an adapter outside of the folder."""
    folder, absolute = service.catalogue.folder, _absolute(service, path)
    inside = folder is not None and absolute.is_relative_to(folder)
    return absolute.relative_to(folder).as_posix() if inside and folder is not None else None


def _fingerprint(service: Service) -> str | None:
    info = base_of(service.engine.model).info
    return None if info is None else info.fingerprint


def _changed(path: Path, seal: Mapping[str, Any] | None) -> list[str]:
    """What differs from the seal."""
    files = [path / SEAL, *(path / name for name in _object((seal or {}).get("files")))]
    state = tuple((each.name, each.stat().st_mtime_ns, each.stat().st_size) for each in files if each.is_file())
    if path not in _checked or _checked[path][0] != state:
        _checked[path] = state, changed_files(path, seal)
    return _checked[path][1]


def _kind(config: Mapping[str, Any]) -> str:
    if config.get("use_dora") is True:
        return "DoRA"
    return {"LORA": "LoRA", "PREFIX_TUNING": "P-Tuning v2"}.get(str(config.get("peft_type")), "prefix")


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"r": "r", "lora_alpha": "lora_alpha", "num_virtual_tokens": "prefix"}
    return {told: config[key] for key, told in keys.items() if type(config.get(key)) in (int, float)}


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool) else str(value)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
