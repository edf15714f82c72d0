"""The loss of logits and its gradient, row by row: a row of the table, as every choice of kernels is."""

import torch
from torch import Tensor

from qgraft.kernels import reference
from qgraft.kernels.choice import serving


def dtype_for(logits: Tensor) -> torch.dtype:
    """In which dtype `loss_to_gradient` wants these logits: a kernel in their own, plain torch in float32."""
    return torch.float32 if _kernel(logits) is reference else logits.dtype


def loss_to_gradient(logits_CV: Tensor, targets_C: Tensor, smoothing: float) -> Tensor:
    """The cross-entropy [C] float32 of each row of logits, which are overwritten with its gradient in their own dtype."""
    losses_C: Tensor = _kernel(logits_CV).loss_to_gradient(logits_CV, targets_C, smoothing)
    return losses_C


def _kernel(logits: Tensor):  # type: ignore[no-untyped-def]
    return serving("cross_entropy", logits) if logits.stride(-1) == 1 else reference
