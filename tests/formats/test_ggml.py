"""The ggml formats against `gguf.quants`, bit for bit: random bytes read, every kind of row written."""

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraft.errors import UnsupportedError
from qgraft.formats import FORMATS, PackedTensor, dequantize, get_format, quantize
from qgraft.formats.blocks import read_fields, read_float, write_fields

GGML = sorted(name for name, each in FORMATS.items() if len(each.parts) == 1)
CODEBOOKS = ("iq4_nl", "iq4_xs", "mxfp4", "nvfp4")  # most of which gguf only reads: test_codebooks.py
WRITABLE = [name for name in GGML if FORMATS[name].quantize is not None and FORMATS[name].block_size < 256]
WRITABLE = [name for name in WRITABLE if name not in CODEBOOKS]
BLOCKS_OF_32 = [name for name in WRITABLE if FORMATS[name].block_size == 32]


def assert_same_bits(got: Tensor, want: np.ndarray, per_block: int) -> None:
    """Equal bits, and NaN wherever the other is NaN; otherwise fails and prints the block with most differences."""
    ours, theirs = got.contiguous().numpy(), np.ascontiguousarray(want)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    differs = ours.reshape(-1).view(f"u{ours.itemsize}") != theirs.reshape(-1).view(f"u{ours.itemsize}")
    if ours.dtype.kind == "f":
        differs &= ~(np.isnan(ours) & np.isnan(theirs)).reshape(-1)
    bad = differs.reshape(-1, per_block).sum(axis=1)
    if bad.any():
        worst = int(bad.argmax())
        got_block, want_block = (each.reshape(-1, per_block)[worst].tolist() for each in (ours, theirs))
        counts = f"{(bad > 0).sum()} of {bad.size} blocks differ"
        pytest.fail(f"{counts}; worst is {worst}\ngot  {got_block}\nwant {want_block}")


def oracle_quantize(w_OI: Tensor, name: str) -> np.ndarray:
    """[out, row_bytes] uint8 by gguf."""
    with np.errstate(all="ignore"):
        stored = quants.quantize(w_OI.float().contiguous().numpy(), gguf.GGMLQuantizationType[name.upper()])
    return stored.view(np.uint8)


def oracle_dequantize(data: Tensor, name: str) -> np.ndarray:
    """[out, in] float32 by gguf."""
    with np.errstate(all="ignore"):
        return quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name.upper()]).astype(np.float32)


def assert_quantizes_like_gguf(w_OI: Tensor, name: str) -> None:
    packed = quantize(w_OI, name)
    assert packed.format == name
    assert packed.shape == tuple(w_OI.shape)
    assert packed.parts[0].dtype == torch.uint8
    assert packed.parts[0].is_contiguous()
    assert_same_bits(packed.parts[0], oracle_quantize(w_OI, name), FORMATS[name].nbytes(1, FORMATS[name].block_size))


def random_bytes(name: str, out_features: int, blocks: int, seed: int = 0) -> PackedTensor:
    each = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(
        0, 256, (out_features, blocks * each.nbytes(1, each.block_size)), dtype=torch.uint8, generator=generator
    )
    return PackedTensor(name, (out_features, blocks * each.block_size), (data,))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


# ---------------------------------------------------------------- dequantize


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("out_features", [1, 7, 33])
def test_dequantizes_random_bytes_like_gguf(name: str, out_features: int) -> None:
    packed = random_bytes(name, out_features, blocks=5)
    got = dequantize(packed, torch.float32)
    assert got.shape == packed.shape
    assert_same_bits(got, oracle_dequantize(packed.parts[0], name), FORMATS[name].block_size)


SCALE_OFFSETS = {"q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0], "q2_k": [80, 82], "q3_k": [108]}
SCALE_OFFSETS |= {
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
    "iq4_nl": [0],
    "iq4_xs": [0],
    "tq1_0": [52],
    "tq2_0": [64],
}
SCALE_OFFSETS |= {name: [0] for name in ("iq1_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")}
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 2.0**-24, -(2.0**-15), 65504.0]


@pytest.mark.parametrize("name", sorted(SCALE_OFFSETS))
def test_dequantizes_special_scales_like_gguf(name: str) -> None:
    packed = random_bytes(name, 3 * len(SPECIAL), blocks=2)
    for i, offset in enumerate(SCALE_OFFSETS[name]):
        scales = torch.tensor(SPECIAL * 3, dtype=torch.float16).roll(i)[:, None].view(torch.uint8)  # [rows, 2]
        packed.parts[0][:, offset : offset + 2] = scales
    got = dequantize(packed, torch.float32)
    assert got.isnan().any()
    assert got.isinf().any()
    assert_same_bits(got, oracle_dequantize(packed.parts[0], name), FORMATS[name].block_size)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_dequantizes_every_16_bit_pattern(name: str) -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(256, 256)
    packed = PackedTensor(name, (256, 256), (patterns.view(torch.uint8),))
    assert_same_bits(dequantize(packed, torch.float32), oracle_dequantize(packed.parts[0], name), 1)


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_the_float32_result_rounded_once(name: str, dtype: torch.dtype) -> None:
    packed = random_bytes(name, 3, blocks=2)
    got = dequantize(packed, dtype)
    assert got.dtype == dtype
    want = torch.from_numpy(oracle_dequantize(packed.parts[0], name)).to(dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", GGML)
def test_dequantize_reads_any_strides_and_leaves_the_bytes_alone(name: str) -> None:
    packed = random_bytes(name, 6, blocks=2)
    wide = torch.empty(6, 1 + 2 * packed.parts[0].shape[1], dtype=torch.uint8)
    wide[:, 1::2] = packed.parts[0]
    strided = PackedTensor(name, packed.shape, (wide[:, 1::2],))
    want = oracle_dequantize(packed.parts[0], name)
    assert_same_bits(dequantize(strided, torch.float32), want, FORMATS[name].block_size)
    dequantize(packed, torch.float32).zero_()  # f32 too must hand out a copy
    assert_same_bits(dequantize(packed, torch.float32), want, FORMATS[name].block_size)


def test_reads_numbers_at_odd_offsets() -> None:
    raw = torch.arange(9, dtype=torch.uint8)
    assert torch.equal(read_float(raw[1:].view(2, 4), torch.float32), raw[1:].clone().view(torch.float32).view(2, 1))


def test_q4_0_block_by_hand() -> None:
    codes = list(range(16))  # byte j: low nibble j, high nibble 15 - j; d = 0.5 is 0x3800
    data = torch.tensor([[0x00, 0x38] + [j | (15 - j) << 4 for j in codes]], dtype=torch.uint8)
    got = dequantize(PackedTensor("q4_0", (1, 32), (data,)), torch.float32)
    assert got[0].tolist() == [0.5 * (j - 8) for j in codes] + [0.5 * (7 - j) for j in codes]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("group", [1, 8, 16])
def test_fields_round_trip(group: int, bits: int) -> None:
    raw = random_bytes("q4_0", 4, blocks=16).parts[0]
    codes = read_fields(raw, group, bits)
    assert codes.max() == 2**bits - 1
    assert codes.shape == (4, raw.shape[1] * 8 // bits)
    assert torch.equal(write_fields(codes, group, bits), raw)


# ---------------------------------------------------------------- quantize


def outliers() -> Tensor:
    w_OI = normal(6, 96) * 0.01
    w_OI[torch.arange(6), torch.arange(6) * 17] = torch.tensor([5.0, -5.0, 900.0, -900.0, 1e-3, -60000.0])
    return w_OI


def ties() -> Tensor:
    """Half steps of each scale, and the largest magnitude twice with both signs."""
    steps = torch.arange(-32, 32).view(1, 64) / 2
    halves = steps.clone()  # of q8_0's step, which is 1 in both blocks
    halves[0, 0], halves[0, 40] = 127, -127
    return torch.cat([steps, steps.flip(1), steps * 31, steps * 127 / 16, steps.roll(16, 1), steps.abs() - 8, halves])


ROWS = {
    "normal": normal(16, 256),
    "odd number of rows": normal(17, 96),
    "weights of a model": normal(5, 64) * 0.02,
    "tiny": normal(8, 64) * 1e-7,
    "scales subnormal in float16": normal(8, 64) * 2e-6,
    "subnormal": normal(8, 64) * 1e-40,
    "subnormal, reciprocal overflows": normal(8, 64) * 1e-44,
    "large": normal(8, 64) * 6e4,
    "huge": normal(8, 64) * 1e37,
    "range overflows": torch.tensor([[3e38, -3e38, 0.0, 1.0] * 8]),
    "all zero": torch.zeros(3, 32),
    "all negative zero": -torch.zeros(3, 32),
    "constant": torch.tensor([[1.5], [-0.3], [1e-9], [7e4]]).expand(4, 64),
    "one outlier": outliers(),
    "ties": ties(),
    "positive": normal(4, 64).abs() + 1,
    "negative": -normal(4, 64).abs() - 1,
}


@pytest.mark.parametrize("rows", sorted(ROWS))
@pytest.mark.parametrize("name", WRITABLE)
def test_quantizes_like_gguf(name: str, rows: str) -> None:
    assert_quantizes_like_gguf(ROWS[rows], name)


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_quantizes_other_dtypes_as_their_float32_values(name: str, dtype: torch.dtype) -> None:
    assert_quantizes_like_gguf(normal(5, 64).to(dtype), name)


@pytest.mark.parametrize("name", WRITABLE)
def test_quantizes_views_and_leaves_the_weights_alone(name: str) -> None:
    w_OI = normal(64, 9).t().requires_grad_()  # [9, 64], columns first
    before = w_OI.detach().clone()
    assert_quantizes_like_gguf(w_OI.detach(), name)
    packed = quantize(w_OI, name)
    assert not packed.parts[0].requires_grad
    quantize(w_OI, name).parts[0].zero_()
    assert torch.equal(w_OI, before)


def test_quantize_to_f32_copies() -> None:
    w_OI = torch.ones(2, 3)
    quantize(w_OI, "f32").parts[0].zero_()
    assert torch.equal(w_OI, torch.ones(2, 3))


@pytest.mark.parametrize("name", WRITABLE)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_quantizes_anything_like_gguf(name: str, data: st.DataObject) -> None:
    rows, blocks = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 3))
    smallest = data.draw(st.sampled_from([1e-44, 1e-30, 1e-8, 1e-3, 1.0, 1e30]))
    numbers = st.floats(-100, 100, width=32).map(lambda x: x * smallest + 0.0)  # + 0.0: no negative zeros, see below
    few = data.draw(st.lists(numbers, min_size=1, max_size=40))
    w_OI = torch.tensor(few * (rows * blocks * 32 // len(few) + 1))[: rows * blocks * 32].view(rows, -1) + 0.0
    assert_quantizes_like_gguf(w_OI, name)


@pytest.mark.parametrize("name", ["q4_1", "q5_1"])
@pytest.mark.parametrize("first", [0.0, -0.0])
def test_zero_minimum_has_the_sign_of_the_first_zero(name: str, first: float) -> None:
    """numpy's min of zeros of both signs depends on its vector width; the C code takes the first, and so do we."""
    block = [1.0, first, -first, 0.5] * 8
    packed = quantize(torch.tensor([block]), name)
    assert packed.parts[0][0, 2:4].tolist() == [0, 0x80 if str(first) == "-0.0" else 0]
    assert_same_bits(dequantize(packed, torch.float32), oracle_dequantize(packed.parts[0], name), 32)


@pytest.mark.parametrize("name", ["q4_1", "q5_1"])
def test_blocks_of_mixed_zeros_get_scale_plus_zero(name: str) -> None:
    packed = quantize(torch.tensor([[-0.0, 0.0] * 16, [0.0, -0.0] * 16]), name)
    assert packed.parts[0][:, :2].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("name", BLOCKS_OF_32)
def test_quantizing_what_was_dequantized_changes_little(name: str) -> None:
    w_OI = normal(8, 128)
    got = dequantize(quantize(w_OI, name), torch.float32)
    steps = 2 ** int(name[1])
    assert (got - w_OI).abs().max() < 1.1 * (w_OI.max() - w_OI.min()) / steps


@pytest.mark.parametrize("name", BLOCKS_OF_32)
def test_width_that_is_no_multiple_of_the_block(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^{name}: got in_features = 48, expected a multiple of .* 32\nhint: "):
        quantize(normal(2, 48), name)


@pytest.mark.parametrize("name", GGML)
def test_no_rows(name: str) -> None:
    packed = PackedTensor(name, (0, 512), (torch.empty(0, get_format(name).nbytes(1, 512), dtype=torch.uint8),))
    assert dequantize(packed, torch.float32).shape == (0, 512)
    if get_format(name).quantize:
        assert quantize(torch.empty(0, 512), name).parts[0].shape == packed.parts[0].shape
