"""The table of formats, and what must hold for every one of them."""

import gguf
import pytest
import torch

import qgraft.formats
from qgraft.errors import UnsupportedError
from qgraft.formats import (
    FORMATS,
    GGML_TYPES,
    PackedTensor,
    dequantize,
    fitting_format,
    get_format,
    misfit_notes,
    quantize,
    take_rows,
)

READ_ONLY = ["iq1_m", "iq1_s", "iq2_s", "iq2_xs", "iq2_xxs", "iq3_s", "iq3_xxs", "q2_k", "q3_k", "tq1_0", "tq2_0"]
WRITABLE = ["bf16", "chatglm-int4", "chatglm-int8", "f16", "f32", "iq4_nl", "iq4_xs", "mxfp4", "nvfp4"]
WRITABLE += ["q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0"]


def random_packed(name: str, out_features: int, in_features: int) -> PackedTensor:
    """Random bytes, with random finite scales in the row-wise family."""
    each, generator = FORMATS[name], torch.Generator().manual_seed(11)
    data = torch.randint(0, 256, each.parts[0].shape(out_features, in_features), dtype=torch.uint8, generator=generator)
    if len(each.parts) == 1:
        return PackedTensor(name, (out_features, in_features), (data,))
    scale = torch.rand(out_features, generator=generator).half()
    return PackedTensor(name, (out_features, in_features), (data.view(torch.int8), scale))


def test_table_is_complete() -> None:
    assert sorted(FORMATS) == sorted(WRITABLE + READ_ONLY)
    assert all(name == each.name for name, each in FORMATS.items())
    assert [name for name, each in sorted(FORMATS.items()) if each.quantize is None] == READ_ONLY
    assert sorted(GGML_TYPES.values()) == sorted(name for name, each in FORMATS.items() if len(each.parts) == 1)


def test_public_names() -> None:
    names = qgraft.formats.__all__
    assert all(hasattr(qgraft.formats, name) for name in names)
    assert names == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))


@pytest.mark.parametrize("type_id", sorted(GGML_TYPES))
def test_ggml_types_and_sizes_are_those_of_gguf(type_id: int) -> None:
    theirs, ours = gguf.GGMLQuantizationType(type_id), FORMATS[GGML_TYPES[type_id]]
    assert theirs.name.lower() == ours.name
    assert gguf.GGML_QUANT_SIZES[theirs] == (ours.block_size, ours.nbytes(1, ours.block_size))
    assert ours.nbytes(1, 1024) == gguf.quants.quant_shape_to_byte_shape((3, 1024), theirs)[1]


@pytest.mark.parametrize(("name", "row_bytes"), [("chatglm-int4", 32), ("chatglm-int8", 64)])
def test_row_bytes_of_the_row_wise_family(name: str, row_bytes: int) -> None:
    assert FORMATS[name].parts[0].shape(2, 64) == (2, row_bytes) == quantize(torch.ones(2, 64), name).parts[0].shape
    assert FORMATS[name].nbytes(2, 64) == 2 * row_bytes + 2 * 4  # with scales in float32, the widest that are written


@pytest.mark.parametrize(("typo", "meant"), [("q4_2", "q4_"), ("Q4_K", "q4_k"), ("chatglm_int4", "chatglm-int4")])
def test_unknown_name_suggests_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        get_format(typo)
    assert repr(typo) in caught.value.message
    assert "bf16, chatglm-int4, chatglm-int8, f16" in caught.value.message
    assert caught.value.hint is not None
    assert caught.value.hint.startswith(f"did you mean {meant}")


def test_unknown_name_unlike_any_other_has_no_hint() -> None:
    with pytest.raises(UnsupportedError) as caught:
        quantize(torch.ones(1, 32), "nonsense")
    assert caught.value.hint is None


@pytest.mark.parametrize("name", READ_ONLY)
def test_read_only_formats_refuse_to_quantize(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^{name}: qgraft reads this format but cannot write it\nhint: .*q8_0"):
        quantize(torch.ones(1, 256), name)


@pytest.mark.parametrize("name", WRITABLE)
def test_quantize_refuses_and_counts_broken_weights(name: str) -> None:
    w_OI = torch.ones(2, 32)
    w_OI[0, 3], w_OI[1, 5], w_OI[1, 6] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(UnsupportedError, match=rf"^{name}: got 3 of 64 weights NaN or infinite, expected"):
        quantize(w_OI, name)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_rows_are_the_rows_of_the_matrix(name: str) -> None:
    packed = random_packed(name, out_features=11, in_features=512)
    index = torch.tensor([10, 0, 3, 3, 7])
    part = take_rows(packed, index)
    assert part.format == name
    assert part.shape == (5, 512)
    got, want = dequantize(part, torch.float32), dequantize(packed, torch.float32)[index]
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_nbytes_counts_data_and_scales(name: str) -> None:
    packed = random_packed(name, out_features=3, in_features=512)
    scales = 3 * 2 if len(FORMATS[name].parts) > 1 else 0
    assert packed.nbytes == packed.parts[0].numel() + scales


@pytest.mark.parametrize(
    ("wanted", "width", "expected"),
    [("q4_k", 512, "q4_k"), ("q4_k", 576, "q5_0"), ("q5_k", 576, "q5_1"), ("q6_k", 896, "q8_0"), ("q3_k", 64, "iq4_nl"),
     ("iq4_xs", 512, "iq4_xs"), ("iq4_xs", 576, "iq4_nl"), ("nvfp4", 576, "nvfp4"),
     ("nvfp4", 96, None), ("iq2_s", 96, "iq4_nl"), ("tq1_0", 96, "q4_0"),
     ("q4_k", 80, None), ("q8_0", 80, None), ("q8_0", 96, "q8_0"), ("f16", 7, "f16")],
)  # fmt: skip
def test_widths_without_blocks_get_the_formats_that_llamacpp_takes(wanted, width, expected):
    """tensor_type_fallback in llama.cpp's src/llama-quant.cpp."""
    assert fitting_format(wanted, width) == expected


def test_what_got_another_format_is_said_with_its_number():
    found = {"a": (576, "q5_0"), "b": (576, "q5_0"), "c": (512, "q4_k"), "d": (80, None)}
    assert misfit_notes("q4_k", found) == [
        "2 matrices (a, ...) are q5_0, as llama.cpp does it, not q4_k: 576 inputs are no multiple of 256",
        "d stays in its format, not q4_k: 80 inputs are no multiple of 256",
    ]
