"""read_gguf against the `gguf` package: files written by its writer, compared with its reader."""

import math
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType as V

from qgraft.checkpoints.gguf_file import ARRAY, DEFAULT_ALIGNMENT, STRING, GgufFile, read_gguf
from qgraft.errors import CheckpointError, UnsupportedError
from qgraft.formats import FORMATS, GGML_TYPES, dequantize

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
METADATA = {  # value type -> (value, and an array of the type)
    V.UINT8: (255, [0, 1, 255]),
    V.INT8: (-128, [-128, 0, 127]),
    V.UINT16: (65535, [0, 65535]),
    V.INT16: (-32768, [-32768, 32767]),
    V.UINT32: (2**32 - 1, [0, 2**32 - 1]),
    V.INT32: (-(2**31), [-(2**31), 2**31 - 1]),
    V.FLOAT32: (0.15625, [0.5, -3.0, math.inf]),
    V.BOOL: (True, [True, False, True]),
    V.STRING: ("naïve 模型 \0 end", ["", "é", "▁the", "a" * 300]),
    V.UINT64: (2**64 - 1, [0, 2**64 - 1]),
    V.INT64: (-(2**63), [-(2**63), 2**63 - 1]),
    V.FLOAT64: (0.1, [0.1, -1e300]),
}


def random_bytes(shape: tuple[int, ...], fmt: str, seed: int = 0) -> np.ndarray:
    """uint8 [*shape[:-1], row_bytes]"""
    full = (*shape[:-1], FORMATS[fmt].nbytes(1, shape[-1]))
    return np.random.default_rng(seed).integers(0, 256, full, dtype=np.uint8)


def write(path: Path, tensors: dict[str, tuple[tuple[int, ...], str]], alignment: int | None = None) -> Path:
    """A file with metadata of every type and tensors name -> (shape, format), written by the gguf package."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for kind, (value, values) in METADATA.items():
        writer.add_key_value(f"test.{kind.name.lower()}", value, kind)
        writer.add_key_value(f"test.{kind.name.lower()}s", values, V.ARRAY, sub_type=kind)
    for seed, (name, (shape, fmt)) in enumerate(tensors.items()):
        raw = random_bytes(shape, fmt, seed)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[fmt.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def every_format() -> dict[str, tuple[tuple[int, ...], str]]:
    """A tensor of 1, 2, 3 and 4 dims in each format that GGUF files have."""
    shapes = [(512,), (3, 256), (2, 3, 768), (2, 1, 3, 256)]
    return {f"{fmt}.{len(s)}d": (s, fmt) for fmt in GGML_TYPES.values() for s in shapes}


@pytest.fixture
def model(tmp_path: Path) -> GgufFile:
    return read_gguf(write(tmp_path / "model.gguf", every_format()))


def test_metadata_of_every_type(model: GgufFile) -> None:
    expected = {"general.architecture": "llama"}
    types = {"general.architecture": STRING}
    for kind, (value, values) in METADATA.items():
        key = f"test.{kind.name.lower()}"
        expected |= {key: value, f"{key}s": values}
        types |= {key: int(kind), f"{key}s": (ARRAY, int(kind))}
    assert model.metadata == expected
    assert list(model.metadata) == list(expected)
    assert [type(value) for value in model.metadata.values()] == [type(value) for value in expected.values()]
    assert model.metadata_types == types


def test_tensors_equal_the_gguf_reader(model: GgufFile) -> None:
    theirs = gguf.GGUFReader(model.path)
    assert (model.version, model.alignment) == (3, DEFAULT_ALIGNMENT)
    assert model.data_offset == theirs.data_offset
    assert 0 <= model.data_offset - model.header_nbytes < model.alignment
    assert list(model.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor, info in zip(theirs.tensors, model.tensors.values(), strict=True):
        assert info.shape == tuple(int(dim) for dim in reversed(tensor.shape))
        assert (info.format.upper(), info.offset, info.nbytes) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
        ours = model.tensor(info.name).contiguous().view(torch.uint8).flatten().numpy()
        np.testing.assert_array_equal(ours, np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1))


@pytest.mark.parametrize("fmt", sorted(GGML_TYPES.values()))
def test_shapes_and_dtypes_of_views(model: GgufFile, fmt: str) -> None:
    for dims in (1, 2, 3, 4):
        info = model.tensors[f"{fmt}.{dims}d"]
        view = model.tensor(info.name)
        if fmt in FLOATS:
            assert (view.dtype, tuple(view.shape)) == (FLOATS[fmt], info.shape)
        else:
            row_bytes = FORMATS[fmt].nbytes(1, info.shape[-1])
            assert (view.dtype, tuple(view.shape)) == (torch.uint8, (*info.shape[:-1], row_bytes))


@pytest.mark.parametrize("fmt", sorted(GGML_TYPES.values()))
def test_packed_holds_the_bytes_of_the_matrix(model: GgufFile, fmt: str) -> None:
    packed = model.packed(f"{fmt}.2d")
    assert (packed.format, packed.shape, len(packed.parts)) == (fmt, (3, 256), 1)
    raw = random_bytes((3, 256), fmt, seed=list(model.tensors).index(f"{fmt}.2d"))
    np.testing.assert_array_equal(packed.parts[0].numpy(), raw)
    assert dequantize(packed, torch.float32).shape == (3, 256)


def test_nothing_is_copied(model: GgufFile) -> None:
    start = model.data.data_ptr()
    for info in model.tensors.values():
        assert model.tensor(info.name).data_ptr() == start + info.offset
    assert model.packed("q4_1.2d").parts[0].data_ptr() == start + model.tensors["q4_1.2d"].offset
    assert model.data.numel() == model.path.stat().st_size


def test_writing_to_a_tensor_leaves_the_file_alone(model: GgufFile) -> None:
    before = model.path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in model.tensors:
            model.tensor(name).zero_()
    assert not model.tensor("q8_0.2d").any()
    assert model.path.read_bytes() == before
    assert read_gguf(model.path).tensor("q8_0.2d").any()


def test_version_2_reads_the_same(model: GgufFile, tmp_path: Path) -> None:
    raw = bytearray(model.path.read_bytes())
    raw[4:8] = (2).to_bytes(4, "little")
    older = tmp_path / "older.gguf"
    older.write_bytes(raw)
    again = read_gguf(older)
    assert again.version == 2
    assert (again.metadata, again.tensors) == (model.metadata, model.tensors)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment_of_the_file(tmp_path: Path, alignment: int) -> None:
    tensors = {"a": ((33,), "f32"), "b": ((2, 32), "q4_0"), "c": ((5,), "f16")}
    model = read_gguf(write(tmp_path / "model.gguf", tensors, alignment))
    theirs = gguf.GGUFReader(model.path)
    assert model.alignment == alignment
    assert [info.offset for info in model.tensors.values()] == [tensor.data_offset for tensor in theirs.tensors]
    assert all(info.offset % alignment == 0 for info in model.tensors.values())


def test_path_may_be_a_string(model: GgufFile) -> None:
    assert read_gguf(str(model.path)).tensors == model.tensors


def test_unknown_tensor_names_the_closest(model: GgufFile) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'q4_1\.2D'") as caught:
        model.tensor("q4_1.2D")
    assert caught.value.hint is not None
    assert "q4_1.2d" in caught.value.hint


@pytest.mark.parametrize("dims", [1, 3, 4])
def test_packed_wants_a_matrix(model: GgufFile, dims: int) -> None:
    with pytest.raises(UnsupportedError, match="expected a matrix"):
        model.packed(f"q4_0.{dims}d")
