"""Prefixes of transformers' decoders against PEFT's PREFIX_TUNING: the same tensors, logits, gradients and tokens.

In PEFT the prefix lies in the cache and goes through masks and positions of transformers as tokens of the past would.
"""

import copy
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from qgraft.adapters.attach_prefix import attach_prefix, prefixes_of
from qgraft.adapters.base import find_adapter
from qgraft.adapters.prefix import encoder_of
from qgraft.compat import cap_scores

LENGTH, WORDS = 5, 97
SHAPE = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
WIDE = {**SHAPE, "head_dim": 16}  # wider than hidden_size / heads
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SHAPE),
    "mistral": ("MistralForCausalLM", "MistralConfig", SHAPE),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SHAPE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", WIDE),
    "qwen3_moe": (  # a mixture, whose passes are told of its router too
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**WIDE, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "eos_token_id": 96},
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", WIDE),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**WIDE, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**WIDE, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SHAPE),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {**SHAPE, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "loss_type": "ForCausalLM",
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
    ),
}  # fmt: skip
Pair = tuple[nn.Module, nn.Module]


def pair(architecture: str, projection: bool) -> Pair:
    """A model with our prefix and a copy of it with PEFT's, of the same values."""
    class_name, config_name, options = MODELS[architecture]
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**options)).eval()
    cap_scores(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = copy.deepcopy(model)
    attach_prefix(ours, LENGTH, projection)
    geometry = prefixes_of(ours).geometry
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, num_layers=2, num_attention_heads=geometry.kv_heads,
        token_dim=geometry.width, encoder_hidden_size=geometry.width, prefix_projection=projection,
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter, same in zip(*parameters((ours, theirs)), strict=True):
            same.copy_(parameter)
    return ours, theirs


def parameters(pair: Pair) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained, ours and theirs in the same order."""
    ours = dict(encoder_of(find_adapter(pair[0])).named_parameters())
    theirs = pair[1].prompt_encoder["default"]
    return list(ours.values()), [theirs.get_parameter(name.replace("trans.", "transform.")) for name in ours]


def random_ids(rows: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(3, WORDS, (rows, tokens), generator=torch.Generator().manual_seed(1))


def left_padded() -> Tensor:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_same_logits_gradients_and_tokens(architecture: str, projection: bool) -> None:
    models, ids = pair(architecture, projection), random_ids()
    outputs = [model(ids, attention_mask=torch.ones_like(ids), labels=ids) for model in models]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.loss.backward()
    for parameter, same in zip(*parameters(models), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-5, atol=1e-6)
    mask = left_padded()
    with torch.no_grad():
        ours, theirs = (model(ids, attention_mask=mask).logits[mask.bool()] for model in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.spread(6)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("architecture", MODELS)
def test_same_answers(architecture: str, padded: bool) -> None:
    """PEFT's side is its forward pass over a row's tokens so far, without padding: its generate() knows one name of the
    cache only, and its forward pass counts padding as tokens."""
    ids, (ours, theirs) = random_ids(), pair(architecture, False)
    mask = left_padded() if padded else torch.ones_like(ids)
    output = ours.generate(
        input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True,
        max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    for row, (prompt, real) in enumerate(zip(ids, mask.bool(), strict=True)):
        tokens = prompt[real][None]
        for logits in output.logits:
            with torch.no_grad():
                expected = theirs(input_ids=tokens).logits[:, -1]
            torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-5, atol=1e-5)
            tokens = torch.cat([tokens, expected.argmax(-1, keepdim=True)], 1)
        assert torch.equal(output.sequences[row, len(prompt) :], tokens[0, -8:])


@pytest.mark.parametrize("projection", [False, True])
def test_same_initial_values_for_the_same_random_state(projection: bool) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    ours = copy.deepcopy(model)
    torch.manual_seed(1)
    attach_prefix(ours, LENGTH, projection)
    torch.manual_seed(1)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=projection, num_layers=2
    )
    theirs = peft.get_peft_model(model, config)  # widths of its own choice
    for parameter, same in zip(*parameters((ours, theirs)), strict=True):
        assert torch.equal(parameter, same)
