"""The shapes of real models, with everything narrow but what decides how they are computed.

The number of layers, the size of a head and the width for each head decide about scales, windows and rotations in ways
that no key of the file states. The judge is the model of transformers that the file was written from, on a prompt longer
than its window.
"""

from typing import Any

import pytest
import torch

import qgraft


def shape(layers: int, head_dim: int, heads: int = 2, kv_heads: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "head_dim": head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "hidden_size": 64, "intermediate_size": 64, **more,
    }  # fmt: skip


GEMMA_WINDOW = {"sliding_window": 16}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-2-2b": ("gemma2", shape(26, 256, query_pre_attn_scalar=256, **GEMMA_WINDOW)),
    "gemma-2-9b": ("gemma2", shape(42, 256, query_pre_attn_scalar=256, **GEMMA_WINDOW)),
    "gemma-2-27b": ("gemma2", shape(46, 128, hidden_size=288, query_pre_attn_scalar=144, **GEMMA_WINDOW)),
    "gemma-3-270m": ("gemma3", shape(18, 256, query_pre_attn_scalar=256, **GEMMA_WINDOW)),
    "gemma-3-1b": ("gemma3", shape(26, 256, query_pre_attn_scalar=256, **GEMMA_WINDOW)),
    "gemma-3-4b": ("gemma3", shape(34, 256, query_pre_attn_scalar=256, **GEMMA_WINDOW)),
    "gemma-3-12b": ("gemma3", shape(48, 256, query_pre_attn_scalar=256, **GEMMA_WINDOW)),
    "gemma-3-27b": ("gemma3", shape(62, 128, hidden_size=672, heads=4, query_pre_attn_scalar=168, **GEMMA_WINDOW)),
    "llama-3.2-1b": ("llama", shape(16, 64)),
    "llama-3.1-8b": ("llama", shape(32, 128)),
    "mistral-nemo": ("llama", shape(40, 128, hidden_size=320)),
    "qwen2.5-0.5b": ("qwen2", shape(24, 64, hidden_size=128)),
    "qwen3-0.6b": ("qwen3", shape(28, 128)),
    "phi-3-mini": ("phi3", shape(32, 96, kv_heads=2, hidden_size=192, sliding_window=16)),
    "starcoder2-3b": ("starcoder2", shape(30, 128, hidden_size=256)),
    "nemotron-mini": ("nemotron", shape(32, 128, hidden_size=192, partial_rotary_factor=0.5)),
    "stablelm-2-1.6b": ("stablelm", shape(24, 64, hidden_size=128, use_qkv_bias=True, partial_rotary_factor=0.25)),
}  # fmt: skip


@pytest.mark.spread(3)
@pytest.mark.parametrize("name", SHAPES)
def test_real_shapes_are_computed_as_by_the_model_they_were_made_of(name, tiny_gguf):
    architecture, config = SHAPES[name]
    tiny = tiny_gguf(architecture, config=config)
    for parameter in tiny.model.parameters():  # deep, and still with attention that is not flat
        assert parameter.isfinite().all()
    model, _ = qgraft.load(tiny.path, device="cpu")
    ids = torch.randint(10, model.config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, expected = (torch.log_softmax(each(ids).logits, dim=-1) for each in (model, tiny.model))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
