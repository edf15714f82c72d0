"""Attention over a padding-free batch on a CPU: each sample by itself, instead of one masked square over all of them.

transformers separates the samples of such a batch by a mask [tokens, tokens]. The mask makes PyTorch's CPU kernel compute
all of the square and leave its fast causal path: 384 tokens in seven samples take three times as long as the seven small
triangles, forward and backward. Keys and values of grouped-query models are not expanded either.

It is an attention implementation like "sdpa" or "eager" to transformers, and used only inside `sample_attention`; the
boundaries of the samples reach it as the argument that flash attention defines for them, `cu_seq_lens_q`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "qgraft_samples"


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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, dim], key and value [1, kv heads, tokens, dim] -> [1, tokens, heads, dim].

    Args:
        sliding_window: each token sees at most so many tokens, itself included.
        cu_seq_lens_q: [samples + 1] int64, where each sample starts, and the end.
        context_lens: [samples] int64, how many tokens at the start of each sample all of its tokens see (a prefix
            language model such as ChatGLM-6B reads its context in both directions); the others are causal.

    Raises ValueError for what this implementation does not compute: a mask, no boundaries, capped scores.
    """
    if attention_mask is not None or cu_seq_lens_q is None or kwargs.get("softcap") is not None:
        raise ValueError(f"{NAME} attends within samples of a padding-free batch only, without mask and softcap")
    bounds = list(pairwise(cu_seq_lens_q.tolist()))
    contexts = [0] * len(bounds) if context_lens is None else context_lens.tolist()
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for (start, stop), context in zip(bounds, contexts, strict=True):
        q, k, v = (tensor[:, :, start:stop] for tensor in (query, key, value))
        mask = _sample_mask(stop - start, sliding_window, context, query.device)
        causal = mask is None
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend_samples)


@contextmanager
def sample_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model attends sample by sample, on a CPU; a GPU has its own fast kernels."""
    before = model.config._attn_implementation
    if next(model.parameters()).device.type == "cpu" and before == "sdpa":
        model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_arguments(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Tensor]:
    """What the forward pass must be given beside positions [1, tokens]: nothing, or the bounds of the samples."""
    if model.config._attn_implementation != NAME:
        return {}
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    return {"cu_seq_lens_q": F.pad(starts, (0, 1), value=position_ids.shape[1])}


def _sample_mask(tokens: int, sliding_window: int | None, context: int, device: torch.device) -> Tensor | None:
    """[tokens, tokens] bool, true where a token may look; None where that is itself and all before it."""
    if context <= 1 and (sliding_window is None or tokens <= sliding_window):
        return None
    key = torch.arange(tokens, device=device)
    distance = key[:, None] - key
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return visible | (key < context)
