"""Folders as GGUF files: the same logits and ids when they are read again, and refused where a file cannot say it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qgraft
from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_from_folder import why_not_gguf
from qgraft.checkpoints.gguf_model import ARCHITECTURES
from qgraft.checkpoints.gguf_write_tokenizer import PROBES
from qgraft.errors import UnsupportedError

Maker = Callable[..., Any]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0 + i for i in range(8)],
        "short_factor": [1.0 + i / 8 for i in range(8)], "original_max_position_embeddings": 32}  # fmt: skip
GEMMA3 = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip


def make_folder(tiny_gguf: Maker, folder: Path, architecture: str, **options: Any) -> tuple[Path, Any]:
    """A float32 folder as transformers saves it, and the model in it."""
    tiny = tiny_gguf(architecture, **options)
    _, tokenizer = qgraft.load(tiny.path, device="cpu") if "config" not in options else qgraft.load(
        tiny_gguf(architecture).path, device="cpu"
    )  # fmt: skip
    tiny.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tiny.model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.float()


def written(folder: Path, target: Path, **options: Any) -> tuple[Any, Any, Any, Any]:
    """(model of the folder, of the file that it is saved as, and their tokenizers)."""
    model, tokenizer = qgraft.load(folder, dtype="float32", device="cpu", **options)
    assert why_not_gguf(model) is None
    qgraft.save(model, target)
    again, its = qgraft.load(target, dtype="float32", device="cpu")
    return model, again, tokenizer, its


CASES: list[tuple[str, dict[str, Any]]] = [
    *((architecture, {}) for architecture in sorted(ARCHITECTURES)),
    ("llama", {"tied": True}),
    ("llama", {"config": {"attention_bias": True, "mlp_bias": True}}),
    ("llama", {"config": {"rope_parameters": LLAMA3}}),
    ("llama", {"config": {"rope_parameters": YARN}}),
    ("qwen2", {"config": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}}),
    ("phi3", {"config": {"rope_parameters": LONG, "original_max_position_embeddings": 32, "sliding_window": 20}}),
    ("gemma3", {"config": {"rope_parameters": GEMMA3, "num_hidden_layers": 7}}),
    ("gemma3", {"config": {"layer_types": ["sliding_attention", "full_attention"]}}),
    ("stablelm", {"config": {"qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5}}),
    ("gpt2", {"config": {"n_inner": 128}}),
]


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_a_float_folder_is_the_same_model_as_a_file(
    architecture: str, options: dict[str, Any], tiny_gguf: Maker, random_ids: Maker, tmp_path: Path
) -> None:
    folder, theirs = make_folder(tiny_gguf, tmp_path / "folder", architecture, **options)
    model, again, tokenizer, its = written(folder, tmp_path / "new.gguf")
    ids = random_ids(model, rows=2, length=48)
    expected = logits(theirs, ids)
    assert (logits(model, ids) - expected).abs().max() < 1e-4
    assert (logits(again, ids) - expected).abs().max() < 1e-4
    assert expected.std() > 0.1
    for text in (*PROBES, "<|im_start|>user\nhello the cat<|im_end|>\n"):
        assert tokenizer(text)["input_ids"] == its(text)["input_ids"], text
    assert tokenizer.chat_template == its.chat_template
    assert set(again.qgraft.info.formats) == {"f32"}


@pytest.mark.spread(3)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_packed_rows_are_written_as_they_are(
    architecture: str, tiny_gguf: Maker, random_ids: Maker, tmp_path: Path
) -> None:
    folder, _ = make_folder(tiny_gguf, tmp_path / "folder", architecture)
    model, again, *_ = written(folder, tmp_path / "new.gguf", quantize="q4_1")
    ids = random_ids(model)
    assert (logits(again, ids) - logits(model, ids)).abs().max() < 1e-4
    assert again.qgraft.info.formats == model.qgraft.info.formats
    assert int(read_gguf(tmp_path / "new.gguf").metadata["general.file_type"]) == 3  # MOSTLY_Q4_1


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "sliding_window|layer_types"),
    ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
    ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "beta|rope_parameters"),
    ("gemma2", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "config", "message"), REFUSED)
def test_what_no_key_states_is_refused(
    architecture: str, config: dict[str, Any], message: str, tiny_gguf: Maker, tmp_path: Path
) -> None:
    folder, _ = make_folder(tiny_gguf, tmp_path / "folder", architecture, config=config)
    model, _ = qgraft.load(folder, device="cpu")
    with pytest.raises(UnsupportedError, match=rf"(?s)cannot be written as a GGUF file: .*(?:{message})"):
        qgraft.save(model, tmp_path / "new.gguf")
    assert why_not_gguf(model) is not None
    assert not (tmp_path / "new.gguf").exists()
