"""Two models' logits beside each other."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """Of one pass over these ids, float32."""
    found: Tensor = model(ids).logits.float()
    return found


def off(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest of what is expected."""
    return float((got - expected).abs().max() / expected.abs().max())
