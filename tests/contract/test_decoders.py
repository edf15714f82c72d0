"""How transformers puts a causal language model together: base model, layers, head, norms, rotations, hooks."""

import importlib
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple


def test_the_base_model_gives_the_states_that_the_output_layer_takes(kind, tiny, ids):
    model = tiny(kind)
    base = model.base_model
    assert base is not model and base is getattr(model, model.base_model_prefix)
    states = base(input_ids=ids, position_ids=torch.arange(10)[None], use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(states)
    if softcap := getattr(model.config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / softcap) * softcap
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize(
    "name,kind", [("final_logit_softcapping", "Gemma2"), ("logit_scale", "Cohere"), ("logits_scaling", "Granite")]
)
def test_what_is_done_to_logits_stands_in_the_configuration_under_this_name(name, kind):
    assert hasattr(getattr(transformers, f"{kind}Config")(), name)


def test_a_forward_on_the_instance_of_a_layer_is_called_with_the_states_first(kind, tiny, ids):
    model, seen = tiny(kind), []
    layer = model.base_model.layers[1]
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(args[0] if args else kwargs["hidden_states"])
        return own(*args, **kwargs)

    layer.forward = forward
    expected = model(ids, use_cache=False).logits
    del layer.forward
    assert seen and seen[0].shape == (1, 10, 32), "layers are no longer called through their forward with the states"
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_a_layer_gives_states_or_a_tuple_that_begins_with_them(kind, tiny, ids):
    model, given = tiny(kind), []
    hook = model.base_model.layers[0].register_forward_hook(lambda *call: given.append(call[2]))
    model(ids, use_cache=False)
    hook.remove()
    states = given[0][0] if isinstance(given[0], tuple) else given[0]
    assert states.shape == (1, 10, 32)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_llamas_kin_is_made_of_these_parts(kind, tiny):
    base = tiny(kind).base_model
    assert {name for name, _ in base.named_children()} >= {"embed_tokens", "layers", "norm", "rotary_emb"}
    layer = base.layers[0]
    assert {name for name, _ in layer.named_children()} == {
        "self_attn", "mlp", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= {name for name, _ in layer.self_attn.named_children()}
    assert {name for name, _ in layer.mlp.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}
    assert layer.self_attn.head_dim == 8 and layer.self_attn.scaling == 8**-0.5
    assert hasattr(layer.input_layernorm, "variance_epsilon")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_rotary_embedding_gives_cos_and_sin_for_positions(kind, tiny):
    rotary = tiny(kind).base_model.rotary_emb
    cos, sin = rotary(torch.zeros(1, 1, 32), position_ids=torch.tensor([[7]]))
    angle = 7 * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(cos[0, 0, :4], angle.cos())
    torch.testing.assert_close(sin[0, 0, 4:], angle.sin())


def test_rotary_frequencies_are_the_buffer_inv_freq_with_the_original_beside(tiny):
    rotary = tiny("llama").base_model.rotary_emb
    assert isinstance(rotary.inv_freq, torch.Tensor) and rotary.inv_freq.shape == (4,)
    assert torch.equal(rotary.inv_freq, rotary.original_inv_freq)
    rotary.inv_freq = rotary.inv_freq / 2
    cos, _ = rotary(torch.zeros(1, 1, 32), position_ids=torch.tensor([[2]]))
    torch.testing.assert_close(cos[0, 0, 0], torch.tensor(1.0).cos())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_changes_with_the_length_says_so_and_can_be_begun_anew(kind, tiny):
    own = {"dynamic": {"factor": 2.0}, "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}}
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 64, **own[kind]}
    rotary = tiny(
        "llama", max_position_embeddings=128 if kind == "longrope" else 64, rope_parameters=rope
    ).base_model.rotary_emb
    assert kind in str(rotary.rope_type)
    first = dict(rotary.named_buffers())["original_inv_freq"].clone()
    short = rotary(torch.zeros(1, 4, 32), position_ids=torch.arange(4)[None])
    rotary(torch.zeros(1, 100, 32), position_ids=torch.arange(100)[None])
    assert torch.equal(rotary.original_inv_freq, first), "the frequencies as they were made are no longer kept"
    rotary.inv_freq = first.clone()
    for name in [name for name in vars(rotary) if name.endswith("max_seq_len_cached")]:
        setattr(rotary, name, rotary.original_max_seq_len)
    again = type(rotary).forward(rotary, torch.zeros(1, 4, 32), position_ids=torch.arange(4)[None])
    assert torch.equal(again[0], short[0]) and torch.equal(again[1], short[1])


@pytest.mark.parametrize(
    "kind,name", [("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")]
)
def test_the_parts_of_llamas_kin_are_classes_of_their_own_module_with_these_names(kind, name, tiny):
    model = tiny(kind)
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    layer = model.base_model.layers[0]
    parts = {
        "Model": model.base_model, "DecoderLayer": layer, "Attention": layer.self_attn, "MLP": layer.mlp,
        "RMSNorm": layer.input_layernorm, "RotaryEmbedding": model.base_model.rotary_emb,
    }  # fmt: skip
    assert {part: type(one) for part, one in parts.items()} == {
        part: getattr(module, f"{name}{part}") for part in parts
    }
    configuration = importlib.import_module(f"transformers.models.{kind}.configuration_{kind}")
    assert type(model.config) is getattr(configuration, f"{name}Config") and model.config.hidden_act == "silu"
    assert type(layer.mlp.act_fn) in (nn.SiLU, type(ACT2FN["silu"]))


def test_checkpointing_sets_a_flag_and_a_function_on_each_layer(tiny):
    model = tiny("llama")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # renamed in 5.23
    enable({"use_reentrant": False})
    for layer in model.base_model.layers:
        assert vars(layer)["gradient_checkpointing"] is True
        assert callable(vars(layer)["_gradient_checkpointing_func"])


def test_outputs_hold_states_and_cache_in_this_order():
    first, second, *_ = inspect.signature(BaseModelOutputWithPast).parameters
    assert first == "last_hidden_state" and second in ("past_key_values", "cache"), f"the cache is called {second} now"
    assert list(inspect.signature(CausalLMOutputWithPast).parameters)[:3] == ["loss", "logits", second]


def test_can_return_tuple_gives_an_output_or_a_tuple_of_it():
    class Holder:
        config = transformers.LlamaConfig()

        @can_return_tuple
        def forward(self) -> CausalLMOutputWithPast:
            return CausalLMOutputWithPast(logits=torch.ones(1))

    assert isinstance(Holder().forward(), CausalLMOutputWithPast)
    assert Holder().forward(return_dict=False) == (torch.ones(1),)


def test_conv1d_holds_its_weight_transposed():
    layer = Conv1D(5, 3)
    assert layer.weight.shape == (3, 5) and layer.bias.shape == (5,)
    torch.testing.assert_close(layer(torch.ones(1, 3)), layer.weight.sum(0)[None] + layer.bias)
