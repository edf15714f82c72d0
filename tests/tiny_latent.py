"""How files of the tiny DeepSeek models may differ from each other: yarn, and keys and values that lie apart."""

from typing import Any

import numpy as np

YARN_KEYS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0, "rope.scaling.original_context_length": 32,
    "rope.scaling.yarn_log_multiplier": 0.0707,
}  # fmt: skip
APART = {  # what llama.cpp's converter has written since 2025
    "attention.head_count_kv": 1, "attention.key_length": 80, "attention.value_length": 64,
    "attention.key_length_mla": 48, "attention.value_length_mla": 32,
}  # fmt: skip


def keyed(keys: dict[str, Any], architecture: str = "deepseek2") -> dict[str, Any]:
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def kv_b_apart(model: Any) -> dict[str, np.ndarray]:
    """llama.cpp: DeepseekV2Model.modify_tensors."""
    c, made = model.config, {}
    for number, layer in enumerate(model.model.layers):
        kv_b = layer.self_attn.kv_b_proj.weight.view(c.num_attention_heads, -1, c.kv_lora_rank)
        k_b, v_b = kv_b.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        made[f"blk.{number}.attn_k_b.weight"] = k_b.transpose(1, 2).contiguous().numpy()
        made[f"blk.{number}.attn_v_b.weight"] = v_b.contiguous().numpy()
    return made
