"""Write a loaded folder back: config.json, the tokenizer's files, and safetensors with the model's matrices.

Each matrix is written as the layout of its format writes it (layouts/), also where the source was a pickle; other tensors
are what they were. config.json gets what the layouts say of these formats. Blocks of GGUF have no layout here.

A shard ends where one of the source ended, or at `SHARD_BYTES`, so a folder of one file stays one unless it is large.
Copied are the files that transformers reads beside weights, licences and model cards; never code, never pickles.

    safetensors file = length of the JSON u64 | JSON {name: {dtype, shape, data_offsets}}, padded to 8 bytes | tensors,
                       the widest dtypes first, so that each lies at a multiple of its item size

Source: README of huggingface/safetensors. Not chosen: safetensors.torch.save_file, whose files only their owner may
read, and save, which makes a copy of a whole shard in memory.
"""

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qgraft import storage
from qgraft.adapters.lora_experts import stack_paths
from qgraft.checkpoints.folder_config import ADAPTER, read_config_json
from qgraft.checkpoints.folder_experts import FORMATS as EXPERT_FORMATS
from qgraft.checkpoints.folder_experts import Together, place_experts
from qgraft.checkpoints.folder_model import folder_digest, matrix_entries
from qgraft.checkpoints.folder_tokenizer import VOCABULARIES
from qgraft.checkpoints.heads import changed_head, head_config
from qgraft.checkpoints.layouts import (
    LAYOUTS,
    StoredMatrix,
    configured,
    find_layout,
    layout_for,
    owners,
    tensor_name,
    tensor_names,
)
from qgraft.checkpoints.origin import Container, Matrix, Origin, changed_source
from qgraft.checkpoints.pickles import WORDS
from qgraft.checkpoints.shards import INDEX, NAMED, Shard, open_shard, open_shards, shard_paths
from qgraft.errors import CheckpointError
from qgraft.json_files import read_object
from qgraft.mapped import release

SHARD_BYTES = 4_000_000_000
CONTAINER = Container(
    "a folder of safetensors",
    frozenset(format for layout in LAYOUTS if not layout.experts for format in layout.formats),
    EXPERT_FORMATS,
    'load with quantize="chatglm-int4", or save with to="chatglm-int8" or to="f16"',
)
_COPIED = (
    "*.json",
    "*.jinja",
    "*.md",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*.jinja",
    *VOCABULARIES,
)
_LEFT = ("config.json", ADAPTER, storage.MANIFEST)  # written apart, or of tensors that are not written
_INDEX = re.compile(r"\.(safetensors|bin)\.index\b")  # in the names of indices of weight files

Tensors = dict[str, tuple[str, Tensor]]  # name -> (safetensors' word for the dtype, tensor)


def check_source(origin: Origin) -> None:
    """Raise CheckpointError when the folder that a model was loaded from is gone or another one."""
    try:
        digest = folder_digest(origin.path, origin.vectors)
    except (CheckpointError, OSError) as error:
        raise changed_source(origin, str(error)) from error
    if digest != origin.digest:
        raise changed_source(origin, "another configuration or other tensors than then")


def write_folder(target: Path, origin: Origin, matrices: Sequence[Matrix], model: nn.Module) -> tuple[int, int, int]:
    """Publish the folder of `origin` with these matrices, and the head of the classifier `model`, as `target`, whole or not
    at all.

    Returns (bytes of weights written, of the source, tensors that differ from it). Raises CheckpointError, StorageError.
    """
    check_source(origin)
    changed, sizes = 0, {}
    with ExitStack() as stack:
        shards = _split(_places(origin, matrices, model, stack))
        storage.require_room(target, sum(place.nbytes for places in shards for place in places))
        with storage.publish_folder(target) as staging:
            _copy_files(origin.path, staging)
            _write_config(origin.path, staging, matrices, head_config(model), origin.tokens)
            if origin.tokens:
                _write_tokens(origin.path, staging, origin.tokens)
            weight_map: dict[str, str] = {}
            for number, places in enumerate(shards, start=1):
                name = (
                    f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
                )
                read = [(place, place.tensors()) for place in places]
                changed += sum(place.differs(tensors) for place, tensors in read)
                shard = {key: entry for _, tensors in read for key, entry in tensors.items()}
                sizes[name] = write_safetensors(staging / name, shard, places[0].metadata)
                weight_map |= dict.fromkeys(shard, name)
            if len(shards) > 1:
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                storage.write_json(staging / INDEX, index)
        before = sum(path.stat().st_size for path in shard_paths(origin.path))
    return sum(sizes.values()), before, changed


def folder_entries(
    origin: Origin, matrices: Sequence[Matrix], model: nn.Module
) -> Iterator[tuple[str, tuple[int, ...], str, Tensor]]:
    """What the fingerprint of the folder with these matrices would be made of."""
    for matrix in matrices:
        if not matrix.stored.repeated:
            yield from matrix_entries(matrix.stored.name, matrix.whole())
    with ExitStack() as stack:
        tensors = open_shards(origin.path, stack)
        head = changed_head(model, origin.head, tensors)
        for name in dict.fromkeys([*origin.vectors, *head]):
            value = head[name] if name in head else tensors[name]()
            yield name, tuple(value.shape), str(value.dtype), value


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> int:
    """Write one safetensors file, whole or not at all, and return its size."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ordered = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    end = 0
    for name in ordered:
        dtype, tensor = tensors[name]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    nbytes = 8 + len(text) + end
    raw = (_raw(tensors[name][1]) for name in ordered)
    storage.write_chunks(path, chain([struct.pack("<Q", len(text)), text], chain.from_iterable(raw)), nbytes)
    return nbytes


def _raw(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor; what it has in memory of a file is given back behind them."""
    yield _bytes(tensor).numpy().data
    release(tensor)


@dataclass(frozen=True, eq=False)
class _Place:
    """One tensor of the source, and the matrix that goes in its place, if one does.

    Attributes:
        value: of a tensor of the head.
        source: all tensors of the source, where a matrix goes in: those of one may lie in several files.
    """

    file: Path
    shard: Shard
    name: str
    matrix: Matrix | Together | None
    value: Tensor | None = None
    source: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.shard.metadata or {"format": "pt"}

    @property
    def nbytes(self) -> int:
        if self.value is not None:
            return self.value.nbytes
        return int(self.shard.tensor(self.name).nbytes if self.matrix is None else self.matrix.nbytes)

    def tensors(self) -> Tensors:
        if self.value is not None:
            return {self.name: (WORDS[self.value.dtype], self.value)}
        if self.matrix is None:
            return {self.name: (self.shard.describe(self.name)[1], self.shard.tensor(self.name))}
        stored = self.matrix.stored
        if isinstance(self.matrix, Together):
            written = self.matrix.written()
        else:
            written = layout_for(self.matrix.format).write(self.matrix.whole(), stored.transposed)
        named = {tensor_name(stored.name, suffix): tensor for suffix, tensor in written.items()}
        return {name: (WORDS[tensor.dtype], tensor) for name, tensor in named.items()}

    def differs(self, tensors: Tensors) -> bool:
        """Whether these are not what the source has in this place."""
        if self.matrix is None:
            return self.value is not None
        for name, (_, new) in tensors.items():
            old = self.source[name]() if name in self.source else None
            if old is None or (old.shape, old.dtype) != (new.shape, new.dtype):
                return True
            same = _bytes(old).equal(_bytes(new))
            release(old, new)
            if not same:
                return True
        return False


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _places(origin: Origin, matrices: Sequence[Matrix], model: nn.Module, stack: ExitStack) -> Iterator[_Place]:
    """Every tensor of the source that is written again; those that make up a matrix go with the first of them. What is new of
    a classifier's head comes last."""
    shards = [(path, open_shard(path, stack)) for path in shard_paths(origin.path)]
    whose = owners([name for _, shard in shards for name in shard.names])
    by_name = _by_name(
        matrices, model, dict.fromkeys(whose.get(name, name) for _, shard in shards for name in shard.names)
    )
    tensors = {name: partial(shard.tensor, name) for _, shard in shards for name in shard.names}
    config = read_config_json(origin.path)
    head = changed_head(model, origin.head, tensors)
    for path, shard in shards:
        for name in shard.names:
            if name in head:
                continue
            matrix = by_name.get(whose.get(name, name))
            if matrix is None:
                yield _Place(path, shard, name, None)
                continue
            weight = matrix.stored.name
            first, *others = tensor_names(find_layout(StoredMatrix(weight, tensors, config)), weight)
            if name == first:
                yield _Place(path, shard, name, matrix, source=tensors)
            elif name not in (
                *others,
                *tensor_names(layout_for(matrix.format), weight),
            ):  # a stray beside plain numbers
                yield _Place(path, shard, name, None)
    for name, value in head.items():
        yield _Place(*shards[-1], name, None, value)


def _by_name(matrices: Sequence[Matrix], model: nn.Module, weights: Iterable[str]) -> dict[str, Matrix | Together]:
    """What goes in the place of the source's matrices, by their names there; `weights` are these and its other tensors."""
    stacks = set(stack_paths(model))
    found = place_experts(model, [matrix for matrix in matrices if matrix.path in stacks], weights)
    return found | {matrix.stored.name: matrix for matrix in matrices if matrix.path not in stacks}


def check_experts(origin: Origin, matrices: Sequence[Matrix], model: nn.Module) -> None:
    """Raise UnsupportedError where experts of these matrices have no place in the folder of `origin`."""
    with ExitStack() as stack:
        tensors = open_shards(origin.path, stack)
        whose = owners(tensors)
        _by_name(matrices, model, dict.fromkeys(whose.get(name, name) for name in tensors))


def _split(places: Iterator[_Place]) -> list[list[_Place]]:
    """The shards: a new one for each file of the source, and where one would outgrow SHARD_BYTES."""
    shards: list[list[_Place]] = []
    filled = 0
    for place in places:
        if not shards or shards[-1][-1].file != place.file or filled + place.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(place)
        filled += place.nbytes
    return shards


def _copy_files(source: Path, staging: Path) -> None:
    for path in {path for pattern in _COPIED for path in source.glob(pattern)}:
        if path.is_file() and path.name not in _LEFT and not _INDEX.search(path.name):
            copy = staging / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _with_vocabulary(config: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """A configuration that says of at least so many tokens, at its top or in what it says of its text model."""
    if "vocab_size" in config:
        return {**config, "vocab_size": max(config["vocab_size"], count)}
    inner = config.get("text_config")
    if isinstance(inner, dict):
        return {**config, "text_config": {**inner, "vocab_size": max(inner.get("vocab_size", 0), count)}}
    return {**config, "vocab_size": count}


def _write_tokens(source: Path, staging: Path, tokens: Sequence[Any]) -> None:
    """tokenizer.json, and the list in tokenizer_config.json where there is one, with these tokens more.

    Raises CheckpointError for a folder whose tokenizer is in another file.
    """
    path = source / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{source}: new tokens go into tokenizer.json, and there is none")
    entries = {
        token.id: {"content": token.text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                   "special": token.special}
        for token in tokens
    }  # fmt: skip
    written = read_object(path, CheckpointError)
    written["added_tokens"] = [*written.get("added_tokens", []), *({"id": each, **entries[each]} for each in entries)]
    storage.write_json(staging / path.name, written)
    options = source / "tokenizer_config.json"
    if options.is_file() and "added_tokens_decoder" in (config := read_object(options, CheckpointError)):
        config["added_tokens_decoder"] |= {str(each): entry for each, entry in entries.items()}
        storage.write_json(staging / options.name, config)


def _write_config(
    source: Path, staging: Path, matrices: Sequence[Matrix], head: Mapping[str, Any], tokens: Sequence[Any] = ()
) -> None:
    """config.json as it was, but for what layouts say in it of these matrices, what is said of a classifier's head, and
    the number of tokens with new ones."""
    before = read_config_json(source)
    config: Mapping[str, Any] = {**configured(before, [matrix.format for matrix in matrices]), **head}
    config = {key: value for key, value in config.items() if key != NAMED}  # written is model.safetensors
    if tokens:
        config = _with_vocabulary(config, max(token.id for token in tokens) + 1)
    if config == before:
        shutil.copyfile(source / "config.json", staging / "config.json")
    else:
        storage.write_json(staging / "config.json", dict(config))
