"""torch.autocast, for functions of our own: torch casts what its own operations are given, and knows of no others."""

import torch
from torch import Tensor


def to_autocast(x: Tensor) -> Tensor:
    """x in the dtype that torch.autocast asks for on its device, as nn.Linear would compute; x itself outside of it."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
