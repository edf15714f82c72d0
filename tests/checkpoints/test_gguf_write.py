"""write_gguf on random files: the `gguf` package's reader finds every key and tensor as it was, but for what changed."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType as V
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraft import storage
from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_model import gguf_digest
from qgraft.checkpoints.gguf_write import write_gguf
from qgraft.checkpoints.origin import Matrix, Origin, Stored

WRITABLE = {"f32": Q.F32, "f16": Q.F16, "bf16": Q.BF16, "q4_0": Q.Q4_0, "q4_1": Q.Q4_1, "q5_1": Q.Q5_1, "q8_0": Q.Q8_0}
TRAP = "\x11\0\0\0\0\0\0\0general.file_type\x04\0\0\0"  # what the key looks like, inside of another value

numbers = st.integers(0, 2**32 - 1).map(lambda value: (value, V.UINT32, None))
texts = st.sampled_from(["", "a", "数 ✓", TRAP]).map(lambda value: (value, V.STRING, None))
flags = st.booleans().map(lambda value: (value, V.BOOL, None))
floats = st.floats(width=32, allow_nan=False).map(lambda value: (value, V.FLOAT32, None))
doubles = st.floats(allow_nan=False).map(lambda value: (value, V.FLOAT64, None))
lists = st.lists(st.integers(-128, 127), min_size=1, max_size=5).map(lambda value: (value, V.ARRAY, V.INT8))
strings = st.lists(st.sampled_from(["", "é", TRAP]), min_size=1, max_size=5).map(lambda v: (v, V.ARRAY, V.STRING))
values = st.one_of(numbers, texts, flags, floats, doubles, lists, strings)
keys = st.dictionaries(st.text("abc.é_", min_size=1, max_size=12).filter(lambda k: "general" not in k), values)
matrices = st.tuples(st.integers(1, 9), st.sampled_from([32, 64, 96]), st.sampled_from(sorted(WRITABLE)))


def write(path: Path, pairs: list[tuple[str, Any]], tensors: dict[str, tuple[np.ndarray, Q]], alignment: int) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for key, (value, kind, inner) in pairs:
        writer.add_key_value(key, value, kind, inner)
    for name, (stored, kind) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fields(path: Path) -> dict[str, Any]:
    """Key -> (types, value), in the file's order."""
    reader = gguf.GGUFReader(path)
    return {k: (f.types, f.contents()) for k, f in reader.fields.items() if not k.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, Any]:
    """Name -> (type, shape, offset, bytes), in the file's order."""
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type, t.shape.tolist(), t.data_offset, t.data.tobytes()) for t in reader.tensors}


def origin_of(path: Path) -> Origin:
    return Origin(path, "gguf", gguf_digest(read_gguf(path)), {})


@settings(deadline=None, max_examples=40)
@given(
    before=keys,
    after=keys,
    shapes=st.lists(matrices, min_size=1, max_size=6),
    vector=st.integers(1, 40),
    alignment=st.sampled_from([8, 32, 256]),
    draws=st.data(),
)
def test_random_files(
    tmp_path_factory: pytest.TempPathFactory,
    before: dict[str, Any],
    after: dict[str, Any],
    shapes: list[tuple[int, int, str]],
    vector: int,
    alignment: int,
    draws: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("random")
    random = np.random.default_rng(0)
    stored = {"v": (random.standard_normal(vector, np.float32), Q.F32)}
    for index, (rows, width, name) in enumerate(shapes):
        weights = random.standard_normal((rows, width), np.float32)
        stored[f"w.{index}.é"] = (gguf.quants.quantize(weights, WRITABLE[name]), WRITABLE[name])
    stored["last"] = (random.standard_normal(3, np.float32), Q.F32)
    pairs = list({**before, "general.file_type": (3, V.UINT32, None), **after}.items())
    write(folder / "a.gguf", pairs, stored, alignment)
    file = read_gguf(folder / "a.gguf")

    matrices, expected = [], {}
    for index in range(len(shapes)):
        name = f"w.{index}.é"
        action = draws.draw(st.sampled_from(["keep", "leave", "flip", "convert"]))
        packed = file.packed(name)
        if action == "flip":
            packed.parts[0][-1, -1] ^= 1  # in the private mapping only
        fmt = draws.draw(st.sampled_from(sorted(WRITABLE))) if action == "convert" else packed.format
        if action != "leave":
            matrices.append(Matrix(name, Stored(name), packed, fmt))
        floats = gguf.quants.dequantize(packed.parts[0].numpy(), Q[packed.format.upper()])
        same = fmt == packed.format
        expected[name] = (
            packed.parts[0].numpy().tobytes() if same else gguf.quants.quantize(floats, WRITABLE[fmt]).tobytes()
        )
    uniform = draws.draw(st.sampled_from([None, "q8_0", "f16"]))
    report = write_gguf(folder / "b.gguf", origin_of(folder / "a.gguf"), matrices, uniform)

    old, new = tensors(folder / "a.gguf"), tensors(folder / "b.gguf")
    converted = any(m.format != m.packed.format for m in matrices)
    assert list(new) == list(old)
    for name, (_, shape, _, data) in new.items():
        assert shape == old[name][1]
        assert data == expected.get(name, old[name][3])
    assert report == (
        (folder / "b.gguf").stat().st_size,
        (folder / "a.gguf").stat().st_size,
        sum(new[name][:2] != old[name][:2] or new[name][3] != old[name][3] for name in old),
    )
    wanted = fields(folder / "a.gguf")
    if converted and uniform:
        wanted["general.file_type"] = ([V.UINT32], {"q8_0": 7, "f16": 1}[uniform])
    assert list(fields(folder / "b.gguf").items()) == list(wanted.items())
    if not converted:  # nothing but bytes of tensors
        raw = [(folder / name).read_bytes() for name in ("a.gguf", "b.gguf")]
        assert len(raw[0]) == len(raw[1])
        assert raw[0][: file.data_offset] == raw[1][: file.data_offset]
        assert (raw[0] == raw[1]) == (report[2] == 0)
    read_gguf(folder / "b.gguf")


def test_padding_and_tail_are_kept_where_nothing_moves(tmp_path: Path) -> None:
    stored = {name: (np.ones(3, np.float32), Q.F32) for name in "abc"}
    write(tmp_path / "a.gguf", [], stored, 64)
    raw = bytearray((tmp_path / "a.gguf").read_bytes())
    file = read_gguf(tmp_path / "a.gguf")
    gaps = [file.tensors[name].offset + 20 for name in "abc"]
    for gap in gaps:
        raw[gap] = 0xAB
    for length in (len(raw), gaps[-1]):  # with the padding of the last tensor, and with a part of it
        (tmp_path / "a.gguf").write_bytes(raw[:length])
        write_gguf(tmp_path / "b.gguf", origin_of(tmp_path / "a.gguf"), [], None)
        assert (tmp_path / "b.gguf").read_bytes() == raw[:length]


def test_pieces_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chunk holds more than a panel or a fixed number of bytes, however large a tensor is."""
    weights = np.random.default_rng(0).standard_normal((64, 256), np.float32)
    stored = {"m": (weights, Q.F32), "big": (weights, Q.F32)}
    write(tmp_path / "a.gguf", [], stored, 32)
    monkeypatch.setattr("qgraft.checkpoints.gguf_write.CHUNK_BYTES", 1000)
    monkeypatch.setattr("qgraft.checkpoints.origin.PANEL_WEIGHTS", 600)
    sizes: list[int] = []
    real = storage.write_chunks
    monkeypatch.setattr(
        storage,
        "write_chunks",
        lambda path, chunks, nbytes: real(path, (sizes.append(len(c)) or c for c in chunks), nbytes),
    )
    packed = read_gguf(tmp_path / "a.gguf").packed("m")
    write_gguf(tmp_path / "b.gguf", origin_of(tmp_path / "a.gguf"), [Matrix("m", Stored("m"), packed, "f16")], None)
    assert max(sizes[1:]) == 2 * 256 * 2  # two rows of float16
    assert len(sizes) > 64 * 256 * 4 / 1000
    written = torch.from_numpy(gguf.GGUFReader(tmp_path / "b.gguf").tensors[0].data.copy())
    assert torch.equal(written, torch.from_numpy(weights).half())


def test_type_and_offset_fields(tmp_path: Path) -> None:
    """Against the layout written down by hand: what exactly changed in the header."""
    write(
        tmp_path / "a.gguf", [], {"m": (np.ones((2, 32), np.float32), Q.F32), "v": (np.ones(8, np.float32), Q.F32)}, 32
    )
    packed = read_gguf(tmp_path / "a.gguf").packed("m")
    write_gguf(tmp_path / "b.gguf", origin_of(tmp_path / "a.gguf"), [Matrix("m", Stored("m"), packed, "q8_0")], None)
    old, new = ((tmp_path / name).read_bytes() for name in ("a.gguf", "b.gguf"))
    infos = [struct.pack("<Q1sIQQIQ", 1, b"m", 2, 32, 2, 0, 0) + struct.pack("<Q1sIQIQ", 1, b"v", 1, 8, 0, 256),
             struct.pack("<Q1sIQQIQ", 1, b"m", 2, 32, 2, 8, 0) + struct.pack("<Q1sIQIQ", 1, b"v", 1, 8, 0, 96)]  # fmt: skip
    start = old.index(infos[0])
    assert new[: start + len(infos[1])] == old[:start] + infos[1]
