"""Formats: what the bits of a stored weight matrix mean.

A format is a name, what its stored tensors are (packed.py lists them), and pure functions on these, on any device:

    dequantize(packed, dtype) -> [out, in]      quantize(w_OI) -> PackedTensor      choosing codes and scales
    unpack(packed) -> Grid                      pack(grid) -> PackedTensor          taking them as they are

A `Grid` (grid.py) is a weight without its bit layout: integer codes and real scales. Float formats have none. qgraft
reads q2_k, q3_k and all types of less than 4 bits in lattices.py and ternary.py, but does not quantize to them.
`FORMATS` is the whole list; nothing registers itself. To add a format:

    1. Describe the bytes of a block as a `Layout` (blocks.py) in a file of its family (ggml.py, codebooks.py, ...),
       drawn in the docstring: reading, writing and dequantizing follow from it. A family without blocks lists its
       stored tensors (`Part`) and brings its own four functions, as rowwise.py does.
    2. Write its `fit_*`, which chooses the grid of given weights, if qgraft shall quantize to it.
    3. Add one line to `FORMATS` here, and for a tensor type of GGUF its id to `GGML_TYPES`.
    4. Add a test that compares it bit for bit with the original implementation, or with bytes made by it, and a line to
       the tables of tests/formats/test_grid.py.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from qgraft.errors import UnsupportedError, near_match
from qgraft.formats import codebooks, ggml, kquants, kquants_fit, ternary
from qgraft.formats.blocks import block_format, float_format, hold_floats, read_format
from qgraft.formats.grid import Grid
from qgraft.formats.lattices import LATTICES
from qgraft.formats.packed import Format, PackedTensor, Part
from qgraft.formats.rowwise import rowwise_format

__all__ = [
    "FORMATS",
    "GGML_TYPES",
    "Format",
    "Grid",
    "PackedTensor",
    "Part",
    "checked",
    "convert",
    "dequantize",
    "fitting_format",
    "get_format",
    "hold_floats",
    "join_rows",
    "misfit_notes",
    "pack",
    "quantize",
    "slice_rows",
    "take_columns",
    "take_rows",
    "unpack",
]

_ALL = (
    rowwise_format("chatglm-int4", bits=4),
    rowwise_format("chatglm-int8", bits=8),
    float_format("f32", torch.float32),
    float_format("f16", torch.float16),
    float_format("bf16", torch.bfloat16),
    block_format("q4_0", ggml.Q4_0, ggml.fit_q4_0),
    block_format("q4_1", ggml.Q4_1, ggml.fit_q4_1),
    block_format("q5_0", ggml.Q5_0, ggml.fit_q5_0),
    block_format("q5_1", ggml.Q5_1, ggml.fit_q5_1),
    block_format("q8_0", ggml.Q8_0, ggml.fit_q8_0),
    block_format("iq4_nl", codebooks.IQ4_NL, codebooks.fit_iq4_nl),
    block_format("mxfp4", codebooks.MXFP4, codebooks.fit_mxfp4),
    block_format("nvfp4", codebooks.NVFP4, codebooks.fit_nvfp4),
    block_format("q2_k", kquants.Q2_K),
    block_format("q3_k", kquants.Q3_K),
    block_format("q4_k", kquants.Q4_K, kquants_fit.fit_q4_k),
    block_format("q5_k", kquants.Q5_K, kquants_fit.fit_q5_k),
    block_format("q6_k", kquants.Q6_K, kquants_fit.fit_q6_k),
    block_format("iq4_xs", codebooks.IQ4_XS, codebooks.fit_iq4_xs),
    *(read_format(name, lattice) for name, lattice in LATTICES.items()),
    read_format("tq1_0", ternary.Base3()),
    block_format("tq2_0", ternary.TQ2_0),
)
FORMATS: Final[dict[str, Format]] = {each.name: each for each in _ALL}

GGML_TYPES: Final[dict[int, str]] = {  # tensor type id in a GGUF file (enum ggml_type in ggml.h) -> key of FORMATS
    0: "f32",
    1: "f16",
    2: "q4_0",
    3: "q4_1",
    6: "q5_0",
    7: "q5_1",
    8: "q8_0",
    10: "q2_k",
    11: "q3_k",
    12: "q4_k",
    13: "q5_k",
    14: "q6_k",
    16: "iq2_xxs",
    17: "iq2_xs",
    18: "iq3_xxs",
    19: "iq1_s",
    20: "iq4_nl",
    21: "iq3_s",
    22: "iq2_s",
    23: "iq4_xs",
    29: "iq1_m",
    30: "bf16",
    34: "tq1_0",
    35: "tq2_0",
    39: "mxfp4",
    40: "nvfp4",
}


_FALLBACKS = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "tq1_0": "q4_0", "tq2_0": "q4_0"}
_FALLBACKS |= dict.fromkeys(("q2_k", "q3_k", "iq4_xs", *LATTICES), "iq4_nl")
_EXACT = {"f16": torch.float16, "bf16": torch.bfloat16}  # dtypes that hold a format's values; float32 holds all others


def get_format(name: str) -> Format:
    """The format called `name` (lower case); UnsupportedError, with the closest names, when there is none."""
    if isinstance(name, str) and name in FORMATS:
        return FORMATS[name]
    message = f"unknown format: got {name!r}, expected one of {', '.join(sorted(FORMATS))}"
    raise UnsupportedError(message, hint=near_match(str(name).lower(), FORMATS))


def checked(parts: Sequence[Tensor], format: str, in_features: int) -> PackedTensor:
    """The packed tensor of these parts. Raises ValueError where they are not what the format says that they are."""
    # The native loops trust these sizes: a wrong one would read past the end of a part. Called for every product, so
    # what differs is described elsewhere.
    layout = FORMATS.get(format) or get_format(format)
    expected = layout.parts
    if len(parts) != len(expected) or in_features % layout.block_size:
        raise _misfit(parts, layout, in_features)
    rows = _count_rows(parts[0], layout)
    for part, tensor in zip(expected, parts, strict=True):
        if tensor.shape != part.shape(rows, in_features) or tensor.dtype not in part.dtypes:
            raise _misfit(parts, layout, in_features)
    return PackedTensor(format, (rows, in_features), tuple(parts))


def dequantize(packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """The weight that `packed` stands for, [out, in] of `dtype`, in memory of its own."""
    return get_format(packed.format).dequantize(packed, dtype)


def quantize(w_OI: Tensor, format: str) -> PackedTensor:
    """Pack `w_OI` [out, in] (floating point) in `format`, rounding as the original implementation does.

    UnsupportedError: unknown or read-only format, NaN or infinite weights, a width the format has no blocks for.
    """
    chosen = get_format(format)
    if chosen.quantize is None:
        raise _read_only(format)
    if not bool((finite := w_OI.isfinite()).all()):
        bad = w_OI.numel() - int(finite.sum())
        raise UnsupportedError(
            f"{format}: got {bad} of {w_OI.numel()} weights NaN or infinite, expected all of them finite",
            hint="the weights were broken before: look at the run or the file that they come from",
        )
    return chosen.quantize(w_OI)


def fitting_format(format: str, width: int) -> str | None:
    """The format that a matrix of so many inputs gets where `format` is asked for; None where none fits.

    K-quants have blocks of 256; where a width is no multiple of it, llama.cpp's quantizer takes a format with blocks of 32
    instead (`tensor_type_fallback` in src/llama-quant.cpp), and so does this.
    """
    for name in (format, _FALLBACKS.get(format)):
        if name is not None and width % get_format(name).block_size == 0:
            return name
    return None


def misfit_notes(wanted: str, found: Mapping[str, tuple[int, str | None]]) -> list[str]:
    """A sentence for each width that `wanted` has no blocks for: how many matrices, and what they are in instead.

    Args:
        found: name of a matrix -> (its inputs, the fitting format or None).
    """
    notes = []
    groups = Counter((width, format) for width, format in found.values() if format != wanted)
    block = get_format(wanted).block_size
    for (width, format), number in sorted(groups.items(), key=str):
        names = [name for name, each in found.items() if each == (width, format)]
        which = names[0] if number == 1 else f"{number} matrices ({names[0]}, ...)"
        got, stays = ("is", "stays in its format") if number == 1 else ("are", "stay in their format")
        became = stays if format is None else f"{got} {format}, as llama.cpp does it"
        notes.append(f"{which} {became}, not {wanted}: {width} inputs are no multiple of {block}")
    return notes


def convert(packed: PackedTensor, format: str) -> PackedTensor:
    """The weight that `packed` stands for in another format: `packed` itself where it has it already.

    16-bit floats are quantized in their own dtype, as the makers of ChatGLM's checkpoints did. Raises as quantize().
    """
    if packed.format == format:
        return packed
    return quantize(dequantize(packed, _EXACT.get(packed.format, torch.float32)), format)


def take_rows(packed: PackedTensor, rows: Tensor) -> PackedTensor:
    """The packed rows `rows` ([n] int64) as a packed tensor of their own."""
    layout = get_format(packed.format)
    if layout.take_rows is not None:
        return layout.take_rows(packed, rows)
    taken = (
        tensor if part.rows is None else tensor[(slice(None),) * part.rows + (rows,)]
        for part, tensor in zip(layout.parts, packed.parts, strict=True)
    )
    return replace(packed, shape=(rows.numel(), packed.shape[1]), parts=tuple(taken))


def take_columns(packed: PackedTensor, columns: Tensor) -> PackedTensor:
    """The packed columns `columns` ([in] int64, a permutation) of a format whose blocks lie side by side in a row.

    Raises UnsupportedError where a block would have to be taken apart.
    """
    size, (rows, width) = get_format(packed.format).block_size, packed.shape
    blocks = columns.view(-1, size) if width % size == 0 else columns.view(1, -1)
    starts = blocks[:, 0]
    if len(packed.parts) > 1 or not torch.equal(blocks, (starts - starts % size)[:, None] + torch.arange(size)):
        raise UnsupportedError(
            f"{packed.format}: columns in another order than the model's, and a block of {size} cannot be taken apart",
            hint="requantize these matrices to a format with blocks of 32, such as q8_0",
        )
    (data,) = packed.parts
    moved = data.view(rows, width // size, -1)[:, (starts // size).to(data.device)].view(data.shape)
    return replace(packed, parts=(moved,))


def slice_rows(packed: PackedTensor, start: int, stop: int) -> PackedTensor:
    """The packed rows start:stop, of a format that can be cut by rows, as views."""
    assert get_format(packed.format).by_rows
    return replace(
        packed, shape=(stop - start, packed.shape[1]), parts=tuple(part[start:stop] for part in packed.parts)
    )


def join_rows(panels: Sequence[PackedTensor]) -> PackedTensor:
    """The packed rows of all `panels`, one after the other, of one format; ValueError for several whose rows share a part."""
    first, layout = panels[0], get_format(panels[0].format)
    if len(panels) == 1:
        return first
    if not layout.by_rows:
        raise ValueError(f"{layout.name}: got {len(panels)} panels, expected the whole weight: its rows share a part")
    columns = zip(*(panel.parts for panel in panels), strict=True)
    joined = tuple(torch.cat(each, dim=part.rows or 0) for part, each in zip(layout.parts, columns, strict=True))
    return replace(first, shape=(sum(panel.shape[0] for panel in panels), first.shape[1]), parts=joined)


def unpack(packed: PackedTensor) -> Grid:
    """The integers and real scales that `packed` is made of; UnsupportedError for float formats, which have none."""
    chosen = get_format(packed.format)
    if chosen.unpack is None:
        raise _no_grid(packed.format)
    return chosen.unpack(packed)


def pack(grid: Grid, format: str) -> PackedTensor:
    """The bytes of `grid` in `format`, `d` and `m` rounded as they are stored: the inverse of `unpack`.

    pack(unpack(p), p.format) is p, byte for byte, while the scales and minimums of p are finite.
    UnsupportedError: unknown, float or read-only format, `d` or `m` that cannot be stored, a width the format has no
    blocks for. ValueError: a grid with other parts than the format has, or integers of too many bits.
    """
    chosen = get_format(format)
    if chosen.unpack is None:
        raise _no_grid(format)
    if chosen.pack is None:
        raise _read_only(format)
    return chosen.pack(grid.rounded())


def _count_rows(first: Tensor, layout: Format) -> int:
    shape, dimension = first.shape, layout.parts[0].rows or 0
    return shape[dimension] if dimension < len(shape) else 0


def _misfit(parts: Sequence[Tensor], layout: Format, in_features: int) -> ValueError:
    """What differs between these parts and what the format says that they are."""
    what = f"{layout.name} weight of {in_features} inputs"
    if len(parts) != len(layout.parts):
        names = ", ".join(part.name for part in layout.parts)
        return ValueError(f"{what}: got {len(parts)} stored tensors, expected {len(layout.parts)}: {names}")
    if in_features % layout.block_size:
        return ValueError(f"{what}: expected a multiple of {layout.block_size}")
    rows, wrong = _count_rows(parts[0], layout), []
    for part, tensor in zip(layout.parts, parts, strict=True):
        expected, dtypes = part.shape(rows, in_features), " or ".join(map(str, part.dtypes))
        if tensor.shape != expected or tensor.dtype not in part.dtypes:
            got = f"{tensor.dtype} {list(tensor.shape)}"
            wrong.append(f"{part.name}: got {got}, expected {dtypes} {list(expected)}")
    return ValueError(f"{what}: {'; '.join(wrong)}")


def _no_grid(format: str) -> UnsupportedError:
    others = ", ".join(sorted(name for name, each in FORMATS.items() if each.unpack is not None))
    return UnsupportedError(f"{format}: this format has no grid, its weights are plain numbers; expected {others}")


def _read_only(format: str) -> UnsupportedError:
    writable = ", ".join(sorted(name for name, each in FORMATS.items() if each.quantize is not None))
    return UnsupportedError(f"{format}: qgraft reads this format but cannot write it", hint=f"write {writable}")
