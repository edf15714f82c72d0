"""targets: what a command may write over."""

import os
from pathlib import Path

import pytest

import qgraft
from qgraft import targets
from qgraft.adapter_files.gguf_lora import export_gguf_lora
from qgraft.errors import OptionError, StorageError


def test_what_exists_is_replaced_only_when_told_and_an_input_never(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    for name in ("file", "full/.hidden"):
        (tmp_path / name).write_text("old")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.link(tmp_path / "file", tmp_path / "hard")
    for name in ("new", "empty"):
        targets.check_new(tmp_path / name)
    for name in ("file", "full", "dangling"):
        with pytest.raises(StorageError, match=rf"{name} exists already\nhint: .*overwrite=True"):
            targets.check_new(tmp_path / name)
        targets.check_new(tmp_path / name, overwrite=True)
    for name, source in (("file", "file"), ("hard", "file"), ("full", "full/.hidden"), (".", "full")):
        with pytest.raises(OptionError, match=r"is what is read|which is read"):
            targets.check_new(tmp_path / name, True, [tmp_path / source])
    targets.check_new(tmp_path / "file", True, [tmp_path / "nowhere"])


def test_a_file_of_another_kind_is_never_replaced(tmp_path: Path) -> None:
    for name, content in (("rows.jsonl", "{}"), ("model.gguf", "GGUF..."), ("empty.gguf", "")):
        (tmp_path / name).write_text(content)
    with pytest.raises(StorageError, match=r"rows\.jsonl is no GGUF file"):
        targets.check_new(tmp_path / "rows.jsonl", True, kind="gguf")
    targets.check_new(tmp_path / "model.gguf", True, kind="gguf")
    targets.check_new(tmp_path / "empty.gguf", True, kind="gguf")


def test_what_a_folder_that_is_read_holds_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "ad" / "last").mkdir(parents=True)
    for name, content in (("weights.safetensors", "x"), ("merged.gguf", "GGUF..."), ("last/config.json", "{}")):
        (tmp_path / "ad" / name).write_text(content)
    for name, kind in (("weights.safetensors", "gguf"), ("last", ""), ("last/config.json", "gguf")):
        with pytest.raises(OptionError, match=r"is a part of .*ad, which is read"):
            targets.check_new(tmp_path / "ad" / name, True, [tmp_path / "ad"], kind)
    targets.check_new(tmp_path / "ad" / "merged.gguf", True, [tmp_path / "ad"], "gguf")  # of an earlier merge
    targets.check_new(tmp_path / "ad" / "new.gguf", False, [tmp_path / "ad"], "gguf")


def test_saving_and_exporting_replace_no_rows(tiny_gguf, tmp_path: Path) -> None:
    model, _ = qgraft.load(tiny_gguf("llama").path)
    qgraft.attach_lora(model, r=2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    with pytest.raises(StorageError, match="is no GGUF file"):
        export_gguf_lora(model, rows, overwrite=True)
    qgraft.detach_lora(model)
    with pytest.raises(StorageError, match="is no GGUF file"):
        qgraft.save(model, rows, overwrite=True)
    assert rows.read_text() == "{}"
