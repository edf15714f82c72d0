"""model.qgraft: one object for a model, whichever of its modules is asked, in copies and after a pickle."""

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import qgraft
from qgraft.adapters.base import Base, BaseInfo, adapters_of, base_of, find_adapter, selection_of
from qgraft.adapters.holder import Holder, modules_outside_adapters
from qgraft.errors import AdapterError

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
Q = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()


def attach(model: Any, name: str, targets: str = "q_proj") -> None:
    qgraft.attach_lora(model, r=2, target_modules=targets, name=name)
    for key, tensor in qgraft.lora_state_dict(model, name).items():
        if "lora_B" in key:
            tensor.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(key)))


def logits(model: Any, **options: Any) -> Tensor:
    with torch.inference_mode():
        return model(torch.arange(3, 12)[None].expand(2, -1), **options).logits


def paths(model: nn.Module, name: str) -> list[str]:
    return list(find_adapter(model, name).parts)


def holders(model: nn.Module) -> list[Holder]:
    return [module for _, module in modules_outside_adapters(model) if isinstance(module, Holder)]


# ---------------------------------------------------------------- one object


def test_a_model_that_load_did_not_make_gets_its_own_when_it_is_asked(model: Any) -> None:
    assert not hasattr(model, "qgraft") and qgraft.adapter_names(model) == []
    assert isinstance(model.qgraft, Base) and base_of(model) is model.qgraft
    assert (model.qgraft.info, model.qgraft.origin, model.qgraft.merged) == (None, None, None)
    attach(model, "law")
    assert list(model.qgraft.adapters) == ["law"] and model.qgraft.selection is selection_of(model)


def test_a_loaded_model_says_where_it_came_from(tiny_gguf: Any) -> None:
    file = tiny_gguf("llama")
    model, tokenizer = qgraft.load(file.path)
    assert isinstance(model.qgraft.info, BaseInfo) and model.qgraft.info.source == str(file.path)
    assert model.qgraft.tokenizer is tokenizer and model.qgraft.origin.path == file.path.absolute()
    assert not [name for name in vars(model) if "qgraft" in name and name != "qgraft"]


def test_an_adapter_is_a_value(model: Any) -> None:
    attach(model, "law")
    before = find_adapter(model, "law")
    assert (before.name, before.kind, list(before.parts), before.size) == ("law", "lora", Q, 4 * 2 * 32)
    assert all(before.parts[path] is model.get_submodule(path).loras["law"] for path in Q)
    qgraft.detach_adapter(model.model.layers[0])
    assert list(before.parts) == Q and paths(model, "law") == Q[1:]
    with pytest.raises(AttributeError):
        before.name = "tax"  # type: ignore[misc]


# ---------------------------------------------------------------- from where it is seen


def test_every_module_sees_its_own_parts_by_its_own_paths(model: Any) -> None:
    attach(model, "law")
    assert paths(model, "law") == Q
    assert paths(model.model, "law") == [path.removeprefix("model.") for path in Q]
    assert paths(model.model.layers[1], "law") == ["self_attn.q_proj"]
    assert paths(model.model.layers[1].self_attn.q_proj, "law") == [""]
    assert qgraft.active_adapters(model.model.layers[1].mlp.up_proj) == {}  # which has no part in it
    assert paths(model, "law") == Q


def test_what_is_put_on_a_part_is_on_the_model(model: Any) -> None:
    attach(model, "law")
    attach(model.model.layers[1], "med", "q_proj,v_proj")
    assert paths(model, "med") == [Q[1], Q[1].replace("q_proj", "v_proj")]
    stem = f"base_model.model.{Q[1]}.lora_"
    assert [key for key in qgraft.lora_state_dict(model, "med") if "q_proj" in key] == [
        f"{stem}A.weight",
        f"{stem}B.weight",
    ]
    assert {id(holder.selection) for holder in holders(model)} == {id(model.qgraft.selection)}
    qgraft.detach_adapter(model)
    assert not holders(model)


def test_what_was_put_on_the_decoder_is_found_from_the_model(tiny_gguf: Any) -> None:
    model = qgraft.load(tiny_gguf("llama").path)[0].eval()
    attach(model.model, "law")
    assert paths(model, "law") == Q and paths(model.model, "law") == [path[6:] for path in Q]
    assert model.qgraft.selection is model.model.qgraft.selection and qgraft.active_adapters(model) == {"law": 1.0}
    attach(model, "med", "lm_head")
    assert {name: list(adapter.parts) for name, adapter in adapters_of(model).items()} == {"law": Q, "med": ["lm_head"]}
    qgraft.detach_adapter(model.model, "law")
    assert qgraft.adapter_names(model) == ["med"]


def test_a_model_within_another_one(model: Any) -> None:
    attach(model, "law")
    want = logits(model)
    whole = nn.ModuleDict({"head": nn.Linear(4, 4), "lm": model})
    assert paths(whole, "law") == [f"lm.{path}" for path in Q] and paths(model, "law") == Q
    attach(whole, "med", "up_proj,head")
    assert paths(model, "med") == [path.replace("self_attn.q_proj", "mlp.up_proj") for path in Q]
    assert paths(whole, "med")[0] == "head"
    qgraft.use_adapter(model, "law")
    assert torch.equal(logits(model), want)


def test_parts_that_are_found_later_stay_as_active_as_they_were(model: Any) -> None:
    first, second = model.model.layers
    attach(first, "law")
    attach(second, "law", "v_proj")
    attach(second, "med")
    qgraft.use_adapter(second, {"law": 1.0, "med": 0.5})
    want = logits(model)
    assert qgraft.active_adapters(model) == {"law": 1.0, "med": 0.5}
    assert torch.equal(logits(model), want)
    assert paths(model, "law") == [Q[0], Q[1].replace("q_proj", "v_proj")] and paths(model, "med") == Q[1:]
    qgraft.use_adapter(model, "med")
    trained = {
        name.split(".loras.")[1] for name, p in model.named_parameters() if p.requires_grad and ".loras." in name
    }
    assert trained == {"med.lora_A", "med.lora_B"}


def test_the_decoder_takes_calls_of_an_adapter_that_is_outside_of_it(model: Any) -> None:
    with torch.inference_mode():
        base = model.model(torch.arange(4)[None]).last_hidden_state
    attach(model, "head", "lm_head")
    assert model.model.qgraft.selection is model.qgraft.selection
    with torch.inference_mode():
        assert torch.equal(model.model(torch.arange(4)[None], adapter_names=["head"]).last_hidden_state, base)


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_adapters_of_its_own(model: Any, how: str) -> None:
    for name in ("law", "med"):
        attach(model, name)
    qgraft.attach_prefix(model, pre_seq_len=3, name="style")
    qgraft.use_adapter(model, "law")
    want, named = logits(model), logits(model, adapter_names=["med", "style"])
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert qgraft.adapter_names(twin) == ["law", "med", "style"] and paths(twin, "law") == Q
    for path in Q:
        assert find_adapter(twin, "law").parts[path] is twin.get_submodule(path).loras["law"]
    for holder in holders(twin):
        assert holder.selection is twin.qgraft.selection is twin.model.qgraft.selection
    assert torch.equal(logits(twin), want) and torch.equal(logits(twin, adapter_names=["med", "style"]), named)
    qgraft.detach_adapter(twin)
    assert not holders(twin) and qgraft.adapter_names(model) == ["law", "med", "style"]
    assert torch.equal(logits(model), want)


def test_copies_share_what_never_changes(tiny_gguf: Any) -> None:
    model, _ = qgraft.load(tiny_gguf("llama").path)
    twin = copy.deepcopy(model)
    assert twin.qgraft is not model.qgraft and twin.qgraft.selection is not model.qgraft.selection
    for name in ("info", "origin", "tokenizer"):
        assert getattr(twin.qgraft, name) is getattr(model.qgraft, name)


def test_an_adapter_that_is_not_there(model: Any) -> None:
    with pytest.raises(AdapterError, match=r"which adapter\? attached: none"):
        find_adapter(model)
    attach(model, "law")
    assert find_adapter(model).name == "law"
    with pytest.raises(AdapterError, match="no adapter named 'lax'; attached: law"):
        find_adapter(model, "lax")
