"""The weight files of a Hugging Face folder, mapped: *.safetensors, or else pytorch_model*.bin.

    model.safetensors                                       pytorch_model.bin
    model-00001-of-00002.safetensors, ...                   pytorch_model-00001-of-00002.bin, ...
    model.safetensors.index.json                            pytorch_model.bin.index.json

A tensor that is read is a view of the mapped file, so loading a packed weight copies nothing.

A .bin is a zip archive of a pickle and raw storages. A pickle is a program: it can call any function of the machine it
is read on. Here only torch's restricted unpickler reads it (`weights_only=True`), which builds tensors and plain
containers and calls nothing else; a file that asks for more is refused, and the error names what it asked for. Not
chosen: reading the archive ourselves, which would be a second unpickler to keep safe.
"""

import json
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qgraft.errors import CheckpointError

INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
WORDS = {  # safetensors' words for dtypes
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
_ASKED_FOR = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True, eq=False)
class Shard:
    """One open weight file.

    Attributes:
        names: of its tensors, in its order.
        tensor: reads one of them.
        describe: (shape, safetensors' word for the dtype) of one of them, without reading it.
        metadata: of a safetensors file.
    """

    names: tuple[str, ...]
    tensor: Callable[[str], Tensor]
    describe: Callable[[str], tuple[tuple[int, ...], str]]
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_shard(path: Path, stack: ExitStack) -> Shard:
    """The weight file at `path`, open until `stack` closes. Raises CheckpointError."""
    return _open_safetensors(path, stack) if path.suffix == ".safetensors" else _open_bin(path)


def open_shards(folder: Path, stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    """{parameter name: function that reads it} over all weight files of the folder.

    Raises CheckpointError, also when the index lists tensors that its files do not hold.
    """
    readers: dict[str, Callable[[], Tensor]] = {}
    for path in shard_paths(folder):
        shard = open_shard(path, stack)
        for name in shard.names:
            readers[name] = lambda shard=shard, name=name: shard.tensor(name)  # type: ignore[misc]
    index = find_index(folder)
    if lost := [name for name in _weight_map(index) if name not in readers] if index else []:
        raise CheckpointError(f"{index} lists {len(lost)} tensors that its files do not hold: {', '.join(lost)}")
    return readers


def find_index(folder: Path) -> Path | None:
    """The index of the files that count, or None where all files of the folder do."""
    if (folder / INDEX).is_file():
        return folder / INDEX
    has_bin_index = (folder / BIN_INDEX).is_file() and not any(folder.glob("*.safetensors"))
    return folder / BIN_INDEX if has_bin_index else None


def shard_paths(folder: Path) -> list[Path]:
    """The weight files of a folder: those that its index names, or else all. Raises CheckpointError."""
    index = find_index(folder)
    if index is not None:
        names = sorted(set(_weight_map(index).values()))
        outside = [name for name in names if PureWindowsPath(name).name != name or Path(name).name != name]
        if outside:
            raise CheckpointError(f"{index} names files outside the folder: {', '.join(outside)}")
        paths = [folder / name for name in names]
    else:
        paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: missing {', '.join(missing)}", hint="download them again: the index names them"
        )
    if not paths:
        raise CheckpointError(f"{folder}: no weights: expected *.safetensors or pytorch_model*.bin")
    return paths


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor name: file name} of an index. Raises CheckpointError."""
    try:
        found = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
        if odd := [name for name, file in found.items() if not isinstance(file, str)]:
            raise TypeError(f"{odd[0]!r} lies in {found[odd[0]]!r}, expected a file's name")
        return found
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error}") from error


def _open_safetensors(path: Path, stack: ExitStack) -> Shard:
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error

    def describe(name: str) -> tuple[tuple[int, ...], str]:
        about = file.get_slice(name)
        return tuple(about.get_shape()), str(about.get_dtype())

    return Shard(tuple(file.keys()), file.get_tensor, describe, file.metadata() or {})


def _open_bin(path: Path) -> Shard:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except (AttributeError, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: torch cannot read it: {_one_line(error)}") from error
    odd = [f"{name!r}: {type(value).__name__}" for name, value in state.items() if not isinstance(value, Tensor)] \
        if isinstance(state, Mapping) else [type(state).__name__]  # fmt: skip
    if odd:
        raise CheckpointError(f"{path}: expected a mapping of names to tensors, got {', '.join(odd[:8])}")
    if large := [
        f"{name!r}: {list(value.shape)}" for name, value in state.items() if value.nbytes > path.stat().st_size
    ]:
        raise CheckpointError(f"{path}: tensors that are larger than the file: {', '.join(large[:8])}")
    unknown = [f"{name}: {value.dtype}" for name, value in state.items() if value.dtype not in WORDS]
    if unknown:
        raise CheckpointError(f"{path}: tensors of a kind that is not read: {', '.join(unknown[:8])}")

    def describe(name: str) -> tuple[tuple[int, ...], str]:
        return tuple(state[name].shape), WORDS[state[name].dtype]

    return Shard(tuple(map(str, state)), lambda name: state[name].detach().contiguous(), describe)


def _refused(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """The error for a pickle that holds more than tensors, or is none."""
    if asked := _ASKED_FOR.search(str(error)):
        return CheckpointError(
            f"{path} is refused: its pickle asks for {asked[1]}, and a file of weights needs no such thing",
            hint="it may be made to run commands on your machine: get the weights from elsewhere, as safetensors",
        )
    return CheckpointError(f"{path}: torch's restricted unpickler cannot read it: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
