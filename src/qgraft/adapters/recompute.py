"""Tensors that a layer with adapters need not save, because they are cheap to compute from what is kept anyway.

    y = norm(x)                     keeps x for its own backward pass
    recomputable(y, again, x, r)    says: y is again(x, r), bit for bit
    LoraLinear(y)                   saves x and r, which are kept already, and not y

Layers that are given one tensor (q, k and v) compute it once: their backward passes follow each other, the first makes it,
and with the last it goes.

What is said stands on the tensor itself (`y.qgraft_recompute`), so it goes when the tensor goes, and views and copies of
the tensor, which are other tensors, do not have it. It counts as long as nobody has changed the tensor in place.

Not chosen: an argument of the layer, because between the norm and the layer lies transformers' own code; a table by tensors,
which torch has with weak keys, and which every layer of every thread would go through; torch's hooks for saved tensors, which
run for each tensor that any operation saves.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Again:
    """`make`, cheaply and bit for bit what a tensor was, for so many `layers` as will ask for it. It holds nothing before."""

    make: Callable[..., Tensor]
    layers: int = 0
    _made: Tensor | None = field(default=None, init=False)

    def of(self, *tensors: Tensor) -> Tensor:
        """make(*tensors), or what the layer before made of them; not to be written to."""
        x = self.make(*tensors) if self._made is None else self._made
        self.layers -= 1
        self._made = x if self.layers > 0 else None
        return x


@dataclass(frozen=True, eq=False)
class Recompute:
    """How a tensor is computed again: again.of(*tensors).

    Attributes:
        version: of the tensor; torch counts what changes it in place.
    """

    again: Again
    tensors: tuple[Tensor, ...]
    version: int


def recomputable(x: Tensor, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Let a LoraLinear that is given x save `tensors` instead, and compute x = make(*tensors) again when it needs it."""
    if torch.is_grad_enabled():  # nothing is saved otherwise
        x.qgraft_recompute = Recompute(Again(make), tensors, x._version)  # type: ignore[attr-defined]
    return x


def recompute_of(x: Tensor) -> Recompute | None:
    """How to compute x again; None where nobody said so, or x has been changed since."""
    known: Recompute | None = getattr(x, "qgraft_recompute", None)
    return known if known is None or known.version == x._version else None
