"""Texts that begin alike, with their beginning in the row once.

    row        p p p  c c    r r r        a prompt, the chosen answer behind it, the rejected one behind the prompt as well
    positions  0 1 2  3 4    3 4 5
    spread     p p p  c c  | p p p  r r r   what attention sees: two texts, each a sample

All that goes token by token, which is nearly everything, computes the prompt once. Attention alone has whole texts before
it: queries, keys and values are copied into them, and of what comes out the prompt's copies are left behind, but for the
first. So any kernel for attention sample by sample serves. Gradients of a token are summed over its copies by gathering: the
same bits every time, on a GPU too, where scattered sums come in any order.

    texts                      prompt 40, answers 60 tokens    100, 50     200, 40
    tokens of a pair alone                  200                  300         480
    shared                                  160 (80 %)           200 (67 %)  280 (58 %)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SharedPrompts:
    """Where the tokens of whole texts stand in a row of T tokens, and back; E tokens in all texts.

    Attributes:
        places: [E], of each token of the texts its place in the row.
        copies: [C, T], of each token of the row its places in the texts, in their order; E where there are no more.
        owners: [E], as `places`, but T for a copy other than the first.
        bounds: [texts + 1], where each text starts, and the end; on the CPU.
    """

    places: Tensor
    copies: Tensor
    owners: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], tokens: int) -> "SharedPrompts":
        """Of the places of each text's tokens in a row of so many; each place is in one text at least."""
        places = [place for text in texts for place in text]
        copies, owners = [list[int]() for _ in range(tokens)], list(places)
        for number, place in enumerate(places):
            if copies[place]:
                owners[number] = tokens
            copies[place].append(number)
        most = max(map(len, copies), default=0)
        padded = torch.tensor([each + [len(places)] * (most - len(each)) for each in copies]).T.contiguous()
        bounds = torch.tensor([0, *map(len, texts)]).cumsum(0)
        return cls(torch.tensor(places), padded, torch.tensor(owners), bounds)

    def to(self, device: torch.device) -> "SharedPrompts":
        """The same on a device, but for the bounds."""
        parts = {name: getattr(self, name).to(device, non_blocking=True) for name in ("places", "copies", "owners")}
        return SharedPrompts(**parts, bounds=self.bounds)

    def spread(self, row: Tensor) -> Tensor:
        """[1, H, T, D] -> [1, H, E, D]."""
        out: Tensor = _Spread.apply(row, self)
        return out

    def gathered(self, texts: Tensor) -> Tensor:
        """[1, E, H, D] -> [1, T, H, D], of each token its first copy."""
        out: Tensor = _Gathered.apply(texts, self)
        return out


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: Tensor, shared: SharedPrompts) -> Tensor:
        """See SharedPrompts.spread."""
        ctx.shared = shared
        return row.index_select(2, shared.places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Sums the copies."""
        first, *more = ctx.shared.copies
        total, padded = grad.index_select(2, first), F.pad(grad, (0, 0, 0, 1))
        for each in more:
            total += padded.index_select(2, each)
        return total, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, texts: Tensor, shared: SharedPrompts) -> Tensor:
        """See SharedPrompts.gathered."""
        ctx.shared = shared
        return texts.index_select(1, shared.copies[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Nothing for copies."""
        return F.pad(grad, (0, 0, 0, 0, 0, 1)).index_select(1, ctx.shared.owners), None
