"""A tiny model of every causal architecture that transformers knows."""

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qgraft.compat import hide_what_comes

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WORDS, WINDOW = 120, 8
MOST_WEIGHTS = 3_000_000

# What the fields of configurations are called; those that a configuration has are set.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dim_ff"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "padded_vocab_size"), WORDS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"), 128),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("pad_token_id",), 0), **dict.fromkeys(("bos_token_id",), 1), **dict.fromkeys(("eos_token_id",), 2),
    "rotary_dim": 8, "is_decoder": True, "is_encoder_decoder": False, "use_sliding_window": True, "max_window_layers": 0,
    "hidden_size_per_layer_input": 32, "scale_embedding": True,
}  # fmt: skip

# Where that is not enough: sizes that must fit each other, lists as long as there are layers.
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
INDEXED = {"head_dim": 8, "index_head_dim": 16, "index_n_heads": 4, "num_key_value_heads": 4}
MAMBA2 = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16}
LATENT = {"head_dim": 8}  # of the rotated part of a head, as transformers counts it in multi-head latent attention
OTHERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "youtu"), LATENT),
    **dict.fromkeys(("axk2", "deepseek_v32", "glm_moe_dsa"), INDEXED),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"), LINEAR),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), LINEAR),
    "bailing_hybrid": LINEAR,
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "lm_head_multiplier": 20.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
    },
    "jamba": {"mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": MAMBA2,
    "qwen2_moe": {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "logits_soft_cap": 0.5, "attention_window_size": 64},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 8), "attn_layers": ["local", "local"]},
    "roc_bert": {
        "pronunciation_vocab_size": 50, "shape_vocab_size": 50, "shape_embed_dim": 16, "pronunciation_embed_dim": 16,
    },
    "xlm": {"causal": True},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


GEMMA = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 128, "sliding_window": WINDOW, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}  # fmt: skip
EMBEDDED = {**GEMMA, "vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 32}
WIDE = {"global_head_dim": 32, "use_double_wide_mlp": True, "final_logit_softcapping": 5.0}
OWN: dict[str, dict[str, Any]] = {  # the whole configuration, where some fields differ from layer to layer
    f"{name}{suffix}": config for suffix in ("", "_text") for name, config in {
        "gemma3n": {**EMBEDDED, "laurel_rank": 8, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
        "gemma4": {**EMBEDDED, **WIDE}, "gemma4_unified": {**GEMMA, **WIDE},
    }.items()
}  # fmt: skip


def config_of(kind: str) -> PreTrainedConfig:
    """A tiny configuration; raises whatever transformers raises for sizes that do not fit."""
    config_class: Any = CONFIG_MAPPING[kind]
    default = config_class()
    text = default.get_text_config(decoder=True)
    if kind in OWN:
        return type(text)(**OWN[kind])
    computed = {name for name in SIZES if isinstance(getattr(type(text), name, None), property)}
    names = {name: value for name, value in SIZES.items() if hasattr(text, name) and name not in computed}
    return type(text)(**(names | OTHERS.get(kind, {})))


def tiny_model(kind: str) -> PreTrainedModel:
    """A model with weights that matter: logits that differ by several, every bias and norm other than 0 and 1."""
    config = config_of(kind)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(
            f"{weights:,} weights, expected a tiny model: sizes of parts of its configuration are not known here"
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    hide_what_comes(model)  # of a reference that sees what it is to predict nobody learns anything
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.15)
            elif parameter.is_floating_point() and not name.endswith(("A_log", "dt_bias", ".D")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name in model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys():
            buffer = model.get_buffer(name)  # one that a folder holds, such as the corrections of a router
            if buffer.is_floating_point() and not name.endswith("decay"):  # zeros of MiniMax's hide what comes
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model
