"""Attach, choose, switch off and detach LoRAs on a model; the base's modules and bytes stay what they were."""

import hashlib
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qgraft.adapters.attach import attach_layers, attach_lora, detach_lora, find_targets
from qgraft.adapters.base import adapter_names, find_adapter
from qgraft.adapters.choose import active_adapters, adapters_off, use_adapter
from qgraft.adapters.lora import LoraConfig, LoraLinear
from qgraft.adapters.states import lora_state_dict, non_finite
from qgraft.adapters.targets import lora_layers
from qgraft.errors import AdapterError, OptionError
from qgraft.formats import quantize
from qgraft.linear import QuantizedLinear

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def model() -> LlamaForCausalLM:
    """A llama of two layers on packed weights; the output layer stays a float nn.Linear."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    for path, module in list(llama.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            llama.set_submodule(path, QuantizedLinear(quantize(torch.randn(module.weight.shape) * 0.1, "q4_1")))
    return llama.eval()


def layer_paths(names: Sequence[str]) -> list[str]:
    """The paths of these linears in both layers, in the order of the model."""
    block = dict.fromkeys(ATTENTION, "self_attn") | dict.fromkeys(MLP, "mlp")
    return [f"model.layers.{i}.{block[name]}.{name}" for i in (0, 1) for name in block if name in names]


def fill_b(model: nn.Module, name: str, seed: int = 0) -> None:
    """Give the adapter an effect: its B is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    for lora in find_adapter(model, name).parts.values():
        lora.lora_B.data.normal_(generator=generator)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def module_ids(model: nn.Module) -> dict[str, int]:
    return {path: id(module) for path, module in model.named_modules()}


def base_hash(model: nn.Module) -> str:
    """SHA-256 over everything that is not an adapter, by name as without adapters."""
    digest = hashlib.sha256()
    for name, tensor in sorted((key.replace(".base.", "."), value) for key, value in model.state_dict().items()):
        if ".loras." not in name:
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train_steps(model: nn.Module, steps: int, learning_rate: float = 1e-2) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=learning_rate), []
    model.train()
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def enable_checkpointing(model: LlamaForCausalLM) -> None:
    """Under the name that this release of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("all-linear", layer_paths(ATTENTION + MLP)),
        ("all", layer_paths(ATTENTION + MLP)),
        ("q_proj", layer_paths(["q_proj"])),
        ("q_proj, v_proj", layer_paths(["q_proj", "v_proj"])),
        ("q_proj,v_proj,", layer_paths(["q_proj", "v_proj"])),
        (["v_proj", "q_proj"], layer_paths(["q_proj", "v_proj"])),
        (("down_proj",), layer_paths(["down_proj"])),
        ("self_attn.q_proj", layer_paths(["q_proj"])),
        ("layers.1.self_attn.q_proj", ["model.layers.1.self_attn.q_proj"]),
        ("model.layers.1.self_attn.q_proj", ["model.layers.1.self_attn.q_proj"]),
        (["q_proj", "model.layers.0.mlp.up_proj"],
         ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]),
        ("lm_head", ["lm_head"]),
        (r".*\.(q|k)_proj", layer_paths(["q_proj", "k_proj"])),
        (r".*layers\.0\..*", layer_paths(ATTENTION + MLP)[:7]),
    ],
)  # fmt: skip
def test_targets(model: LlamaForCausalLM, target_modules: str | Sequence[str], expected: list[str]) -> None:
    assert find_targets(model, target_modules) == expected
    attach_lora(model, target_modules=target_modules)
    assert [path for path, _ in lora_layers(model)] == expected
    assert find_targets(model, target_modules) == expected  # wrapped layers keep their paths


def test_a_name_is_a_whole_part_of_the_path_and_a_pattern_the_whole_path(model: LlamaForCausalLM) -> None:
    for wrong in ("proj", "_proj", "layers.0", "self_attn", "embed_tokens", r"(q|k)_proj", r".*\.q_pro"):
        with pytest.raises(OptionError):
            find_targets(model, wrong)


def test_all_linear_leaves_out_an_output_layer_that_is_wrapped(model: LlamaForCausalLM) -> None:
    attach_lora(model, target_modules="lm_head", name="head")
    attach_lora(model, name="body")
    assert list(find_adapter(model, "body").parts) == layer_paths(ATTENTION + MLP)


def test_unknown_target_suggests_the_nearest_and_lists_all(model: LlamaForCausalLM) -> None:
    before = module_ids(model)
    with pytest.raises(OptionError) as caught:
        attach_lora(model, target_modules=["q_proj", "k_porj"])
    assert "no linear layer is named k_porj;" in caught.value.message
    for name in [*ATTENTION, *MLP, "lm_head"]:
        assert name in caught.value.message
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean k_proj")
    assert module_ids(model) == before


@pytest.mark.parametrize("target_modules", ["", " , ", [], ()])
def test_no_target_at_all_is_an_error(model: LlamaForCausalLM, target_modules: str | Sequence[str]) -> None:
    with pytest.raises(OptionError, match=r"no linear layer is named \(nothing\)"):
        attach_lora(model, target_modules=target_modules)


def test_pattern_that_matches_nothing_and_broken_pattern(model: LlamaForCausalLM) -> None:
    with pytest.raises(OptionError, match=r"no linear layer is named .*query.*; the model has: down_proj"):
        attach_lora(model, target_modules=r".*\.query")
    with pytest.raises(OptionError, match=r"target_modules='\(q\|k' is not a regular expression"):
        attach_lora(model, target_modules="(q|k")


@pytest.mark.parametrize(
    "without",
    [nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), nn.Linear(4, 4)],
    ids=["no_linear_layer", "the_model_is_the_linear_layer"],
)
def test_all_linear_without_a_linear_layer_is_an_error_not_a_no_op(without: nn.Module) -> None:
    with pytest.raises(OptionError, match="no linear layer"):
        attach_lora(without)
    assert adapter_names(without) == []


def test_a_layer_that_is_called_base_is_a_target_like_any_other() -> None:
    """Only the `base` inside of a wrapper is not."""
    plain = nn.ModuleDict({"base": nn.Linear(4, 4), "inner": nn.ModuleDict({"base": nn.Linear(4, 4)})})
    assert find_targets(plain, "all-linear") == ["base", "inner.base"]
    attach_lora(plain)
    assert find_targets(plain, "all-linear") == ["base", "inner.base"]


def test_layers_may_have_options_of_their_own(model: LlamaForCausalLM) -> None:
    first, second = layer_paths(["q_proj"])
    attach_layers(model, "mixed", {first: LoraConfig(r=2), second: LoraConfig(r=5, use_rslora=True)})
    assert [
        (path, lora.config.r, lora.config.use_rslora) for path, lora in find_adapter(model, "mixed").parts.items()
    ] == [
        (first, 2, False),
        (second, 5, True),
    ]
    assert find_adapter(model, "mixed").size == (2 + 5) * (32 + 32)


# ---------------------------------------------------------------- names, several adapters


@pytest.mark.parametrize("name", ["law", "a", "A-b_9", "0", "x" * 64])
def test_names_that_are_allowed(model: LlamaForCausalLM, name: str) -> None:
    attach_lora(model, target_modules="q_proj", name=name)
    assert adapter_names(model) == [name]


@pytest.mark.parametrize(
    "name", ["", "a.b", "a b", "../x", "x" * 65, "é", "law\n", "train", "keys", "training", "forward", "__init__"]
)
def test_names_that_are_refused_before_anything_changes(model: LlamaForCausalLM, name: str) -> None:
    """No path, no dot (a state dict's separator), and no word that torch's module container has for itself."""
    before = module_ids(model)
    with pytest.raises(OptionError, match="adapter name"):
        attach_lora(model, name=name)
    assert module_ids(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_same_name_twice_is_an_error(model: LlamaForCausalLM) -> None:
    attach_lora(model, target_modules="q_proj")
    with pytest.raises(AdapterError, match="an adapter named 'default' is already attached"):
        attach_lora(model, target_modules="v_proj")
    assert [path for path, _ in lora_layers(model)] == layer_paths(["q_proj"])


def test_a_second_adapter_does_not_wrap_twice(model: LlamaForCausalLM) -> None:
    attach_lora(model, name="law")
    layers = dict(lora_layers(model))
    attach_lora(model, r=3, target_modules=["q_proj", "lm_head"], name="med")
    assert {path: layer for path, layer in lora_layers(model) if path != "lm_head"} == layers
    assert not any(isinstance(layer.base, LoraLinear) for _, layer in lora_layers(model))
    assert list(layers["model.layers.0.self_attn.q_proj"].loras) == ["law", "med"]
    assert list(layers["model.layers.0.mlp.up_proj"].loras) == ["law"]
    assert adapter_names(model) == ["law", "med"]
    assert active_adapters(model) == {"med": 1.0}


def test_trained_weights_are_those_of_the_active_adapters(model: LlamaForCausalLM) -> None:
    def trained() -> set[str]:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert all(".loras." in name for name in names)
        return {name.split(".loras.")[1].split(".")[0] for name in names}

    attach_lora(model, name="law")
    assert trained() == {"law"}
    attach_lora(model, name="med")
    assert trained() == {"med"}
    use_adapter(model, {"law": 0.5, "med": 0.5})
    assert trained() == {"law", "med"}
    use_adapter(model, "law")
    assert trained() == {"law"}
    use_adapter(model, None)
    assert trained() == set()


def test_use_adapter_switches_weighs_and_turns_off(model: LlamaForCausalLM) -> None:
    base = logits(model)
    outputs = {}
    for seed, name in enumerate(("law", "med")):
        attach_lora(model, name=name, target_modules="lm_head")  # the last layer: logits are linear in its delta
        fill_b(model, name, seed)
        outputs[name] = logits(model)
    assert not torch.allclose(outputs["law"], outputs["med"])
    use_adapter(model, "law")
    assert torch.equal(logits(model), outputs["law"])
    use_adapter(model, {"law": 0.7, "med": 0.3})
    assert active_adapters(model) == {"law": 0.7, "med": 0.3}
    torch.testing.assert_close(logits(model), 0.7 * outputs["law"] + 0.3 * outputs["med"], rtol=1e-4, atol=1e-4)
    use_adapter(model, None)
    assert active_adapters(model) == {}
    assert torch.equal(logits(model), base)


def test_use_adapter_refuses_unknown_names_and_changes_nothing(model: LlamaForCausalLM) -> None:
    attach_lora(model, target_modules="q_proj", name="law")
    for unknown in ("lav", {"law": 0.5, "lav": 0.5}):
        with pytest.raises(AdapterError) as caught:
            use_adapter(model, unknown)
        assert caught.value.message == "no adapter named 'lav'; attached: law"
        assert caught.value.hint == "did you mean law?"
    assert active_adapters(model) == {"law": 1.0}


def test_weights_given_to_use_adapter_are_copied(model: LlamaForCausalLM) -> None:
    attach_lora(model, target_modules="q_proj", name="law")
    weights = {"law": 0.5}
    use_adapter(model, weights)
    weights["law"] = 9.0
    active_adapters(model)["law"] = 9.0
    assert active_adapters(model) == {"law": 0.5}


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf")])
def test_weights_must_be_finite(model: LlamaForCausalLM, weight: float) -> None:
    attach_lora(model, target_modules="q_proj", name="law")
    with pytest.raises(OptionError, match=f"got law={weight}, expected finite"):
        use_adapter(model, {"law": weight})
    assert active_adapters(model) == {"law": 1.0}


def test_a_switch_reaches_layers_that_were_wrapped_before_and_after(model: LlamaForCausalLM) -> None:
    """All wrapped layers share what is active, whichever adapter wrapped them."""
    base = logits(model)
    attach_lora(model, target_modules="q_proj", name="law")
    attach_lora(model, target_modules="down_proj", name="med")
    for name in ("law", "med"):
        fill_b(model, name)
    outputs = {}
    for name in ("law", "med"):
        use_adapter(model, name)
        outputs[name] = logits(model)
        assert {tuple(layer.active.items()) for _, layer in lora_layers(model)} == {((name, 1.0),)}
    assert not torch.allclose(outputs["law"], outputs["med"])
    detach_lora(model, "law")
    assert torch.equal(logits(model), outputs["med"])
    use_adapter(model, None)
    assert torch.equal(logits(model), base)


def test_parts_with_adapters_of_their_own_become_one_model(model: LlamaForCausalLM) -> None:
    first, second = model.model.layers
    attach_lora(first, name="law", target_modules="q_proj")
    attach_lora(second, name="med", target_modules="q_proj")
    fill_b(first, "law")
    fill_b(second, "med")
    attach_lora(model, name="tax", target_modules="v_proj")
    assert sorted(adapter_names(model)) == ["law", "med", "tax"]
    assert active_adapters(first) == active_adapters(second) == {"tax": 1.0}
    use_adapter(model, {"law": 1.0, "med": 1.0})
    both = logits(model)
    use_adapter(second, "law")
    assert not torch.allclose(logits(model), both)
    detach_lora(first)
    assert sorted(adapter_names(model)) == ["med", "tax"]
    assert [path for path, _ in lora_layers(model)] == layer_paths(["q_proj", "v_proj"])[2:]


def test_values_to_start_from_are_copied(model: LlamaForCausalLM) -> None:
    path, state = layer_paths(["q_proj"])[0], torch.get_rng_state()
    A, B = torch.randn(3, 32, generator=torch.Generator()), torch.ones(32, 3, dtype=torch.float16)
    attach_layers(model, "law", {path: LoraConfig(r=3)}, {path: (A, B)})
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn only to be overwritten
    (lora,) = find_adapter(model, "law").parts.values()
    assert torch.equal(lora.lora_A, A)
    assert torch.equal(lora.lora_B, torch.ones(32, 3))
    A.zero_()
    assert bool(lora.lora_A.any())


def test_attaching_freezes_what_the_user_thawed_but_no_adapter(model: LlamaForCausalLM) -> None:
    attach_lora(model, target_modules="q_proj", name="law")
    model.get_input_embeddings().requires_grad_(True)
    attach_lora(model, target_modules="v_proj", name="med")
    use_adapter(model, {"law": 1.0, "med": 1.0})
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".loras.")[1].split(".")[0] for name in trained} == {"law", "med"}


def test_work_does_not_grow_with_the_number_of_adapters(model: LlamaForCausalLM) -> None:
    """Counted in calls of Python functions: the twentieth adapter takes as many as the second."""

    def calls(work: Callable[[], object]) -> int:
        count = 0

        def count_call(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            work()
        finally:
            sys.setprofile(None)
        return count

    attach_lora(model, name="a0")
    attached, switched = [], []
    for number in range(1, 20):
        attached.append(calls(lambda number=number: attach_lora(model, name=f"a{number}")))
        switched.append(calls(lambda: use_adapter(model, "a0")))
        use_adapter(model, f"a{number}")
    assert attached[-1] <= attached[0] * 1.02 + 20
    assert switched[-1] == switched[0]


# ---------------------------------------------------------------- off and detach


def test_adapters_off_is_the_base_inside_and_restores_afterwards(model: LlamaForCausalLM) -> None:
    base = logits(model)
    attach_lora(model)
    fill_b(model, "default")
    use_adapter(model, {"default": 0.5})
    adapted = logits(model)
    with adapters_off(model):
        assert torch.equal(logits(model), base)
        with adapters_off(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)  # the inner block must not switch the outer one's adapters on
    assert torch.equal(logits(model), adapted)
    assert not torch.allclose(adapted, base)


def test_adapters_off_restores_after_an_exception(model: LlamaForCausalLM) -> None:
    attach_lora(model, target_modules="q_proj")
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        assert active_adapters(model) == {}
        raise ZeroDivisionError
    assert active_adapters(model) == {"default": 1.0}


def test_training_changes_no_byte_of_the_base_and_detach_puts_the_same_modules_back(model: LlamaForCausalLM) -> None:
    base, modules, digest = logits(model), module_ids(model), base_hash(model)
    attach_lora(model, lora_dropout=0.1, target_modules=["lm_head", *ATTENTION])
    assert base_hash(model) == digest
    train_steps(model, 3)
    assert base_hash(model) == digest
    assert not torch.allclose(logits(model), base)
    detach_lora(model)
    assert module_ids(model) == modules
    assert base_hash(model) == digest
    assert torch.equal(logits(model), base)


def test_detach_one_of_two_keeps_the_other_and_unwraps_what_it_left(model: LlamaForCausalLM) -> None:
    attach_lora(model, name="law", target_modules=["q_proj", "up_proj"])
    fill_b(model, "law")
    law = logits(model)
    up = model.get_submodule("model.layers.0.mlp.up_proj").base
    attach_lora(model, name="med", target_modules=["q_proj", "v_proj"])
    use_adapter(model, {"law": 1.0, "med": 2.0})
    detach_lora(model, "med")
    assert (adapter_names(model), active_adapters(model)) == (["law"], {"law": 1.0})
    assert [path for path, _ in lora_layers(model)] == layer_paths(["q_proj", "up_proj"])
    assert torch.equal(logits(model), law)
    detach_lora(model, "law")
    assert model.get_submodule("model.layers.0.mlp.up_proj") is up
    assert list(lora_layers(model)) == []


def test_detach_unknown_is_an_error_and_detach_all_of_nothing_is_not(model: LlamaForCausalLM) -> None:
    before = module_ids(model)
    detach_lora(model)
    assert module_ids(model) == before
    with pytest.raises(AdapterError, match="no adapter named 'law'; attached: none"):
        detach_lora(model, "law")


def test_attach_again_after_detach(model: LlamaForCausalLM) -> None:
    attach_lora(model)
    detach_lora(model)
    attach_lora(model, r=2)
    assert {lora.config.r for lora in find_adapter(model, "default").parts.values()} == {2}


# ---------------------------------------------------------------- state dict


def test_state_dict_has_pefts_names_and_shares_memory(model: LlamaForCausalLM) -> None:
    attach_lora(model, r=4, target_modules=["q_proj", "down_proj"])
    state = lora_state_dict(model)
    stem = "base_model.model.model.layers.0.mlp.down_proj"
    assert len(state) == 2 * 4
    assert state[f"{stem}.lora_A.weight"].shape == (4, 64)
    assert state[f"{stem}.lora_B.weight"].shape == (32, 4)
    assert not any(tensor.requires_grad for tensor in state.values())
    state[f"{stem}.lora_B.weight"].fill_(3.0)
    assert torch.equal(model.get_submodule(stem[17:]).loras["default"].lora_B, torch.full((32, 4), 3.0))


def test_state_dict_names_are_those_that_peft_writes() -> None:
    import peft

    ours = nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(8, 4), "down": nn.Linear(4, 8)})})
    theirs = nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(8, 4), "down": nn.Linear(4, 8)})})
    attach_lora(ours, r=2, target_modules=["up", "down"])
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["up", "down"]))
    expected = {key: tensor.shape for key, tensor in peft.get_peft_model_state_dict(wrapped).items()}
    assert {key: tensor.shape for key, tensor in lora_state_dict(ours).items()} == expected


def test_which_adapter_must_be_said_when_there_are_several(model: LlamaForCausalLM) -> None:
    with pytest.raises(AdapterError, match=r"which adapter\? attached: none"):
        lora_state_dict(model)
    attach_lora(model, name="law", target_modules="q_proj")
    assert find_adapter(model, None).name == "law"
    attach_lora(model, name="med", target_modules="v_proj")
    with pytest.raises(AdapterError, match=r"which adapter\? attached: law, med"):
        lora_state_dict(model)
    assert {key.split(".")[6] for key in lora_state_dict(model, "med")} == {"v_proj"}
    with pytest.raises(AdapterError, match="no adapter named 'tax'"):
        lora_state_dict(model, "tax")


def test_broken_tensors_are_named() -> None:
    state = {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan]), "c": torch.tensor([torch.inf])}
    assert non_finite(state) == ["b", "c"]


# ---------------------------------------------------------------- a whole model


def test_attaching_changes_no_output(model: LlamaForCausalLM) -> None:
    base = logits(model)
    config = attach_lora(model, r=4, lora_alpha=8, lora_dropout=0.05, use_rslora=True)
    assert config == LoraConfig(4, 8, 0.05, True, "all-linear")
    assert torch.equal(logits(model), base)
    assert torch.equal(model.train()(IDS).logits, base)


def test_wrapped_layers_keep_the_mode_of_the_model(model: LlamaForCausalLM) -> None:
    attach_lora(model, target_modules="q_proj", name="law")
    assert not any(layer.training for _, layer in lora_layers(model))
    model.train()
    attach_lora(model, target_modules="v_proj", name="med")
    assert all(layer.training for _, layer in lora_layers(model))


def test_generate_with_and_without_the_adapter(model: LlamaForCausalLM) -> None:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    base = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    attach_lora(model)
    assert torch.equal(model.generate(IDS, attention_mask=torch.ones_like(IDS), **options), base)
    fill_b(model, "default")
    adapted = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    assert adapted.shape == base.shape == (2, 18)
    assert not torch.equal(adapted, base)
    with adapters_off(model):
        assert torch.equal(model.generate(IDS, attention_mask=torch.ones_like(IDS), **options), base)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_learn_and_nothing_else_does(model: LlamaForCausalLM, checkpointing: bool) -> None:
    attach_lora(model, r=4)
    if checkpointing:
        enable_checkpointing(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = train_steps(model, 20)
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".loras." in name}


def test_gradient_checkpointing_gives_the_gradients_of_the_whole_model(model: LlamaForCausalLM) -> None:
    attach_lora(model, r=4, lora_dropout=0.2)
    fill_b(model, "default")
    model.train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(model)
        torch.manual_seed(7)
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        results.append(
            [
                parameter.grad
                for lora in find_adapter(model, "default").parts.values()
                for parameter in lora.parameters()
            ]
        )
    assert len(results[0]) == 28
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again)
