"""Models of the libraries, not ours: what is tested here is what qgraft takes for granted of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

SHAPE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {  # model_type -> (class, configuration class, options)
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 8, "sliding_window": 4}),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 8, "sliding_window": 4}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 4}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", {}),
}


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    """Each of them in turn."""
    return str(request.param)


@pytest.fixture
def tiny() -> Callable[..., transformers.PreTrainedModel]:
    """A small random model of transformers, in evaluation mode."""

    def make(kind: str, **options: Any) -> transformers.PreTrainedModel:
        name, config, more = KINDS[kind]
        torch.manual_seed(0)
        return getattr(transformers, name)(getattr(transformers, config)(**{**SHAPE, **more, **options})).eval()

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids [1, 10]."""
    return torch.arange(3, 13)[None]
