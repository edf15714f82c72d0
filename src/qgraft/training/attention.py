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
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, dim], key and value [1, kv heads, tokens, dim] -> [1, tokens, heads, dim].

    Args:
        sliding_window: each token sees at most so many tokens, itself included.
        cu_seq_lens_q: [samples + 1] int64, where each sample starts, and the end.

    Raises ValueError for what this implementation does not compute: a mask, no boundaries, capped scores.
    """
    if attention_mask is not None or cu_seq_lens_q is None or kwargs.get("softcap") is not None:
        raise ValueError(f"{NAME} attends within samples of a padding-free batch only, without mask and softcap")
    bounds = cu_seq_lens_q.tolist()
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for start, stop in pairwise(bounds):
        q, k, v = (tensor[:, :, start:stop] for tensor in (query, key, value))
        window = _window_mask(stop - start, sliding_window, query.device)
        causal = window is None
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=window, dropout_p=dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
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


def _window_mask(tokens: int, sliding_window: int | None, device: torch.device) -> Tensor | None:
    """[tokens, tokens] bool, true where a token may look; None where the window is no narrower than the sample."""
    if sliding_window is None or tokens <= sliding_window:
        return None
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    return (distance >= 0) & (distance < sliding_window)
