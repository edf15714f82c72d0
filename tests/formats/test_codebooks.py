"""Types of GGUF with codebooks, against llama.cpp's C code (tests/golden/ggml_types/README.md) and gguf."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from qgraft.formats import FORMATS, PackedTensor, dequantize, quantize, unpack

HERE = Path(__file__).parents[1] / "golden"
GOLDEN = load_file(HERE / "ggml_types/io.safetensors")
WEIGHTS = {name[:-2]: w_OI for name, w_OI in load_file(HERE / "kquants/io.safetensors").items() if name.endswith("/w")}
WRITTEN = ["iq4_nl", "iq4_xs", "mxfp4", "nvfp4"]
READ = sorted(name.removeprefix("values/") for name in GOLDEN if name.startswith("values/"))


def in_blocks(data: Tensor, name: str) -> Tensor:
    return data.view(-1, FORMATS[name].nbytes(1, FORMATS[name].block_size))


def values(data: Tensor, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name.upper()])


def not_as_the_c_code(w_NQ: Tensor, want: Tensor, name: str) -> Tensor:
    """[blocks] bool: where the module says that other bytes are meant."""
    if name == "mxfp4":
        return w_NQ.abs().amax(1) < 2.0**-125
    if name == "nvfp4":
        return (want[:, :4] == 126).any(1)
    return w_NQ.abs().amax(1) > 1e18


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_quantizes_like_llamacpp(name: str, format: str) -> None:
    w_OI, golden = WEIGHTS[name], GOLDEN[f"{name}/{format}"]
    got, want = in_blocks(quantize(w_OI, format).parts[0], format), in_blocks(golden, format)
    differing = (got != want).any(dim=1)
    meant = not_as_the_c_code(w_OI.reshape(len(got), -1), want, format)
    assert not (differing & ~meant).any(), f"{int((differing & ~meant).sum())} of {len(got)} blocks differ"


@pytest.mark.parametrize("format", WRITTEN)
def test_errors_are_no_larger_than_those_of_llamacpp(format: str) -> None:
    errors = np.zeros(2)
    for name in ("real", "normal", "outliers", "scales apart", "scales apart, runs of 16", "sparse", "whole numbers"):
        for i, data in enumerate((quantize(WEIGHTS[name], format).parts[0], GOLDEN[f"{name}/{format}"])):
            errors[i] += ((values(data, format).astype(float) - WEIGHTS[name].numpy()) ** 2).sum()
    assert errors[0] <= errors[1]
    assert errors[0] < errors[1] or format != "nvfp4"


def test_most_of_what_is_compared_is_the_same() -> None:
    for format in WRITTEN:
        size, meant = FORMATS[format].block_size, []
        for name, w_OI in WEIGHTS.items():
            golden = in_blocks(GOLDEN[f"{name}/{format}"], format)
            meant.append(not_as_the_c_code(w_OI.view(-1, size), golden, format))
        assert torch.cat(meant).float().mean() < 0.25


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_quantizes_anything_to_mxfp4_like_gguf(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([2.0**-120, 1e-30, 1e-8, 1e-3, 1.0, 1e30]))
    few = data.draw(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40))
    w_OI = torch.tensor([size, *(x * size for x in few)] * 96)[:96].view(1, -1)
    want = quants.quantize(w_OI.numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert quantize(w_OI, "mxfp4").parts[0].tolist() == want.tolist()


@pytest.mark.parametrize("exponent", range(-30, 31, 3))
@pytest.mark.parametrize("side", [-torch.inf, 0.0, torch.inf])
def test_blocks_of_mxfp4_around_powers_of_two(exponent: int, side: float) -> None:
    most = torch.nextafter(torch.tensor(2.0**exponent), torch.tensor(side)) if side else torch.tensor(2.0**exponent)
    w_OI = torch.cat([most[None], torch.zeros(31)])[None]
    assert (
        quantize(w_OI, "mxfp4").parts[0].tolist()
        == quants.quantize(w_OI.numpy(), gguf.GGMLQuantizationType.MXFP4).tolist()
    )


@pytest.mark.parametrize("format", READ)
def test_reads_random_bytes_like_the_c_code(format: str) -> None:
    data = GOLDEN[f"bytes/{format}"]
    got = dequantize(PackedTensor(format, (1, 1536), (data,)), torch.float32)
    assert torch.equal(
        got.nan_to_num(nan=0.5).view(torch.int32), GOLDEN[f"values/{format}"].nan_to_num(nan=0.5).view(torch.int32)
    )


@pytest.mark.parametrize("format", READ)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_reads_any_bytes_like_gguf(format: str, data: st.DataObject) -> None:
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    size = rows * FORMATS[format].nbytes(1, 256 * blocks)
    raw = data.draw(st.binary(min_size=size, max_size=size))
    stored = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(rows, -1)
    got = dequantize(PackedTensor(format, (rows, 256 * blocks), (stored,)), torch.float32)
    want = torch.from_numpy(np.ascontiguousarray(values(stored, format)))
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(nan=0.5).view(torch.int32), want.nan_to_num(nan=0.5).view(torch.int32))


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("byte", range(256))
def test_every_scale_is_read_like_gguf(format: str, byte: int) -> None:
    size, scales = FORMATS[format].nbytes(1, FORMATS[format].block_size), 1 if format == "mxfp4" else 4
    data = torch.arange(size, dtype=torch.uint8)[None] * 17
    data[:, :scales] = byte
    got = dequantize(PackedTensor(format, (1, FORMATS[format].block_size), (data,)), torch.float32)
    assert torch.equal(got.view(torch.int32), torch.from_numpy(values(data, format)).view(torch.int32))
    assert format == "nvfp4" or byte in (254, 255) or got.abs().max() == 12 * 2.0 ** (byte - 128)


@pytest.mark.parametrize("format", WRITTEN)
def test_no_level_is_nearer(format: str) -> None:
    """Each code by hand, for the scale that was chosen."""
    w_OI = WEIGHTS["normal"].double()
    grid = unpack(quantize(w_OI.float(), format))
    assert grid.levels is not None
    steps = grid.spread(grid.steps()).double()
    errors = (grid.levels.double() * steps[..., None] - w_OI[..., None]).abs()
    chosen = errors.gather(2, grid.codes.long()[..., None])[..., 0]
    slack = 2e-3 * steps.abs() * grid.spacing()  # iq4: codes are chosen before the scale is rounded
    assert (chosen <= errors.amin(2) + slack).all()


@pytest.mark.parametrize("format", WRITTEN)
def test_no_rows(format: str) -> None:
    assert quantize(torch.empty(0, 512), format).parts[0].shape == (0, FORMATS[format].nbytes(1, 512))
