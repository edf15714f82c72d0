"""Keys and values of many texts in one memory, in slots of a token each; blocks of slots are handed out by the caller.

    layer 0   keys    [G, slots, D]      slot      0 1 2 3 | 4 5 6 7 | 8 9 ..        BLOCK slots are a block
              values  [G, slots, E]      token     a0 a1 a2 a3 b0 b1 . . a4 ..       a text is a list of blocks

A text's slots need not lie together, so texts of any lengths come and go without a gap that nobody can use, and two texts
that begin alike share the blocks of their beginning. A slot is read by no text but those whose it is: what a broken
adapter leaves in one (NaN) reaches nobody else, not even multiplied by 0.

Layers are laid out when they first write: only then their numbers of heads and channels are known. On a CPU the memory is
virtual until it is written to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 16  # slots of a block: few are lost at a text's end, and a beginning is shared in steps of so many tokens


@dataclass(eq=False)
class KeyValues:
    """Room for the keys and values of `slots` tokens in each layer.

    Attributes:
        layers: number of a layer -> its keys [G, slots, D] and values [G, slots, E].
    """

    slots: int
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def put(self, layer: int, slots_T: Tensor, key_GTD: Tensor, value_GTE: Tensor) -> None:
        """Write the keys and values of new tokens."""
        for memory, new in zip(self._of(layer, key_GTD, value_GTE), (key_GTD, value_GTE), strict=True):
            memory.index_copy_(1, slots_T, new.to(memory.dtype))

    def take(self, layer: int, slots: "Tensor | slice") -> tuple[Tensor, Tensor]:
        """The keys [G, n, D] and values [G, n, E] in these slots; without a copy where they are a slice."""
        keys, values = self.layers[layer]
        if isinstance(slots, slice):
            return keys[:, slots], values[:, slots]
        return keys.index_select(1, slots), values.index_select(1, slots)

    def laid_out(self, layer: int, like_GTD: Tensor) -> tuple[Tensor, Tensor]:
        """The memory of a layer; for keys and values of this kind where nothing was written yet."""
        return self._of(layer, like_GTD, like_GTD)

    def _of(self, layer: int, key_GTD: Tensor, value_GTE: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            made = (part.new_empty(part.shape[0], self.slots, part.shape[2]) for part in (key_GTD, value_GTE))
            keys, values = made
            self.layers[layer] = (keys, values)
        return self.layers[layer]


def as_slices(slots: Sequence[Tensor]) -> list[Tensor | slice]:
    """Of some texts the slots of each: a slice where they follow each other, else as they are. A GPU is waited for once."""
    told = [torch.stack([slots_N[0], slots_N[-1], (slots_N.diff() == 1).all().long()]) for slots_N in slots]
    ends = torch.stack(told).tolist()
    return [
        slice(first, last + 1) if follow else slots_N
        for slots_N, (first, last, follow) in zip(slots, ends, strict=True)
    ]


def slots_of(blocks: list[int], length: int, device: torch.device | str = "cpu") -> Tensor:
    """The first `length` slots of a text with these blocks, [length] int64."""
    starts = torch.tensor(blocks, dtype=torch.long)[:, None] * BLOCK
    return (starts + torch.arange(BLOCK)).flatten()[:length].to(device, non_blocking=True)
