"""The tiny models of every architecture of a GGUF file, and how their files differ from their parameters."""

from typing import Any

from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, LENGTH = 64, 2, 4, 2, 256, 128
SHAPE = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "intermediate_size": FFN, "max_position_embeddings": LENGTH,
}  # fmt: skip
GEMMA = {
    "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
FULL = ["full_attention"] * LAYERS
MINISTRAL_ROPE = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 8, "beta_fast": 16.0,
    "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.3,
}  # fmt: skip
PERMUTED = {
    "arcee",
    "granite",
    "granitemoe",
    "granitemoeshared",
    "llama",
    "mistral3",
    "mixtral",
    "smollm3",
}  # rows of q and k
MOVED = {  # layers whose rows are in another order
    **dict.fromkeys(PERMUTED, ("q_proj", "k_proj")),
    "falcon": ("query_key_value",),
    **dict.fromkeys(("qwen35", "qwen35moe"), ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")),
}
STORED_AS = {
    "mixtral": "llama",
    "deepseek3": "deepseek2",
    "granitemoeshared": "granitemoe",
}  # which the file is called otherwise
EXPERTS = {  # parameters of all experts of a layer -> their tensors
    "gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",),
}  # fmt: skip
KERNELS = (".shortconv.conv.weight", ".ssm_conv1d.weight")  # of convolutions: matrices in the file, floats in the model
PLUS_ONE = {"gemma", "gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe"}  # norms
SENTENCEPIECE = {"gemma", "gemma2", "gemma3", "phi3"}
PAIRS = {"t5"}  # encoder-decoders, whose files tests/tiny_pairs.py makes
ALWAYS_TIED = {
    "command-r",
    "cohere2",
    "gemma",
    "gemma2",
    "lfm2moe",
}  # the tables of the gguf package have no output layer for them
LATENT = {  # DeepSeek's
    **SHAPE, "num_hidden_layers": 3, "num_key_value_heads": HEADS, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "n_shared_experts": 2, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
CHOICE = {  # of experts by a sigmoid with a bias
    **SHAPE, "num_hidden_layers": 3, "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
    "pad_token_id": None,
}  # fmt: skip
QWEN35 = {
    **SHAPE, "head_dim": 32, "num_hidden_layers": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {  # architecture -> (class, configuration class, its options)
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**SHAPE, **GEMMA}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SHAPE, **GEMMA}),
    "exaone4": ("Exaone4ForCausalLM", "Exaone4Config", {**SHAPE, "sliding_window": None, "layer_types": FULL}),
    "falcon": (
        "FalconForCausalLM", "FalconConfig",
        {**{key: value for key, value in SHAPE.items() if key not in ("num_key_value_heads", "intermediate_size")},
         "num_kv_heads": KV_HEADS, "new_decoder_architecture": True},
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**SHAPE, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "chatglm": (
        "ChatGLM2ForConditionalGeneration", "ChatGLM2Config",
        {"hidden_size": HIDDEN, "num_layers": LAYERS, "num_attention_heads": HEADS, "multi_query_group_num": KV_HEADS,
         "ffn_hidden_size": FFN, "seq_length": LENGTH, "kv_channels": 16, "pad_token_id": None},
    ),
    "gemma3n": (  # the last two layers take keys and values of the others
        "Gemma3nForCausalLM", "Gemma3nTextConfig",
        {**SHAPE, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 4,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "laurel_rank": 32,
         "hidden_size_per_layer_input": 32, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]},
    ),
    "gemma4": (  # the last two layers take keys and values of the others
        "Gemma4ForCausalLM", "Gemma4TextConfig",
        {**SHAPE, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "num_hidden_layers": 4,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
         "use_double_wide_mlp": True, "hidden_size_per_layer_input": 32, "final_logit_softcapping": 30.0},
    ),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", {**SHAPE, "head_dim": 16, "pad_token_id": None}),
    "granite": (
        "GraniteForCausalLM", "GraniteConfig",
        {**SHAPE, "attention_multiplier": 0.3, "embedding_multiplier": 1.5, "residual_multiplier": 0.7,
         "logits_scaling": 1.25},
    ),
    "hunyuan-dense": ("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", {**SHAPE, "head_dim": 16, "pad_token_id": None}),
    "lfm2": (
        "Lfm2ForCausalLM", "Lfm2Config",
        {**SHAPE, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "pad_token_id": None,
         "block_auto_adjust_ff_dim": False},
    ),
    "mistral3": (
        "Ministral3ForCausalLM", "Ministral3Config",
        {**SHAPE, "head_dim": 16, "pad_token_id": None, "rope_parameters": MINISTRAL_ROPE},
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**SHAPE, "pad_token_id": None}),
    "qwen35": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", QWEN35),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {**SHAPE, "num_hidden_layers": 4, "pad_token_id": None}),
    # transformers' reader knows neither n_inner nor n_positions: these are the values it assumes
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SHAPE, "head_dim": 16}),
    "nemotron": ("NemotronForCausalLM", "NemotronConfig", {**SHAPE, "head_dim": 16}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**SHAPE, "pad_token_id": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SHAPE),
    "gpt-oss": (
        "GptOssForCausalLM", "GptOssConfig",
        {**SHAPE, "head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8,
         "intermediate_size": 96, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
         "swiglu_limit": 7.0},
    ),
    "granitemoe": (
        "GraniteMoeForCausalLM", "GraniteMoeConfig",
        {**SHAPE, "attention_multiplier": 0.3, "embedding_multiplier": 1.5, "residual_multiplier": 0.7,
         "logits_scaling": 1.25, "intermediate_size": 96, "num_local_experts": 6, "num_experts_per_tok": 2},
    ),
    "granitemoeshared": (
        "GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig",
        {**SHAPE, "attention_multiplier": 0.3, "embedding_multiplier": 1.5, "residual_multiplier": 0.7,
         "logits_scaling": 1.25, "intermediate_size": 96, "num_local_experts": 6, "num_experts_per_tok": 2,
         "shared_intermediate_size": 160},
    ),
    "mixtral": (
        "MixtralForCausalLM", "MixtralConfig",
        {**SHAPE, "intermediate_size": 96, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "olmoe": (
        "OlmoeForCausalLM", "OlmoeConfig",
        {**SHAPE, "intermediate_size": 96, "num_experts": 6, "num_experts_per_tok": 2, "pad_token_id": None,
         "num_key_value_heads": HEADS},  # llama.cpp reads no other
    ),
    "qwen2moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {**SHAPE, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 96},
    ),
    "qwen3moe": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**SHAPE, "head_dim": 128, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "norm_topk_prob": True},
    ),
    "arcee": ("ArceeForCausalLM", "ArceeConfig", SHAPE),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {**SHAPE, "sliding_window": 8, "num_hidden_layers": 4}),
    "command-r": ("CohereForCausalLM", "CohereConfig", SHAPE),
    "deepseek2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {**LATENT, "q_lora_rank": None, "n_routed_experts": 6}),
    "deepseek3": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**LATENT, "q_lora_rank": 32, "n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    ),
    "dots1": (
        "Dots1ForCausalLM", "Dots1Config",
        {**CHOICE, "head_dim": 32, "sliding_window": None, "num_key_value_heads": HEADS},
    ),
    "ernie4_5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", {**SHAPE, "head_dim": 16, "pad_token_id": None}),
    "ernie4_5-moe": (
        "Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig",
        {**SHAPE, "num_hidden_layers": 3, "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 32,
         "pad_token_id": None},
    ),
    "glm4moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", {**CHOICE, "head_dim": 32, "use_qk_norm": True}),
    "hunyuan-moe": (
        "HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config",
        {**SHAPE, "head_dim": 16, "intermediate_size": 96, "num_experts": 6, "moe_topk": 2, "pad_token_id": None},
    ),
    "minimax-m2": (
        "MiniMaxM2ForCausalLM", "MiniMaxM2Config",
        {**SHAPE, "head_dim": 32, "intermediate_size": 96, "num_local_experts": 6, "num_experts_per_tok": 2,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "lfm2moe": (
        "Lfm2MoeForCausalLM", "Lfm2MoeConfig",
        {**SHAPE, "num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "pad_token_id": None,
         "num_dense_layers": 1, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "qwen35moe": (
        "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig",
        {**{key: value for key, value in QWEN35.items() if key != "intermediate_size"}, "num_experts": 6,
         "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
    ),
    "seed_oss": (
        "SeedOssForCausalLM", "SeedOssConfig",
        {**SHAPE, "head_dim": 16, "attention_dropout": 0.0, "residual_dropout": 0.0, "pad_token_id": None},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SHAPE, "head_dim": 128}),  # the head_dim that the reader assumes
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {**SHAPE, "use_qkv_bias": True}),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", SHAPE),
}  # fmt: skip
# a second judge, but for falcon (it reads no groups of heads) and lfm2 (none of the formats q5_0 and q5_1)
READ_BY_TRANSFORMERS = (frozenset(GGUF_SUPPORTED_ARCHITECTURES) & MODELS.keys()) - {"falcon", "lfm2"}
