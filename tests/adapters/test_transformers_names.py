"""transformers' own methods for adapters, on models of ours: they do what they say, or name what does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import qgraft
from qgraft.errors import AdapterError, UnsupportedError

Maker = Callable[..., Any]


@pytest.fixture
def model(tiny_gguf: Maker) -> Any:
    model, _ = qgraft.load(tiny_gguf("llama").path)
    for name in ("law", "med"):
        qgraft.attach_lora(model, r=2, name=name, target_modules="q_proj")
        with torch.no_grad():
            for tensor in qgraft.lora_state_dict(model, name).values():
                tensor.normal_(generator=torch.Generator().manual_seed(len(name) + ord(name[0])))
    return model


def test_choosing(model: Any) -> None:
    model.set_adapter("law")
    assert model.active_adapters() == ["law"] == list(qgraft.active_adapters(model))
    model.set_adapter(["law", "med"])
    assert qgraft.active_adapters(model) == {"law": 1.0, "med": 1.0}
    model.disable_adapters()
    assert model.active_adapters() == []
    model.enable_adapters()
    assert model.active_adapters() == ["med"]
    assert model.get_adapter_state_dict("law").keys() == qgraft.lora_state_dict(model, "law").keys()
    model.delete_adapter("law")
    assert qgraft.adapter_names(model) == ["med"]


def test_a_copy_has_methods_of_its_own(model: Any) -> None:
    other = copy.deepcopy(model)
    other.set_adapter("law")
    model.set_adapter("med")
    assert (other.active_adapters(), model.active_adapters()) == (["law"], ["med"])


def test_what_cannot_be_names_what_can(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"(?s)packed weights.*qgraft\.load_adapter"):
        model.load_adapter(str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"qgraft\.attach_lora"):
        model.add_adapter(peft.LoraConfig())
    with pytest.raises(UnsupportedError, match=r"(?s)came as a GGUF.*qgraft\.save\("):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"qgraft\.attach_lora"):
        peft.get_peft_model(
            copy.deepcopy(qgraft.load(model.qgraft.info.source)[0]), peft.LoraConfig(target_modules=["v_proj"])
        )


def test_a_folders_model_is_saved(tiny_gguf: Maker, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    model, _ = qgraft.load(tmp_path / "source")
    model.save_pretrained(tmp_path / "copy")
    again, _ = qgraft.load(tmp_path / "copy")
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_loras_tensors_are_not_dropped(model: Any) -> None:
    with pytest.raises(AdapterError, match=r"(?s)LoRA's under PEFT's names.*load_lora_state_dict"):
        model.load_state_dict(qgraft.lora_state_dict(model, "law"), strict=False)
    model.load_state_dict(model.state_dict())


def test_pefts_word_for_the_base(model: Any) -> None:
    ids = torch.arange(12).reshape(2, 6)
    ours = model(ids, adapter_names=[None, "law"]).logits
    assert torch.equal(model(ids, adapter_names=["__base__", "law"]).logits, ours)
