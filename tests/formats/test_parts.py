"""Formats that qgraft does not have, to prove that they fit: as many parts, grids and shapes as other libraries' have.

    nf4       a codebook, as bitsandbytes stores it: two codes a byte, the first in the high half; a float32 absmax for 32
              weights; the 16 levels themselves, which all rows share
    gptq4     groups in act-order: words of eight codes along `in`, float16 scales and integer zeros [groups, out], packed
              along `out`, so that eight rows share a number; the group of each column, which all rows share

Each is described once, as a Format with its Parts and a Grid. Everything else here is what qgraft does with any format.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qgraft.errors import UnsupportedError
from qgraft.formats import (
    FORMATS,
    Format,
    Grid,
    PackedTensor,
    Part,
    checked,
    convert,
    dequantize,
    join_rows,
    pack,
    quantize,
    take_rows,
    unpack,
)
from qgraft.kernels import choose, linear, linear_bf16, linear_grad_input, linear_int8
from qgraft.linear import QuantizedEmbedding, QuantizedLinear
from qgraft.merging.layer import merge_layer, seen

GROUP = 32
LEVELS = [  # of NF4 (arXiv:2305.14314), as in bitsandbytes
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


# ---------------------------------------------------------------- a codebook


def unpack_nf4(packed: PackedTensor) -> Grid:
    data, absmax, levels = packed.parts
    codes = torch.stack([data >> 4, data & 15], dim=-1).flatten(1).view(torch.int8)
    return Grid(codes, absmax.clone(), levels=levels.clone(), low=0, high=15, real_dtype=torch.float32)


def pack_nf4(grid: Grid) -> PackedTensor:
    rows, width = grid.codes.shape
    grid.require("nf4", width // GROUP, levels=16)
    codes = grid.codes.view(torch.uint8)
    return PackedTensor("nf4", (rows, width), (codes[:, ::2] << 4 | codes[:, 1::2], grid.d, grid.levels))


def quantize_nf4(w_OI: Tensor) -> PackedTensor:
    levels = torch.tensor(LEVELS)
    blocks = w_OI.float().unflatten(1, (-1, GROUP))
    absmax = blocks.abs().amax(dim=2)
    apart = (blocks / absmax[:, :, None])[..., None] - levels
    codes = apart.abs().argmin(dim=-1).flatten(1).to(torch.int8)
    return pack_nf4(Grid(codes, absmax, levels=levels, low=0, high=15, real_dtype=torch.float32))


NF4 = Format(
    "nf4",
    GROUP,
    (
        Part("data", (torch.uint8,), lambda rows, columns: (rows, columns // 2)),
        Part("absmax", (torch.float32,), lambda rows, columns: (rows, columns // GROUP)),
        Part("levels", (torch.float32,), lambda rows, columns: (16,), rows=None),
    ),
    lambda packed, dtype: unpack_nf4(packed).weight(dtype),
    quantize_nf4,
    unpack_nf4,
    pack_nf4,
)


# ---------------------------------------------------------------- groups with zero points, in act-order


def words(codes: Tensor) -> Tensor:
    """[n, 8 k] codes of 4 bits -> [n, k] int32, the lowest bits first."""
    shifts = torch.arange(0, 32, 4)
    return (codes.long().unflatten(1, (-1, 8)) << shifts).sum(-1).to(torch.int32)


def nibbles(packed_words: Tensor) -> Tensor:
    """The inverse of `words`, int8."""
    return ((packed_words[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(1).to(torch.int8)


def unpack_gptq(packed: PackedTensor) -> Grid:
    qweight, scales, qzeros, g_idx = packed.parts
    codes, zeros = nibbles(qweight.T), nibbles(qzeros).T.contiguous()
    real = scales.T.float().contiguous()
    return Grid(codes, real, zeros=zeros, low=0, high=15, zero_low=0, zero_high=15, group_of=g_idx.long())


def pack_gptq(grid: Grid) -> PackedTensor:
    rows, width = grid.codes.shape
    grid.require("gptq4", width // GROUP, zeros=True, group_of=True)
    parts = words(grid.codes).T.contiguous(), grid.d.T.half().contiguous(), words(grid.zeros.T), grid.group_of.int()
    return PackedTensor("gptq4", (rows, width), parts)


def quantize_gptq(w_OI: Tensor) -> PackedTensor:
    """By the columns of the largest weights first, so that no group is a run of neighbours."""
    order = w_OI.float().square().sum(0).argsort(descending=True)
    group_of = torch.empty(w_OI.shape[1], dtype=torch.int64)
    group_of[order] = torch.arange(w_OI.shape[1]) // GROUP
    sorted_OGW = w_OI.float()[:, order].unflatten(1, (-1, GROUP))
    low, high = sorted_OGW.amin(2).clamp(max=0), sorted_OGW.amax(2).clamp(min=0)
    d = ((high - low) / 15).half().float()
    zeros = (-low / d).round()
    codes = torch.empty_like(w_OI, dtype=torch.int8)
    codes[:, order] = (sorted_OGW / d[..., None] + zeros[..., None]).round().clamp(0, 15).flatten(1).to(torch.int8)
    zeros = zeros.to(torch.int8)
    return pack_gptq(Grid(codes, d, zeros=zeros, low=0, high=15, zero_low=0, zero_high=15, group_of=group_of))


def take_gptq(packed: PackedTensor, rows: Tensor) -> PackedTensor:
    """Eight rows share a word of zeros, so they come out one by one; a number of rows that no word holds is filled up."""
    grid = unpack_gptq(packed)
    taken = replace(grid, codes=grid.codes[rows], d=grid.d[rows], zeros=grid.zeros[rows])
    return pack_gptq(taken)


GPTQ = Format(
    "gptq4",
    GROUP,
    (
        Part("qweight", (torch.int32,), lambda rows, columns: (columns // 8, rows), rows=1),
        Part("scales", (torch.float16,), lambda rows, columns: (columns // GROUP, rows), rows=1),
        Part("qzeros", (torch.int32,), lambda rows, columns: (columns // GROUP, rows // 8), rows=None),
        Part("g_idx", (torch.int32,), lambda rows, columns: (columns,), rows=None),
    ),
    lambda packed, dtype: unpack_gptq(packed).weight(dtype),
    quantize_gptq,
    unpack_gptq,
    pack_gptq,
    take_gptq,
)
NAMES = ["nf4", "gptq4"]


@pytest.fixture(autouse=True)
def formats(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The table with these two in it."""
    monkeypatch.setitem(FORMATS, "nf4", NF4)
    monkeypatch.setitem(FORMATS, "gptq4", GPTQ)
    yield
    choose.cache_clear()


def weights(rows: int = 16, width: int = 128, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(-1, 0, width)[torch.randperm(width, generator=generator)]
    return torch.randn(rows, width, generator=generator) * spread * 0.05


def by_hand(packed: PackedTensor) -> Tensor:
    """Number by number, in Python's floats."""
    rows, width = packed.shape
    out = torch.empty(rows, width, dtype=torch.float64)
    for o in range(rows):
        for i in range(width):
            if packed.format == "nf4":
                data, absmax, levels = packed.parts
                byte = int(data[o, i // 2])
                code = byte >> 4 if i % 2 == 0 else byte & 15
                out[o, i] = float(levels[code]) * float(absmax[o, i // GROUP])
            else:
                qweight, scales, qzeros, g_idx = packed.parts
                g = int(g_idx[i])
                code = int(qweight[i // 8, o]) >> 4 * (i % 8) & 15
                zero = int(qzeros[g, o // 8]) >> 4 * (o % 8) & 15
                out[o, i] = (code - zero) * float(scales[g, o])
    return out


def same(one: PackedTensor, other: PackedTensor) -> bool:
    same_kind = (one.format, one.shape) == (other.format, other.shape)
    return same_kind and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one.parts, other.parts, strict=True)
    )


@pytest.mark.parametrize("name", NAMES)
def test_they_are_read_as_their_makers_read_them(name: str) -> None:
    packed = quantize(weights(8, 64), name)
    assert torch.equal(dequantize(packed, torch.float32), by_hand(packed).float())  # each product is rounded once
    assert same(pack(unpack(packed), name), packed)
    error = (dequantize(packed, torch.float32) - weights(8, 64)).norm() / weights(8, 64).norm()
    assert error < 0.15
    if name == "gptq4":
        assert bool((packed.parts[3].diff() < 0).any())  # groups whose columns lie apart


@pytest.mark.parametrize("name", NAMES)
def test_ops_take_any_number_of_parts(name: str) -> None:
    packed = quantize(weights(), name)
    w_OI = by_hand(packed)
    x, g = torch.randn(2, 5, 128, requires_grad=True), torch.randn(2, 5, 16)
    y = linear(x, packed)
    torch.testing.assert_close(y.double(), x.double() @ w_OI.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(linear_grad_input(g, packed).double(), g.double() @ w_OI, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], linear_grad_input(g, packed))
    bound = 0.02 * float(y.detach().abs().max())
    for rounded in (linear_int8, linear_bf16):
        torch.testing.assert_close(rounded(x, packed), y, rtol=0, atol=bound)
    assert choose("linear", name, "cpu").kernel == "reference"


@pytest.mark.spread(1)
@pytest.mark.parametrize("name", NAMES)
def test_ops_pass_opcheck(name: str) -> None:
    packed, table = quantize(weights(), name), torch.ops.qgraft
    parts, width = packed.parts, 128
    x, g = torch.randn(3, width, requires_grad=True), torch.randn(3, 16, requires_grad=True)
    checks = [
        (table.dequantize.default, (parts, name, width, torch.float32)),
        (table.linear.default, (x, parts, name)),
        (table.linear_int8.default, (x, parts, name)),
        (table.linear_bf16.default, (x, parts, name)),
        (table.linear_grad_input.default, (g, parts, name, width)),
        (table.linear_grad_input_bf16.default, (g, parts, name, width)),
    ]
    for op, arguments in checks:
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}, op


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_taken_and_joined(name: str) -> None:
    packed = quantize(weights(), name)
    index = torch.tensor([9, 0, 3, 3, 15, 7, 8, 1])
    assert torch.equal(dequantize(take_rows(packed, index), torch.float32), dequantize(packed, torch.float32)[index])
    halves = [take_rows(packed, half) for half in torch.arange(16).split(8)]
    with pytest.raises(ValueError, match=f"{name}: got 2 panels, expected the whole weight"):
        join_rows(halves)
    assert join_rows([packed]) is packed
    rows = quantize(weights(), "chatglm-int8")
    assert same(join_rows([take_rows(rows, half) for half in torch.arange(16).split(5)]), rows)


@pytest.mark.parametrize("name", NAMES)
def test_parts_that_are_not_the_formats_are_refused(name: str) -> None:
    packed = quantize(weights(), name)
    assert same(checked(packed.parts, name, 128), packed)
    layout = FORMATS[name]
    for n, part in enumerate(layout.parts):
        others = {"cut": packed.parts[n][..., :-1], "cast": packed.parts[n].double()}
        for changed in others.values():
            parts = (*packed.parts[:n], changed, *packed.parts[n + 1 :])
            with pytest.raises(ValueError, match=f"{name} weight of 128 inputs: .*got"):
                checked(parts, name, 128)
        named = f"expected {len(layout.parts)}: .*{part.name}"
        with pytest.raises(ValueError, match=named):
            checked(packed.parts[:-1], name, 128)
    with pytest.raises(ValueError, match="expected a multiple of 32"):
        checked(packed.parts, name, 120)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_holds_moves_and_replaces_them(name: str) -> None:
    packed = quantize(weights(), name)
    layer = nn.ModuleDict(
        {"a": QuantizedLinear(packed, torch.zeros(16)), "e": QuantizedEmbedding(packed, torch.float32)}
    )
    names = {f"packed_weight.{part.name}" for part in FORMATS[name].parts}
    assert set(layer["a"].state_dict()) == names | {"bias"}
    layer.half()
    assert same(layer["a"].packed, packed)
    twin = QuantizedLinear(quantize(weights(seed=1), name))
    twin.load_state_dict({key: value for key, value in layer["a"].state_dict().items() if key != "bias"})
    assert same(twin.packed, packed)
    ids = torch.tensor([[3, 1, 15, 2], [0, 8, 8, 4]])
    assert torch.equal(QuantizedEmbedding(packed, torch.float32)(ids), dequantize(packed, torch.float32)[ids])
    assert packed.nbytes == FORMATS[name].nbytes(16, 128)
    other = convert(packed, "q8_0")
    layer["a"].replace(other)
    assert set(layer["a"].state_dict()) == {"packed_weight.data", "bias"}
    layer["a"].replace(packed)
    assert same(layer["a"].packed, packed)
    assert {part.device.type for part in layer.to("meta")["a"].packed.parts} == {"meta"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["auto", "scales", "codes", "feedback"])
def test_a_delta_is_merged_into_them(name: str, method: str) -> None:
    """As in tests/merging/test_layer.py: the outputs come closer, in the same format."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    packed = quantize(weights(16, 128), name)
    delta = normal(16, 4) @ normal(4, 128) * 4e-4
    x = normal(900, 24) @ (torch.logspace(0, -2, 24)[:, None] * normal(24, 128)) + 0.01 * normal(900, 128)
    fit, held = x[:700], x[700:]
    merged, report = merge_layer("layer", packed, delta, seen(fit.clone(), fit.clone(), held, held), method)
    assert (merged.format, merged.shape, merged.nbytes) == (name, packed.shape, packed.nbytes)
    base = dequantize(packed, torch.float32).double()
    wanted = held.double() @ (base + delta.double()).T
    error, unmerged = (
        float((held.double() @ each.T - wanted).norm()) for each in (dequantize(merged, torch.float32).double(), base)
    )
    assert error / unmerged == pytest.approx(report.error, rel=1e-3)
    assert error < 0.8 * unmerged
    assert same(pack(unpack(merged), name), merged)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nf4", lambda grid: replace(grid, levels=None), "levels None, expected"),
        ("nf4", lambda grid: replace(grid, zeros=torch.zeros(16, 4, dtype=torch.int8)), "zeros .* expected None"),
        ("gptq4", lambda grid: replace(grid, group_of=None), "group_of None, expected"),
        ("gptq4", lambda grid: replace(grid, zeros=None), "zeros None, expected"),
    ],
)
def test_grids_with_other_parts_are_refused(name: str, change: Callable[[Grid], Grid], message: str) -> None:
    grid = unpack(quantize(weights(), name))
    with pytest.raises(ValueError, match=message):
        pack(change(grid), name)
    plain = unpack(quantize(weights(), "q4_1"))
    for odd in ({"levels": torch.zeros(16)}, {"zeros": grid.d.to(torch.int8)}, {"group_of": torch.arange(128) // 32}):
        with pytest.raises(ValueError, match=f"q4_1: got a grid with {next(iter(odd))}"):
            pack(replace(plain, **odd), "q4_1")
    with pytest.raises(UnsupportedError, match="no grid"):
        unpack(quantize(weights(), "f32"))
