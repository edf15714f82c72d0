"""ChatGLM's formats against golden data made with the original code (tests/golden/quant_kernels/README.md)."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from qgraft.errors import UnsupportedError
from qgraft.formats import PackedTensor, dequantize, quantize
from qgraft.formats.rowwise import pack_int4, unpack_int4

GOLDEN = load_file(Path(__file__).parents[1] / "golden/quant_kernels/io.safetensors")
BITS, SOURCES = [4, 8], ["src0", "src1"]


def same(got: Tensor, want: Tensor) -> None:
    """Same dtype, shape and numbers; the failure shows the worst element."""
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def golden(source: str, bits: int, what: str) -> Tensor:
    return GOLDEN[f"{source}.int{bits}.{what}"]


def golden_packed(source: str, bits: int) -> PackedTensor:
    shape = tuple(GOLDEN[f"{source}.fp16"].shape)
    return PackedTensor(f"chatglm-int{bits}", shape, (golden(source, bits, "weight"), golden(source, bits, "scale")))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("bits", BITS)
def test_quantizes_float16_like_the_original(source: str, bits: int) -> None:
    packed = quantize(GOLDEN[f"{source}.fp16"], f"chatglm-int{bits}")
    same(packed.parts[1], golden(source, bits, "scale"))
    same(packed.parts[0], golden(source, bits, "weight"))
    same(packed.parts[0] if bits == 8 else unpack_int4(packed.parts[0]), golden(source, bits, "ints"))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("bits", BITS)
def test_quantizes_float32_like_the_original(source: str, bits: int) -> None:
    packed = quantize(GOLDEN[f"{source}.fp16"].float(), f"chatglm-int{bits}")
    same(packed.parts[1], golden(source, bits, "scale_fp32"))
    same(packed.parts[0], golden(source, bits, "weight_fp32src"))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("bits", BITS)
def test_dequantizes_like_the_original(source: str, bits: int) -> None:
    packed = golden_packed(source, bits)
    same(dequantize(packed, torch.float32), golden(source, bits, "dequant_fp32"))
    same(dequantize(packed, torch.float16), golden(source, bits, "dequant_fp16"))
    same(dequantize(packed, torch.bfloat16), golden(source, bits, "dequant_fp32").bfloat16())


def test_all_bytes() -> None:
    data = GOLDEN["all_bytes"]  # [1, 256] int8
    same(unpack_int4(data), GOLDEN["all_bytes.unpacked"])
    same(pack_int4(GOLDEN["all_bytes.unpacked"]), data)
    ones = torch.ones(1)
    same(dequantize(PackedTensor("chatglm-int8", (1, 256), (data, ones)), torch.float32), data.float())
    got = dequantize(PackedTensor("chatglm-int4", (1, 512), (data, ones)), torch.float32)
    same(got, GOLDEN["all_bytes.unpacked"].float())


def test_all_pairs() -> None:
    same(pack_int4(GOLDEN["pairs"]), GOLDEN["packed_pairs"])
    same(unpack_int4(GOLDEN["packed_pairs"]), GOLDEN["pairs"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_ties_round_to_even(dtype: torch.dtype) -> None:
    w_OI = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5]], dtype=dtype)
    packed = quantize(w_OI, "chatglm-int4")
    same(unpack_int4(packed.parts[0]), torch.tensor([[7, 0, 2, 2, 0, -2, -2, 6]], dtype=torch.int8))
    w_OI[0, 0] = 127
    same(quantize(w_OI, "chatglm-int8").parts[0], torch.tensor([[127, 0, 2, 2, 0, -2, -2, 6]], dtype=torch.int8))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_zero_row_stays_zero(bits: int, dtype: torch.dtype) -> None:
    w_OI = torch.tensor([[0.0, 0.0], [1.0, -0.5], [-0.0, 0.0]], dtype=dtype)
    packed = quantize(w_OI, f"chatglm-int{bits}")
    assert packed.parts[1][[0, 2]].tolist() == [0, 0]
    for each in (torch.float16, torch.float32):
        assert dequantize(packed, each)[[0, 2]].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("bits", BITS)
def test_subnormal_scales_neither_wrap_nor_divide_by_zero(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    step = 2.0**-24  # the smallest float16; max|w| / largest is 1.4 steps, then 0.4 steps
    peaks = torch.tensor([1.4, 0.4]).mul(largest).round().mul(step)[:, None]
    packed = quantize(torch.cat([peaks, -peaks], dim=1).half(), f"chatglm-int{bits}")
    codes = packed.parts[0] if bits == 8 else unpack_int4(packed.parts[0])
    assert packed.parts[1].tolist() == [step, 0.0]
    assert codes.tolist() == [[largest, -largest], [0, 0]]


@pytest.mark.parametrize("bits", BITS)
def test_bfloat16_gets_float16_scales(bits: int) -> None:
    w_OI = torch.randn(9, 34, generator=torch.Generator().manual_seed(3)).bfloat16()
    packed = quantize(w_OI, f"chatglm-int{bits}")
    largest = 2 ** (bits - 1) - 1
    scale_O = (w_OI.double().abs().amax(1) / largest).half()
    same(packed.parts[1], scale_O)
    codes = packed.parts[0] if bits == 8 else unpack_int4(packed.parts[0])
    same(codes, (w_OI.float() / scale_O.float()[:, None]).round().clamp(-largest, largest).to(torch.int8))


def test_bfloat16_too_large_for_a_float16_scale() -> None:
    w_OI = torch.tensor([[1e30, 1.0], [1.0, 1.0], [0.0, -3e38]]).bfloat16()
    with pytest.raises(UnsupportedError, match=r"^chatglm-int8: got 2 rows .* max\|w\| / 127 <= 65504\nhint: "):
        quantize(w_OI, "chatglm-int8")


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    exponent=st.integers(-6, 4),
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_round_trip_is_within_half_a_step(
    shape: tuple[int, int], exponent: int, bits: int, dtype: torch.dtype, seed: int
) -> None:
    w_IO = torch.randn(2 * shape[1], shape[0], generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    w_OI = w_IO.clamp(-60000, 60000).to(dtype).t()  # not contiguous
    packed = quantize(w_OI, f"chatglm-int{bits}")
    assert packed.parts[0].dtype == torch.int8
    assert packed.parts[0].shape == (shape[0], 2 * shape[1] * bits // 8)
    error = (dequantize(packed, torch.float32) - w_OI.float()).abs()
    # + 2**-25: rounding of a subnormal float16 scale, times the code; 0.56: the quotient is rounded to float16 as well
    assert (error <= 0.56 * packed.parts[1].float()[:, None] + 2.0**-25 * 2 ** (bits - 1)).all()


def test_odd_width() -> None:
    with pytest.raises(UnsupportedError, match=r"^chatglm-int4: got in_features = 5, expected an even .*\nhint: "):
        quantize(torch.ones(2, 5), "chatglm-int4")
    assert quantize(torch.ones(2, 5), "chatglm-int8").parts[0].tolist() == [[127] * 5] * 2
