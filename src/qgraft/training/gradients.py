"""The gradients of all trained parameters in one tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Gradients:
    """Views of one tensor, which is cleared, clipped and sent to other processes as a whole.

    Tensors of their own, made anew in each step, take milliseconds to clear and to clip, and lie all over the heap, where
    nothing large fits between them: the process then grows by a tenth of a gigabyte. A parameter that a step does not
    reach has a gradient of zeros, not none: weight decay and momentum go on.

    Attributes:
        sent: the tensor with a place behind it for sums that processes share: the loss, and the tokens.
        whole: the gradients alone, [parameters].
    """

    SUMS = 2

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        kinds = {(parameter.dtype, parameter.device) for parameter in parameters}
        assert len(kinds) == 1, f"trained parameters of several kinds: {kinds}"
        size = sum(parameter.numel() for parameter in parameters)
        self.sent = parameters[0].detach().new_zeros(size + self.SUMS)
        self.whole = self.sent[:size]
        parts = self.whole.split([parameter.numel() for parameter in parameters])
        self._views = [(parameter, part.view_as(parameter)) for parameter, part in zip(parameters, parts, strict=True)]

    def clear(self) -> None:
        """Zeros, for every parameter."""
        self.sent.zero_()
        for parameter, view in self._views:
            parameter.grad = view

    def drop(self) -> None:
        """None for every parameter: the optimizer then does nothing."""
        for parameter, _ in self._views:
            parameter.grad = None

    def clip(self, most: float) -> Tensor:
        """Scale them so that their norm is at most this, where it is positive; returns the norm as it was."""
        norm = torch.linalg.vector_norm(self.whole)
        if most > 0:
            self.whole.mul_(torch.clamp(most / (norm + 1e-6), max=1.0))
        return norm
