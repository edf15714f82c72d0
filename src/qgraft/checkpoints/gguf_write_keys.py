"""The metadata of a GGUF file for a model of transformers: the tables of gguf_keys.py, read backwards.

Backwards says what to write, not whether it says everything: a configuration has fields that no key states. So what was
written is read again by gguf_config, and must give

    the same configuration   field by field, but for fields without effect on what is computed (_WITHOUT_EFFECT)
    the same rotations       the frequencies and factors of the module that makes cos and sin of positions

What differs is refused by name (`lost_in_keys`). llama3's frequencies have no key of their own: as in llama.cpp's converter
they are a tensor, rope_freqs.weight, of what each plain frequency is divided by; longrope's lists are two tensors.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qgraft.checkpoints.gguf_config import gguf_config
from qgraft.checkpoints.gguf_file import GgufFile
from qgraft.checkpoints.gguf_gemma import gemma4_keys
from qgraft.checkpoints.gguf_header import Header
from qgraft.checkpoints.gguf_key_parts import INTERVAL, PATTERN, WINDOW
from qgraft.checkpoints.gguf_keys import TABLE
from qgraft.checkpoints.gguf_mixtures import SIGMOID
from qgraft.checkpoints.gguf_rope import FREQS, LONG, SHORT, apply_rotation
from qgraft.checkpoints.gguf_t5 import scales_outputs, t5_keys
from qgraft.errors import UnsupportedError
from qgraft.models.chatglm2 import ROTARY_BASE

# llama.cpp wants keys and values of all layers of Gemma 3n, and folders have none of those that share them. What the keys of
# the others say of their experts is not read backwards. GraniteMoE is written without a shared expert.
UNWRITTEN = frozenset({"deepseek2", "dots1", "ernie4_5-moe", "gemma3n", "glm4moe", "lfm2moe", "qwen35moe"})
ARCHITECTURE_OF = {  # by model_type
    **{keys.other[1]: name for name, keys in TABLE.items() if keys.other and name not in (*UNWRITTEN, "granitemoe")},
    **{keys.model_type: name for name, keys in TABLE.items() if name not in UNWRITTEN},
    "mistral": "llama",
    "mt5": "t5",
    "umt5": "t5",
    "gemma4_unified_text": "gemma4",
}

_STATED = {  # of mixtures, what no field of a configuration says
    "hunyuan-moe": {"expert_shared_count": 1}, "minimax-m2": {"expert_gating_func": SIGMOID, "expert_weights_norm": True},
}  # fmt: skip
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # of yarn, where they are not stated
_WITHOUT_EFFECT = (
    *PreTrainedConfig().to_dict(), "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp",
    "tie_word_embeddings", "vocab_size", "use_sliding_window", "max_window_layers", "rope_parameters", "model_type",
    "original_max_position_embeddings", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "residual_dropout", "embedding_dropout", "summary_type", "summary_use_proj", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "block_multiple_of", "block_ffn_dim_multiplier", "full_attn_idxs",
    "router_aux_loss_coef", "output_router_logits", "router_jitter_noise",
    "dropout_rate", "classifier_dropout", "initializer_factor",
)  # fmt: skip


def written_keys(config: PreTrainedConfig, architecture: str, rotary: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """({key: value}, {name: tensor of the rotations}) for a model of this configuration.

    Args:
        rotary: the module that makes cos and sin of positions; None where positions are a table.
    """
    keys, values = TABLE[architecture], dict[str, Any]()
    for key, field in {**keys.fields, **keys.experts}.items():
        value = getattr(config, field, None)
        if field == "n_inner":
            value = value or 4 * config.n_embd
        if field == "moe_topk":
            value = _filled(config)[field]
            if isinstance(value, list):
                raise UnsupportedError(
                    f"{field} {value!r:.60}: layers have other numbers of experts for a token, and a file has one"
                )
        if value is not None:
            values[key] = float(value) if key.endswith(("epsilon", "softcapping", "scale")) else value
    values |= _STATED.get(architecture, {})
    if architecture == "qwen35":
        values["ssm.inner_size"] = config.linear_value_head_dim * config.linear_num_value_heads
        kinds = [*config.layer_types, "full_attention"]
        values[INTERVAL] = kinds.index("full_attention") + 1
        values["rope.dimension_sections"] = [*(config.rope_parameters or {}).get("mrope_section", [11, 11, 10]), 0][:4]
    if architecture == "hunyuan-moe":
        values["expert_shared_feed_forward_length"] = config.intermediate_size
    if architecture == "falcon":
        values["attention.head_count_kv"] = _filled(config)["num_kv_heads"]
    if architecture == "lfm2":
        values["feed_forward_length"] = _filled(config)["intermediate_size"]
        kinds = config.layer_types
        values["attention.head_count_kv"] = [config.num_key_value_heads * (kind != "conv") for kind in kinds]
    if architecture == "t5":
        values |= t5_keys(config)
    if "attention.key_length" in values:
        values["attention.value_length"] = values["attention.key_length"]
    if architecture == "chatglm":
        values |= {
            "rope.freq_base": float(ROTARY_BASE * config.rope_ratio),
            "rope.dimension_count": config.kv_channels // 2,
        }
    tensors: dict[str, Tensor] = {}
    if architecture == "gemma4":
        own, tensors = gemma4_keys(config)
        values |= own
    elif keys.rotates:
        rope: Mapping[str, Any] = config.rope_parameters or {}
        values |= _windows(config, architecture)
        if "sliding_attention" in rope:
            values["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope.get("full_attention", rope)
        rotation, tensors = _rotation(config, rope, rotary, keys.partial)
        values |= rotation
    return {f"{architecture}.{key}": value for key, value in values.items()}, tensors


def _windows(config: PreTrainedConfig, architecture: str) -> dict[str, Any]:
    """The window and, where it is not llama.cpp's own pattern of layers, every how many layers there is none."""
    layers = getattr(config, "layer_types", None)
    windowed = [kind == "sliding_attention" for kind in layers or ()]
    window = getattr(config, "sliding_window", None)
    if architecture in ("phi3", "starcoder2"):
        return {WINDOW: window} if window else {}
    if not any(windowed):
        return {WINDOW: 0} if architecture == "gemma3" else {}
    if architecture == "exaone4":
        return {WINDOW: window}
    period = windowed.index(False) + 1 if False in windowed else 0
    return {WINDOW: window, PATTERN: period}


def _rotation(
    config: PreTrainedConfig, rope: Mapping[str, Any], rotary: Any, partial: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    kind, values, tensors = rope.get("rope_type", "default"), dict[str, Any](), dict[str, Tensor]()
    values["rope.freq_base"] = float(rope["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if partial:
        values["rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        if config.model_type == "ministral3":
            values["attention.temperature_scale"] = float(rope["llama_4_scaling_beta"])
            values["rope.scaling.yarn_log_multiplier"] = float(rope.get("mscale_all_dim", 0.0))
            values |= {f"rope.scaling.yarn_{key}": float(rope.get(key) or n) for key, n in _BETAS.items()}
    elif kind == "dynamic" and rope.get("alpha") and config.model_type in ("hunyuan_v1_dense", "hunyuan_v1_moe"):
        values["rope.freq_base"] *= rope["alpha"] ** (head_dim / (head_dim - 2))
    elif kind in ("llama3", "longrope") and not hasattr(rotary, "inv_freq"):
        raise UnsupportedError(f"rope_type {kind!r} in some layers only: no key of a GGUF file states such rotations")
    elif kind == "llama3":
        scaled = rotary.inv_freq.float().cpu()  # of what is rotated of a head
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(len(scaled), dtype=torch.int64).float() / len(scaled))
        tensors[FREQS] = plain / scaled
    elif kind == "longrope":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        values["rope.scaling.attn_factor"] = float(rotary.attention_scaling)
        if config.model_type != "phi3":
            values["rope.scaling.type"] = kind
        tensors = {LONG: torch.tensor(rope["long_factor"]), SHORT: torch.tensor(rope["short_factor"])}
    elif kind not in ("default", "linear"):
        raise UnsupportedError(f"rope_type {kind!r}: no key of a GGUF file states such rotations")
    return values, tensors


def lost_in_keys(config: PreTrainedConfig, rotary: Any, draft: GgufFile) -> list[str]:
    """What the metadata of `draft` does not say, or says otherwise, of this configuration: one phrase each."""
    read = gguf_config(draft)
    stated, meant = _filled(read), _filled(config)
    fields = [name for name in stated if name not in _WITHOUT_EFFECT and not name.startswith("_")]
    lost = [
        f"{name} {meant[name]!r:.60} (the file can say {stated[name]!r:.60})"
        for name in fields
        if name in meant and not _same(meant[name], stated[name])
    ]
    window = meant.get("sliding_window")
    if config.model_type == "mistral" and window and window < config.max_position_embeddings:
        lost.append(f"sliding_window {window} (llama.cpp has none for this architecture)")
    if rotary is not None:
        again: Any = type(rotary)(config=read)
        apply_rotation(again, Header(draft), draft)
        if not _same_rotations(rotary, again):
            lost.append(f"rope_parameters {config.rope_parameters!r:.200}")
        elif config.model_type != "ministral3" and llamacpp_rotates_otherwise(config.rope_parameters or {}):
            lost.append("the beta or the attention factor of its yarn, which llama.cpp passes over")
    return lost


def llamacpp_rotates_otherwise(rope: Mapping[str, Any]) -> bool:
    """Whether yarn has what llama.cpp passes over for these architectures."""
    rope = rope.get("full_attention", rope)
    told = (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("attention_factor"))
    return rope.get("rope_type") == "yarn" and (told[:2] != (32, 1) or told[2] is not None)


def _filled(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields, those with a default that others decide filled in."""
    values = config.to_dict()
    if "n_embd" in values:
        values["n_inner"] = values.get("n_inner") or 4 * values["n_embd"]
    if "new_decoder_architecture" in values:  # of Falcon: what FalconAttention and FalconDecoderLayer make of it
        if values["new_decoder_architecture"]:
            values |= {"multi_query": True, "parallel_attn": True}
            values["num_ln_in_parallel_attn"] = values["num_ln_in_parallel_attn"] or 2
        elif values["multi_query"]:
            values |= {"num_kv_heads": 1, "num_ln_in_parallel_attn": 1}
    if values.pop("block_auto_adjust_ff_dim", False):  # of LFM2: what Lfm2MLP makes of it
        width, unit = int(2 * values["intermediate_size"] / 3), values["block_multiple_of"]
        width = int((values["block_ffn_dim_multiplier"] or 1) * width)
        values["intermediate_size"] = -(-width // unit) * unit
    if values["model_type"] in ("t5", "mt5", "umt5"):
        values["scale_decoder_outputs"] = scales_outputs(values)
    if "num_attention_heads" in values:
        width = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
        values["head_dim"] = width
        values["num_key_value_heads"] = values.get("num_key_value_heads") or values["num_attention_heads"]
    if not values.get("hidden_size_per_layer_input", True):  # of Gemma 4: no such table
        values["vocab_size_per_layer_input"] = None
    chosen = values.get("moe_topk")  # of Hunyuan: a list, with a number for each layer
    if isinstance(chosen, list) and len(set(chosen)) == 1:
        values["moe_topk"] = chosen[0]
    layers = values.get("layer_types")
    if layers is not None and "sliding_attention" not in layers:
        values["sliding_window"] = None
    return values


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))  # a key holds float32
    return bool(one == other)


def _same_rotations(one: Any, other: Any) -> bool:
    """Whether two such modules have the same frequencies, and the same factors on cos and sin."""
    ours, theirs = (dict(each.named_buffers(remove_duplicate=False)) for each in (one, other))
    if ours.keys() != theirs.keys():
        return False
    near = all(torch.allclose(ours[name].float().cpu(), theirs[name].float().cpu(), rtol=1e-5, atol=0) for name in ours)
    factors = [name for name in vars(one) if name.endswith("attention_scaling")]
    lists = [each.config.rope_parameters or {} for each in (one, other)]
    longs = [[each.get(name) for name in ("long_factor", "short_factor")] for each in lists]
    return near and all(_same(float(getattr(one, n)), float(getattr(other, n))) for n in factors) and _close(*longs)


def _close(one: list[Any], other: list[Any]) -> bool:
    return all(
        a is b or (a is not None and b is not None and torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-5))
        for a, b in zip(one, other, strict=True)
    )
