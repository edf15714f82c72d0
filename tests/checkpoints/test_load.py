"""load(): which door a name leads to, and what is said when it leads nowhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

import qgraft
from qgraft.checkpoints.load import choose_dtype, load
from qgraft.errors import CheckpointError, OptionError, UnsupportedError

Maker = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub that cannot be reached; what was asked of it."""
    asked: list[tuple[Any, ...]] = []

    def offline(*args: Any, **options: Any) -> str:
        asked.append((*args, options))
        raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.\nMore about it.")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    return asked


def test_a_gguf_file(tiny_gguf: Maker) -> None:
    path = tiny_gguf("llama").path
    for given in (path, str(path)):
        model, tokenizer = load(given)
        assert (model.qgraft.info.container, model.qgraft.info.source) == ("gguf", str(path))
        assert model.dtype == torch.float32
        assert not model.training
        assert tokenizer("hello").input_ids
    assert qgraft.load is load


def test_a_folder(folder: Path) -> None:
    model, tokenizer = load(folder, quantize="q8_0")
    assert model.qgraft.info.container == "folder"
    assert set(model.qgraft.info.formats) == {"q8_0", "f32"}
    assert tokenizer is None


def test_paths_from_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load("~/llama")[0].qgraft.info.source == str(folder)


@pytest.mark.parametrize(
    "name", ["no-such-model", "./org/name", "/no/such.gguf", "org/model.gguf", "a/b/c", "~/x", "a/b:c.bin"]
)
def test_what_is_neither_path_nor_name(name: str, hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(name)
    assert caught.value.message == f"{name}: no such file or folder"
    assert caught.value.hint is not None
    assert "smollm2-135m" in caught.value.hint
    assert hub == []


def test_hub_id_without_a_network(hub: list[tuple[Any, ...]]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load("org/name")
    assert caught.value.message == (
        "org/name: neither a local path nor to be had from the hub: Cannot find an appropriate cached snapshot folder."
    )
    assert caught.value.hint is not None
    assert "network" in caught.value.hint
    ((name, options),) = hub
    assert name == "org/name"
    assert not {pattern for pattern in options["allow_patterns"] if pattern.endswith((".py", ".bin", ".pt", "*"))}


def test_hub_file_without_a_network(hub: list[tuple[Any, ...]]) -> None:
    for file in ("file-q4_1.gguf", "folder/file.gguf"):
        with pytest.raises(CheckpointError, match=f"org/name:{file}: neither"):
            load(f"org/name:{file}")
    assert [call[:2] for call in hub] == [("org/name", "file-q4_1.gguf"), ("org/name", "folder/file.gguf")]


def test_an_error_without_text_and_an_impossible_id(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError(), HFValidationError("Repo id must use alphanumeric chars")):

        def fail(*args: Any, error: Exception = error, **options: Any) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(CheckpointError, match="neither a local path nor to be had from the hub"):
            load("org/na me")


def test_hub_snapshot_is_loaded_as_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(folder))
    assert load("org/name")[0].qgraft.info.container == "folder"


def test_hub_file_is_loaded_as_a_gguf(tiny_gguf: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tiny_gguf("llama").path))
    assert load("org/name:tiny.gguf")[0].qgraft.info.container == "gguf"


def test_a_gguf_is_not_quantized_again(tiny_gguf: Maker) -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)quantize='q4_0' with tiny\.gguf.*leave quantize out"):
        load(tiny_gguf("llama").path, quantize="q4_0")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16), ("auto", torch.float32)],
)
def test_dtypes(tiny_gguf: Maker, name: str, dtype: torch.dtype) -> None:
    model, _ = load(tiny_gguf("llama").path, dtype=name)
    assert model.dtype == dtype
    norm = model.get_submodule("model.norm").weight
    assert norm.dtype == dtype
    if dtype != torch.float16:  # too few bits on some CPUs to be worth a comparison
        assert model(torch.tensor([[4, 5]])).logits.dtype == dtype
    assert choose_dtype(dtype, torch.device("cpu")) == dtype


def test_unknown_dtype(tiny_gguf: Maker) -> None:
    with pytest.raises(OptionError, match="dtype='fp8': expected auto, float32, bfloat16, float16"):
        load(tiny_gguf("llama").path, dtype="fp8")


def test_an_unknown_device_is_said_before_anything_is_read(tiny_gguf: Maker) -> None:
    with pytest.raises(OptionError, match="device='gpu'"):
        load(tiny_gguf("llama").path, device="gpu")


def test_a_gpu_that_is_not_there(tiny_gguf: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="device='cuda:0': torch finds no GPU here"):
        load(tiny_gguf("llama").path, device="cuda:0")


@pytest.mark.cuda
def test_on_a_gpu_everything_is_there(tiny_gguf: Maker, random_ids: Maker) -> None:
    tiny = tiny_gguf("llama", tied=True)
    ids = random_ids(tiny.model)
    model, _ = load(tiny.path, device="cuda", dtype="float32")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert model.get_output_embeddings().packed_weight is model.get_input_embeddings().packed_weight
    with torch.no_grad():
        got, expected = model(ids.cuda()).logits.cpu(), tiny.model(ids).logits
    assert (got - expected).abs().max() / expected.abs().max() < 1e-4
