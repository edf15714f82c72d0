"""Attention over a padding-free batch: when it goes sample by sample, and what must be passed for that.

The attention itself is in qgraft/attention.py. Like "sdpa" or "eager" it is an attention implementation to transformers,
used only inside `sample_attention`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.attention import PREFIX, SAMPLES


@contextmanager
def sample_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model attends sample by sample, where it would by a masked square over all of them."""
    before = model.config._attn_implementation
    if before in ("sdpa", PREFIX):
        model.set_attn_implementation(SAMPLES)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_arguments(model: PreTrainedModel, position_ids: Tensor) -> dict[str, Tensor]:
    """What the forward pass must be given beside positions [1, tokens]: nothing, or the bounds of the samples."""
    if model.config._attn_implementation != SAMPLES:
        return {}
    starts = (position_ids[0] == 0).nonzero()[:, 0].cpu()  # read by the CPU in every layer
    return {"cu_seq_lens_q": F.pad(starts, (0, 1), value=position_ids.shape[1])}
