"""Folders whose tensors are not called as the parameters are, or lie there twice, as transformers reads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2Model,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    PreTrainedModel,
)

import qgraft

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=100, bos_token_id=1, eos_token_id=2)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 30)[None]).logits


def rewrite(folder: Path, change: Any) -> None:
    """The tensors of a folder, changed."""
    path = folder / "model.safetensors"
    save_file({name: value.clone() for name, value in change(load_file(path)).items()}, path, metadata={"format": "pt"})


def same_as_transformers(folder: Path, quantize: str | None = None) -> PreTrainedModel:
    model, _ = qgraft.load(folder, device="cpu", quantize=quantize)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    if quantize is None:
        torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
    return model


@pytest.mark.parametrize("model_class", [GPT2Model, LlamaModel])
def test_a_decoder_without_its_output_layer(model_class, tmp_path):
    """As openai-community/gpt2 is published: `h.0...` where the code says `transformer.h.0...`; the head is tied."""
    config = GPT2 if model_class is GPT2Model else LlamaConfig(**SMALL, tie_word_embeddings=True)
    model_class(config).save_pretrained(tmp_path)
    assert not any(name.startswith(("transformer.", "model.")) for name in load_file(tmp_path / "model.safetensors"))
    model = same_as_transformers(tmp_path)
    qgraft.save(model, tmp_path / "saved")
    assert (
        load_file(tmp_path / "saved" / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()
    )


def test_names_of_older_code(tmp_path):
    """GPT-NeoX and Pythia call the output layer `embed_out`."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GPTNeoXConfig(**SMALL, rotary_pct=0.25)).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {name.replace("lm_head", "embed_out"): value for name, value in tensors.items()})
    model = same_as_transformers(tmp_path)
    assert model.qgraft.origin.matrices["lm_head"].name == "embed_out.weight"


def test_experts_that_lie_apart(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert any("experts.0.w1" in name for name in load_file(tmp_path / "model.safetensors"))
    model = same_as_transformers(tmp_path, None)
    model = same_as_transformers(tmp_path, "q8_0")
    assert model.qgraft.info.formats.keys() == {"f32", "q8_0"} and "experts" not in " ".join(
        model.qgraft.origin.vectors
    )


def test_other_bytes_of_an_expert_are_another_base(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    before = qgraft.load(tmp_path, device="cpu")[0].qgraft.info.fingerprint
    rewrite(tmp_path, lambda tensors: {n: v + ("experts.1.w2" in n) for n, v in tensors.items()})
    assert qgraft.load(tmp_path, device="cpu")[0].qgraft.info.fingerprint != before


def test_a_misshaped_expert_is_named(tmp_path):
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: {n: v[:9] if "layers.1" in n and "experts.1.w2" in n else v for n, v in tensors.items()},
    )
    told = r"layers\.1\..*experts\.1\.w2\.weight: got \[9, 64\], expected \[64, 64\], as 3 others of its kind have"
    with pytest.raises(qgraft.CheckpointError, match=told):
        qgraft.load(tmp_path, device="cpu")


def test_a_missing_expert_is_an_error(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {n: v for n, v in tensors.items() if "experts.1.w2" not in n})
    with pytest.raises(qgraft.CheckpointError, match=r"experts"):
        qgraft.load(tmp_path, device="cpu")


@pytest.mark.parametrize("differ", [False, True])
def test_tied_weights_that_lie_there_twice(differ, tmp_path):
    """Where both are there and differ, they are two, whatever config.json says; so does transformers."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] * (2.0 if differ else 1.0)})
    model = same_as_transformers(tmp_path)
    shared = model.lm_head.packed_weight is model.model.embed_tokens.packed_weight
    assert shared != differ
    assert any("not tied" in note for note in model.qgraft.info.notes) == differ
    qgraft.save(model, tmp_path / "saved")
    saved, given = (load_file(tmp_path / part / "model.safetensors") for part in ("saved", "."))
    assert saved.keys() == given.keys() and all(torch.equal(saved[name], given[name]) for name in given)


def test_a_tied_weight_that_lies_under_the_other_name(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=True)).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {n.replace("model.embed_tokens", "lm_head"): v for n, v in t.items()})
    same_as_transformers(tmp_path)
