"""The functions by which qgraft asks how transformers puts a model together, on its models: each answer, each release."""

import importlib
import inspect
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qgraft.attention import PREFIX, SAMPLES, attending, attention_of
from qgraft.compat import CACHE, cache_in, given_cache
from qgraft.errors import UnsupportedError
from qgraft.kernels.pointwise import ACTIVATIONS
from qgraft.model_parts import (
    argument_names,
    context_of,
    decoder_layers,
    decoder_of,
    decoder_states,
    has_decoder,
    keeps_state,
)
from qgraft.passes.decoder import output_head, sample_attention
from qgraft.passes.fused import fused_modules
from qgraft.passes.known_layers import ROTATION, gate_of, norm_of, rotates_part

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def other(name: str, **options: Any) -> Any:
    """A small model of a kind that is not among those of conftest.py."""
    config = getattr(transformers, f"{name}Config")
    known = inspect.signature(config).parameters
    return getattr(transformers, f"{name}ForCausalLM")(
        config(**{k: v for k, v in SMALL.items() if k in known}, **options)
    )


def test_the_decoder_is_the_base_model_and_gives_the_states_that_the_output_layer_takes(kind, tiny, ids):
    model = tiny(kind)
    assert has_decoder(model) and decoder_of(model) is getattr(model, model.base_model_prefix)
    assert decoder_of(decoder_of(model)) is decoder_of(model) and not has_decoder(decoder_of(model))
    states = decoder_states(model, input_ids=ids)
    assert states.shape == (1, 10, 32)
    torch.testing.assert_close(output_head(model)(states), model(ids, use_cache=False).logits)


def test_a_decoder_with_its_output_layer_in_it_is_told_apart():
    config = transformers.Llama4TextConfig(**SMALL, intermediate_size_mlp=48, head_dim=8, num_local_experts=2)
    model = transformers.Llama4ForCausalLM(config)
    assert decoder_of(model) is model and not has_decoder(model)
    with pytest.raises(UnsupportedError, match="no decoder apart"):
        decoder_states(model, input_ids=torch.tensor([[1, 2]]))


def test_the_layers_are_what_gradient_checkpointing_takes_as_units(kind, tiny):
    model = tiny(kind)
    assert decoder_layers(model) == list(model.base_model.layers) == decoder_layers(model.base_model)
    assert all(isinstance(layer, GradientCheckpointingLayer) for layer in decoder_layers(model))


def test_layers_within_layers_are_no_layers_and_older_models_have_a_list():
    hybrid = transformers.AutoModelForCausalLM.from_config(
        transformers.Zamba2Config(
            **SMALL, layer_types=["linear_attention", "hybrid"], mamba_d_state=8, mamba_headdim=16, n_mamba_heads=4,
            num_mem_blocks=1, adapter_rank=4,
        )
    )  # fmt: skip
    assert decoder_layers(hybrid) == list(hybrid.base_model.layers)
    old = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(vocab_size=40, n_embd=32, n_layer=2, n_head=4))
    assert decoder_layers(old) == list(old.transformer.h)


def test_a_model_without_layers_is_refused():
    with pytest.raises(UnsupportedError, match="no layers"):
        decoder_layers(nn.Linear(2, 2))


def test_what_a_forward_pass_takes(kind, tiny):
    model = tiny(kind)
    for each in (model, decoder_of(model)):
        names = argument_names(each)
        assert names[:3] == ["input_ids", "attention_mask", "position_ids"] and CACHE in names
    assert "logits_to_keep" in argument_names(model)
    assert "position_ids" not in argument_names(other("Bloom", n_layer=2, n_head=4))


def test_how_many_positions_there_are(tiny):
    assert context_of(tiny("llama")) == context_of(tiny("llama").base_model) == 64
    assert context_of(other("Bloom", n_layer=2, n_head=4)) is None and context_of(nn.Linear(2, 2)) is None


def test_models_say_whether_they_keep_a_state(kind, tiny):
    assert not keeps_state(tiny(kind))
    assert keeps_state(other("Mamba", state_size=4))


def test_attention_is_another_within_a_block_and_what_it_was_afterwards(kind, tiny, ids):
    model = tiny(kind)
    before, expected = attention_of(model), model(ids, use_cache=False).logits
    with attending(model, PREFIX):
        assert attention_of(model) == attention_of(decoder_of(model)) == PREFIX
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ZeroDivisionError), attending(model, PREFIX):
        raise ZeroDivisionError
    assert attention_of(model) == before
    assert torch.equal(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("kind", ["gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "starcoder2"])
def test_samples_are_attended_one_by_one_and_their_masks_are_noted(kind, tiny, ids):
    model = tiny(kind)
    expected = [model(part, use_cache=False).logits for part in (ids[:, :6], ids[:, 6:])]
    with sample_attention(model):
        assert attention_of(model) == SAMPLES
        positions = torch.tensor([[*range(6), *range(4)]])
        got = model(ids, position_ids=positions, use_cache=False, cu_seq_lens_q=torch.tensor([0, 6, 10])).logits
    torch.testing.assert_close(got, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)


def test_the_cache_is_found_among_arguments_and_in_outputs(tiny, ids):
    model, cache = tiny("llama"), transformers.DynamicCache()
    assert given_cache({"input_ids": ids}) is None
    output = model(ids, use_cache=True, **{CACHE: cache})
    assert given_cache({CACHE: cache}) is cache is cache_in(output) and cache.get_seq_length() == 10


# -- layers whose formula is known --


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"])
def test_norms_are_known_with_their_weight_and_epsilon(kind, tiny):
    model = tiny(kind)
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert len(norms) >= 7
    for module in norms:
        nn.init.normal_(module.weight)
        x, norm = torch.randn(3, len(module.weight)), norm_of(module)
        assert norm is not None, "the code of a norm is none of the known ones: see passes/known_layers.py"
        expected = torch.nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3"])
def test_gated_products_are_known_with_their_activation(kind, tiny):
    mlp = decoder_layers(tiny(kind))[0].mlp
    activation = gate_of(mlp)
    assert activation in ACTIVATIONS[:2], (
        "the code of a gated MLP is none of the known ones: see passes/known_layers.py"
    )
    x = torch.randn(3, 32)
    torch.testing.assert_close(mlp(x), mlp.down_proj(activation(mlp.gate_proj(x)) * mlp.up_proj(x)))


@pytest.mark.parametrize(
    "family,part",
    [("gemma2", False), ("llama", False), ("mistral", False), ("olmo2", False), ("qwen3", False), ("phi3", True),
     ("gpt_neox", True), ("stablelm", False), ("cohere", None), ("glm", None)],
)  # fmt: skip
def test_rotations_are_known_and_turn_halves(family, part):
    rotate = vars(importlib.import_module(f"transformers.models.{family}.modeling_{family}"))[ROTATION]
    assert rotates_part(rotate) is part
    if part is None:
        return
    width = 4 if part else 8
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    angles = torch.randn(1, 5, width // 2).repeat(1, 1, 2)
    turning, half = q[..., :width], torch.cat([-q[..., width // 2 : width], q[..., : width // 2]], -1)
    halves = turning * angles.cos()[:, None] + half * angles.sin()[:, None]
    got_q, _ = rotate(q, k, angles.cos(), angles.sin())
    torch.testing.assert_close(got_q, torch.cat([halves, q[..., width:]], -1))


def test_attention_layers_rotate_by_that_function_so_that_an_instance_can_be_given_another(kind, tiny):
    model = tiny(kind)
    with fused_modules(model.requires_grad_(False)):
        attentions = [layer.self_attn for layer in decoder_layers(model)]
        assert all("forward" in vars(attention) for attention in attentions)
    assert not any("forward" in vars(module) for module in model.modules())
