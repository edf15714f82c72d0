"""What the tables of metadata keys are made of: `Keys`, what holds for every architecture, and what several share.

See gguf_keys.py and gguf_mixtures.py for the tables.
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
SHARED_SIZE = "expert_shared_feed_forward_length"
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
        other_value: what that key says then; None for anything but 0.
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
    other_value: int | None = None
    experts: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_mixture(self) -> bool:
        """Whether every file of the architecture has experts."""
        return bool(self.experts) and (self.other is None or self.other[0] != "expert_count")

    def fields_of(self, header: Header) -> dict[str, str]:
        """key -> field of the configuration, in this file."""
        return {**self.fields, **(self.experts if header.get("expert_count") else {})}

    def type_of(self, header: Header) -> str:
        """transformers' name of the configuration of this file."""
        got = header.get(self.other[0]) if self.other else None
        is_other = bool(got) if self.other_value is None else got == self.other_value
        return self.other[1] if self.other and is_other else self.model_type


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

SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
BY_LAYER = {  # a number, or a list with one for each layer
    "feed_forward_length": "intermediate_size, and whether the layers that share keys and values have twice that",
    "attention.head_count_kv": "num_key_value_heads, of layers without a window num_global_key_value_heads",
}
SCALES = {  # of Granite
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
RMS_NORM, LAYER_NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
HEAD_DIM = {"attention.key_length": "head_dim"}
ROPE = {
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
PARTLY = {"rope.dimension_count": "elements of a head that are rotated"}
WINDOWED = {
    WINDOW: "tokens that a layer with a window sees",
    PATTERN: "a number n: every n-th layer has no window; or a list: which layers have one",
}
ONE_WINDOW = {WINDOW: "tokens that every layer sees (llama.cpp passes over it)"}
TEMPERATURE = {
    "attention.temperature_scale": "llama_4_scaling_beta: queries grow with the logarithm of their position",
    "rope.scaling.yarn_log_multiplier": "mscale_all_dim of yarn",
}
SAME_BASE = {"rope.freq_base_swa": same("rope.freq_base", lambda header: header.number("rope.freq_base", 10000.0))}
UNSCALED = {  # positions
    "rope.scaling.type": Must(lambda _, got: got in ("none", "linear"), "none or linear"),
    "rope.scaling.factor": one_of(0, 1),
    "rope.scale_linear": one_of(0, 1),
    "rope.scaling.attn_factor": one_of(1),
}
BIASES = {"attention_bias": "attn_q.bias", "mlp_bias": "ffn_up.bias"}
SAME_LAYERS = {
    PATTERN: Must(
        lambda header, got: not header.get(WINDOW) or (all(got) if isinstance(got, list) else got == 0),
        "0: all layers have the same window",
    )
}

SOFTMAX = 1  # of expert_gating_func
PLAIN_EXPERTS = {
    "expert_gating_func": if_experts(one_of(SOFTMAX)), "expert_weights_scale": if_experts(one_of(0, 1)),
    "expert_*": if_experts(one_of(0)),
}  # fmt: skip
NORMED_EXPERTS = {**PLAIN_EXPERTS, "expert_weights_norm": if_experts(one_of(True))}
COUNTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
LOCAL_COUNTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
EXPERT_SIZE = {"expert_feed_forward_length": "moe_intermediate_size"}

QWEN35 = {  # gated delta nets, and full attention every so many layers
    RMS_NORM: "rms_norm_eps", **HEAD_DIM, "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim", "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}  # fmt: skip
QWEN35_USED = {
    INTERVAL: "every so many layers one has attention, 4 where it is absent",
    DRAFTS: "last layers, which only draft; they are left as they are",
}
QWEN35_MUSTS = {
    "rope.dimension_sections": Must(
        positions_of_texts, "four numbers whose first three sections take in all that is rotated"
    ),
    "ssm.inner_size": same(
        "ssm.state_size times ssm.time_step_rank",
        lambda header: header.count("ssm.state_size") * header.count("ssm.time_step_rank"),
    ),
    "attention.recurrent_layers": Must(
        lambda header, got: got == [not header.attends(layer) for layer in range(header.count("block_count"))],
        f"what {INTERVAL} says",
    ),
}
