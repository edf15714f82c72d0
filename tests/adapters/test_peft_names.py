"""The names of PEFT's tensors; the judge is PEFT."""

from types import SimpleNamespace

import peft
import pytest
from torch import nn
from transformers import CONFIG_MAPPING

from qgraft.adapters.peft_names import OF_EXPERTS, TAKEN_FOR_EXPERTS, TensorName, is_lora, parse_name, tensor_name


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.base_layer = nn.ModuleList([nn.Linear(8, 8)])  # a name that PEFT uses, too


def test_what_peft_takes_for_experts_is_known() -> None:
    """Of every architecture that transformers lists, PEFT's own reading of the names."""
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion", exc_type=ImportError)
    taken = set()
    for model_type in CONFIG_MAPPING:
        config = peft.LoraConfig(target_modules=sorted(OF_EXPERTS))
        model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
        conversion.convert_peft_config_for_transformers(config, model, None)
        if config.target_parameters:
            assert not config.target_modules
            taken.add(model_type)
    assert "glm4_moe" in taken and taken <= TAKEN_FOR_EXPERTS


def test_names_are_those_that_peft_writes() -> None:
    wrapped = peft.get_peft_model(Tiny(), peft.LoraConfig(r=2, target_modules=["embed", "0"]))
    names = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False).keys()
    parsed = {name: parse_name(name) for name in names}
    assert set(parsed.values()) == {
        TensorName(path, part, path == "embed") for path in ("embed", "base_layer.0") for part in "AB"
    }
    for name, found in parsed.items():
        assert found is not None and found.part is not None and is_lora(name)
        assert tensor_name(found.path, found.part, found.of_embedding) == name


def test_the_state_of_a_whole_model_of_pefts() -> None:
    wrapped = peft.get_peft_model(Tiny(), peft.LoraConfig(r=2, target_modules=["embed", "0"]))
    parsed = {name: parse_name(name) for name in wrapped.state_dict()}
    assert set(parsed.values()) == {
        *(TensorName("embed", part, of_embedding=True) for part in "AB"),
        *(TensorName("base_layer.0", part) for part in "AB"),
        TensorName("embed"), TensorName("base_layer.0"), None,
    }  # fmt: skip
    assert [name for name, found in parsed.items() if found is None] == [
        "base_model.model.base_layer.0.base_layer.bias"
    ]


@pytest.mark.parametrize(
    "name", ["model.q_proj.lora_A.weight", "base_model.model.q.lora_A", "base_model.model.q.lora_embedding_A.weight",
             "base_model.model.q.lora_C.bias", "prompt_embeddings", ""]
)  # fmt: skip
def test_other_names(name: str) -> None:
    assert parse_name(name) is None
