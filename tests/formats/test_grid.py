"""The grid of every format: there and back without a changed byte, and the weight that gguf reads."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraft.errors import UnsupportedError
from qgraft.formats import FORMATS, Grid, PackedTensor, dequantize, pack, quantize, unpack

WITH_GRID = sorted(name for name, each in FORMATS.items() if each.unpack is not None)
PACKABLE = sorted(name for name, each in FORMATS.items() if each.pack is not None)
GGML = [name for name in WITH_GRID if len(FORMATS[name].parts) == 1]
HALVES = {  # byte offsets of the float16 numbers of a block
    "q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0],
    "q2_k": [80, 82], "q3_k": [108], "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208],
    "iq4_nl": [0], "iq4_xs": [0], "tq1_0": [52], "tq2_0": [64],
    "iq1_s": [0], "iq2_xxs": [0], "iq2_xs": [0], "iq2_s": [0], "iq3_xxs": [0], "iq3_s": [0],
}  # fmt: skip
BYTE_SCALES = {"mxfp4": range(255), "nvfp4": range(127)}  # those that a writer may choose; the first bytes of a block
WITH_HALVES = [name for name in PACKABLE if name not in BYTE_SCALES]
SHAPES = {  # weights in a group, in a sub-group; the range of codes; the range of the sub-groups' integers
    "q4_0": (32, 32, -8, 7, 1, 1),
    "q4_1": (32, 32, 0, 15, 1, 1),
    "q5_0": (32, 32, -16, 15, 1, 1),
    "q5_1": (32, 32, 0, 31, 1, 1),
    "q8_0": (32, 32, -127, 127, 1, 1),
    "q2_k": (256, 16, 0, 3, 0, 15),
    "q3_k": (256, 16, -4, 3, -32, 31),
    "q4_k": (256, 32, 0, 15, 0, 63),
    "q5_k": (256, 32, 0, 31, 0, 63),
    "q6_k": (256, 16, -32, 31, -128, 127),
    "iq4_nl": (32, 32, 0, 15, 1, 1),
    "iq4_xs": (256, 32, 0, 15, -32, 31),
    "mxfp4": (32, 32, 0, 15, 1, 1),
    "nvfp4": (16, 16, 0, 15, 1, 1),
    "tq1_0": (256, 256, -1, 1, 1, 1),
    "tq2_0": (256, 256, -1, 1, 1, 1),
    "iq1_s": (256, 32, -9, 9, 1, 15),
    "iq1_m": (256, 16, -9, 9, 1, 15),
    "iq2_xxs": (256, 32, -43, 43, 1, 31),
    "iq2_xs": (256, 16, -43, 43, 1, 31),
    "iq2_s": (256, 16, -43, 43, 1, 31),
    "iq3_xxs": (256, 32, -62, 62, 1, 31),
    "iq3_s": (256, 32, -15, 15, 1, 31),
    "chatglm-int4": (768, 768, -7, 7, 1, 1),
    "chatglm-int8": (768, 768, -127, 127, 1, 1),
}


def random_packed(name: str, seed: int, rows: int = 5, width: int = 768) -> PackedTensor:
    """Random bytes; d and m are any finite float16 (row-wise: or float32), also negative, subnormal and zero."""
    each, generator = FORMATS[name], torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, each.parts[0].shape(rows, width), dtype=torch.uint8, generator=generator)
    if len(each.parts) > 1:
        scale = torch.randn(rows, generator=generator) * 10.0 ** (seed % 12 - 8)
        return PackedTensor(name, (rows, width), (data.view(torch.int8), scale if seed % 2 else scale.half()))
    blocks = data.view(-1, each.nbytes(1, each.block_size))
    if name in BYTE_SCALES:
        scales = blocks[:, : 1 if name == "mxfp4" else 4]
        scales.copy_(scales % {"mxfp4": 251, "nvfp4": 127}[name])  # finite weights
    if name == "iq1_m":
        blocks[:, 55] &= 0xBF  # the upper bits of the exponent
    for offset in HALVES.get(name, []):
        high = blocks[:, offset + 1]
        high[(high & 0x7C) == 0x7C] &= 0x83  # infinities and NaN become subnormal or zero
    return PackedTensor(name, (rows, width), (data,))


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", PACKABLE)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(0, 9), blocks=st.integers(1, 3))
def test_pack_is_the_inverse_of_unpack(name: str, seed: int, rows: int, blocks: int) -> None:
    packed = random_packed(name, seed, rows, 256 * blocks)
    again = pack(unpack(packed), name)
    assert (again.format, again.shape, again.parts[0].dtype) == (name, packed.shape, packed.parts[0].dtype)
    assert [part.dtype for part in again.parts] == [part.dtype for part in packed.parts]
    assert all(torch.equal(*pair) for pair in zip(again.parts, packed.parts, strict=True))


@pytest.mark.parametrize("name", BYTE_SCALES)
def test_every_scale_of_a_byte_survives(name: str) -> None:
    packed = random_packed(name, 0, len(BYTE_SCALES[name]), 64)
    blocks = packed.parts[0].view(len(packed.parts[0]), -1, FORMATS[name].nbytes(1, FORMATS[name].block_size))
    blocks[:, :, : 1 if name == "mxfp4" else 4] = torch.tensor(BYTE_SCALES[name], dtype=torch.uint8)[:, None, None]
    grid = unpack(packed)
    assert grid.d[:, 0].unique().numel() == len(grid.d)
    assert torch.equal(pack(grid, name).parts[0], packed.parts[0])


@pytest.mark.parametrize("name", WITH_HALVES)
def test_every_scale_survives(name: str) -> None:
    """All finite float16 numbers as d, and in the other order as m."""
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    numbers = numbers[numbers.isfinite()]  # 63488 = 248 * 256
    width = max(32, FORMATS[name].block_size)
    grid = unpack(random_packed(name, 0, len(numbers), width))
    d = numbers.float()[:, None]
    grid = replace(grid, d=d, m=None if grid.m is None else d.flip(0), real_dtype=torch.float16)
    again = unpack(pack(grid, name))
    assert torch.equal(bits(again.d), bits(grid.d))
    if grid.m is not None:
        assert again.m is not None
        assert torch.equal(bits(again.m), bits(grid.m))


@pytest.mark.parametrize("name", [name for name in PACKABLE if FORMATS[name].quantize is not None])
def test_what_quantize_wrote_packs_to_the_same_bytes(name: str) -> None:
    packed = quantize(torch.randn(7, 512, generator=torch.Generator().manual_seed(1)), name)
    assert torch.equal(pack(unpack(packed), name).parts[0], packed.parts[0])


@pytest.mark.parametrize("name", WITH_GRID)
def test_changing_a_grid_leaves_the_bytes_alone(name: str) -> None:
    for rows, width in ((5, 768), (1, max(32, FORMATS[name].block_size))):
        packed = random_packed(name, 1, rows, width)
        before = packed.map(torch.clone)
        grid = unpack(packed)
        for each in (grid.codes, grid.d, grid.m, grid.sub_scales, grid.sub_minimums):
            if each is not None:
                each.fill_(1)
        assert all(torch.equal(*pair) for pair in zip(packed.parts, before.parts, strict=True))


# ---------------------------------------------------------------- the weight


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("seed", range(5))
def test_weight_is_what_gguf_reads(name: str, seed: int) -> None:
    packed = random_packed(name, seed)
    want = quants.dequantize(packed.parts[0].numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert torch.equal(bits(unpack(packed).weight()), bits(torch.from_numpy(want)))


@pytest.mark.parametrize("name", WITH_GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weight_is_what_dequantize_gives(name: str, dtype: torch.dtype) -> None:
    packed = random_packed(name, 2)  # row-wise: with float16 scales
    assert torch.equal(unpack(packed).weight(dtype), dequantize(packed, dtype))


@pytest.mark.parametrize("name", WITH_GRID)
def test_parts_are_what_the_formula_says(name: str) -> None:
    """The formula in the module's docstring, weight by weight in float64."""
    group, sub_group, low, high, sub_low, sub_high = SHAPES[name]
    grid = unpack(random_packed(name, 4, rows=2))
    assert (grid.low, grid.high, grid.sub_low, grid.sub_high) == (low, high, sub_low, sub_high)
    codes, d = grid.codes.double().numpy(), grid.d.double().numpy()
    if grid.levels is not None:
        codes = np.array(getattr(quants, name.upper().replace("XS", "NL")).kvalues)[codes.astype(int)]
    assert d.shape == (2, 768 // group)
    assert grid.steps().shape == (2, 768 // sub_group)
    want = np.zeros((2, 768))
    for o, i in np.ndindex(2, 768):
        g, s = i * d.shape[1] // 768, i * grid.steps().shape[1] // 768
        scale = 1 if grid.sub_scales is None else int(grid.sub_scales[o, s])
        minimum = 1 if grid.sub_minimums is None else int(grid.sub_minimums[o, s])
        want[o, i] = d[o, g] * scale * codes[o, i] + (0 if grid.m is None else float(grid.m[o, g]) * minimum)
    largest = np.abs(want).max(axis=1, keepdims=True)
    assert (np.abs(grid.weight().double().numpy() - want) <= 1e-6 * largest).all()


@pytest.mark.parametrize("name", [name for name in PACKABLE if FORMATS[name].quantize is not None])
def test_quantize_uses_all_codes_of_the_range_and_no_others(name: str) -> None:
    w_OI = torch.randn(64, 768, generator=torch.Generator().manual_seed(0))
    grid = unpack(quantize(torch.cat([w_OI, -w_OI]), name))
    assert (int(grid.codes.min()), int(grid.codes.max())) == (grid.low, grid.high)
    for integers in (grid.sub_scales, grid.sub_minimums):
        if integers is not None:
            assert grid.sub_low <= int(integers.min()) < int(integers.max()) <= grid.sub_high


@pytest.mark.parametrize(("narrow", "wide"), [("q4_0", "q5_0"), ("q4_1", "q5_1"), ("q5_0", "q8_0"), ("q4_k", "q5_k")])
def test_wider_formats_of_the_same_parts_hold_the_same_weights(narrow: str, wide: str) -> None:
    packed = random_packed(narrow, 3)
    assert torch.equal(dequantize(pack(unpack(packed), wide), torch.float32), dequantize(packed, torch.float32))


# ---------------------------------------------------------------- rounding


def grid_of(name: str, value: float, real_dtype: torch.dtype = torch.float16) -> Grid:
    """A grid of `name` whose d and m are `value` everywhere."""
    grid = unpack(random_packed(name, 0, rows=2))
    m = None if grid.m is None else torch.full_like(grid.m, value)
    return replace(grid, d=torch.full_like(grid.d, value), m=m, real_dtype=real_dtype)


@pytest.mark.parametrize("name", WITH_HALVES)
@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e-6, 3e-8, 2049.0, 65519.0])
def test_rounded_is_what_is_stored(name: str, value: float) -> None:
    grid = grid_of(name, value)
    rounded, stored = grid.rounded(), unpack(pack(grid, name))
    want = float(np.float16(value))
    assert rounded.d.dtype == torch.float32
    assert rounded.d.unique().tolist() == stored.d.unique().tolist() == [want]
    if rounded.m is not None:
        assert stored.m is not None
        assert rounded.m.unique().tolist() == stored.m.unique().tolist() == [want]
    assert torch.equal(rounded.weight(), dequantize(pack(grid, name), torch.float32))
    assert grid.d.unique().tolist() == [float(np.float32(value))]


def test_float32_scales_are_not_rounded() -> None:
    grid = grid_of("chatglm-int8", 0.1, torch.float32)
    assert torch.equal(grid.rounded().d, grid.d)
    assert pack(grid, "chatglm-int8").parts[1].tolist() == [float(np.float32(0.1))] * 2


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [("mxfp4", 0.3, 0.25), ("mxfp4", -3.0, 2.0**-128), ("mxfp4", 0.0, 2.0**-128), ("mxfp4", 2.0**126, 2.0**126),
     ("nvfp4", 0.3, 0.3125), ("nvfp4", -3.0, 0.0), ("nvfp4", 0.0, 0.0), ("nvfp4", 2.0**-10, 2.0**-10),
     ("nvfp4", 224.0, 224.0), ("nvfp4", 1.0, 1.0)],
)  # fmt: skip
def test_rounded_is_the_nearest_scale_of_a_byte(name: str, value: float, want: float) -> None:
    grid = unpack(random_packed(name, 0, rows=2))
    grid = replace(grid, d=torch.full_like(grid.d, value))
    assert grid.rounded().d.unique().tolist() == unpack(pack(grid, name)).d.unique().tolist() == [want]


@pytest.mark.parametrize(
    ("name", "value", "most"), [("mxfp4", 2.0**127, "8.5"), ("nvfp4", 240.0, "224"), ("nvfp4", torch.nan, "224")]
)
def test_scales_that_no_byte_holds_are_counted(name: str, value: float, most: str) -> None:
    grid = unpack(random_packed(name, 0, rows=2))
    grid.d[1, 0] = value
    with pytest.raises(UnsupportedError, match=rf"^grid: got 1 of {grid.d.numel()} scales .* expected at most {most}"):
        pack(grid, name)


@pytest.mark.parametrize("name", WITH_HALVES)
@pytest.mark.parametrize("value", [65520.0, -1e9, float("inf"), float("nan")])
def test_numbers_that_do_not_fit_are_counted(name: str, value: float) -> None:
    grid = grid_of(name, 1.0)
    bad = grid.d.clone()
    bad[1, 0] = value
    total = grid.d.numel() * (1 if grid.m is None else 2)
    message = (
        rf"^grid: got 1 of {total} scales and minimums NaN or too large to store, expected at most 65504 \(float16\)"
    )
    with pytest.raises(UnsupportedError, match=message):
        pack(replace(grid, d=bad), name)
    with pytest.raises(UnsupportedError, match=message):
        replace(grid, d=bad).rounded()
    if grid.m is not None:
        with pytest.raises(UnsupportedError, match=message):
            pack(replace(grid, m=bad), name)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_float_formats_have_no_grid(name: str) -> None:
    message = f"^{name}: this format has no grid"
    with pytest.raises(UnsupportedError, match=message):
        unpack(quantize(torch.ones(1, 32), name))
    with pytest.raises(UnsupportedError, match=message):
        pack(grid_of("q8_0", 1.0), name)


def test_read_only_formats_do_not_pack() -> None:
    with pytest.raises(UnsupportedError, match=r"^q3_k: qgraft reads this format .*\nhint: write .*q4_k"):
        pack(grid_of("q3_k", 1.0), "q3_k")


def test_unknown_format() -> None:
    with pytest.raises(UnsupportedError, match="unknown format: got 'q4_2'"):
        pack(grid_of("q4_0", 1.0), "q4_2")


@pytest.mark.parametrize(
    ("of", "into", "missing"),
    [
        ("q4_1", "q4_0", r"m \(torch.float32, \(2, 24\)\), expected None"),
        ("q4_0", "q4_1", r"m None, expected \(torch.float32, \(2, 24\)\)"),
        ("q4_k", "q4_1", "sub_scales"),
        ("q4_k", "q6_k", r"sub_scales .*\(2, 24\)\), expected .*\(2, 48\)\)"),
        ("q6_k", "q4_k", "sub_minimums None"),
        ("q8_0", "chatglm-int8", r"d .*\(2, 24\)\), expected .*\(2, 1\)\)"),
        ("chatglm-int4", "q4_0", r"d .*\(2, 1\)\), expected .*\(2, 24\)\)"),
    ],
)
def test_grids_of_other_parts_are_refused(of: str, into: str, missing: str) -> None:
    with pytest.raises(ValueError, match=f"^{into}: got a grid with .*{missing}"):
        pack(grid_of(of, 1.0), into)


def test_grids_of_other_dtypes_are_refused() -> None:
    grid = grid_of("q4_k", 1.0)
    assert grid.sub_scales is not None
    with pytest.raises(ValueError, match=r"codes \(torch.int16, .*; sub_scales \(torch.int32, "):
        pack(replace(grid, codes=grid.codes.short(), sub_scales=grid.sub_scales.int()), "q4_k")


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *[("q4_0", 8), ("q4_0", -9), ("q4_1", 16), ("q4_1", -1), ("q5_0", 16), ("q5_1", 32), ("q5_1", -1)],
        *[("q4_k", 16), ("q5_k", 32), ("q6_k", 32), ("q6_k", -33), ("chatglm-int4", 8), ("chatglm-int4", -9)],
    ],
)
def test_codes_of_too_many_bits_are_refused(name: str, code: int) -> None:
    grid = grid_of(name, 1.0)
    grid.codes[1, 700] = code
    with pytest.raises(ValueError, match=rf"^{name}: got codes from .*{code}.*, expected "):
        pack(grid, name)


@pytest.mark.parametrize("part", ["sub_scales", "sub_minimums"])
@pytest.mark.parametrize("integer", [-1, 64])
def test_integers_of_too_many_bits_are_refused(part: str, integer: int) -> None:
    grid = grid_of("q5_k", 1.0)
    getattr(grid, part)[0, 3] = integer
    with pytest.raises(ValueError, match=rf"^q5_k: got integers of sub-groups from .*{integer}.*, expected 0 to 63"):
        pack(grid, "q5_k")


def test_widths_without_whole_blocks_are_refused() -> None:
    grid = grid_of("q4_0", 1.0)
    with pytest.raises(UnsupportedError, match=r"^q4_0: got in_features = 48, expected a multiple of"):
        pack(replace(grid, codes=grid.codes[:, :48]), "q4_0")
    with pytest.raises(UnsupportedError, match=r"^chatglm-int4: got in_features = 5, expected an even"):
        pack(replace(grid_of("chatglm-int4", 1.0), codes=grid.codes[:, :5]), "chatglm-int4")
