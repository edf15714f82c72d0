"""What each metadata key of a GGUF file means for the computation: one table for each architecture.

A key `llama.rope.freq_base` belongs to the architecture "llama"; here it is called "rope.freq_base". Every key of a file is

    used             it sets a field of transformers' configuration (`fields`), or code reads it (`used`)
    without effect   nothing that is computed depends on it, here as in llama.cpp (`ignored`, IGNORED and OTHER_GROUPS)
    refused          it would change the computation in a way that is not served; a value that says what is computed
                     anyway passes (`musts` and MUSTS)
    unknown          in none of the tables; named in a note, so that a newer key does not vanish

Source: `load_hparams` and each architecture's `load_arch_hparams` in llama.cpp (llama-model.cpp, models/*.cpp) with the
names in llama-arch.cpp, and what its converter writes. Which keys have an effect there was tried on tiny files: every name
that the library knows, on every architecture, with a value that is not the default.

Not chosen: transformers' GGUF reader. It passes over every key that it does not know, and over rope scaling, windows and
soft caps of those that it does; and it walks each string of the vocabulary to read a dozen numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qgraft.checkpoints.gguf_header import Header
from qgraft.checkpoints.gguf_musts import (
    Must,
    if_experts,
    if_yarn,
    near,
    one_of,
    positions_of_texts,
    same,
    whole_context,
)

WINDOW = "attention.sliding_window"
PATTERN = "attention.sliding_window_pattern"
INTERVAL, DRAFTS = "full_attention_interval", "nextn_predict_layers"
SHARED, PER_LAYER = "attention.shared_kv_layers", "embedding_length_per_layer_input"  # Gemma 3n's and 4's
SPARSITY = "activation_sparsity_scale"


@dataclass(frozen=True)
class Keys:
    """How the metadata of one architecture becomes the configuration of a transformers model.

    Attributes:
        model_type: transformers' name of the configuration.
        fields: key -> field of the configuration that it sets.
        used: key -> what code does with it.
        ignored: key -> why it is without effect here, beside IGNORED.
        musts: keys that are refused unless they say what is computed, beside MUSTS.
        rotates: whether a module of transformers makes rotations of positions (not gpt2's table, nor ChatGLM's own code).
        partial: whether a part of a head may be rotated.
        scalings: values of rope.scaling.type that are served.
        freqs: whether rope_freqs.weight divides the frequencies.
        present: field that is true where the first layer has a tensor -> that tensor.
        other: (key, model_type): the configuration where that key is there and not 0.
        experts: key -> field of the configuration in a file whose expert_count is not 0.
        fixed: field -> its value, which no key states.
    """

    model_type: str
    fields: Mapping[str, str]
    used: Mapping[str, str]
    ignored: Mapping[str, str] = field(default_factory=dict)
    musts: Mapping[str, Must] = field(default_factory=dict)
    rotates: bool = True
    partial: bool = False
    scalings: tuple[str, ...] = ("none", "linear", "yarn")
    freqs: bool = False
    present: Mapping[str, str] = field(default_factory=dict)
    other: tuple[str, str] | None = None
    experts: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def fields_of(self, header: Header) -> dict[str, str]:
        """key -> field of the configuration, in this file."""
        return {**self.fields, **(self.experts if header.get("expert_count") else {})}

    def type_of(self, header: Header) -> str:
        """transformers' name of the configuration of this file."""
        return self.other[1] if self.other and header.get(self.other[0]) else self.model_type


_NO_EXPERTS = Must(
    lambda header, got: got == 0 or header.get("expert_count") in (0, None),
    "no experts, as in a file whose expert_count is 0",
)
_NO_WINDOW = Must(whole_context, "0, or at least context_length: no layer has a window here")

MUSTS: dict[str, Must] = {  # of every architecture; a name may end in *
    "attention.causal": one_of(True),
    "attention.clamp_kqv": one_of(0),
    "attention.key_length": same(
        "embedding_length / attention.head_count", lambda header: header.width // header.heads
    ),
    "attention.key_length_swa": same("attention.key_length", lambda header: header.head_dim),
    "attention.max_alibi_bias": one_of(0),
    "attention.scale": Must(
        lambda header, got: near(got, (0, header.attention_width**-0.5)), "0, or the scale that is computed"
    ),
    "attention.temperature_scale": one_of(0),
    "attention.value_length": same("attention.key_length", lambda header: header.head_dim),
    "attention.value_length_swa": same("attention.key_length", lambda header: header.head_dim),
    WINDOW: _NO_WINDOW,
    "attn_logit_softcapping": one_of(0),
    "embedding_length_out": same("embedding_length", lambda header: header.width),
    "embedding_scale": one_of(0, 1),
    "expert_count": Must(lambda _, got: got == 0, "0: this architecture is not served with experts"),
    "expert_*": _NO_EXPERTS,
    "final_logit_softcapping": one_of(0),
    "logit_scale": one_of(0, 1),
    "nextn_predict_layers": one_of(0),
    "residual_scale": one_of(0, 1),
    "rope.dimension_count": same("attention.key_length", lambda header: header.head_dim),
    "rope.dimension_count_swa": same("rope.dimension_count", lambda header: header.rotated),
    "rope.dimension_sections": one_of(0),
    "rope.scaling.alpha": one_of(0, 1),
    "rope.scaling.yarn_ext_factor": if_yarn(one_of(1)),
    "rope.scaling.yarn_log_multiplier": if_yarn(one_of(0)),
    "use_parallel_residual": one_of(False),
}

IGNORED = {  # of every architecture
    PATTERN: "no layer has a window",
    "pooling_type": "for embeddings of texts",
    "rope.freq_base_swa": "no layer has a window",
    "rope.scaling.finetuned": "says how the model was trained",
    "tensor_data_layout": "says where the file came from",
    "vocab_size": "the rows of token_embd.weight are counted",
}
OTHER_GROUPS = {  # keys that begin so belong to no architecture
    "general.": "names, licence, sizes, type of the file",
    "quantize.": "how the file was quantized",
    "split.": "parts of the file",
    "tokenizer.": "of the tokenizer",
}

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
_BY_LAYER = {  # a number, or a list with one for each layer
    "feed_forward_length": "intermediate_size, and whether the layers that share keys and values have twice that",
    "attention.head_count_kv": "num_key_value_heads, of layers without a window num_global_key_value_heads",
}
_SCALES = {  # of Granite
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
_HEAD_DIM = {"attention.key_length": "head_dim"}
_ROPE = {
    "rope.freq_base": "base of the rotations, 10000 where it is absent",
    "rope.scaling.type": "none, linear, yarn or longrope; linear where it is absent",
    "rope.scaling.factor": "positions are divided by it",
    "rope.scale_linear": "older name of rope.scaling.factor",
    "rope.scaling.attn_factor": "factor on rotated queries and keys",
    "rope.scaling.original_context_length": "of yarn and longrope; context_length where it is absent",
    "rope.scaling.yarn_attn_factor": "attention_factor of yarn (llama.cpp passes over it)",
    "rope.scaling.yarn_beta_fast": "beta_fast of yarn (llama.cpp passes over it)",
    "rope.scaling.yarn_beta_slow": "beta_slow of yarn (llama.cpp passes over it)",
}
_PART = {"rope.dimension_count": "elements of a head that are rotated"}
_WINDOWS = {
    WINDOW: "tokens that a layer with a window sees",
    PATTERN: "a number n: every n-th layer has no window; or a list: which layers have one",
}
_ONE_WINDOW = {WINDOW: "tokens that every layer sees (llama.cpp passes over it)"}
_TEMPERATURE = {
    "attention.temperature_scale": "llama_4_scaling_beta: queries grow with the logarithm of their position",
    "rope.scaling.yarn_log_multiplier": "mscale_all_dim of yarn",
}
_SAME_BASE = {"rope.freq_base_swa": same("rope.freq_base", lambda header: header.number("rope.freq_base", 10000.0))}
_UNSCALED = {  # positions
    "rope.scaling.type": Must(lambda _, got: got in ("none", "linear"), "none or linear"),
    "rope.scaling.factor": one_of(0, 1),
    "rope.scale_linear": one_of(0, 1),
    "rope.scaling.attn_factor": one_of(1),
}
_BIASES = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}
_SAME_LAYERS = {
    PATTERN: Must(
        lambda header, got: not header.get(WINDOW) or (all(got) if isinstance(got, list) else got == 0),
        "0: all layers have the same window",
    )
}

_SOFTMAX = 1  # of expert_gating_func
_PLAIN_EXPERTS = {
    "expert_gating_func": if_experts(one_of(_SOFTMAX)), "expert_weights_scale": if_experts(one_of(0, 1)),
    "expert_*": if_experts(one_of(0)),
}  # fmt: skip
_NORMED_EXPERTS = {**_PLAIN_EXPERTS, "expert_weights_norm": if_experts(one_of(True))}
_COUNTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_LOCAL_COUNTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_EXPERT_SIZE = {"expert_feed_forward_length": "moe_intermediate_size"}

TABLE: dict[str, Keys] = {  # by general.architecture
    "chatglm": Keys(  # ChatGLM3 and GLM-4-9B, in our own code (models/chatglm2.py)
        "chatglm",
        {"context_length": "seq_length", "embedding_length": "hidden_size", "block_count": "num_layers",
         "feed_forward_length": "ffn_hidden_size", "attention.head_count": "num_attention_heads",
         "attention.head_count_kv": "multi_query_group_num", "attention.key_length": "kv_channels",
         _RMS: "layernorm_epsilon"},
        {"rope.freq_base": "10000 times rope_ratio, 10000 where it is absent"},
        musts={**_UNSCALED, "rope.dimension_count": same(
            "half of a head", lambda header: header.head_dim // 2
        )},
        rotates=False, present={"add_qkv_bias": "attn_qkv.bias"},
    ),
    "exaone4": Keys(
        "exaone4", {**_SIZES, _RMS: "rms_norm_eps"}, {**_ROPE, **_WINDOWS}, freqs=True
    ),
    "falcon": Keys(
        "falcon",
        {"context_length": "max_position_embeddings", "embedding_length": "hidden_size",
         "block_count": "num_hidden_layers", "feed_forward_length": "ffn_hidden_size",
         "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_kv_heads",
         _LAYER: "layer_norm_epsilon"},
        _ROPE,
    ),
    "gemma": Keys("gemma", {**_SIZES, _RMS: "rms_norm_eps", **_HEAD_DIM}, _ROPE),
    "gemma2": Keys(
        "gemma2",
        {**_SIZES, _RMS: "rms_norm_eps", **_HEAD_DIM, "attn_logit_softcapping": "attn_logit_softcapping",
         "final_logit_softcapping": "final_logit_softcapping"},
        {**_ROPE, **_WINDOWS},
        musts=_SAME_BASE,
    ),
    "gemma3": Keys(
        "gemma3_text",
        {**_SIZES, _RMS: "rms_norm_eps", **_HEAD_DIM, "final_logit_softcapping": "final_logit_softcapping"},
        {**_ROPE, **_WINDOWS, "rope.freq_base_swa": "base in layers with a window, 10000 where it is absent"},
    ),
    "gemma3n": Keys(
        "gemma3n_text",
        {**{key: field for key, field in _SIZES.items() if key != "feed_forward_length"}, _RMS: "rms_norm_eps", **_HEAD_DIM,
         "final_logit_softcapping": "final_logit_softcapping", PER_LAYER: "hidden_size_per_layer_input",
         "altup.num_inputs": "altup_num_inputs"},
        {**_WINDOWS, "feed_forward_length": "intermediate_size; a number, or a list with one for each layer",
         "altup.active_idx": "altup_active_idx", SHARED: "last layers, which take keys and values from those before",
         SPARSITY: "activation_sparsity_pattern: of each layer the quantile of the share that it drops",
         "rope.freq_base": "base in layers without a window, 10000 where it is absent",
         "rope.freq_base_swa": "base in layers with a window, 10000 where it is absent"},
        musts={**_UNSCALED, "attention.scale": one_of(0, 1)},
    ),
    "gemma4": Keys(  # two kinds of layers: gguf_gemma.py
        "gemma4_text",
        {**{key: field for key, field in _SIZES.items() if key not in _BY_LAYER}, _RMS: "rms_norm_eps",
         "final_logit_softcapping": "final_logit_softcapping"},
        {**_WINDOWS, **_BY_LAYER,
         "rope.freq_base": "base in layers without a window, 10000 where it is absent",
         "rope.freq_base_swa": "base in layers with a window, rope.freq_base where it is absent",
         "attention.key_length": "global_head_dim: elements of a head in layers without a window",
         "attention.key_length_swa": "head_dim: elements of a head in layers with a window",
         SHARED: "last layers, which take keys and values from those before",
         PER_LAYER: "hidden_size_per_layer_input: numbers of each token for each layer"},
        musts={
            **_UNSCALED,
            "attention.scale": one_of(0, 1),
            **dict.fromkeys(("attention.value_length_swa", "rope.dimension_count_swa"), same(
                "attention.key_length_swa", lambda header: header.count("attention.key_length_swa")
            )),
        },
        freqs=True,
    ),
    "glm4": Keys(
        "glm4", {**_SIZES, _RMS: "rms_norm_eps", **_HEAD_DIM}, {**_ROPE, **_PART}, partial=True,
        present={"attention_bias": "attn_q.bias"},
    ),
    "gpt2": Keys(
        "gpt2",
        {"context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer",
         "feed_forward_length": "n_inner", "attention.head_count": "n_head", _LAYER: "layer_norm_epsilon"},
        {},
        ignored={"rope.*": "positions are a table"},
        musts={"attention.head_count_kv": same("attention.head_count", lambda header: header.heads)},
        rotates=False,
    ),
    "gpt-oss": Keys(
        "gpt_oss", {**_SIZES, _RMS: "rms_norm_eps", **_HEAD_DIM}, {**_ROPE, **_WINDOWS},
        musts={**_PLAIN_EXPERTS, **_SAME_BASE, "expert_gating_func": one_of(3)},  # softmax of the chosen ones
        experts={**_LOCAL_COUNTS, "expert_feed_forward_length": "intermediate_size"},
    ),
    "granite": Keys(
        "granite", {**_SIZES, _RMS: "rms_norm_eps", **_SCALES}, _ROPE, freqs=True, present=_BIASES,
        musts={"rope.scaling.finetuned": one_of(True)},  # Granite's switch for rotations
    ),
    "granitemoe": Keys(
        "granitemoe", {**_SIZES, _RMS: "rms_norm_eps", **_SCALES}, _ROPE, experts=_LOCAL_COUNTS,
        musts={**_NORMED_EXPERTS, "rope.scaling.finetuned": one_of(True)}, present={"attention_bias": "attn_q.bias"},
    ),
    "hunyuan-dense": Keys(
        "hunyuan_v1_dense", {**_SIZES, _RMS: "rms_norm_eps", **_HEAD_DIM}, _ROPE,
        present={"attention_bias": "attn_q.bias"},
    ),
    "lfm2": Keys(
        "lfm2",
        {**{key: field for key, field in _SIZES.items() if not key.endswith("_kv")}, _RMS: "norm_eps",
         "shortconv.l_cache": "conv_L_cache"},
        {**_ROPE, "attention.head_count_kv": "num_key_value_heads; a list, with 0 for a layer that is a short convolution"},
    ),
    "llama": Keys(  # mistral files, too
        "llama", {**_SIZES, _RMS: "rms_norm_eps", **_HEAD_DIM}, _ROPE, present=_BIASES, freqs=True,
        scalings=("none", "linear", "yarn", "longrope"), other=("expert_count", "mixtral"), experts=_LOCAL_COUNTS,
        musts=_NORMED_EXPERTS,
    ),
    "mistral3": Keys(
        "mistral", {**_SIZES, _RMS: "rms_norm_eps", **_HEAD_DIM}, {**_ROPE, **_TEMPERATURE}, freqs=True,
        other=("attention.temperature_scale", "ministral3"),
    ),
    "nemotron": Keys(
        "nemotron", {**_SIZES, _LAYER: "norm_eps", **_HEAD_DIM}, {**_ROPE, **_PART}, partial=True, present=_BIASES
    ),
    "olmo2": Keys(  # with a window OLMo 3
        "olmo2", {**_SIZES, _RMS: "rms_norm_eps"}, {**_ROPE, **_WINDOWS}, musts=_SAME_BASE, other=(WINDOW, "olmo3")
    ),
    "olmoe": Keys("olmoe", {**_SIZES, _RMS: "rms_norm_eps"}, _ROPE, musts=_PLAIN_EXPERTS, experts=_COUNTS),
    "phi3": Keys(
        "phi3", {**_SIZES, _RMS: "rms_norm_eps"}, {**_ROPE, **_PART, **_ONE_WINDOW},
        musts={**_SAME_BASE, **_SAME_LAYERS}, partial=True, scalings=("none", "linear", "longrope"),
    ),
    "qwen2": Keys("qwen2", {**_SIZES, _RMS: "rms_norm_eps"}, _ROPE),
    "qwen2moe": Keys(
        "qwen2_moe", {**_SIZES, _RMS: "rms_norm_eps"}, _ROPE, musts=_PLAIN_EXPERTS,
        experts={**_COUNTS, **_EXPERT_SIZE, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "qwen3": Keys("qwen3", {**_SIZES, _RMS: "rms_norm_eps", **_HEAD_DIM}, _ROPE),
    "qwen3moe": Keys(
        "qwen3_moe", {**_SIZES, _RMS: "rms_norm_eps", **_HEAD_DIM}, _ROPE, musts=_NORMED_EXPERTS,
        experts={**_COUNTS, **_EXPERT_SIZE}, fixed={"norm_topk_prob": True},
    ),
    "qwen35": Keys(  # gated delta nets, and full attention every so many layers
        "qwen3_5_text",
        {**_SIZES, _RMS: "rms_norm_eps", **_HEAD_DIM, "ssm.conv_kernel": "linear_conv_kernel_dim",
         "ssm.state_size": "linear_key_head_dim", "ssm.group_count": "linear_num_key_heads",
         "ssm.time_step_rank": "linear_num_value_heads"},
        {**_ROPE, **_PART, INTERVAL: "every so many layers one has attention, 4 where it is absent",
         DRAFTS: "last layers, which only draft; they are left as they are"},
        musts={
            "rope.dimension_sections": Must(
                positions_of_texts, "four numbers whose first three sections take in all that is rotated"
            ),
            "ssm.inner_size": same("ssm.state_size times ssm.time_step_rank",
                                    lambda header: header.count("ssm.state_size") * header.count("ssm.time_step_rank")),
            "attention.recurrent_layers": Must(lambda header, got: got == [
                not header.attends(layer) for layer in range(header.count("block_count"))
            ], f"what {INTERVAL} says"),
        },
        partial=True,
    ),
    "smollm3": Keys(  # every fourth layer without rotations: no key says so
        "smollm3", {**_SIZES, _RMS: "rms_norm_eps"}, _ROPE, present=_BIASES
    ),
    "stablelm": Keys(
        "stablelm", {**_SIZES, _LAYER: "layer_norm_eps"}, {**_ROPE, **_PART},
        ignored={"use_parallel_residual": "whether there are ffn_norm tensors decides"}, partial=True,
        present={"use_qkv_bias": "attn_q.bias", "qk_layernorm": "attn_q_norm.weight"},
    ),
    "starcoder2": Keys(
        "starcoder2", {**_SIZES, _LAYER: "norm_epsilon"}, {**_ROPE, **_ONE_WINDOW},
        musts={**_SAME_BASE, **_SAME_LAYERS},
    ),
    "t5": Keys(  # an encoder and a decoder: gguf_t5.py
        "t5",
        {"embedding_length": "d_model", "block_count": "num_layers", "feed_forward_length": "d_ff",
         "attention.head_count": "num_heads", "attention.key_length": "d_kv", _RMS: "layer_norm_epsilon",
         "attention.relative_buckets_count": "relative_attention_num_buckets"},
        {"decoder_block_count": "num_decoder_layers; block_count where it is absent",
         "decoder_start_token_id": "what every answer begins with"},
        ignored={"context_length": "positions are relative", _LAYER: "norms are by the root of the mean square",
                 "rope.*": "positions are a bias"},
        musts={"attention.head_count_kv": same("attention.head_count", lambda header: header.heads)},
        rotates=False,
    ),
}  # fmt: skip
