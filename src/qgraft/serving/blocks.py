"""Who has which blocks of keys and values, and which texts begin alike.

A text holds a list of blocks, BLOCK tokens each. A full block is known by what is in it: the ids of its tokens, after
those of the block before it, under the same adapters:

    (root, [a b c d]) -> block 7      root: the adapters with their weights, and the number of their loading
    (7th's number, [e f g h]) -> block 2

The next text with that root that begins a b c d e f g h x takes blocks 7 and 2 and passes from x on. Known blocks that no
text holds are kept, and given away again when there are no others, the least recently used first. Keys are compared, never
hashes alone.

A text gets the block behind its last one where nobody holds that, and a new text begins in the middle of the longest free
run: blocks that follow each other are read without a copy.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from qgraft.passes.key_values import BLOCK


class Blocks:
    """`count` blocks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = set(range(count))
        self._users = [0] * count
        self._known: dict[tuple[Hashable, tuple[int, ...]], int] = {}
        self._keys: dict[int, tuple[Hashable, tuple[int, ...]]] = {}  # of the known blocks
        self._numbers: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, and held by no text
        self._made = 0

    @property
    def available(self) -> int:
        """How many blocks a text could get."""
        return len(self._free) + len(self._idle)

    def take(self, wanted: int, behind: int | None = None) -> list[int] | None:
        """So many blocks, behind this one if they can be; None where there are fewer."""
        if wanted > self.available:
            return None
        taken: list[int] = []
        for _ in range(wanted):
            block = self._best(behind)
            self._free.discard(block)
            if block in self._idle:
                self._forget(block)
            self._users[block], behind = 1, block
            taken.append(block)
        return taken

    def _best(self, behind: int | None) -> int:
        """The next block of a text whose last one is `behind`."""
        if behind is not None and (behind + 1 in self._free or behind + 1 in self._idle):
            return behind + 1
        if not self._free:
            return next(iter(self._idle))
        start, longest, run = 0, 0, 0
        for block in range(self.count):
            run = run + 1 if block in self._free else 0
            if run > longest:
                start, longest = block + 1 - run, run
        return start if longest == self.count else start + longest // 2

    def release(self, blocks: Sequence[int]) -> None:
        """A text does not hold these any more."""
        for block in reversed(blocks):  # the end of a text is of less use to others than its beginning
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._keys:
                self._idle[block] = None
            else:
                self._free.add(block)

    def _forget(self, block: int) -> None:
        """Let a known block that no text holds be any block."""
        del self._idle[block], self._known[self._keys.pop(block)], self._numbers[block]

    def begin(self, root: Hashable, ids: Sequence[int]) -> "Held":
        """The known blocks of the longest beginning of `ids`, held from now on; the last id is never among them."""
        held, parent = Held(root), root
        while len(held.blocks) * BLOCK + BLOCK < len(ids):
            start = len(held.blocks) * BLOCK
            block = self._known.get((parent, tuple(ids[start : start + BLOCK])))
            if block is None:
                break
            self._users[block] += 1
            self._idle.pop(block, None)
            held.blocks.append(block)
            parent = self._numbers[block]
        held.parent, held.told = parent, len(held.blocks)
        return held

    def tell(self, held: "Held", ids: Sequence[int], past: int) -> None:
        """Let others know the blocks that are full, of a text of which `past` tokens have gone through."""
        while held.told < past // BLOCK:
            block = held.blocks[held.told]
            key = (held.parent, tuple(ids[held.told * BLOCK : (held.told + 1) * BLOCK]))
            if key not in self._known:
                self._made += 1
                self._known[key], self._keys[block], self._numbers[block] = block, key, self._made
            held.parent = self._numbers[self._known[key]]
            held.told += 1


@dataclass(eq=False)
class Held:
    """The blocks of one text.

    Attributes:
        told: how many of them others know of.
        parent: what the next one is known after.
    """

    root: Hashable
    blocks: list[int] = field(default_factory=list)
    told: int = 0
    parent: Hashable = None
