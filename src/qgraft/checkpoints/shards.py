"""The weight files of a Hugging Face folder, mapped. Those count that transformers would load, in its order:

    what config.json names              "transformers_weights": a file of safetensors, or an index of some
    model.safetensors
    model.safetensors.index.json        and the files that it names, model-00001-of-00002.safetensors, ...
    pytorch_model.bin
    pytorch_model.bin.index.json        and the files that it names, pytorch_model-00001-of-00002.bin, ...

Whatever lies beside them, of an earlier save, of a checkpoint kept for later, of an adapter, is not read. transformers loads
no folder that has none of these; here all *.safetensors count then, or else all pytorch_model*.bin, if each tensor is in one
of them only.

A tensor that is read is a view of the mapped file, so loading a packed weight copies nothing.

What a .bin may hold is said in pickles.py.
"""

import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qgraft.checkpoints.pickles import WORDS, load_tensors
from qgraft.errors import CheckpointError, QgraftError
from qgraft.json_files import parse_json, read_object

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_WHOLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
NAMED = "transformers_weights"  # in config.json


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
    holders: dict[str, Path] = {}
    for path in shard_paths(folder):
        shard = open_shard(path, stack)
        if twice := next((name for name in shard.names if name in readers), None):
            raise CheckpointError(
                f"{folder}: {twice} is in {holders[twice].name} and in {path.name}",
                hint=f"which of the files is the model? Name it {WHOLE} or {BIN_WHOLE}, or move the others away",
            )
        for name in shard.names:
            readers[name] = lambda shard=shard, name=name: shard.tensor(name)  # type: ignore[misc]
            holders[name] = path
    index = find_index(folder)
    if lost := [name for name in _weight_map(index) if name not in readers] if index else []:
        raise CheckpointError(f"{index} lists {len(lost)} tensors that its files do not hold: {', '.join(lost)}")
    return readers


def find_index(folder: Path) -> Path | None:
    """The index of the files that count, or None where there is none or it is not gone by. Raises CheckpointError."""
    chosen = chosen_file(folder)
    return chosen if chosen is not None and chosen.suffix == ".json" else None


def shard_paths(folder: Path) -> list[Path]:
    """The weight files of a folder that count; see above. Raises CheckpointError."""
    chosen = chosen_file(folder)
    if chosen is None:
        paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    elif chosen.suffix != ".json":
        paths = [chosen]
    else:
        names = sorted(set(_weight_map(chosen).values()))
        outside = [name for name in names if not _is_name(name)]
        if outside:
            raise CheckpointError(f"{chosen} names files outside the folder: {', '.join(outside)}")
        paths = [folder / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: missing {', '.join(missing)}", hint="download them again: the index names them"
        )
    if not paths:
        raise CheckpointError(f"{folder}: no weights: expected *.safetensors or pytorch_model*.bin")
    return paths


def chosen_file(folder: Path) -> Path | None:
    """The weight file, or the index of several, that transformers would load; None where it would load nothing."""
    config = folder / "config.json"
    named = read_object(config, CheckpointError, finite=False).get(NAMED) if config.is_file() else None
    if named is None:
        return next((path for name in (WHOLE, INDEX, BIN_WHOLE, BIN_INDEX) if (path := folder / name).is_file()), None)
    if (
        not isinstance(named, str)
        or not _is_name(named)
        or not named.endswith((".safetensors", ".safetensors.index.json"))
    ):
        expected = "a file of safetensors of the folder, or an index of some"
        raise CheckpointError(f"{config}: {NAMED}: got {str(named)[:80]!r}, expected {expected}")
    if not (folder / named).is_file():
        raise CheckpointError(f"{folder}: missing {named}, which config.json names as its weights ({NAMED})")
    return folder / named


def _is_name(name: str) -> bool:
    """Whether it is a file's name, on any system, without a folder before it."""
    return PureWindowsPath(name).name == name and Path(name).name == name


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor name: file name} of an index. Raises CheckpointError."""
    found = read_object(index, CheckpointError).get("weight_map")
    if not isinstance(found, dict):
        raise CheckpointError(f"{index} is not an index of shards: it has no object under `weight_map`")
    if odd := [name for name, file in found.items() if not isinstance(file, str)]:
        raise CheckpointError(
            f"{index} is not an index of shards: {odd[0]!r} lies in {found[odd[0]]!r}, expected a file's name"
        )
    return found


def check_header(path: Path, error: type[QgraftError]) -> None:
    """Raise `error` for a safetensors file whose header says something twice, which the library passes over."""
    try:
        with open(path, "rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            parse_json(file.read(min(length, path.stat().st_size)))
    except (OSError, ValueError, struct.error) as reason:
        raise error(f"{path}: its header cannot be read: {reason}") from reason


def _open_safetensors(path: Path, stack: ExitStack) -> Shard:
    check_header(path, CheckpointError)
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error

    def describe(name: str) -> tuple[tuple[int, ...], str]:
        about = file.get_slice(name)
        return tuple(about.get_shape()), str(about.get_dtype())

    return Shard(tuple(file.keys()), file.get_tensor, describe, file.metadata() or {})


def _open_bin(path: Path) -> Shard:
    state = load_tensors(path, CheckpointError, mmap=True)

    def describe(name: str) -> tuple[tuple[int, ...], str]:
        return tuple(state[name].shape), WORDS[state[name].dtype]

    return Shard(tuple(state), lambda name: state[name].detach().contiguous(), describe)
