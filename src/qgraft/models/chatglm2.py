"""The second generation of ChatGLM (ChatGLM2-6B), and ChatGLM3-6B, which shares its layout, as transformers models.

    x = E[ids]                                                        E: transformer.embedding.word_embeddings
    per block: x = x + W_o attention(W_qkv RMS(x) + b)                grouped queries: H heads share G keys and values
               x = x + W_4hh (silu(a) * c),  [a | c] = W_h4h RMS(x)   the first half goes through silu
    logits = W_out RMS(x)                                             not tied, although it lies in `transformer`

Rows of W_qkv: all H query heads, then all G key heads, then all G value heads, D rows each. Query head h attends with
key h // (H / G).

Rotary positions turn the first D/2 channels of each head and leave the rest. Pairs are neighbours: (c0, c1), (c2, c3)
... and pair j turns by position * 10000^(-4j/D). The original keeps this table in the dtype of the model: in float16
the products are off by up to 0.25 rad at position 1000, in bfloat16 positions above 256 are not even represented. Here
it is float32 at every dtype, computed from the positions in each forward pass: 64 numbers a token, and no buffer that
a cast could spoil.

The long-context releases add `rope_ratio`, with two meanings under one name: ChatGLM2-6B-32k (16) divides the positions
by it, ChatGLM3-6B-32k and GLM-4 (500) multiply the 10000 by it (hzg0601/cn-llm-codes 6669078,
chatglm2-6b-32k/modeling_chatglm.py; NVIDIA/TensorRT-LLM 20709ce, tensorrt_llm/models/chatglm/config.py). A config does
not say which; the releases are told apart by the name they carry in `_name_or_path`, others by `rope_ratio_scales`.

Names of parameters are the keys of the released checkpoints. The linear layers and the embedding are called and never
looked into, so that packed ones can take their place. Shapes: B batch, T tokens, S keys, H query heads, G key and value
heads, D channels of a head.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # looked for in this file by transformers
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from qgraft.attention import attention_of
from qgraft.compat import CACHE, takes_cache
from qgraft.models.causal_lm import CausalLM

ROTARY_BASE = 10000
# No release has any of these otherwise, and each would need another layout or another order of the computation.
_ONLY = {
    "rmsnorm": True, "post_layer_norm": True, "multi_query_attention": True,
    "apply_residual_connection_post_layernorm": False, "fp32_residual_connection": False,
}  # fmt: skip
_SIZES = (
    "num_layers", "padded_vocab_size", "hidden_size", "ffn_hidden_size", "kv_channels", "num_attention_heads",
    "multi_query_group_num", "seq_length",
)  # fmt: skip


class ChatGLM2Config(PreTrainedConfig):
    """config.json of ChatGLM2-6B and ChatGLM3-6B, under its own names; defaults are those of the ChatGLM2-6B release.

    Fields without an effect on the result (`apply_query_key_layer_scaling`, `attention_softmax_in_fp32`,
    `bias_dropout_fusion`, `original_rope`), and all others that are not named here, are kept as they come.

    Args:
        kv_channels: channels of a head.
        multi_query_group_num: number of key and value heads.
        rope_ratio_scales: what a rope_ratio other than 1 does: "positions" are divided by it, or the "base" is
            multiplied by it.

    Raises ValueError for values that this layout does not serve, all of them listed.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers", "vocab_size": "padded_vocab_size", "head_dim": "kv_channels",
        "num_key_value_heads": "multi_query_group_num", "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
    }  # fmt: skip

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_attention: bool = True
    multi_query_group_num: int = 2
    seq_length: int = 32768
    rope_ratio: float = 1
    rope_ratio_scales: str | None = None
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    post_layer_norm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    fp32_residual_connection: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the values; fill in what rope_ratio does where the release's name says it."""
        super().__post_init__(**kwargs)
        if self.rope_ratio != 1 and self.rope_ratio_scales is None:
            self.rope_ratio_scales = _meaning_of_ratio(self.name_or_path or "")
        if problems := [*_wrong_sizes(self), *_wrong_options(self)]:
            raise ValueError("ChatGLM2 config: " + "; ".join(problems))


def _wrong_sizes(config: ChatGLM2Config) -> list[str]:
    sizes = {name: getattr(config, name) for name in _SIZES}
    wrong = [name for name, value in sizes.items() if not isinstance(value, int) or value < 1]
    if wrong:
        return [f"{name} is {sizes[name]!r}, expected a positive integer" for name in wrong]
    heads, groups, channels = config.num_attention_heads, config.multi_query_group_num, config.kv_channels
    problems = []
    if channels % 4:
        problems.append(f"kv_channels is {channels}, expected a multiple of 4: half of them turn, in pairs")
    if heads % groups:
        problems.append(f"num_attention_heads {heads} is no multiple of multi_query_group_num {groups}")
    return problems


def _wrong_options(config: ChatGLM2Config) -> list[str]:
    options = {name: getattr(config, name) for name in _ONLY}
    problems = [f"{k} is {value!r}, supported is {_ONLY[k]}" for k, value in options.items() if value != _ONLY[k]]
    if not config.rope_ratio > 0:
        problems.append(f"rope_ratio is {config.rope_ratio}, expected a positive number")
    elif config.rope_ratio != 1 and config.rope_ratio_scales not in ("positions", "base"):
        problems.append(
            f"rope_ratio is {config.rope_ratio} and rope_ratio_scales {config.rope_ratio_scales!r}: add "
            '"rope_ratio_scales": "positions" to config.json if the ratio divides the positions (ChatGLM2-6B-32k), '
            'or "base" if it multiplies the rotary base (ChatGLM3-6B-32k, GLM-4)'
        )
    return problems


def _meaning_of_ratio(name: str) -> str | None:
    if re.search("chatglm2", name, re.IGNORECASE):
        return "positions"
    return "base" if re.search("chatglm3|glm-?4", name, re.IGNORECASE) else None


def rotary_table(position_ids_BT: Tensor, config: ChatGLM2Config) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each pair's angle, [B, T, 1, D/4] float32."""
    channels, base, positions = config.kv_channels // 2, float(ROTARY_BASE), position_ids_BT.float()
    if config.rope_ratio_scales == "base":
        base *= config.rope_ratio
    elif config.rope_ratio_scales == "positions":
        positions = positions / config.rope_ratio
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=position_ids_BT.device) / channels
    angles = positions[:, :, None, None] * (1.0 / base**exponents)
    return angles.cos(), angles.sin()


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs in the first half of each head's channels, in float32; the second half passes through."""
    turning, passing = x_BTHD.chunk(2, dim=-1)
    even, odd = turning.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x_BTHD.dtype), passing), dim=-1)


class ChatGLM2RMSNorm(nn.Module):
    """g x / sqrt(mean(x^2) + eps): all of it in float32, rounded once at the end."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> the same shape and dtype."""
        x_float = x.float()
        normed = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed).to(x.dtype)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """query [B, H, T, D], key and value [B, G, S, D] -> [B, T, H, D] and the probabilities [B, H, T, S]."""
    shared = (key.shape[1], -1)
    scores = ((query * scaling).unflatten(1, shared) @ key.unsqueeze(2).mT).flatten(1, 2)
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = F.dropout(probabilities, dropout, module.training)
    context = (probabilities.unflatten(1, shared) @ value.unsqueeze(2)).flatten(1, 2)
    return context.transpose(1, 2).contiguous(), probabilities


class ChatGLM2Attention(nn.Module):
    """Grouped-query attention with one fused projection."""

    def __init__(self, config: ChatGLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.num_key_value_groups = self.heads // self.groups  # transformers' name for how many heads share a key
        self.is_causal = True
        width, rows = config.kv_channels * self.heads, config.kv_channels * (self.heads + 2 * self.groups)
        qkv_bias = config.add_bias_linear or config.add_qkv_bias
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=qkv_bias)
        self.dense = nn.Linear(width, config.hidden_size, bias=config.add_bias_linear)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, hidden] -> the same shape, and the probabilities where the implementation gives them."""
        qkv = self.query_key_value(x).unflatten(-1, (-1, self.config.kv_channels))  # [B, T, H + 2G, D]
        qk = rotate(qkv[:, :, : -self.groups], *rotary)
        parts = (qk[:, :, : self.heads], qk[:, :, self.heads :], qkv[:, :, -self.groups :])
        query, key, value = (part.transpose(1, 2) for part in parts)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention_of(self), eager_attention)
        kwargs["dropout"] = self.config.attention_dropout if self.training else 0.0
        kwargs["scaling"] = self.config.kv_channels**-0.5
        context, probabilities = attend(self, query, key, value, attention_mask, **kwargs)
        return self.dense(context.flatten(2)), probabilities


class ChatGLM2MLP(nn.Module):
    """W_4hh (silu(a) * c) with [a | c] = W_h4h x."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__()
        bias = config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> the same shape."""
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class ChatGLM2Block(GradientCheckpointingLayer):
    """Attention and MLP, each added to its unnormalised input."""

    def __init__(self, config: ChatGLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = ChatGLM2RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.self_attention = ChatGLM2Attention(config, layer_idx)
        self.post_attention_layernorm = ChatGLM2RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = ChatGLM2MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        """x [B, T, hidden] -> the same shape; `attention` is what ChatGLM2Attention takes beside x."""
        x = x + self.dropout(self.self_attention(self.input_layernorm(x), **attention)[0])
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class ChatGLM2PreTrainedModel(PreTrainedModel):
    """What transformers asks of the classes below."""

    config_class = ChatGLM2Config
    config: ChatGLM2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLM2Block"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ChatGLM2Block, "attentions": ChatGLM2Attention}  # noqa: RUF012
    prefix_layout = "chatglm2"  # see adapters/prefix.py

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.base_model.get_submodule("embedding.word_embeddings")

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put `value` in place of the word embeddings."""
        self.base_model.set_submodule("embedding.word_embeddings", value)


class ChatGLM2Model(ChatGLM2PreTrainedModel):
    """From tokens to the hidden states that the output layer takes; it holds that layer, but does not call it."""

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        blocks = nn.ModuleList(ChatGLM2Block(config, index) for index in range(config.num_layers))
        norm = ChatGLM2RMSNorm(config.hidden_size, config.layernorm_epsilon)
        words = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.embedding = nn.ModuleDict({"word_embeddings": words})
        self.encoder = nn.ModuleDict({"layers": blocks, "final_layernorm": norm})
        self.output_layer: nn.Module = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)  # the last of the hidden states is the last block's own output
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, hidden] -> the states after the final norm, [B, T, hidden].

        Args:
            attention_mask: [B, past + T], 0 where there is padding.
            position_ids: [B, T] or [1, T]; default: they count on from the cache. Where neither a mask nor a cache is
                given, a position that is not the last one plus 1 begins a sample that sees nothing of those before.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        x = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        mask = create_causal_mask(self.config, x, attention_mask, cache, position_ids)
        if use_cache and cache is None:  # after the mask, which looks for samples only where no cache is
            cache = DynamicCache(config=self.config)
        rotary = rotary_table(position_ids, self.config)
        kwargs.update(position_ids=position_ids, cache=cache)  # flash attention reads positions
        for block in self.encoder["layers"].children():
            x = block(x, rotary=rotary, attention_mask=mask, **kwargs)
        return BaseModelOutputWithPast(self.encoder["final_layernorm"](x), cache)


class ChatGLM2ForConditionalGeneration(CausalLM, ChatGLM2PreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {  # noqa: RUF012  (in effect only where tie_word_embeddings is true)
        "transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"
    }

    def __init__(self, config: ChatGLM2Config) -> None:
        super().__init__(config)
        self.transformer = ChatGLM2Model(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.transformer.output_layer

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Put `value` in place of the output layer."""
        self.transformer.output_layer = value
