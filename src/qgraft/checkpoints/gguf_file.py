"""Read a GGUF file: check the whole header, then hand out views on the mapped bytes. Nothing is copied or written.

The container, little-endian, fields one after another without gaps:

    magic "GGUF"   version u32   tensor count u64   key/value count u64
    key/value      key string, value type u32, value                                  (key/value count times)
    tensor info    name string, n_dims u32, dims u64 [n_dims], ggml type u32, offset u64  (tensor count times)
    zeros up to the next multiple of the alignment (key general.alignment, 32 when absent)
    tensor data    each tensor at data start + offset, padded with zeros to the alignment

    string = length u64, UTF-8 bytes.   array = element type u32, count u64, elements.   dims: innermost first.
    value types: 0 u8, 1 i8, 2 u16, 3 i16, 4 u32, 5 i32, 6 f32, 7 bool, 8 string, 9 array, 10 u64, 11 i64, 12 f64

Source: docs/gguf.md in ggml (github.com/ggml-org/ggml). Version 2 has the layout of version 3; version 1 counts in u32
and is refused, as are big-endian files and arrays of arrays. Of a model split over several files this reads one; see
gguf_split.py.

A file from outside is hostile until checked. Every length in it is an attacker's number: a reader that trusts one
allocates 2^60 elements, wraps a product of dims to a small buffer, or reads beyond the mapping. So a count is compared
with the bytes that are left before anything is allocated or looped over (Python integers cannot wrap), the header may
take at most `MAX_HEADER_BYTES` (lists take up to ten times their bytes), and tensors must lie in the file side by side:
aligned, without overlap, with no holes but padding and nothing behind the last one, so that no bytes hide from
whoever inspects the tensors. Values of weights are not checked: any bit pattern is a weight, NaN included.

Not chosen: the `gguf` package's reader, which trusts counts (a 49-byte file keeps it busy for ever). The file is mapped
private, copy-on-write: writing to a tensor changes this process only. A file that another process truncates while it
is mapped ends this one (SIGBUS); replace model files by rename, never in place.
"""

import math
import mmap
import os
import re
import reprlib
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qgraft.errors import CheckpointError, UnsupportedError, near_match
from qgraft.formats import FORMATS, GGML_TYPES
from qgraft.formats.packed import PackedTensor

MAGIC, VERSIONS = b"GGUF", (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_HEADER_BYTES = 128 << 20  # headers with a vocabulary of 256k tokens take about 10 MiB
MAX_NAME_BYTES, MAX_DIMS = 65535, 4

UINT32, BOOL, STRING, ARRAY, UINT64 = 4, 7, 8, 9, 10
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # of `struct`
_INTEGERS = (0, 1, 2, 3, 4, 5, 10, 11)
_TOKENIZER_ARRAYS = {  # key -> element types it may have
    "tokenizer.ggml.tokens": (STRING,),
    "tokenizer.ggml.merges": (STRING,),
    "tokenizer.ggml.scores": (6, 12),
    "tokenizer.ggml.token_type": _INTEGERS,
    "tokenizer.ggml.precompiled_charsmap": (0, 1),
}
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_UNREAD_TYPES = {  # to name in messages what we cannot read
    9: "q8_1", 15: "q8_k", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 41: "q1_0",
}  # fmt: skip

_brief = reprlib.Repr()  # names and values in messages: quoted, control characters escaped, shortened
_brief.maxstring = _brief.maxother = 100


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    shape: tuple[int, ...]  # torch's order, outermost first: ggml's dims reversed
    format: str  # the ggml type in lower case, a key of `FORMATS`, for example "q4_1"
    offset: int  # bytes from the start of the file
    nbytes: int  # without padding


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A checked header and the mapping of its file; made by `read_gguf`.

    Attributes:
        metadata: key -> int, float, bool, str or a list of one of them, in the file's order.
        metadata_types: key -> value type id, or (ARRAY, element type id): what a writer needs to write it again.
        tensors: name -> TensorInfo, in the order of the tensor infos.
        data_offset: where tensor data starts, bytes from the start of the file.
        header_nbytes: bytes up to the end of the last tensor info; zeros follow up to `data_offset`.
        data: uint8 [file size], the private mapping that every tensor is a view of.
        parts: the files of a model that is split over several; `data` and what belongs to it is then of the first alone.
    """

    path: Path
    version: int
    alignment: int
    metadata: dict[str, Any] = field(repr=False)
    metadata_types: dict[str, int | tuple[int, int]] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)
    data_offset: int
    header_nbytes: int
    data: Tensor = field(repr=False)
    parts: tuple["GgufFile", ...] = field(default=(), repr=False)

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` as a view on the mapping.

        Returns:
            f32, f16, bf16: that dtype, [*shape]; every other format: uint8 [*shape[:-1], row_bytes].

        Raises:
            CheckpointError: the file has no tensor `name`.
        """
        info, raw = self._find(name)
        if info.format in _FLOATS:
            return raw.view(_FLOATS[info.format]).view(info.shape)
        return raw.view(*info.shape[:-1], -1)

    def packed(self, name: str) -> PackedTensor:
        """The matrix `name` as a packed tensor, its part uint8 [out, row_bytes] in every format, f32 and its like included.

        Raises:
            CheckpointError: the file has no tensor `name`.
            UnsupportedError: the tensor is not a matrix.
        """
        info, raw = self._find(name)
        if len(info.shape) != 2:
            got = f"tensor {_brief.repr(name)}: got shape {info.shape}"
            raise UnsupportedError(f"{self.path}: {got}, expected a matrix [out, in]")
        out, width = info.shape
        return PackedTensor(info.format, (out, width), (raw.view(out, -1),))

    def _find(self, name: str) -> tuple[TensorInfo, Tensor]:
        info = self.tensors.get(name)
        if info is None:
            missing = f"{self.path}: no tensor {_brief.repr(name)} among its {len(self.tensors)} tensors"
            raise CheckpointError(missing, hint=near_match(name, self.tensors))
        holder = next((part for part in self.parts if name in part.tensors), self)
        return info, holder.data[info.offset : info.offset + info.nbytes]


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Map the file at `path` and check its header.

    Raises:
        CheckpointError: no such file, not a GGUF, truncated, inconsistent or hostile.
        UnsupportedError: a GGUF of another version or byte order, or with tensor types that qgraft does not read.
    """
    path = Path(path)
    data = _map(path)
    cursor = _Cursor(path, data)
    version = _read_version(cursor)
    tensor_count = cursor.count("tensor count", 24)  # no name, no dims: 8 + 4 + 4 + 8 bytes
    metadata, types = _read_metadata(cursor, cursor.count("key/value count", 13))  # empty key, 1 byte: 8 + 4 + 1
    _check_metadata(path, metadata, types)
    raw = _read_infos(cursor, tensor_count)
    alignment: int = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    data_offset = -(-cursor.position // alignment) * alignment
    _check_types(path, raw)
    tensors = {info.name: _locate(path, info, alignment, data_offset) for info in raw}
    _check_layout(path, list(tensors.values()), alignment, data_offset, len(data))
    mapped = torch.frombuffer(data, dtype=torch.uint8)
    return GgufFile(path, version, alignment, metadata, types, tensors, data_offset, cursor.position, mapped)


def _map(path: Path) -> mmap.mmap:
    """The file's bytes, private and copy-on-write: writable for us, never written back."""
    try:
        if not path.is_file():  # asked before opening: opening a pipe would wait for its writer
            got = "not a regular file" if path.exists() else "no such file"
            raise CheckpointError(f"{path}: {got}, expected a GGUF file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"{path}: got an empty file, expected a GGUF file")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Cursor:
    """Reads the header front to back; whatever it is told to read, it looks first whether the bytes are there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0
        self.limit = min(len(data), MAX_HEADER_BYTES)

    def error(self, what: str, problem: str, *, at: int | None = None, hint: str | None = None) -> CheckpointError:
        return CheckpointError(f"{self.path}: byte {self.position if at is None else at}: {what}: {problem}", hint=hint)

    def need(self, nbytes: int, what: str) -> None:
        left = self.limit - self.position
        if nbytes <= left:
            return
        if self.limit < len(self.data):
            raise self.error(what, f"{nbytes} bytes expected, {left} left of the {self.limit} a header may take")
        missing = f"{nbytes} bytes expected, {left} left in the file: {nbytes - left} bytes are missing"
        raise self.error(what, missing, hint="the file is truncated or broken; download it again")

    def numbers(self, kind: int, count: int, what: str) -> tuple[Any, ...]:
        code = CODES.get(kind)
        if code is None:
            raise self.error(what, f"got value type {kind}, expected one of 0 to 12", at=self.position - 4)
        nbytes = count * struct.calcsize("<" + code)
        self.need(nbytes, what)
        if kind == BOOL and (odd := self.data[self.position : self.position + nbytes].translate(None, b"\0\1")):
            raise self.error(what, f"got bool {odd[0]}, expected 0 or 1")
        values = struct.unpack_from(f"<{count}{code}", self.data, self.position)
        self.position += nbytes
        return values

    def u32(self, what: str) -> int:
        return int(self.numbers(UINT32, 1, what)[0])

    def count(self, what: str, item_bytes: int) -> int:
        """A number of items that take at least `item_bytes` each, so no more of them than the bytes left can hold."""
        start, count = self.position, int(self.numbers(UINT64, 1, what)[0])
        most = (self.limit - self.position) // item_bytes
        if count > most:
            raise self.error(what, f"got {count}, expected at most {most}: no more fit in the bytes left", at=start)
        return count

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings; locals instead of methods, because vocabularies hold hundreds of thousands."""
        data, position, limit, unpack = self.data, self.position, self.limit, struct.Struct("<Q").unpack_from
        found = []
        for index in range(count):
            start = position + 8
            end = start + unpack(data, position)[0] if start <= limit else start
            if end > limit:
                self.position = position
                self.need(end - position, f"{what}, string {index}")
            try:
                found.append(str(data[start:end], "utf-8"))
            except UnicodeDecodeError as error:
                got = f"got byte 0x{error.object[error.start]:02x}, expected valid UTF-8"
                raise self.error(f"{what}, string {index}", got, at=start + error.start) from error
            position = end
        self.position = position
        return found

    def name(self, what: str) -> str:
        """A key or a tensor's name: 1 to `MAX_NAME_BYTES` bytes."""
        start = self.position
        name = self.strings(1, what)[0]
        if not 8 < self.position - start <= 8 + MAX_NAME_BYTES:
            got = self.position - start - 8
            raise self.error(what, f"got {got} bytes, expected 1 to {MAX_NAME_BYTES}", at=start)
        return name

    def value(self, what: str) -> tuple[Any, int | tuple[int, int]]:
        """One metadata value and its type, as `GgufFile.metadata` and `GgufFile.metadata_types` hold them."""
        kind = self.u32(what)
        if kind == STRING:
            return self.strings(1, what)[0], kind
        if kind != ARRAY:
            return self.numbers(kind, 1, what)[0], kind
        element = self.u32(what)
        if element == ARRAY:
            raise UnsupportedError(f"{self.path}: byte {self.position - 4}: {what}: arrays of arrays are not supported")
        if element == STRING:
            return self.strings(self.count(what, 8), what), (kind, element)
        if element not in CODES:
            raise self.error(what, f"got element type {element}, expected one of 0 to 12", at=self.position - 4)
        return list(self.numbers(element, self.count(what, 1), what)), (kind, element)


def _read_version(cursor: _Cursor) -> int:
    magic = cursor.data[:4]
    if magic != MAGIC:
        known = {b"vers": "a Git LFS pointer, not the model: fetch it with `git lfs pull`",
                 b"lmgg": "a file of ggml, as whisper.cpp has them: give the folder of the model on the hub"}  # fmt: skip
        raise cursor.error("magic", f"got {magic!r}, expected {MAGIC!r}: not a GGUF file", hint=known.get(magic))
    cursor.position = 4
    version = cursor.u32("version")
    if version in VERSIONS:
        return version
    if version & 0xFFFF == 0 and version:  # a small number, stored the other way round
        raise UnsupportedError(f"{cursor.path}: byte 4: got a big-endian GGUF file, expected a little-endian one")
    raise UnsupportedError(
        f"{cursor.path}: byte 4: got GGUF version {version}, expected 2 or 3",
        hint="convert the original model again with a current llama.cpp" if version == 1 else None,
    )


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, int | tuple[int, int]]]:
    metadata: dict[str, Any] = {}
    types: dict[str, int | tuple[int, int]] = {}
    for index in range(count):
        start = cursor.position
        key = cursor.name(f"key {index} of {count}")
        if key in metadata:
            raise cursor.error(f"key {_brief.repr(key)}", "got it twice, expected it once", at=start)
        metadata[key], types[key] = cursor.value(f"key {_brief.repr(key)}")
    return metadata, types


def _check_metadata(path: Path, metadata: dict[str, Any], types: dict[str, int | tuple[int, int]]) -> None:
    """What every reader relies on: alignment, architecture, one file, special tokens inside the vocabulary."""

    def require(holds: bool, key: str, expected: str) -> None:
        if not holds:
            got = f"{_brief.repr(metadata[key])} (value type {types[key]})"
            raise CheckpointError(f"{path}: key {_brief.repr(key)}: got {got}, expected {expected}")

    if (key := "general.alignment") in metadata:
        value, expected = metadata[key], f"a uint32, power of two, 8 to {MAX_ALIGNMENT}"
        require(types[key] == UINT32 and 8 <= value <= MAX_ALIGNMENT and value & (value - 1) == 0, key, expected)
    if (key := "general.architecture") in metadata:
        named = types[key] == STRING and re.fullmatch(r"[a-z0-9_-]+", metadata[key]) is not None
        require(named, key, "a string of a-z, 0-9, _ and -")
    for key in (key for key in ("split.count", "split.no", "split.tensors.count") if key in metadata):
        require(types[key] in _INTEGERS and 0 <= metadata[key] < 1 << 31, key, "an integer >= 0")
    tokens = metadata.get("tokenizer.ggml.tokens")
    length = len(tokens) if isinstance(tokens, list) else 1 << 31  # without tokens: ids must still not be negative
    for key in (key for key in metadata if key.startswith("tokenizer.ggml.")):
        if (elements := _TOKENIZER_ARRAYS.get(key)) is not None:
            require(types[key] in [(ARRAY, kind) for kind in elements], key, f"an array of value type in {elements}")
            if tokens is not None and not key.endswith(("merges", "charsmap")):
                require(len(metadata[key]) == length, key, f"{length} elements, one for each token")
        elif key.endswith("_token_id"):
            inside = types[key] in _INTEGERS and 0 <= metadata[key] < length
            require(inside, key, f"an integer >= 0 and < {length}")


class _RawInfo(NamedTuple):
    """One tensor info as read: `shape` in torch's order, `offset` from the start of tensor data."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


def _read_infos(cursor: _Cursor, count: int) -> list[_RawInfo]:
    infos: dict[str, _RawInfo] = {}
    for index in range(count):
        start = cursor.position
        name = cursor.name(f"name of tensor {index} of {count}")
        what = f"tensor {_brief.repr(name)}"
        if name in infos:
            raise cursor.error(what, "got it twice, expected it once", at=start)
        n_dims = cursor.u32(what)
        if not 1 <= n_dims <= MAX_DIMS:
            raise cursor.error(what, f"got {n_dims} dims, expected 1 to {MAX_DIMS}", at=cursor.position - 4)
        shape = cursor.numbers(UINT64, n_dims, what)[::-1]
        if 0 in shape:
            raise cursor.error(what, f"got shape {shape}, expected every dim >= 1", at=cursor.position - 8 * n_dims)
        infos[name] = _RawInfo(name, shape, cursor.u32(what), *cursor.numbers(UINT64, 1, what))
    return list(infos.values())


def _check_types(path: Path, infos: list[_RawInfo]) -> None:
    """Refuse tensor types without a format, all of them in one message."""
    unread: dict[int, list[str]] = {}
    for info in infos:
        if info.type_id not in GGML_TYPES:
            unread.setdefault(info.type_id, []).append(info.name)
    if not unread:
        return
    lines = [
        f"type {kind} ({_UNREAD_TYPES.get(kind, 'unknown')}): {len(names)} tensors, the first {_brief.repr(names[0])}"
        for kind, names in sorted(unread.items())[:20]
    ]
    raise UnsupportedError(
        f"{path}: unsupported ggml types: got {'; '.join(lines)}; expected {', '.join(sorted(GGML_TYPES.values()))}",
        hint="requantize the model to a supported type with llama-quantize",
    )


def _locate(path: Path, info: _RawInfo, alignment: int, data_offset: int) -> TensorInfo:
    """Check one tensor on its own; `_check_layout` checks them against each other and the file."""
    what, fmt = f"{path}: tensor {_brief.repr(info.name)}", FORMATS[GGML_TYPES[info.type_id]]
    *outer, width = info.shape
    if width % fmt.block_size:
        raise CheckpointError(f"{what}: got rows of {width}, expected a multiple of {fmt.block_size} for {fmt.name}")
    if info.offset % alignment:
        raise CheckpointError(f"{what}: got offset {info.offset}, expected a multiple of the alignment {alignment}")
    nbytes = fmt.nbytes(math.prod(outer), width)
    return TensorInfo(info.name, info.shape, fmt.name, data_offset + info.offset, nbytes)


def _check_layout(path: Path, tensors: list[TensorInfo], alignment: int, data_offset: int, file_nbytes: int) -> None:
    """Tensors side by side from `data_offset` to the end of the file: no overlap, no hole, nothing missing or left."""
    end = data_offset
    for info in sorted(tensors, key=lambda info: info.offset):
        if not end <= info.offset < end + alignment:
            gap = f"{end - info.offset} bytes overlap" if info.offset < end else f"{info.offset - end} bytes in between"
            got = f"tensor {_brief.repr(info.name)}: got byte {info.offset}, expected it right after byte {end}"
            raise CheckpointError(f"{path}: {got}, where the tensor before it ends ({gap})")
        end = info.offset + info.nbytes
    if tensors and end > file_nbytes:
        message = f"{path}: got {file_nbytes} bytes, expected {end}: {end - file_nbytes} bytes of tensors are missing"
        raise CheckpointError(message, hint="the file is truncated or broken; download it again")
    if file_nbytes - end >= alignment:
        extra = file_nbytes - end
        raise CheckpointError(f"{path}: got {extra} bytes after the last tensor, expected less than {alignment}")
