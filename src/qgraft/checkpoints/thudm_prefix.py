"""Prefixes in weight files, as THUDM's P-Tuning scripts for ChatGLM-6B and ChatGLM2-6B store them.

    pytorch_model.bin    transformer.prefix_encoder.embedding.weight     [P, W], with projection [P, H] or [P, W]
    (or safetensors)     transformer.prefix_encoder.trans.0.weight .bias   with projection only; shapes: adapters/prefix.py
                         transformer.prefix_encoder.trans.2.weight .bias
    config.json          the model's, with pre_seq_len and prefix_projection

The scripts save what they train, which is the prefix alone. Older ones saved the whole model with the prefix in it: such
a folder loads as a model with its prefix attached, and as an adapter, of which only the prefix is read. The official code
loads what begins with `transformer.prefix_encoder.` into its PrefixEncoder.

Source: ptuning/main.py and trainer.py, modeling_chatglm.py of both releases. What is in a pickle: see shards.py.
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.adapters.base import base_of, find_adapter
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.fit_prefix import LONGEST, StoredPrefix, fit_prefix, is_size
from qgraft.checkpoints.origin import Origin
from qgraft.checkpoints.shards import open_shard, open_shards
from qgraft.errors import CheckpointError
from qgraft.json_files import read_object

KEY = "transformer.prefix_encoder."
_SAID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "pre_seq_len": (is_size, f"a whole number from 1 to {LONGEST}"),
    "prefix_projection": (lambda value: isinstance(value, bool), "true or false"),
}


def read_thudm(path: Path) -> StoredPrefix | None:
    """The prefix in a weight file, or in the weight files of a folder; None where they hold none.

    Raises CheckpointError for files that cannot be read or ask for more than tensors.
    """
    with ExitStack() as stack:
        readers = _readers(path, stack)
        values = {name.removeprefix(KEY): read() for name, read in readers.items() if name.startswith(KEY)}
    if not values:
        return None
    others = len(readers) - len(values)
    options, problems = _options(path / "config.json" if path.is_dir() else path.with_name("config.json"))
    return StoredPrefix(
        values,
        options.get("pre_seq_len"),
        "config.json says pre_seq_len",
        prefix_projection=options.get("prefix_projection"),
        problems=tuple(problems),
        key=KEY,
        notes=(f"{others} other tensors beside it are not read: as an adapter only the prefix counts",) * bool(others),
    )


def attach_own_prefix(model: nn.Module, folder: Path) -> None:
    """Attach the prefix that the model's own folder holds as "default", active; what was done is noted on the model.

    Raises CheckpointError for one that does not fit the model.
    """
    base, stored = base_of(model), read_thudm(folder)
    assert base.info is not None
    options, wrong = _options(folder / "config.json")
    if stored is None and wrong:
        raise CheckpointError(f"{folder}:\n  " + "\n  ".join(wrong))
    length = options.get("pre_seq_len")
    if stored is None and not length:
        return
    if stored is None:
        notes = [f"config.json says pre_seq_len={length}, but the folder holds no prefix: load one as an adapter"]
    else:
        fitted = fit_prefix(model, stored)
        if problems := [*fitted.misfits, *fitted.doubts]:
            raise CheckpointError(f"{folder}: its prefix does not fit its model:\n  " + "\n  ".join(problems))
        fitted.put(model, "default")
        use_adapter(model, "default")
        config = fitted.encoder.config
        projection = " with projection" if config.prefix_projection else ""
        notes = [f"the folder's prefix of {config.pre_seq_len} tokens{projection} is attached and active, as 'default'"]
        if not length:
            notes.append(f"config.json says no pre_seq_len: the prefix has {config.pre_seq_len} rows")
    base.info = dataclasses.replace(base.info, notes=(*base.info.notes, *notes))


def unsaved_adapters(model: nn.Module, active: list[str]) -> list[str]:
    """Those that the model's own folder does not hold as they are; a prefix that was loaded with it, it does."""
    origin = base_of(model).origin
    adapters = {name: find_adapter(model, name) for name in active}
    prefixes = [name for name, adapter in adapters.items() if adapter.is_prefix]
    if not prefixes or not isinstance(origin, Origin) or origin.container != "folder":
        return active
    stored = read_thudm(origin.path)
    held = {} if stored is None else {key: value.float() for key, value in stored.values.items()}
    return [name for name in active if name not in prefixes or not _same(adapters[name].state_dict(), held)]


def tensor_names(path: Path) -> list[str]:
    """Of a weight file, or of the weight files of a folder; none where there are no such files."""
    if not (has_weights(path) or is_weight_file(path)):
        return []
    with ExitStack() as stack:
        return list(_readers(path, stack))


def _readers(path: Path, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    if path.is_dir():
        return open_shards(path, stack)
    shard = open_shard(path, stack)
    return {name: lambda name=name: shard.tensor(name) for name in shard.names}  # type: ignore[misc]


def holds_only_prefix(names: list[str]) -> bool:
    """Whether these tensors are a prefix without its model."""
    return bool(names) and all(name.startswith(KEY) for name in names)


def has_weights(folder: Path) -> bool:
    """Whether there are weight files in a folder."""
    return folder.is_dir() and any([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])


def is_weight_file(path: Path) -> bool:
    """Whether it is a file of tensors, by its name."""
    return path.is_file() and path.suffix in (".bin", ".pt", ".pth", ".safetensors")


def _options(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(pre_seq_len and prefix_projection, as far as a config.json names them, what is wrong with them)."""
    try:
        raw = read_object(path, CheckpointError, finite=False) if path.is_file() else {}
    except CheckpointError as error:
        return {}, [error.message]
    options, problems = {}, []
    for key, (right, what) in _SAID.items():
        value = raw.get(key)
        if value is not None and not right(value):
            problems.append(f"config.json: {key}: got {str(value)[:80]}, expected {what}")
        elif value is not None:
            options[key] = value
    return options, problems


def _same(own: dict[str, Tensor], held: dict[str, Tensor]) -> bool:
    return own.keys() == held.keys() and all(torch.equal(value.cpu(), held[key]) for key, value in own.items())
