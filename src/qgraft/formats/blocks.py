"""Blocks: how the bytes of one GGML block are read and written, from one description of its layout.

A row of `in_features` weights is cut into blocks of neighbouring weights; each block carries its own scales, and
blocks and rows follow each other without gaps. Everything is little endian. A `Layout` says which bytes of a block
hold what; reading and writing follow the same `Layout`, so they cannot disagree. The layouts themselves are in ggml.py
(blocks of 32) and kquants.py (blocks of 256).

All layouts place codes in one pattern: a run of `group` bytes holds `8 / bits` runs of `group` codes, the lowest bits
first. `read_fields` reads that pattern and `write_fields` writes it. Codes of 5 or 6 bits are split in two such
fields, low bits and high bits.

Not chosen: a function that reads and one that writes for each format: ten pairs which only tests could keep equal.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from qgraft.errors import UnsupportedError
from qgraft.formats.device_tables import on_device
from qgraft.formats.grid import Grid, require_range
from qgraft.formats.packed import Format, PackedTensor, Part

# Shapes: N blocks (all rows, one after the other), a letter or number for what one block has.
Fit = Callable[[Tensor], Grid]  # [N, block_size] float32 -> grid of N rows, a block each


@dataclass(frozen=True)
class Bits:
    """Codes of `bits` bits in the bytes `start` to `stop` of a block, in runs of `group` bytes."""

    start: int
    stop: int
    group: int
    bits: int

    def read(self, blocks: Tensor) -> Tensor:
        """[N, block_bytes] -> [N, Q] uint8."""
        return read_fields(blocks[:, self.start : self.stop], self.group, self.bits)

    def write(self, blocks: Tensor, codes_NQ: Tensor) -> None:
        blocks[:, self.start : self.stop] = write_fields(codes_NQ, self.group, self.bits)


@dataclass(frozen=True)
class Scales:
    """Scales that are not one float16: numbers of a byte each, `dtype`, in the bytes `start` to `stop` of a block.

    Neither dtype has a sign here. The real scale is `unit` times the number, as ggml has it beside levels that are doubled.
    What the two dtypes call NaN, ggml gives a value: 2^128 for the byte 255 of e8m0, 0 for the byte 127 of e4m3.
    """

    start: int
    stop: int
    dtype: torch.dtype
    unit: float = 0.5

    def read(self, blocks: Tensor) -> Tensor:
        """[N, block_bytes] -> [N, count] float32."""
        raw = blocks[:, self.start : self.stop]
        if self.dtype == torch.float8_e8m0fnu:  # 2^(raw - 128): a subnormal below 2
            exponent = raw.to(torch.int32)
            small = torch.full_like(exponent, 0x200000) << exponent.clamp(max=1)
            return torch.where(exponent < 2, small, exponent - 1 << 23).view(torch.float32)
        mantissa, exponent = (raw & 7).float(), (raw >> 3 & 15).to(torch.int32)
        number = torch.where(exponent == 0, mantissa * 2.0**-9, torch.ldexp(mantissa / 8 + 1, exponent - 7))
        return torch.where(raw == 127, 0.0, number).mul_(self.unit)

    def write(self, values_NS: Tensor) -> Tensor:
        """The inverse of `read`, of numbers that `stored_reals` has rounded: [N, count] uint8."""
        return (values_NS / self.unit).to(self.dtype).view(torch.uint8)


@dataclass(frozen=True)
class SubIntegers:
    """The integers of the sub-groups of a K-quant, in the bytes `start` to `stop` of a block.

    `read` gives scales and minimums (None: the format has none), [N, count] int8 each; `write` is its inverse, None
    where qgraft only reads the format.
    """

    start: int
    stop: int
    count: int
    low: int
    high: int
    read: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    write: Callable[[Tensor, Tensor | None], Tensor] | None = None


@dataclass(frozen=True)
class Layout:
    """What the bytes of a block are.

    Attributes:
        weights, bytes: in one block.
        d: first byte of the float16 scale; or where and what the scales are.
        low, high: the lowest bits of the stored codes, and those above them.
        zero: stored code of the weight 0; a format with `low` of 8 bits stores two's complement, its `zero` is 0.
        codes: the smallest and the largest code that a writer may choose, `zero` taken off.
        m: first byte of the float16 minimum, None in symmetric formats. Formats with sub-groups store it negated (dmin).
        sub: the integers of the sub-groups, if any.
        levels: what the codes stand for, from 0 on, where they are places in a codebook.
    """

    weights: int
    bytes: int
    d: int | Scales
    low: Bits
    codes: tuple[int, int]
    high: Bits | None = None
    zero: int = 0
    m: int | None = None
    sub: SubIntegers | None = None
    levels: tuple[int, ...] | None = None

    @property
    def groups(self) -> int:
        """Of weights with a real scale of their own, in a block."""
        return self.d.stop - self.d.start if isinstance(self.d, Scales) else 1

    def read(self, blocks: Tensor) -> Grid:
        """[N, bytes] uint8 -> grid of N rows, a block each; codes of 8 bits share memory with `blocks`."""
        codes = self.low.read(blocks)
        if self.high is not None:
            codes |= self.high.read(blocks).bitwise_left_shift_(self.low.bits)
        codes = codes.view(torch.int8)
        if self.zero:
            codes -= self.zero
        m = None if self.m is None else read_half(blocks[:, self.m : self.m + 2])
        low, high = self.codes
        if isinstance(self.d, Scales):
            grid = Grid(codes, self.d.read(blocks), low=low, high=high, real_dtype=self.d.dtype, real_unit=self.d.unit)
        else:
            grid = Grid(codes, read_half(blocks[:, self.d : self.d + 2]), m, low=low, high=high)
        if self.levels is not None:
            grid = replace(grid, levels=levels_on(self.levels, blocks.device))
        if self.sub is None:
            return grid
        scales, minimums = self.sub.read(blocks[:, self.sub.start : self.sub.stop])
        grid = replace(grid, sub_scales=scales, sub_minimums=minimums, sub_low=self.sub.low, sub_high=self.sub.high)
        return grid if m is None else replace(grid, m=m.neg_())

    def write(self, grid: Grid) -> Tensor:
        """The inverse of `read`: [N, bytes] uint8. `d` and `m` are rounded; beyond 65504 they become infinite."""
        blocks = torch.empty(len(grid.codes), self.bytes, dtype=torch.uint8, device=grid.codes.device)
        codes = (grid.codes + self.zero).view(torch.uint8)
        if self.high is None:
            self.low.write(blocks, codes)
        else:
            self.low.write(blocks, codes & ((1 << self.low.bits) - 1))
            self.high.write(blocks, codes >> self.low.bits)
        if isinstance(self.d, Scales):
            blocks[:, self.d.start : self.d.stop] = self.d.write(grid.d)
        else:
            blocks[:, self.d : self.d + 2] = half_bytes(grid.d)
        if self.m is not None:
            assert grid.m is not None
            blocks[:, self.m : self.m + 2] = half_bytes(grid.m if self.sub is None else -grid.m)
        if self.sub is not None:
            assert self.sub.write is not None
            assert grid.sub_scales is not None
            blocks[:, self.sub.start : self.sub.stop] = self.sub.write(grid.sub_scales, grid.sub_minimums)
        return blocks


def levels_on(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 [levels] on `device`; grids share it, so it is not to be written to."""
    return on_device(levels, partial(torch.tensor, levels, dtype=torch.float32), device)


def block_format(name: str, layout: Layout, fit: Fit | None = None) -> Format:
    """The format `name`; `fit` chooses the grid of given weights, None where qgraft cannot."""
    read_only = layout.sub is not None and layout.sub.write is None
    return Format(
        name,
        layout.weights,
        (_bytes_of_blocks(layout.weights, layout.bytes),),
        dequantize=partial(_dequantize, layout),
        quantize=None if fit is None else partial(_quantize, name, layout, fit),
        unpack=partial(_unpack, layout),
        pack=None if read_only else partial(_pack, name, layout),
    )


class Blocks(Protocol):
    """What is read only, with a description of its own in the place of a `Layout`."""

    @property
    def weights(self) -> int: ...

    @property
    def bytes(self) -> int: ...

    def read(self, blocks: Tensor) -> Grid: ...


def read_format(name: str, layout: Blocks) -> Format:
    """The format `name`, which qgraft does not write."""
    part = _bytes_of_blocks(layout.weights, layout.bytes)
    read, unpack = partial(_dequantize, layout), partial(_unpack_fresh, layout)
    return Format(name, layout.weights, (part,), dequantize=read, quantize=None, unpack=unpack)


def float_format(name: str, dtype: torch.dtype) -> Format:
    """The format whose blocks are one number of `dtype` each; f16: above 65504 gives infinity."""
    dequantize, quantize = partial(_dequantize_floats, dtype), partial(_quantize_floats, name, dtype)
    return Format(name, 1, (_bytes_of_blocks(1, dtype.itemsize),), dequantize, quantize)


def _bytes_of_blocks(weights: int, nbytes: int) -> Part:
    """The one stored tensor of these formats: rows of blocks of so many weights and bytes."""
    return Part("data", (torch.uint8,), lambda rows, columns: (rows, columns // weights * nbytes))


def _unpack(layout: Layout, packed: PackedTensor) -> Grid:
    grid = _unpack_fresh(layout, packed)
    if layout.low.bits == 8:
        grid = replace(grid, codes=grid.codes.clone())  # who changes a grid must not change the packed bytes
    return grid


def _unpack_fresh(layout: Blocks, packed: PackedTensor) -> Grid:
    return layout.read(packed.parts[0].reshape(-1, layout.bytes)).reshape(*packed.shape)


def _dequantize(layout: Blocks, packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """[out, row_bytes] uint8 -> [out, in] `dtype`, computed in float32 and rounded once at the end."""
    return layout.read(packed.parts[0].reshape(-1, layout.bytes)).weight(dtype).reshape(packed.shape)


def _pack(name: str, layout: Layout, grid: Grid) -> PackedTensor:
    rows, width = grid.codes.shape
    _require_whole_blocks(name, layout, width)
    subs = 1 if layout.sub is None else layout.sub.count
    groups, has_m = width // layout.weights, layout.m is not None
    levels = 0 if layout.levels is None else len(layout.levels)
    grid.require(
        name, groups * layout.groups, subs, m=has_m, sub_minimums=has_m and layout.sub is not None, levels=levels
    )
    bits = layout.low.bits + (0 if layout.high is None else layout.high.bits)
    if bits < 8:  # bytes of their own hold all that int8 does
        require_range(name, "codes", grid.codes, -layout.zero, (1 << bits) - 1 - layout.zero)
    for integers in (grid.sub_scales, grid.sub_minimums):
        if layout.sub is not None and integers is not None:
            require_range(name, "integers of sub-groups", integers, layout.sub.low, layout.sub.high)
    blocks = layout.write(grid.reshape(rows * groups, layout.weights))
    return PackedTensor(name, (rows, width), (blocks.reshape(rows, groups * layout.bytes),))


def _quantize(name: str, layout: Layout, fit: Fit, w_OI: Tensor) -> PackedTensor:
    """[out, in] floating point -> packed, fitted in float32; UnsupportedError when `in` is not a multiple of a block."""
    rows, width = w_OI.shape
    _require_whole_blocks(name, layout, width)
    blocks = layout.write(fit(w_OI.detach().to(torch.float32).reshape(-1, layout.weights)))
    return PackedTensor(name, (rows, width), (blocks.reshape(rows, width // layout.weights * layout.bytes),))


def _require_whole_blocks(name: str, layout: Layout, width: int) -> None:
    if width % layout.weights:
        others = "keep this tensor in f16 or bf16, which take any width"
        raise UnsupportedError(
            f"{name}: got in_features = {width}, expected a multiple of the block size {layout.weights}",
            hint=others if width % 32 else f"q8_0, q5_1 and q4_1 take multiples of 32; or {others}",
        )


def _dequantize_floats(stored: torch.dtype, packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    return read_float(packed.parts[0], stored).to(dtype)


def _quantize_floats(name: str, stored: torch.dtype, w_OI: Tensor) -> PackedTensor:
    rows, width = w_OI.shape
    numbers = w_OI.detach().float().to(stored, copy=True, memory_format=torch.contiguous_format)
    return PackedTensor(name, (rows, width), (numbers.view(torch.uint8).reshape(rows, width * stored.itemsize),))


FLOATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def hold_floats(w_OI: Tensor) -> PackedTensor:
    """Float weights [out, in] as they are, in the format of their dtype; memory is shared where `w_OI` is contiguous."""
    if w_OI.dtype not in FLOATS:
        raise UnsupportedError(f"dtype {w_OI.dtype}; expected float32, float16 or bfloat16")
    rows, width = w_OI.shape
    return PackedTensor(FLOATS[w_OI.dtype], (rows, width), (w_OI.detach().contiguous().view(torch.uint8),))


# ---------------------------------------------------------------- fields of a block


def read_float(raw_NB: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, k * itemsize] uint8 holding numbers of `dtype` -> [N, k] float32; never shares memory with its input."""
    aligned = raw_NB.storage_offset() % dtype.itemsize == 0 and raw_NB.is_contiguous()
    raw_NB = raw_NB if aligned else raw_NB.clone(memory_format=torch.contiguous_format)
    return raw_NB.view(dtype).to(torch.float32, copy=True)


def read_half(raw_N2: Tensor) -> Tensor:
    """[N, 2] uint8, one float16 each -> [N, 1] float32."""
    return read_float(raw_N2, torch.float16)


def half_bytes(values_N1: Tensor) -> Tensor:
    """[N, 1] float32 -> [N, 2] uint8, the bytes of the nearest float16."""
    return values_N1.to(torch.float16).view(torch.uint8)


def read_fields(raw_NB: Tensor, group: int, bits: int) -> Tensor:
    """Codes of `bits` bits from runs of `group` bytes: [N, B] uint8 -> [N, B * 8 / bits] uint8 (a view for 8 bits).

    A run's lowest bits give its first `group` codes, the next bits the next `group` codes, and so on.
    """
    if bits == 8:
        return raw_NB
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw_NB.device).view(1, 1, -1, 1)
    runs = raw_NB.reshape(len(raw_NB), raw_NB.shape[1] // group, 1, group)
    return (runs >> shifts).bitwise_and_((1 << bits) - 1).flatten(1)


def write_fields(codes_NQ: Tensor, group: int, bits: int) -> Tensor:
    """The inverse of `read_fields`: [N, Q] uint8 -> [N, Q * bits / 8] uint8, the codes below 2**bits."""
    if bits == 8:
        return codes_NQ
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes_NQ.device).view(1, 1, -1, 1)
    runs = codes_NQ.reshape(len(codes_NQ), codes_NQ.shape[1] // (group * 8 // bits), 8 // bits, group)
    return (runs << shifts).sum(dim=2, dtype=torch.uint8).flatten(1)
