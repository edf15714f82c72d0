"""Mixtures of experts with dense layers before them and experts that serve every token: their tables of metadata keys.

    DeepSeek      queries, keys and values come out of narrow states: attn_kv_b has the rows of keys and values of each head
                  in turn, as transformers has; newer files have them apart, attn_k_b transposed and attn_v_b
    routing       softmax (DeepSeek 2) or sigmoid with a bias for the choice (all others); of some groups of experts only the
                  best are chosen from. DeepSeek 2's groups are as good as their best expert, those of others as their two
                  best together; llama.cpp computes the latter for all
    Granite       a shared expert whose gate and up are one layer in transformers, and two tensors in the file
    Qwen 3.5, LFM2    as their dense kin (gguf_keys.py), with experts

Source: `load_hparams` in llama.cpp (llama-model.cpp, models/*.cpp) and its converter.
"""

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.checkpoints.gguf_header import Header
from qgraft.checkpoints.gguf_key_parts import (
    COUNTS,
    DRAFTS,
    EXPERT_SIZE,
    HEAD_DIM,
    LOCAL_COUNTS,
    NORMED_EXPERTS,
    PARTLY,
    QWEN35,
    QWEN35_MUSTS,
    QWEN35_USED,
    RMS_NORM,
    ROPE,
    SIZES,
    Keys,
)
from qgraft.checkpoints.gguf_musts import one_of, same

SIGMOID = 2  # of expert_gating_func
DENSE, GROUPS, BEST_GROUPS = "leading_dense_block_count", "expert_group_count", "expert_group_used_count"
FACTOR, NORMED, GATING = "expert_weights_scale", "expert_weights_norm", "expert_gating_func"
_SHARED = {"expert_shared_count": "n_shared_experts"}
_ROUTED = {"expert_count": "n_routed_experts", "expert_used_count": "num_experts_per_tok", **EXPERT_SIZE, **_SHARED}
_LEADING = {DENSE: "first layers, which have no experts"}
_CHOICE = {
    **_LEADING,
    GROUPS: "n_group; 1 where it is absent",
    BEST_GROUPS: "topk_group; 1 where it is absent",
    FACTOR: "routed_scaling_factor: the weights of experts are multiplied by it; 1 where it is absent",
    NORMED: "norm_topk_prob: whether the weights of a token's experts are divided by their sum",
}
_SIGMOID = {GATING: one_of(SIGMOID), "expert_*": one_of(0)}
_LATENT = {
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.q_lora_rank": "q_lora_rank; queries come out of no narrow state where it is absent",
    "attention.key_length": "elements of a head of keys; where attention.key_length_mla is stated, that is",
    "attention.value_length": "v_head_dim; where attention.value_length_mla is stated, that is",
    "attention.key_length_mla": "elements of a head of keys, qk_nope_head_dim + qk_rope_head_dim",
    "attention.value_length_mla": "v_head_dim",
    "attention.head_count_kv": "heads of keys and values, or 1 where these are apart in the file: attention.head_count",
    "rope.dimension_count": "qk_rope_head_dim",
    "rope.scaling.yarn_log_multiplier": "a tenth of yarn's mscale_all_dim, by which scores are scaled",
}
_UNSCALED_SCORES = dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), one_of(1))
_LATENT_ROPE = {key: use for key, use in ROPE.items() if key not in _UNSCALED_SCORES}
_PLAIN_SIZES = {key: field for key, field in SIZES.items() if key != "attention.head_count_kv"}

MIXTURES: dict[str, Keys] = {  # by general.architecture
    "deepseek2": Keys(  # DeepSeek 2, and with sigmoid 3
        "deepseek_v2", {**_PLAIN_SIZES, RMS_NORM: "rms_norm_eps"},
        {**_LATENT_ROPE, **_CHOICE, **_LATENT, GATING: "1 or absent: softmax, of DeepSeek 2; 2: sigmoid, of DeepSeek 3"},
        experts=_ROUTED, musts={"expert_*": one_of(0), **_UNSCALED_SCORES}, other=(GATING, "deepseek_v3"),
        other_value=SIGMOID,
    ),
    "dots1": Keys(
        "dots1", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, {**ROPE, **_CHOICE}, experts=_ROUTED, musts=_SIGMOID,
        fixed={"sliding_window": None},
    ),
    "ernie4_5-moe": Keys(
        "ernie4_5_moe", {**SIZES, RMS_NORM: "rms_norm_eps", "interleave_moe_layer_step": "moe_layer_interval"},
        {**ROPE, **_LEADING},
        experts={"expert_count": "moe_num_experts", "expert_used_count": "moe_k", **EXPERT_SIZE,
                 "expert_shared_count": "moe_num_shared_experts"},
        musts={**NORMED_EXPERTS, "expert_shared_feed_forward_length": same(
            "expert_feed_forward_length times expert_shared_count",
            lambda header: header.count("expert_feed_forward_length") * header.count("expert_shared_count"),
        )},
        present={"use_bias": "attn_q.bias"},
    ),
    "glm4moe": Keys(
        "glm4_moe", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM},
        {**ROPE, **PARTLY, **_CHOICE, DRAFTS: "last layers, which only draft; they are left as they are"},
        experts=_ROUTED, musts=_SIGMOID, partial=True,
        present={"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"},
    ),
    "hunyuan-moe": Keys(
        "hunyuan_v1_moe", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, ROPE,
        experts={"expert_count": "num_experts", "expert_used_count": "moe_topk",
                 "expert_feed_forward_length": "intermediate_size"},
        musts={**NORMED_EXPERTS, "expert_shared_count": one_of(1), "expert_shared_feed_forward_length": same(
            "expert_feed_forward_length", lambda header: header.count("expert_feed_forward_length")
        )},
        present={"attention_bias": "attn_q.bias"},
    ),
    "lfm2moe": Keys(
        "lfm2_moe",
        {**_PLAIN_SIZES, RMS_NORM: "norm_eps", "shortconv.l_cache": "conv_L_cache"},
        {**ROPE, **_LEADING,
         "attention.head_count_kv": "num_key_value_heads; a list, with 0 for a layer that is a short convolution"},
        experts={**COUNTS, **EXPERT_SIZE},
        musts={**_SIGMOID, NORMED: one_of(True), FACTOR: one_of(0, 1)},
        present={"use_expert_bias": "exp_probs_b.bias"}, fixed={"norm_topk_prob": True, "routed_scaling_factor": 1.0},
    ),
    "minimax-m2": Keys(
        "minimax_m2", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, {**ROPE, **PARTLY},
        experts={**LOCAL_COUNTS, "expert_feed_forward_length": "intermediate_size"},
        musts={**_SIGMOID, NORMED: one_of(True), FACTOR: one_of(0, 1)}, partial=True,
    ),
    "qwen35moe": Keys(
        "qwen3_5_moe_text",
        {**{key: field for key, field in SIZES.items() if key != "feed_forward_length"}, **QWEN35},
        {**ROPE, **PARTLY, **QWEN35_USED},
        ignored={"feed_forward_length": "no layer is without experts"},
        musts={**QWEN35_MUSTS, **NORMED_EXPERTS}, partial=True,
        experts={**COUNTS, **EXPERT_SIZE, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
}  # fmt: skip


def mixture_fields(header: Header) -> dict[str, Any]:
    """The fields of transformers' configuration that no single key sets, of the architectures above."""
    used = MIXTURES[header.architecture].used
    values: dict[str, Any] = {}
    if DENSE in used:
        values[_DENSE_FIELDS.get(header.architecture, "first_k_dense_replace")] = _dense(header)
    if GROUPS in used:
        values |= {"n_group": _groups(header), "topk_group": header.count(BEST_GROUPS, 1, most=_groups(header))}
        values["routed_scaling_factor"] = header.number(FACTOR, 1.0, zero=True) or 1.0
        values["norm_topk_prob"] = _normed(header)
    if header.architecture == "deepseek2":
        values |= _latent(header)
    return values


_DENSE_FIELDS = {"ernie4_5-moe": "moe_layer_start_index", "lfm2moe": "num_dense_layers"}


def _dense(header: Header) -> int:
    dense = header.get(DENSE) or 0
    if type(dense) is not int or not 0 <= dense <= header.layers:
        raise header.wrong(DENSE, "an integer from 0 on, at most block_count")
    return dense


def _groups(header: Header) -> int:
    experts = header.count("expert_count")
    groups = header.count(GROUPS, most=experts) if header.get(GROUPS) else 1
    if experts % groups:
        raise header.wrong(GROUPS, f"a divisor of {experts} experts")
    if groups > 1 and header.get(BEST_GROUPS) is None:
        raise header.wrong(BEST_GROUPS, f"a number of the {groups} groups")
    return groups


def _normed(header: Header) -> bool:
    normed = header.get(NORMED)
    if normed not in (None, False, True):
        raise header.wrong(NORMED, "true or false")
    return bool(normed)


def _latent(header: Header) -> dict[str, Any]:
    """DeepSeek's narrow states and heads."""
    gating = header.get(GATING) or 1
    if gating not in (1, SIGMOID):
        raise header.refused(GATING, "1 or 2: softmax or sigmoid")
    if gating == 1 and _normed(header):
        raise header.refused(NORMED, "false, where expert_gating_func is 1: DeepSeek 2's weights are not divided")
    apart = header.get("attention.key_length_mla") is not None
    suffix = "_mla" if apart else ""
    key, value = (header.count(f"attention.{kind}_length{suffix}", most=1 << 16) for kind in ("key", "value"))
    rotated = header.count("rope.dimension_count")
    if rotated >= key or rotated % 2:
        raise header.wrong("rope.dimension_count", f"an even integer, less than {key} elements of a head")
    rank = header.count("attention.kv_lora_rank", most=1 << 16)
    heads = (header.get("attention.head_count_kv"), header.get("attention.key_length"))
    if apart and heads not in ((1, rank + rotated), (None, rank + rotated)):
        raise header.refused("attention.head_count_kv", "1, and keys of kv_lora_rank + rope.dimension_count elements")
    if not apart and heads[0] not in (None, header.heads):
        raise header.refused("attention.head_count_kv", "attention.head_count, as attention.key_length_mla is absent")
    lora = header.get("attention.q_lora_rank")
    return {
        "num_key_value_heads": header.heads,
        "kv_lora_rank": rank,
        "q_lora_rank": header.count("attention.q_lora_rank", most=1 << 16) if lora else None,
        "qk_nope_head_dim": key - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": value,
        **({"topk_method": "group_limited_greedy" if _groups(header) > 1 else "greedy"} if gating == 1 else {}),
    }


_APART = {  # layers whose rows a file may have, or has, in two tensors
    "self_attn.kv_b_proj": ("attn_k_b", "attn_v_b"),
    "shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp"),
}


def tensors_apart(parameter: str, tensors: Collection[str]) -> tuple[str, str] | None:
    """The tensors that make up the weight of such a layer where a file has it so."""
    found = re.search(r"\.layers\.(\d+)\.(\w+\.\w+)\.weight$", parameter)
    pair = tuple(f"blk.{found[1]}.{stem}.weight" for stem in _APART.get(found[2], ())) if found else ()
    return (pair[0], pair[1]) if pair and all(name in tensors for name in pair) else None


class FloatRows(nn.Linear):
    """y = x W^T with floats made of two tensors. No LoRA is put on it, as its class is its own: no merge could be written."""

    def __init__(self, weight: Tensor) -> None:
        rows, width = weight.shape
        super().__init__(width, rows, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)


def joined_rows(first: Tensor, second: Tensor) -> Tensor:
    """The rows of two tensors [out, in], one behind the other: of a shared expert's gate and up.

    Of DeepSeek's keys [heads, rank, nope] and values [heads, v, rank] -> [heads * (nope + v), rank], the rows of each head in
    turn.
    """
    if (first.dim(), second.dim()) == (2, 2) and first.shape[1] == second.shape[1]:
        return torch.cat([first, second])
    if (first.dim(), second.dim()) != (3, 3) or (first.shape[0], first.shape[1]) != (second.shape[0], second.shape[2]):
        return torch.empty(0)  # assemble() reports the shape
    return torch.cat([first.transpose(1, 2), second], 1).flatten(0, 1)
