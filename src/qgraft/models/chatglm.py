"""ChatGLM-6B, the first generation, with the names of its checkpoint as the names of its parameters.

    x = word_embeddings[ids]
    each block:   h = input_layernorm(x)                       x' = alpha h + attention(h)
                  m = post_attention_layernorm(x')             x  = alpha m + mlp(m)          alpha = sqrt(2 * 28)
    logits = final_layernorm(x) word_embeddings^T

What is unusual about it:

- The residual is the normalised input times alpha, not x. The original never tells a block how many blocks there are,
  so alpha is that of 28 in a model of any depth.
- query_key_value holds the rows of each head together: [q0 k0 v0 q1 k1 v1 ...], not all of q, then k, then v.
- Two positions for each token (prefix_lm.py says which). The first half of a head is rotated by row 0, the second half by
  row 1, in each half (a, b) -> (a cos - b sin, b cos + a sin) with a, b its own two halves. The original keeps the
  frequencies in float16 even where it computes in float32, so they are rounded here too; the rest is float32.
- gelu is the tanh approximation, and the class that the original calls GLU has no gate.

The original divides q by layer + 1 and multiplies the scores by it again, since q k^T may not fit in float16. Here the
scores are never float16: the kernels of scaled_dot_product_attention accumulate in float32, and `eager` computes so.

Masks and positions may be the original's (bool [batch, 1, queries, keys], true = hidden; [batch, 2, tokens]) or ordinary
ones (0 where padding is; 0, 1, 2 ... or none). Specification, checked against the original's numbers: tests/golden.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # looked for in this file by transformers
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from qgraft.attention import SAMPLES, attention_of
from qgraft.compat import CACHE, takes_cache
from qgraft.models.causal_lm import CausalLM
from qgraft.models.prefix_lm import (
    HINT,
    Marks,
    PrefixGenerationMixin,
    check_shapes,
    context_lengths,
    context_positions,
    number_samples,
    sees_itself,
    visible_keys,
    without_blind_rows,
)

ALPHA = math.sqrt(2 * 28)


class ChatGLMConfig(PreTrainedConfig):
    """config.json of ChatGLM-6B, under its own names; other keys of the file are kept as attributes.

    Raises ValueError for values that no model can have, all of them listed.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = (CACHE,)
    attribute_map = {  # noqa: RUF012 (declared ClassVar by the base class)
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int = 130004  # <sop>
    eos_token_id: int = 130005  # <eop>
    pad_token_id: int | None = 3
    mask_token_id: int | None = None  # both lie at the same distance before <sop> in every release
    gmask_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mask_token_id is None:
            self.mask_token_id = self.bos_token_id - 4
        if self.gmask_token_id is None:
            self.gmask_token_id = self.bos_token_id - 3
        super().__post_init__(**kwargs)
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "inner_hidden_size")
        problems = [
            f"{name} is {getattr(self, name)}, expected at least 1" for name in sizes if getattr(self, name) < 1
        ]
        if not problems and self.hidden_size % (4 * self.num_attention_heads):
            problems.append(
                f"hidden_size is {self.hidden_size}, expected {self.num_attention_heads} heads of a multiple of 4"
            )
        if not self.position_encoding_2d:
            problems.append("position_encoding_2d is false, and only true is supported: no release has one position")
        for name in ("bos_token_id", "mask_token_id", "gmask_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                problems.append(f"{name} is {getattr(self, name)}, expected 0 to {self.vocab_size - 1}")
        if problems:
            raise ValueError(f"config of ChatGLM-6B: {'; '.join(problems)}")

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_attention_heads


def rotary_tables(rows_B2T: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, [B, 1, T, 2 rows, 1, head_dim / 4] float32, of the angles that each token's positions mean."""
    half = head_dim // 2
    exponents_F = torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half  # one rounding for all devices
    frequency_F = (1.0 / 10000.0**exponents_F).half().float().to(rows_B2T.device)
    angle_BT2F = rows_B2T.transpose(1, 2)[..., None].float() * frequency_F
    angle = angle_BT2F[:, None, :, :, None]
    return angle.cos(), angle.sin()


def rotate(x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys turned by rotary_tables, computed in float32, in the dtype of x."""
    a, b = x_BHTD.float().unflatten(-1, (2, 2, -1)).split(1, dim=-2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-2).flatten(-3).to(x_BHTD.dtype)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """[B, heads, Q, D] -> [B, Q, heads, D] and the weights [B, heads, Q, K]: attention as one reads it in a paper."""
    scores_BHQK = query.float() @ key.float().transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHQK = scores_BHQK.masked_fill(~attention_mask, -math.inf)
    weights_BHQK = scores_BHQK.softmax(dim=-1).to(query.dtype)
    return (weights_BHQK @ value).transpose(1, 2), weights_BHQK


class Attention(nn.Module):
    """Attention with as many heads for keys and values as for queries."""

    def __init__(self, config: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x_BTC: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor], cache: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, hidden] -> the same, and the attention weights where the implementation has them."""
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        qkv_BHTE = self.query_key_value(x_BTC).unflatten(-1, (heads, 3 * head_dim)).transpose(1, 2)
        query, key, value = qkv_BHTE.split(head_dim, dim=-1)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention_of(self), eager_attention)
        mixed_BTHD, weights = attend(self, query, key, value, mask, scaling=head_dim**-0.5, **kwargs)
        return self.dense(mixed_BTHD.flatten(-2)), weights


class MLP(nn.Module):
    """dense_4h_to_h(gelu(dense_h_to_4h(x)))."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> the same."""
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Block(GradientCheckpointingLayer):
    """Attention and MLP, each added to alpha times what it was given."""

    def __init__(self, config: ChatGLMConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTC: Tensor,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """[B, T, hidden] -> the same."""
        h_BTC = self.input_layernorm(x_BTC)
        mixed_BTC, _ = self.attention(h_BTC, mask, rotary, cache, **kwargs)
        m_BTC = self.post_attention_layernorm(ALPHA * h_BTC + mixed_BTC)
        return ALPHA * m_BTC + self.mlp(m_BTC)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers wants to know."""

    config_class = ChatGLMConfig
    config: ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # noqa: RUF012 (computed, not loaded)
    _supports_sdpa = True  # but not flash attention, which has no such mask
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}  # noqa: RUF012
    _input_embed_layer = "word_embeddings"
    prefix_layout = "chatglm"  # see adapters/prefix.py

    @property
    def marks(self) -> Marks:
        """The ids that say where the context ends."""
        config = self.config
        assert config.gmask_token_id is not None and config.mask_token_id is not None
        return Marks(config.bos_token_id, config.gmask_token_id, config.mask_token_id)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Something to pass through the model: a context needs its end."""
        return {"input_ids": torch.tensor([[0, self.marks.gmask, self.marks.sop]])}


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Everything but the output layer."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
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
        """The states after the final norm.

        Args:
            input_ids: [batch, tokens]; without attention mask and cache, samples may be packed in a row.
            attention_mask: [batch, past + tokens], 0 where padding is; or the original's: bool [batch, 1, tokens,
                past + tokens], true = hidden. Without one nothing is hidden as padding.
            position_ids: the original's two rows [batch, 2, tokens]; or 0, 1, 2 ... in each sample, [batch, tokens]; or
                None. The latter two need the ids from the beginning, as generate() does; it is the former that continue
                a filled cache.
            inputs_embeds: in place of input_ids, [batch, tokens, hidden]; needs two rows of positions.

        Raises ValueError where it cannot be told where the context ends.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected one of input_ids and inputs_embeds, not both")
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else int(cache.get_seq_length())
        x_BTC = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        check_shapes(attention_mask, position_ids, x_BTC.shape[0], x_BTC.shape[1], past)
        rows_B2T, sample_BT = self._positions(input_ids, attention_mask, position_ids, past)
        if sample_BT is not None and attention_of(self) == SAMPLES and "cu_seq_lens_q" in kwargs:
            mask, kwargs["context_lens"] = None, context_lengths(rows_B2T, sample_BT)
        else:
            mask = self._mask(attention_mask, rows_B2T.expand(len(x_BTC), -1, -1), sample_BT, past, cache)
        rotary = rotary_tables(rows_B2T, self.config.head_dim)
        for layer in self.layers:
            x_BTC = layer(x_BTC, mask, rotary, cache=cache, **kwargs)
        return BaseModelOutputWithPast(self.final_layernorm(x_BTC), cache)

    def _positions(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None, past: int
    ) -> tuple[Tensor, Tensor | None]:
        """Two rows of positions, [B, 2, T], and which sample each token is of where a row may hold several."""
        if position_ids is not None and position_ids.dim() == 3:
            return position_ids, None
        if past or input_ids is None:
            given = "a filled cache" if past else "inputs_embeds"
            raise ValueError(f"{given} with no position_ids [batch, 2, tokens]: where does the context end?\n{HINT}")
        seen_BT = attention_mask
        if attention_mask is not None and attention_mask.dim() == 4:
            seen_BT = sees_itself(attention_mask).expand(input_ids.shape)
        rows_B2T = context_positions(input_ids, self.marks, position_ids, seen_BT)
        packed = position_ids is not None and attention_mask is None
        return rows_B2T, number_samples(input_ids, position_ids, None) if packed else None

    def _mask(
        self, given: Tensor | None, rows_B2T: Tensor, sample_BT: Tensor | None, past: int, cache: Cache | None
    ) -> Tensor | None:
        """[B, 1, T, past + T] bool, true = visible; None where everything is."""
        tokens = rows_B2T.shape[2]
        keys = tokens if cache is None else cache.get_mask_sizes(tokens, 0)[0]
        if given is not None and given.dim() == 4:
            return without_blind_rows(F.pad(~given, (0, keys - past - tokens)))
        if past and bool((rows_B2T[:, 1] == 0).any()):
            raise ValueError(f"a context must be given at once, not as a continuation of what is in the cache\n{HINT}")
        if tokens == 1 and keys == past + 1 and given is None:
            return None
        return visible_keys(rows_B2T, past, keys, sample_BT, given)


class ChatGLMForConditionalGeneration(CausalLM, ChatGLMPreTrainedModel, PrefixGenerationMixin):
    """The model with its output layer, which is the embedding again."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
