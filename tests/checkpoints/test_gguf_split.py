"""Models in several files, split by the `gguf` package, against the same model in one; parts that do not belong together."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf_copies import write_copy

import qgraft
from qgraft.checkpoints.gguf_split import part_names, part_paths, read_model
from qgraft.cli import main
from qgraft.errors import CheckpointError, OptionError, StorageError
from qgraft.formats import convert

COUNT = 3


def split(source: Path, folder: Path, name: str = "tiny", small_first: bool = False, **keys: str) -> list[Path]:
    """`source` in COUNT files, or one more where the first has no tensors, as gguf writes them."""
    reader = GGUFReader(source)
    most = -(-len(reader.tensors) // COUNT)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(folder / f"{name}.gguf", architecture, split_max_tensors=most, small_first_shard=small_first)
    write_copy(reader, writer, **keys)
    return sorted(folder.glob(f"{name}-*.gguf"))


@pytest.fixture
def parts(tiny_gguf: Callable, tmp_path: Path) -> list[Path]:
    return split(tiny_gguf().path, tmp_path)


def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(3, 35)[None]).logits.detach()


@pytest.mark.parametrize("small_first", [False, True])
@pytest.mark.parametrize("given", [0, -1])
def test_any_part_loads_the_whole_model(tiny_gguf: Callable, tmp_path: Path, small_first: bool, given: int) -> None:
    whole, _ = qgraft.load(tiny_gguf().path)
    paths = split(tiny_gguf().path, tmp_path, small_first=small_first)
    assert len(paths) == COUNT + small_first
    model, tokenizer = qgraft.load(paths[given])
    assert tokenizer is not None
    assert torch.equal(logits(model), logits(whole))
    assert model.qgraft.info.fingerprint == whole.qgraft.info.fingerprint


def test_tensors_and_keys_are_those_of_all_parts(parts: list[Path]) -> None:
    file = read_model(parts[1])
    want = {t.name: t.data.tobytes() for path in parts for t in GGUFReader(path).tensors}
    assert {name: file.tensor(name).contiguous().view(torch.uint8).numpy().tobytes() for name in file.tensors} == want
    assert file.metadata["split.count"] == COUNT
    assert file.path == parts[0]
    assert [part.path for part in file.parts] == parts


@pytest.mark.parametrize("name", ["merged.gguf", "merged-00001-of-00003.gguf", "merged"])
def test_saved_as_the_same_split_byte_for_byte(parts: list[Path], tmp_path: Path, name: str) -> None:
    model, _ = qgraft.load(parts[2])
    report = qgraft.save(model, tmp_path / name)
    saved = [tmp_path / f"merged-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    assert report.path == saved[0]
    assert report.nbytes == report.source_nbytes == sum(path.stat().st_size for path in parts)
    assert report.changed == 0
    assert [path.read_bytes() for path in saved] == [path.read_bytes() for path in parts]
    assert len(list(tmp_path.iterdir())) == 2 * COUNT


def test_changed_weights_and_formats_are_in_their_parts(parts: list[Path], tmp_path: Path) -> None:
    model, _ = qgraft.load(parts[0])
    report = qgraft.save(model, tmp_path / "other.gguf", to="iq4_nl")
    again, _ = qgraft.load(report.path)
    layers = {path: layer.packed for path, layer in model.named_modules() if hasattr(layer, "packed")}
    for path, layer in again.named_modules():
        if hasattr(layer, "packed") and "layers" in path:
            assert layer.packed.format == "iq4_nl"
            want = convert(layers[path], "iq4_nl")
            assert torch.equal(layer.packed.parts[0], want.parts[0])
    by_part = [[t.name for t in GGUFReader(path).tensors] for path in parts]
    saved = [tmp_path / f"other-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    assert [[t.name for t in GGUFReader(path).tensors] for path in saved] == by_part
    assert 0 < report.changed < sum(map(len, by_part))


def test_parts_are_not_written_over(parts: list[Path], tmp_path: Path) -> None:
    model, _ = qgraft.load(parts[0])
    with pytest.raises(OptionError, match="is what is read"):
        qgraft.save(model, tmp_path / "tiny.gguf", overwrite=True)
    (tmp_path / "new-00002-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(StorageError, match=r"new-00002-of-00003\.gguf exists already"):
        qgraft.save(model, tmp_path / "new.gguf")
    qgraft.save(model, tmp_path / "new.gguf", overwrite=True)
    assert torch.equal(logits(qgraft.load(tmp_path / "new-00003-of-00003.gguf")[0]), logits(model))


def test_a_save_that_breaks_leaves_what_was_there(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = qgraft.load(parts[0])
    qgraft.save(model, tmp_path / "new.gguf")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    from qgraft.checkpoints import gguf_write

    calls, write = [], gguf_write._write_one

    def broken(*arguments: object) -> tuple[int, int, int]:
        calls.append(arguments)
        if len(calls) == COUNT:
            raise StorageError("the disk is full")
        return write(*arguments)

    monkeypatch.setattr(gguf_write, "_write_one", broken)
    with pytest.raises(StorageError, match="the disk is full"):
        qgraft.save(model, tmp_path / "new.gguf", to="q8_0", overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_changed_parts_are_found_when_saving(parts: list[Path], tmp_path: Path) -> None:
    model, _ = qgraft.load(parts[0])
    parts[2].rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"changed since the model was loaded: .*tiny-00003-of-00003.gguf"):
        qgraft.save(model, tmp_path / "new.gguf")


# ---------------------------------------------------------------- what does not belong together


def test_missing_parts_are_listed(parts: list[Path]) -> None:
    parts[0].unlink()
    parts[2].unlink()
    with pytest.raises(
        CheckpointError, match=r"one of 3 files, of which 2 are missing .*00001-of-00003.*00003-of-00003"
    ):
        qgraft.load(parts[1])


def test_a_part_under_another_name_is_refused(parts: list[Path], tmp_path: Path) -> None:
    shutil.copy(parts[1], tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=r"of which 3 are missing.*alone-00001-of-00003"):
        read_model(tmp_path / "alone.gguf")


def test_parts_in_the_wrong_order_are_listed(parts: list[Path], tmp_path: Path) -> None:
    parts[1].rename(tmp_path / "aside")
    parts[2].rename(parts[1])
    (tmp_path / "aside").rename(parts[2])
    with pytest.raises(CheckpointError) as caught:
        read_model(parts[0])
    assert "00002-of-00003.gguf: key 'split.no': got 2, expected 1" in caught.value.message
    assert "00003-of-00003.gguf: key 'split.no': got 1, expected 2" in caught.value.message


def test_parts_of_different_models_are_refused(parts: list[Path], tiny_gguf: Callable, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    theirs = split(tiny_gguf("qwen2").path, other)
    shutil.copy(theirs[1], parts[1])
    with pytest.raises(
        CheckpointError, match=r"its 3 files are not the parts of one model:\n  tiny-00002-of-00003.gguf: key"
    ):
        read_model(parts[0])


def test_the_same_part_twice_is_refused(parts: list[Path], tmp_path: Path) -> None:
    data = bytearray(parts[0].read_bytes())
    at = data.index(b"split.no") + len("split.no") + 4
    struct.pack_into("<H", data, at, 1)
    parts[1].write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tensors are in several parts: .*\n.*tensors in all, expected"):
        read_model(parts[0])


def test_a_wrong_count_is_refused(parts: list[Path]) -> None:
    for path in parts[1:]:
        data = bytearray(path.read_bytes())
        at = data.index(b"split.tensors.count") + len("split.tensors.count") + 4
        struct.pack_into("<i", data, at, 7)
        path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        read_model(parts[0])
    assert caught.value.message.count("key 'split.tensors.count': got 7, expected") == 2


# ---------------------------------------------------------------- names, inspect


def test_names_are_those_of_gguf_and_llamacpp() -> None:
    names = [gguf.gguf_writer.SHARD_NAME_FORMAT.format("a/b", i + 1, 12) for i in range(12)]
    assert [path.as_posix() for path in part_paths(Path("a/b.gguf"), 12)] == names
    assert [path.as_posix() for path in part_paths(Path("a/b-00007-of-00012.gguf"), 12)] == names
    assert part_names(names[6]) == names
    assert part_names("a/b.gguf") == ["a/b.gguf"]
    assert part_paths(Path("a/b-00007-of-00012.gguf"), 1) == [Path("a/b-00007-of-00012.gguf")]


def test_inspect_shows_the_model_whatever_part_is_given(parts: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for path in parts:
        assert main.main(["inspect", str(path), "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert {each.pop("path") for each in shown} == {str(path) for path in parts}
    assert shown[0] == shown[1] == shown[2]
    assert shown[0]["parts"] == [path.name for path in parts]
    assert shown[0]["bytes"] == sum(path.stat().st_size for path in parts)


def test_commands_for_llamacpp_name_the_first_part(
    parts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It refuses to load any other one; and Ollama reads models in one file alone."""
    model, _ = qgraft.load(parts[1], device="cpu")
    qgraft.attach_lora(model, r=2)
    qgraft.save_adapter(model, tmp_path / "out")
    words = ["export", "--model", str(parts[1]), "--adapter", str(tmp_path / "out")]
    assert main.main([*words, "--to", "gguf-lora", "--output", str(tmp_path / "lora.gguf")]) == 0
    assert f"llama-cli -m {parts[0]} --lora" in capsys.readouterr().out
    assert main.main([*words, "--to", "ollama", "--output", str(tmp_path / "ollama")]) == 2
    assert f"llama-gguf-split --merge {parts[0]} model.gguf" in capsys.readouterr().err
    assert not (tmp_path / "ollama").exists()
