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

from qgraft.checkpoints.gguf_key_parts import (
    BIASES,
    BY_LAYER,
    COUNTS,
    EXPERT_SIZE,
    HEAD_DIM,
    LAYER_NORM,
    LOCAL_COUNTS,
    NORMED_EXPERTS,
    ONE_WINDOW,
    PARTLY,
    PER_LAYER,
    PLAIN_EXPERTS,
    QWEN35,
    QWEN35_MUSTS,
    QWEN35_USED,
    RMS_NORM,
    ROPE,
    SAME_BASE,
    SAME_LAYERS,
    SCALES,
    SHARED,
    SHARED_SIZE,
    SIZES,
    SPARSITY,
    TEMPERATURE,
    UNSCALED,
    WINDOW,
    WINDOWED,
    Keys,
)
from qgraft.checkpoints.gguf_mixtures import MIXTURES
from qgraft.checkpoints.gguf_musts import one_of, same

TABLE: dict[str, Keys] = {  # by general.architecture
    "arcee": Keys(
        "arcee", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, ROPE, freqs=True, present=BIASES
    ),
    "chatglm": Keys(  # ChatGLM3 and GLM-4-9B, in our own code (models/chatglm2.py)
        "chatglm",
        {"context_length": "seq_length", "embedding_length": "hidden_size", "block_count": "num_layers",
         "feed_forward_length": "ffn_hidden_size", "attention.head_count": "num_attention_heads",
         "attention.head_count_kv": "multi_query_group_num", "attention.key_length": "kv_channels",
         RMS_NORM: "layernorm_epsilon"},
        {"rope.freq_base": "10000 times rope_ratio, 10000 where it is absent"},
        musts={**UNSCALED, "rope.dimension_count": same(
            "half of a head", lambda header: header.head_dim // 2
        )},
        rotates=False, present={"add_qkv_bias": "attn_qkv.bias"},
    ),
    "cohere2": Keys(  # layers without a window have no rotations
        "cohere2", {**SIZES, LAYER_NORM: "layer_norm_eps", "logit_scale": "logit_scale"}, {**ROPE, **WINDOWED},
        musts=SAME_BASE, present={"attention_bias": "attn_q.bias"},
    ),
    "command-r": Keys(
        "cohere", {**SIZES, LAYER_NORM: "layer_norm_eps", "logit_scale": "logit_scale"}, ROPE,
        present={"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"},
    ),
    "ernie4_5": Keys(
        "ernie4_5", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, ROPE, present={"use_bias": "attn_q.bias"}
    ),
    "exaone4": Keys(
        "exaone4", {**SIZES, RMS_NORM: "rms_norm_eps"}, {**ROPE, **WINDOWED}, freqs=True
    ),
    "falcon": Keys(
        "falcon",
        {"context_length": "max_position_embeddings", "embedding_length": "hidden_size",
         "block_count": "num_hidden_layers", "feed_forward_length": "ffn_hidden_size",
         "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_kv_heads",
         LAYER_NORM: "layer_norm_epsilon"},
        ROPE,
    ),
    "gemma": Keys("gemma", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, ROPE),
    "gemma2": Keys(
        "gemma2",
        {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM, "attn_logit_softcapping": "attn_logit_softcapping",
         "final_logit_softcapping": "final_logit_softcapping"},
        {**ROPE, **WINDOWED},
        musts=SAME_BASE,
    ),
    "gemma3": Keys(
        "gemma3_text",
        {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM, "final_logit_softcapping": "final_logit_softcapping"},
        {**ROPE, **WINDOWED, "rope.freq_base_swa": "base in layers with a window, 10000 where it is absent"},
    ),
    "gemma3n": Keys(
        "gemma3n_text",
        {**{key: field for key, field in SIZES.items() if key != "feed_forward_length"}, RMS_NORM: "rms_norm_eps", **HEAD_DIM,
         "final_logit_softcapping": "final_logit_softcapping", PER_LAYER: "hidden_size_per_layer_input",
         "altup.num_inputs": "altup_num_inputs"},
        {**WINDOWED, "feed_forward_length": "intermediate_size; a number, or a list with one for each layer",
         "altup.active_idx": "altup_active_idx", SHARED: "last layers, which take keys and values from those before",
         SPARSITY: "activation_sparsity_pattern: of each layer the quantile of the share that it drops",
         "rope.freq_base": "base in layers without a window, 10000 where it is absent",
         "rope.freq_base_swa": "base in layers with a window, 10000 where it is absent"},
        musts={**UNSCALED, "attention.scale": one_of(0, 1)},
    ),
    "gemma4": Keys(  # two kinds of layers: gguf_gemma.py
        "gemma4_text",
        {**{key: field for key, field in SIZES.items() if key not in BY_LAYER}, RMS_NORM: "rms_norm_eps",
         "final_logit_softcapping": "final_logit_softcapping"},
        {**WINDOWED, **BY_LAYER,
         "rope.freq_base": "base in layers without a window, 10000 where it is absent",
         "rope.freq_base_swa": "base in layers with a window, rope.freq_base where it is absent",
         "attention.key_length": "global_head_dim: elements of a head in layers without a window",
         "attention.key_length_swa": "head_dim: elements of a head in layers with a window",
         SHARED: "last layers, which take keys and values from those before",
         PER_LAYER: "hidden_size_per_layer_input: numbers of each token for each layer"},
        musts={
            **UNSCALED,
            "attention.scale": one_of(0, 1),
            **dict.fromkeys(("attention.value_length_swa", "rope.dimension_count_swa"), same(
                "attention.key_length_swa", lambda header: header.count("attention.key_length_swa")
            )),
        },
        freqs=True,
    ),
    "glm4": Keys(
        "glm4", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, {**ROPE, **PARTLY}, partial=True,
        present={"attention_bias": "attn_q.bias"},
    ),
    "gpt2": Keys(
        "gpt2",
        {"context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer",
         "feed_forward_length": "n_inner", "attention.head_count": "n_head", LAYER_NORM: "layer_norm_epsilon"},
        {},
        ignored={"rope.*": "positions are a table"},
        musts={"attention.head_count_kv": same("attention.head_count", lambda header: header.heads)},
        rotates=False,
    ),
    "gpt-oss": Keys(
        "gpt_oss", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, {**ROPE, **WINDOWED},
        musts={**PLAIN_EXPERTS, **SAME_BASE, "expert_gating_func": one_of(3)},  # softmax of the chosen ones
        experts={**LOCAL_COUNTS, "expert_feed_forward_length": "intermediate_size"},
    ),
    "granite": Keys(
        "granite", {**SIZES, RMS_NORM: "rms_norm_eps", **SCALES}, ROPE, freqs=True, present=BIASES,
        musts={"rope.scaling.finetuned": one_of(True)},  # Granite's switch for rotations
    ),
    "granitemoe": Keys(
        "granitemoe", {**SIZES, RMS_NORM: "rms_norm_eps", **SCALES},
        {**ROPE, SHARED_SIZE: "shared_intermediate_size; no expert is shared where it is absent"}, experts=LOCAL_COUNTS,
        musts={**NORMED_EXPERTS, "rope.scaling.finetuned": one_of(True)}, present={"attention_bias": "attn_q.bias"},
        other=(SHARED_SIZE, "granitemoeshared"),
    ),
    "hunyuan-dense": Keys(
        "hunyuan_v1_dense", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, ROPE,
        present={"attention_bias": "attn_q.bias"},
    ),
    "lfm2": Keys(
        "lfm2",
        {**{key: field for key, field in SIZES.items() if not key.endswith("_kv")}, RMS_NORM: "norm_eps",
         "shortconv.l_cache": "conv_L_cache"},
        {**ROPE, "attention.head_count_kv": "num_key_value_heads; a list, with 0 for a layer that is a short convolution"},
    ),
    "llama": Keys(  # mistral files, too
        "llama", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, ROPE, present=BIASES, freqs=True,
        scalings=("none", "linear", "yarn", "longrope"), other=("expert_count", "mixtral"), experts=LOCAL_COUNTS,
        musts=NORMED_EXPERTS,
    ),
    "mistral3": Keys(
        "mistral", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, {**ROPE, **TEMPERATURE}, freqs=True,
        other=("attention.temperature_scale", "ministral3"),
    ),
    "nemotron": Keys(
        "nemotron", {**SIZES, LAYER_NORM: "norm_eps", **HEAD_DIM}, {**ROPE, **PARTLY}, partial=True, present=BIASES
    ),
    "olmo2": Keys(  # with a window OLMo 3
        "olmo2", {**SIZES, RMS_NORM: "rms_norm_eps"}, {**ROPE, **WINDOWED}, musts=SAME_BASE, other=(WINDOW, "olmo3")
    ),
    "olmoe": Keys("olmoe", {**SIZES, RMS_NORM: "rms_norm_eps"}, ROPE, musts=PLAIN_EXPERTS, experts=COUNTS),
    "phi3": Keys(
        "phi3", {**SIZES, RMS_NORM: "rms_norm_eps"}, {**ROPE, **PARTLY, **ONE_WINDOW},
        musts={**SAME_BASE, **SAME_LAYERS}, partial=True, scalings=("none", "linear", "longrope"),
    ),
    "qwen2": Keys("qwen2", {**SIZES, RMS_NORM: "rms_norm_eps"}, ROPE),
    "qwen2moe": Keys(
        "qwen2_moe", {**SIZES, RMS_NORM: "rms_norm_eps"}, ROPE, musts=PLAIN_EXPERTS,
        experts={**COUNTS, **EXPERT_SIZE, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    ),
    "qwen3": Keys("qwen3", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, ROPE),
    "qwen3moe": Keys(
        "qwen3_moe", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, ROPE, musts=NORMED_EXPERTS,
        experts={**COUNTS, **EXPERT_SIZE}, fixed={"norm_topk_prob": True},
    ),
    "qwen35": Keys(
        "qwen3_5_text", {**SIZES, **QWEN35}, {**ROPE, **PARTLY, **QWEN35_USED}, musts=QWEN35_MUSTS, partial=True
    ),
    "seed_oss": Keys(
        "seed_oss", {**SIZES, RMS_NORM: "rms_norm_eps", **HEAD_DIM}, ROPE, present={
            "attention_bias": "attn_q.bias", "attention_out_bias": "attn_output.bias", "mlp_bias": "ffn_up.bias"
        }, fixed={"attention_dropout": 0.0, "residual_dropout": 0.0},
    ),
    "smollm3": Keys(  # every fourth layer without rotations: no key says so
        "smollm3", {**SIZES, RMS_NORM: "rms_norm_eps"}, ROPE, present=BIASES
    ),
    "stablelm": Keys(
        "stablelm", {**SIZES, LAYER_NORM: "layer_norm_eps"}, {**ROPE, **PARTLY},
        ignored={"use_parallel_residual": "whether there are ffn_norm tensors decides"}, partial=True,
        present={"use_qkv_bias": "attn_q.bias", "qk_layernorm": "attn_q_norm.weight"},
    ),
    "starcoder2": Keys(
        "starcoder2", {**SIZES, LAYER_NORM: "norm_epsilon"}, {**ROPE, **ONE_WINDOW},
        musts={**SAME_BASE, **SAME_LAYERS},
    ),
    "t5": Keys(  # an encoder and a decoder: gguf_t5.py
        "t5",
        {"embedding_length": "d_model", "block_count": "num_layers", "feed_forward_length": "d_ff",
         "attention.head_count": "num_heads", "attention.key_length": "d_kv", RMS_NORM: "layer_norm_epsilon",
         "attention.relative_buckets_count": "relative_attention_num_buckets"},
        {"decoder_block_count": "num_decoder_layers; block_count where it is absent",
         "decoder_start_token_id": "what every answer begins with"},
        ignored={"context_length": "positions are relative", LAYER_NORM: "norms are by the root of the mean square",
                 "rope.*": "positions are a bias"},
        musts={"attention.head_count_kv": same("attention.head_count", lambda header: header.heads)},
        rotates=False,
    ),
    **MIXTURES,
}  # fmt: skip
