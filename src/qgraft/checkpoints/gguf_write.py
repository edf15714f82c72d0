"""Write a loaded GGUF model back: the file it came from, with the model's matrices in the places of the old ones.

The header is never built anew. Tensor infos have the same length whatever their type, so a file with other formats has
the old header with other numbers in it: types, offsets, and `general.file_type` where all linear layers end up in one
format. Keys, their order, names, order of the tensors and alignment cannot change, and a model whose formats are the
file's gets the old header byte for byte (one with new tokens a longer header, see gguf_new_tokens.py):

    header up to the tensor data   copied, types and offsets patched where a format changed
    a matrix of the model          its packed rows, q and k back in llama.cpp's order, or requantized, panel by panel
    any other tensor               copied in chunks
    padding                        copied; zeros where offsets changed

Source of the numbers of `general.file_type`: enum llama_ftype in llama.h, as gguf.LlamaFileType; for K-quants the one
that llama-model-loader.cpp guesses for a file of such tensors.

Not chosen: gguf.GGUFWriter, which sorts out values and types anew and keeps neither the order of keys nor padding.
"""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

from gguf import LlamaFileType
from torch import Tensor

from qgraft import storage
from qgraft.checkpoints.gguf_file import CODES, STRING, UINT32, GgufFile, TensorInfo
from qgraft.checkpoints.gguf_model import gguf_digest
from qgraft.checkpoints.gguf_new_tokens import longer_header
from qgraft.checkpoints.gguf_split import part_paths, read_model
from qgraft.checkpoints.origin import Container, Matrix, Origin, Slices, by_tensor, changed_source
from qgraft.errors import CheckpointError
from qgraft.formats import GGML_TYPES, get_format

_HELD = frozenset(GGML_TYPES.values())
CONTAINER = Container("a GGUF file", _HELD, _HELD, 'give to="q8_0" or another format of GGUF')
CHUNK_BYTES = 16 << 20  # copied at a time
TYPE_IDS = {name: number for number, name in GGML_TYPES.items()}
_FIXED_BYTES = 24  # magic, version, two counts
_INT32 = 5  # value type
_FILE_TYPE = "general.file_type"
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q5_1": LlamaFileType.MOSTLY_Q5_1,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q2_k": LlamaFileType.MOSTLY_Q2_K,
    "q3_k": LlamaFileType.MOSTLY_Q3_K_M,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_M,
    "q5_k": LlamaFileType.MOSTLY_Q5_K_M,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "iq1_s": LlamaFileType.MOSTLY_IQ1_S,
    "iq1_m": LlamaFileType.MOSTLY_IQ1_M,
    "iq2_xxs": LlamaFileType.MOSTLY_IQ2_XXS,
    "iq2_xs": LlamaFileType.MOSTLY_IQ2_XS,
    "iq2_s": LlamaFileType.MOSTLY_IQ2_S,
    "iq3_xxs": LlamaFileType.MOSTLY_IQ3_XXS,
    "iq3_s": LlamaFileType.MOSTLY_IQ3_S,
    "iq4_nl": LlamaFileType.MOSTLY_IQ4_NL,
    "iq4_xs": LlamaFileType.MOSTLY_IQ4_XS,
    "tq1_0": LlamaFileType.MOSTLY_TQ1_0,
    "tq2_0": LlamaFileType.MOSTLY_TQ2_0,
    # MOSTLY_MXFP4_MOE, llama.cpp has no other for it, and MOSTLY_NVFP4: names of newer releases of gguf
    "mxfp4": 38,
    "nvfp4": 39,
}


def open_source(origin: Origin) -> GgufFile:
    """The file that a model was loaded from. Raises CheckpointError when it is gone or another one."""
    try:
        file = read_model(origin.path)
    except CheckpointError as error:
        raise changed_source(origin, error.message) from error
    if gguf_digest(file) != origin.digest:
        raise changed_source(origin, "other metadata or tensors than then")
    return file


def write_gguf(target: Path, origin: Origin, matrices: Sequence[Matrix], uniform: str | None) -> tuple[int, int, int]:
    """Write the file of `origin` with these matrices to `target`, whole or not at all; of several files as many.

    Those of an earlier save go before the first of the new ones has its name, so that a kill in between leaves too few
    files, which no reader takes, and never some of then and some of now.

    Args:
        target: the file, or the first of several.
        uniform: the format that all linear layers have now, if they have one.

    Returns (bytes written, bytes of the source, tensors that differ from it). Raises CheckpointError, StorageError.
    """
    file, by_name = open_source(origin), by_tensor(matrices)
    if not file.parts:
        return _write_one(target, origin, file, by_name, uniform)
    paths = part_paths(target, len(file.parts))
    with storage.publish_files(target.parent, target.name) as staging:
        written = [
            _write_one(staging / path.name, origin, part, by_name, uniform)
            for path, part in zip(paths, file.parts, strict=True)
        ]
        for path in paths:
            path.unlink(missing_ok=True)
    nbytes, source_nbytes, changed = (sum(column) for column in zip(*written, strict=True))
    return nbytes, source_nbytes, changed


def _write_one(
    target: Path, origin: Origin, file: GgufFile, by_name: dict[str, Matrix | Slices], uniform: str | None
) -> tuple[int, int, int]:
    """One file, with what it holds of the matrices."""
    formats = {name: by_name[name].format if name in by_name else info.format for name, info in file.tensors.items()}
    shapes = {name: _shape_of(matrix, file.tensors[name]) for name, matrix in by_name.items() if name in file.tensors}
    header = file.data[: file.data_offset].numpy().tobytes()
    patched, infos_end = _with_file_type(file, header, uniform), file.header_nbytes
    if origin.tokens:
        longer = longer_header(file, patched[:infos_end], origin.tokens, shapes, _value_nbytes)
        patched, infos_end = longer + bytes(-len(longer) % file.alignment), len(longer)
    infos, end = _lay_out(file, formats, shapes, len(patched))
    same = infos == file.tensors
    changed: set[str] = set()
    with _Source(origin, file.path) as source:
        nbytes = len(file.data) if same else end
        header = header if same else _patch(patched, infos_end, infos)
        data = _data(file, source, infos, by_name, nbytes, changed)
        storage.write_chunks(target, chain([header], data), nbytes)
    return nbytes, len(file.data), len(changed)


def gguf_entries(file: GgufFile, matrices: Sequence[Matrix]) -> Iterator[tuple[str, tuple[int, ...], str, Tensor]]:
    """What the fingerprint of the file with these matrices would be made of."""
    by_name = by_tensor(matrices)
    for name, info in file.tensors.items():
        matrix = by_name.get(name)
        if matrix is None:
            yield name, info.shape, info.format, file.tensor(name)
        else:
            (data,) = matrix.whole().parts
            yield name, _shape_of(matrix, info), matrix.format, data


def _shape_of(matrix: Matrix | Slices, info: TensorInfo) -> tuple[int, ...]:
    """Of a matrix in the file: that of the tensor that it replaces, but where it has got more rows."""
    return info.shape if math.prod(matrix.shape) == math.prod(info.shape) else matrix.shape


def _lay_out(
    file: GgufFile, formats: dict[str, str], shapes: Mapping[str, tuple[int, ...]], end: int
) -> tuple[dict[str, TensorInfo], int]:
    """The tensors in these formats and shapes, side by side from `end` on in their order, and where the file ends."""
    moved: dict[str, TensorInfo] = {}
    for info in sorted(file.tensors.values(), key=lambda info: info.offset):
        layout, shape = get_format(formats[info.name]), shapes.get(info.name, info.shape)
        nbytes = layout.nbytes(math.prod(shape[:-1]), shape[-1])
        moved[info.name] = replace(info, format=layout.name, shape=shape, offset=end, nbytes=nbytes)
        end += -(-nbytes // file.alignment) * file.alignment
    return {name: moved[name] for name in file.tensors}, end


def _with_file_type(file: GgufFile, header: bytes, uniform: str | None) -> bytes:
    """The header with the number of the format `uniform` as its file type."""
    patched = bytearray(header)
    kind = file.metadata_types.get(_FILE_TYPE)
    if uniform in FILE_TYPES and isinstance(kind, int) and kind in (UINT32, _INT32):
        struct.pack_into(f"<{CODES[kind]}", patched, _value_offset(file, _FILE_TYPE), FILE_TYPES[uniform])
    return bytes(patched)


def _patch(header: bytes, infos_end: int, infos: dict[str, TensorInfo]) -> bytes:
    """The header, up to the data, with the types and offsets of `infos`, which end at `infos_end`."""
    patched = bytearray(header)
    position = infos_end - sum(_info_nbytes(info) for info in infos.values())
    for info in infos.values():
        position += _info_nbytes(info)
        struct.pack_into("<IQ", patched, position - 12, TYPE_IDS[info.format], info.offset - len(header))
    return bytes(patched)


def _info_nbytes(info: TensorInfo) -> int:
    """Name with its length, number of dims, dims, and at the end type u32 and offset u64."""
    return 8 + len(info.name.encode()) + 4 + 8 * len(info.shape) + 12


def _value_offset(file: GgufFile, wanted: str) -> int:
    """Where in the file the value of the key `wanted` starts."""
    position = _FIXED_BYTES
    for key, value in file.metadata.items():
        position += 8 + len(key.encode()) + 4
        if key == wanted:
            break
        position += _value_nbytes(value, file.metadata_types[key])
    return position


def _value_nbytes(value: Any, kind: int | tuple[int, int]) -> int:
    if isinstance(kind, tuple):
        return 12 + sum(_value_nbytes(element, kind[1]) for element in value)
    return 8 + len(value.encode()) if kind == STRING else struct.calcsize("<" + CODES[kind])


def _data(
    file: GgufFile,
    source: "_Source",
    infos: dict[str, TensorInfo],
    matrices: dict[str, Matrix | Slices],
    nbytes: int,
    changed: set[str],
) -> Iterator[bytes]:
    """Everything behind the header, up to `nbytes` of the whole file; `changed` collects the tensors that differ."""
    same = infos == file.tensors
    ordered = sorted(infos.values(), key=lambda info: info.offset)
    ends = [*(info.offset for info in ordered[1:]), nbytes]
    for info, end in zip(ordered, ends, strict=True):
        old, matrix = file.tensors[info.name], matrices.get(info.name)
        if matrix is None:
            yield from source.chunks(old.offset, old.nbytes)
        else:
            for differs, raw in _panels(source, old, matrix):
                changed |= {info.name} if differs else set()
                yield raw
        padding = end - info.offset - info.nbytes
        yield source.read(old.offset + old.nbytes, padding) if same else bytes(padding)


def _panels(source: "_Source", old: TensorInfo, matrix: Matrix | Slices) -> Iterator[tuple[bool, bytes]]:
    """The matrix in pieces, each with whether it differs from what the source has in its place."""
    position, alike = old.offset, matrix.format == old.format and _shape_of(matrix, old) == old.shape
    for panel in matrix.panels():
        (data,) = panel.parts
        raw = data.numpy().tobytes()
        same = alike and source.read(position, len(raw)) == raw
        position += len(raw)
        yield not same, raw


class _Source:
    """Reads the file that a model came from; where a mapping would end the process, a shorter file is an error here."""

    def __init__(self, origin: Origin, path: Path) -> None:
        self.origin = origin
        self.file = open(path, "rb")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, start: int, nbytes: int) -> bytes:
        self.file.seek(start)
        found = self.file.read(nbytes)
        if len(found) != nbytes:
            raise changed_source(self.origin, "it became shorter")
        return found

    def chunks(self, start: int, nbytes: int) -> Iterator[bytes]:
        for offset in range(0, nbytes, CHUNK_BYTES):
            yield self.read(start + offset, min(CHUNK_BYTES, nbytes - offset))
