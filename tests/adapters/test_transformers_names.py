"""transformers' own methods for adapters, on models of ours: they do what they say, or name what does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import qgraft
from qgraft.errors import AdapterError, OptionError, UnsupportedError

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


NAMES = {  # of a LoRA's tensors elsewhere
    "PEFT": lambda key: key,
    "PEFT's own state_dict": lambda key: key.replace(".weight", ".default.weight"),
    "transformers": lambda key: key.removeprefix("base_model.model."),
    "the tutorials": lambda key: key.removeprefix("base_model.model.").replace("lora_A.weight", "lora_a"),
    "THUDM": lambda key: f"transformer.prefix_encoder.{key}",
    "nobody": lambda key: "x." + key.replace("lora_", ""),
}


@pytest.mark.parametrize("who", NAMES)
def test_an_adapters_tensors_are_not_dropped(model: Any, who: str) -> None:
    state = {NAMES[who](key): tensor for key, tensor in qgraft.lora_state_dict(model, "law").items()}
    instead = "load_adapter" if who == "THUDM" else "load_lora_state_dict"
    told = r"load_state_dict: none of" if who == "nobody" else rf"(?s)are an adapter's.*law, med.*{instead}"
    with pytest.raises(AdapterError, match=told):
        model.load_state_dict(state, strict=False)
    if who != "nobody":
        with pytest.raises(AdapterError, match=told):
            model.load_state_dict({**model.state_dict(), **state}, strict=False)


def test_what_is_the_models_is_loaded(model: Any) -> None:
    state = model.state_dict()
    model.load_state_dict(state)
    part = {key: value + 1 for key, value in state.items() if key.endswith("norm.weight")}
    model.load_state_dict(part, strict=False)
    model.load_state_dict({}, strict=False)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in part.items())
    whole = torch.nn.ModuleDict({"lm": model})
    whole.load_state_dict(whole.state_dict())
    with pytest.raises(AdapterError, match="are an adapter's"):
        whole.load_state_dict(
            {f"lm.{key}": value for key, value in qgraft.lora_state_dict(model, "law").items()}, strict=False
        )


def test_pefts_word_for_the_base(model: Any) -> None:
    ids = torch.arange(12).reshape(2, 6)
    ours = model(ids, adapter_names=[None, "law"]).logits
    assert torch.equal(model(ids, adapter_names=["__base__", "law"]).logits, ours)
    with pytest.raises(OptionError, match="reserved"):
        qgraft.attach_lora(model, name="__base__")
