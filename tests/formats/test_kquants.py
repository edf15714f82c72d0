"""Writing K-quants, against bytes that llama.cpp made (tests/golden/kquants/README.md)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qgraft.errors import UnsupportedError
from qgraft.formats import FORMATS, dequantize, quantize, unpack

GOLDEN = load_file(Path(__file__).parents[1] / "golden/kquants/io.safetensors")
NAMES = sorted(name.removesuffix("/w") for name in GOLDEN if name.endswith("/w"))
WRITABLE = ["q4_k", "q5_k", "q6_k"]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("format", WRITABLE)
@pytest.mark.parametrize("name", NAMES)
def test_quantizes_like_llamacpp(name: str, format: str) -> None:
    got, want = quantize(GOLDEN[f"{name}/w"], format).parts[0], GOLDEN[f"{name}/{format}"]
    assert got.shape == want.shape
    block_bytes = FORMATS[format].nbytes(1, FORMATS[format].block_size)
    differing = (got != want).view(-1, block_bytes).any(dim=1)
    assert not differing.any(), (
        f"{int(differing.sum())} of {len(differing)} blocks differ, the first in bytes "
        f"{(got != want).view(-1, block_bytes)[differing][0].nonzero().flatten().tolist()}"
    )


@pytest.mark.parametrize("format", WRITABLE)
@pytest.mark.parametrize("name", ["zero", "negative zero", "times 1e-44", "times 1e-20"])
def test_what_is_too_small_for_float16_becomes_zero(name: str, format: str) -> None:
    assert not dequantize(quantize(GOLDEN[f"{name}/w"], format), torch.float32).any()


@pytest.mark.parametrize(("format", "most"), [("q4_k", 0.08), ("q5_k", 0.04), ("q6_k", 0.02)])
@pytest.mark.parametrize("name", ["normal", "real", "positive", "negative", "times 60000"])
def test_error_is_a_part_of_a_step(name: str, format: str, most: float) -> None:
    w_OI = GOLDEN[f"{name}/w"].double()
    error = (dequantize(quantize(w_OI.float(), format), torch.float64) - w_OI).square().mean().sqrt()
    assert error < most * w_OI.square().mean().sqrt()


@pytest.mark.spread(1)
@pytest.mark.parametrize("format", WRITABLE)
def test_each_block_is_quantized_by_itself(format: str) -> None:
    """More blocks than are searched at once, and the same blocks one row after the other."""
    w_OI = normal(130, 1280)
    rows = torch.cat([quantize(row[None], format).parts[0] for row in w_OI])
    assert torch.equal(quantize(w_OI, format).parts[0], rows)


@pytest.mark.parametrize("format", WRITABLE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_quantized_as_their_float32_values(format: str, dtype: torch.dtype) -> None:
    w_OI = normal(3, 512).to(dtype)
    assert torch.equal(quantize(w_OI, format).parts[0], quantize(w_OI.float(), format).parts[0])


@pytest.mark.parametrize("format", WRITABLE)
def test_quantizes_views_and_leaves_the_weights_alone(format: str) -> None:
    w_OI = normal(512, 5).t().requires_grad_()
    before = w_OI.detach().clone()
    packed = quantize(w_OI, format)
    assert not packed.parts[0].requires_grad
    assert packed.parts[0].is_contiguous()
    assert torch.equal(packed.parts[0], quantize(before.contiguous(), format).parts[0])
    assert torch.equal(w_OI, before)


@pytest.mark.parametrize("format", WRITABLE)
def test_no_rows(format: str) -> None:
    assert quantize(torch.empty(0, 512), format).parts[0].shape == (0, FORMATS[format].nbytes(1, 512))


@pytest.mark.parametrize("format", WRITABLE)
def test_width_that_is_no_multiple_of_the_block(format: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^{format}: got in_features = 576, .* 256\nhint: .*q8_0"):
        quantize(normal(2, 576), format)


def test_quotients_beyond_the_c_codes_rounding_are_cut() -> None:
    """The sub-groups differ by 2**20 and their weights by one bit, so that the offsets miss them by 1e6 steps."""
    generator = torch.Generator().manual_seed(0)
    offsets = (2**19 + 2**19 * torch.rand(2000, 7, generator=generator)).mul(16).round().div(16)
    offsets = torch.cat([offsets, torch.full((2000, 1), 2**20 - 1.0)], dim=1).repeat_interleave(32, dim=1)
    w_OI = torch.randint(0, 2, (2000, 256), generator=generator) / 16 - offsets
    grid = unpack(quantize(w_OI, "q5_k"))
    steps, starts = grid.steps(), grid.offsets()
    assert starts is not None
    quotients = (w_OI.view(2000, 8, 32).double() - starts[:, :, None]) / steps[:, :, None]
    assert (quotients.abs() > 2**22).any()
    assert torch.equal(grid.codes.view(2000, 8, 32), quotients.round().clamp(0, 31).to(torch.int8))
