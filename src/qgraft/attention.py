"""Two attention functions for transformers: keys and values in front of all others, and samples packed in one row.

A prefix (adapters/prefix.py) is P keys and values for each layer, and every token sees all of them:

                 prefix   tokens            the mask as the model makes it, with columns of ones put in front of it;
        query t0  1 1 1   1 0 0 0           a sliding window, a context that is read in both directions, padding and
              t1  1 1 1   1 1 0 0           packed samples say which tokens a token sees, never which of the prefix
              t2  1 1 1   1 1 1 0

It travels as a keyword argument of the forward pass, `prefix`, down to the function that computes the attention, where
it is put in front of keys and values after the rotation and after the cache. So it is never in a cache, nothing keeps
it between two passes, and a layer that gradient checkpointing runs again is given the same tensors again.

    PREFIX    "qgraft_prefix": transformers' own "sdpa", masks and all, and a prefix. Capped scores as well (Gemma 2).
    SAMPLES   "qgraft_samples": for a padding-free batch, each sample by itself instead of one masked square
              over all of them. transformers separates the samples by a mask [tokens, tokens], which makes PyTorch's CPU
              kernel compute all of the square and leave its fast causal path: 384 tokens in seven samples take three
              times as long as the seven small triangles, forward and backward; on a GPU it is worse. How they are
              computed is in kernels/varlen_attention.py. The boundaries come as the argument that flash attention defines for
              them, `cu_seq_lens_q`, on the CPU. Which tokens a layer may see within its sample is what the model's own
              mask says: not the mask itself is made, but a note of how it would be (`note_mask`), and one that is neither
              causal nor a sliding window is refused.

Not chosen: the prefix in the cache, as PEFT and the original ChatGLM have it. A cache grows when a layer is run again,
and there is none in training. Shapes: B batch, H heads, G key and value heads, T tokens, K keys, P prefix, D channels.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qgraft.errors import UnsupportedError
from qgraft.kernels import varlen_attention
from qgraft.kernels.autocast import to_autocast
from qgraft.shared_prompts import SharedPrompts

PREFIX, SAMPLES = "qgraft_prefix", "qgraft_samples"
_sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
_SAYS_NOTHING = {
    "position_ids",
    "cache_position",
    "output_attentions",
    "use_cache",
    "is_causal",
    "output_hidden_states",
    "output_router_logits",  # of mixtures
    "return_dict",
    "num_items_in_batch",  # of transformers' Trainer, for the loss
}
_OF_SDPA = {"dropout", "scaling", "sliding_window", "position_bias"}  # a window is in the mask


def attention_of(module: Any) -> str:
    """The attention implementation that a model, or one of its layers, computes by now: "sdpa", "eager", PREFIX ..."""
    return str(module.config._attn_implementation)


def unknown_arguments(given: Mapping[str, Any]) -> list[str]:
    """The names of arguments of an attention function that change what it computes, beside those that it names itself.

    Models hand over what their attention has beside queries, keys and values: sinks (gpt-oss's `s_aux`), the keys that a
    token may see (`indices`, of DeepSeek 3.2). A function that took them and did not use them would compute something else.
    """
    return [name for name, value in given.items() if name not in _SAYS_NOTHING and value is not None]


@contextmanager
def attending(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Within the block the model attends by this implementation; afterwards by the one before."""
    before = attention_of(model)
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values in front of those of every layer.

    Attributes:
        layers: layer_idx -> (keys, values), each [1 or B, G, P, D].
        seen: which of them each row of the batch sees, [B, P] bool; None for all.
    """

    layers: Mapping[int, tuple[Tensor, Tensor]]
    seen: Tensor | None = None

    def of(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, P, D] for the attention of a layer, in the dtype of its own, [B, G, K, D]."""
        index: Any = module.layer_idx
        keys, values = (part.to(key).expand(len(key), -1, -1, -1) for part in self.layers[index])
        return keys, values

    def widened(self, mask: Tensor, columns: int) -> Tensor:
        """The mask [1 or B, 1 or H, T, K], bool or added to the scores, with the prefix's columns in front."""
        if self.seen is None:
            return F.pad(mask, (columns, 0), value=mask.dtype == torch.bool)
        seen = self.seen[:, None, None].expand(-1, *mask.shape[1:3], -1)
        if mask.dtype != torch.bool:
            seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)
        return torch.cat([seen, mask.expand(len(seen), -1, -1, -1)], dim=-1)


def attend_with_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix: Prefix | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D], key and value [B, G, K, D] -> [B, T, H, D]; without a prefix exactly transformers' sdpa.

    Raises ValueError for what that does not compute.
    """
    if unknown := [name for name in unknown_arguments(kwargs) if name not in _OF_SDPA]:
        raise ValueError(f"{PREFIX} attends without {', '.join(unknown)}")
    if prefix is None and softcap is None:
        return _sdpa(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is None:
        tokens = query.shape[2]
        if tokens > 1:  # a cache of a fixed size has room behind the tokens
            key, value = key[:, :, :tokens], value[:, :, :tokens]
        keys = key.shape[2]
        attention_mask = torch.ones(1, 1, tokens, keys, dtype=torch.bool, device=key.device).tril(keys - tokens)
    if prefix is not None:
        keys_BGPD, values_BGPD = prefix.of(module, key, value)
        key, value = torch.cat([keys_BGPD, key], dim=2), torch.cat([values_BGPD, value], dim=2)
        attention_mask = prefix.widened(attention_mask, keys_BGPD.shape[2])
    if softcap is None:
        return _sdpa(module, query, key, value, attention_mask, **kwargs)
    return attend_capped(query, key, value, attention_mask, softcap, **kwargs), None


def attend_capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    softcap: float,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """Attention whose scores are c tanh(score / c), which no kernel computes."""
    grouped = (key.shape[1], -1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores_BHTK = (query.unflatten(1, grouped) @ key.unsqueeze(2).mT * scale).flatten(1, 2)
    scores_BHTK = torch.tanh(scores_BHTK / softcap) * softcap
    if mask.dtype == torch.bool:
        scores_BHTK = scores_BHTK.masked_fill(~mask, torch.finfo(scores_BHTK.dtype).min)
    else:
        scores_BHTK = scores_BHTK + mask
    weights_BHTK = F.dropout(F.softmax(scores_BHTK, dim=-1, dtype=torch.float32).to(query.dtype), dropout)
    mixed_BHTD = (weights_BHTK.unflatten(1, grouped) @ value.unsqueeze(2)).flatten(1, 2)
    return mixed_BHTD.transpose(1, 2).contiguous()


def attend_samples(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    context_lens: Tensor | None = None,
    prefix: Prefix | None = None,
    shared_prompts: SharedPrompts | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    Args:
        attention_mask: what note_mask made in its place, or None where `context_lens` says what is visible.
        sliding_window: what the layer thinks of its window; the mask decides, as it does in transformers.
        cu_seq_lens_q: [samples + 1] int64, where each sample starts, and the end.
        context_lens: [samples] int64, how many tokens at the start of each sample all of its tokens see (a prefix
            language model such as ChatGLM-6B reads its context in both directions); the others are causal.
        prefix: in front of each sample.
        shared_prompts: texts that begin with tokens which stand in the row once; `cu_seq_lens_q` then says where tokens
            follow each other without a gap, as the model's mask has it.

    Raises ValueError for what this implementation does not compute: other masks, no boundaries, capped scores.
    """
    noted: MaskNote | None = getattr(attention_mask, "qgraft_note", None)
    unknown = unknown_arguments(kwargs)
    if cu_seq_lens_q is None or unknown or (noted is None) == (context_lens is None):
        raise ValueError(
            f"{SAMPLES} attends within samples of a padding-free batch only, without mask and "
            f"{', '.join(unknown) or 'other arguments'}"
        )
    if shared_prompts is not None and context_lens is not None:
        raise ValueError(f"{SAMPLES}: prompts are shared in causal attention only")
    window = None if noted is None else noted.window(cu_seq_lens_q)
    bounds = cu_seq_lens_q
    query, key, value = map(to_autocast, (query, key, value))  # which torch's varlen kernel does not do itself
    if shared_prompts is not None:
        query, key, value = (shared_prompts.spread(part) for part in (query, key, value))
        bounds = shared_prompts.bounds
    out = varlen_attention.attend(
        query, key, value, bounds, scale=scaling, dropout=dropout, window=window, contexts=context_lens,
        prefix=None if prefix is None else prefix.of(module, key, value),
    )  # fmt: skip
    return out if shared_prompts is None else shared_prompts.gathered(out), None


class MaskNote:
    """How a mask would be that is not made: `visible(batch, head, query, key)` on indices, and its window if it has one."""

    def __init__(
        self, visible: Callable[..., Tensor], local_size: int | None, device: torch.device | str = "cpu"
    ) -> None:
        self.visible, self.local_size, self.device = visible, local_size, device
        self.checked = False

    def window(self, bounds: Tensor) -> int | None:
        """The sliding window of a mask that lets a token see itself and, within that, what is before it in its sample.

        Looked at are the first and last token of each sample and those around the window's end, over all of their
        sample: nowhere else does a window, a chunk or a look ahead begin. What is outside of a sample is not asked for.

        Args:
            bounds: [samples + 1]; those of `mark_checked` are not read.

        Raises ValueError for every other mask.
        """
        if not self.checked and not getattr(bounds, "qgraft_checked", False):
            query_N, key_N = (
                place.to(self.device, non_blocking=True) for place in _checked_places(bounds, self.local_size)
            )
            nothing = torch.zeros_like(query_N)
            visible_N = self.visible(nothing, nothing, query_N, key_N)
            distance_N = query_N - key_N
            expected_N = (distance_N >= 0) & (distance_N < (self.local_size or len(query_N) + 1))
            if not torch.equal(visible_N.broadcast_to(expected_N.shape), expected_N):
                raise ValueError(f"{SAMPLES}: a mask that is neither causal nor a sliding window")
            self.checked = True
        return self.local_size


def mark_checked(bounds: Tensor) -> None:
    """Say that the masks of a pass with these bounds, wherever they lie, are those of an earlier pass that was checked."""
    bounds.qgraft_checked = True  # type: ignore[attr-defined]


def _checked_places(bounds: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """(query, key) indices, each [n]: a few tokens of every sample, with all tokens of their sample as keys."""
    queries, keys = [], []
    for start, stop in pairwise(bounds.tolist()):
        places = {0, 1, stop - start - 1, *((window - 1, window, window + 1) if window else ())}
        rows = torch.tensor([start + place for place in sorted(places) if place < stop - start], device=bounds.device)
        columns = torch.arange(start, stop, device=bounds.device)
        queries.append(rows.repeat_interleave(len(columns)))
        keys.append(columns.repeat(len(rows)))
    return torch.cat(queries), torch.cat(keys)


def note_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    q_offset: int = 0,
    kv_offset: int = 0,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """What stands for a mask [1, 1, T, T] in SAMPLES: one number in memory, with a MaskNote.

    It has the shape of a mask because models look at that; one that cuts or changes it loses the note, and is refused.
    Raises ValueError for a batch of several rows, with padding, or with a cache.
    """
    if attention_mask is not None or batch_size != 1 or q_length != kv_length or int(q_offset) or int(kv_offset):
        raise ValueError(f"{SAMPLES} is for one row of samples without padding and cache")
    mask = torch.ones(1, dtype=torch.bool, device=device).expand(1, 1, q_length, kv_length)
    mask.qgraft_note = MaskNote(mask_function, local_size, device)  # type: ignore[attr-defined]
    return mask


AttentionInterface.register(PREFIX, attend_with_prefix)
AttentionMaskInterface.register(PREFIX, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
AttentionInterface.register(SAMPLES, attend_samples)
AttentionMaskInterface.register(SAMPLES, note_mask)


@dataclass(frozen=True)
class Call:
    """One call of an attention function: of which layer, over keys [G, D] and values, and whether it is causal."""

    layer: int | None
    key_shape: tuple[int, int]
    value_shape: tuple[int, int]
    causal: bool


@dataclass(frozen=True, eq=False)
class _Recorder(Prefix):
    """A prefix without keys that writes down who asks for it."""

    calls: list[Call] = field(default_factory=list)

    def of(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """No keys and no values."""
        keys, values = ((part.shape[1], part.shape[3]) for part in (key, value))
        self.calls.append(Call(getattr(module, "layer_idx", None), keys, values, getattr(module, "is_causal", True)))
        return key[:, :, :0], value[:, :, :0]


def record_attention(model: nn.Module) -> tuple[list[Call], float]:
    """A pass over a few tokens through PREFIX: the calls of the attention function, and how far the result is off.

    Off, relative to the largest number, from the result with the attention that the model has now. Raises
    UnsupportedError for a model whose forward pass does not take a prefix.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"a prefix cannot go on {type(model).__name__}: expected a model of transformers")
    recorder = _Recorder({})
    inputs = {name: tensor[:1].to(model.device) for name, tensor in model.dummy_inputs.items()}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(**inputs, use_cache=False)[0].float()
            with attending(model, PREFIX):
                got = model(**inputs, use_cache=False, prefix=recorder)[0].float()
    except (TypeError, ValueError) as error:
        raise UnsupportedError(f"{type(model).__name__} does not take a prefix: {error}") from error
    finally:
        model.train(training)
    return recorder.calls, float((got - expected).abs().max() / expected.abs().max())
