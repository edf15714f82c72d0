"""How the tokens of several requests go through the model: in passes that they share, or one request after another.

    SharedPasses    one pass for all (passes/native_texts.py, passes/batched.py), keys and values in blocks (blocks.py),
                    beginnings shared
    SinglePasses    the model's own pass for each, with a cache of its own (passes/own_passes.py)

Both answer the same. Which one a model gets is found out by a trial (passes/batched_trial.py). A pass that fails is taken
again request by request, so that one that fails fails alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.attention import attending, attention_of
from qgraft.errors import QgraftError, UnsupportedError
from qgraft.model_parts import computed_dtype, decoder_of
from qgraft.passes.batched import CACHED, Piece, next_logits
from qgraft.passes.key_values import BLOCK, KeyValues, slots_of
from qgraft.passes.native_texts import NativeTexts
from qgraft.passes.own_passes import OwnPasses
from qgraft.serving.blocks import Blocks, Held
from qgraft.serving.mixes import Mix, prefix_layers
from qgraft.serving.running import Running


class PassError(QgraftError):
    """A pass through the model that failed."""


Part = tuple[Running, int]  # a request, and how many of its new ids go through now
Result = Tensor | PassError | None  # logits [vocabulary]; None where ids are left


class Passes(Protocol):
    """What the engine asks of both."""

    whole_prompts: bool  # whether a prompt must go through in one pass

    @property
    def used(self) -> float:
        """The share of the memory that is held."""

    def begin(self, running: Running) -> bool:
        """Get a place for a request; False where there is none now."""

    def extend(self, running: Running, length: int) -> bool:
        """Get room for so many ids of it; False where there is none now."""

    def logits(self, parts: Sequence[Part]) -> list[Result]:
        """Pass these through: what each comes to."""

    def release(self, running: Running) -> None:
        """Give back its place; what is known of its beginning may be of use to others."""

    def own_attention(self) -> AbstractContextManager[None]:
        """Within the block the model attends as it does without the engine."""

    def close(self) -> None:
        """Leave the model as it was."""


@dataclass(eq=False)
class _Place:
    held: Held
    prefix: Tensor  # slots
    slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # the prefix's, and of some blocks
    counted: int = -1  # how many blocks these are

    def slots_now(self) -> Tensor:
        """The slots of the prefix and of all blocks; made when there are more blocks, which is not at every token."""
        blocks = self.held.blocks
        if self.counted != len(blocks):
            own = slots_of(blocks, len(blocks) * BLOCK, self.prefix.device)
            self.slots, self.counted = torch.cat([self.prefix, own]), len(blocks)
        return self.slots


class SharedPasses:
    """One pass for all requests.

    Args:
        slots: tokens for whose keys and values there is room.
    """

    def __init__(self, model: PreTrainedModel, slots: int) -> None:
        self.model = model
        self.blocks = Blocks(slots // BLOCK)
        self.memory = KeyValues(self.blocks.count * BLOCK)
        self.whole_prompts = hasattr(decoder_of(model), "marks")  # a context is read in both directions
        self.native = NativeTexts(model)
        self.mixes_share = True  # whether every layer sees every token, so that each can have its own adapters
        self._prefixes: dict[tuple[tuple[str, int, float], ...], tuple[list[int], int]] = {}  # blocks, requests
        self._attention = attention_of(model)
        model.set_attn_implementation(CACHED)

    @property
    def used(self) -> float:
        """See Passes."""
        return 1 - self.blocks.available / self.blocks.count

    def begin(self, running: Running) -> bool:
        """See Passes."""
        prefix = self._prefix_for(running.mix)
        if prefix is None:
            return False
        shared = [] if self.whole_prompts else running.ids
        held = self.blocks.begin(running.mix.root, shared)
        running.place = _Place(held, slots_of(prefix, running.mix.length, self.model.device))
        running.past = len(held.blocks) * BLOCK
        if not self.extend(running, len(running.ids) + 1):
            self.release(running)
            return False
        if not running.answered:
            running.cached = running.past
        return True

    def extend(self, running: Running, length: int) -> bool:
        """See Passes."""
        held = running.place.held
        wanted = max(-(-length // BLOCK) - len(held.blocks), 0)
        if wanted > self.blocks.available:
            self._drop_prefixes()
        more = self.blocks.take(wanted, held.blocks[-1] if held.blocks else None)
        held.blocks += more or []
        return more is not None

    def release(self, running: Running) -> None:
        """See Passes."""
        place, running.place, running.past = running.place, None, 0
        if place is None:
            return
        self.blocks.release(place.held.blocks)
        key = _prefix_key(running.mix)
        if key:
            blocks, users = self._prefixes[key]
            self._prefixes[key] = (blocks, users - 1)

    def logits(self, parts: Sequence[Part]) -> list[Result]:
        """See Passes."""
        order = sorted(range(len(parts)), key=lambda index: parts[index][0].mix.root)
        if not self.mixes_share:
            return self._by_mix(parts)
        try:
            found = self._passed([parts[index] for index in order])
        except UnsupportedError:
            self.mixes_share = False
            return self._by_mix(parts)
        results: list[Result] = [None] * len(parts)
        for index, result in zip(order, found, strict=True):
            results[index] = result
        return results

    def _by_mix(self, parts: Sequence[Part]) -> list[Result]:
        results: list[Result] = [None] * len(parts)
        for root in dict.fromkeys(running.mix.root for running, _ in parts):
            members = [index for index, (running, _) in enumerate(parts) if running.mix.root == root]
            for index, result in zip(members, self._passed([parts[index] for index in members]), strict=True):
                results[index] = result
        return results

    def _passed(self, parts: Sequence[Part]) -> list[Result]:
        pieces = [self._piece(running, count) for running, count in parts]
        try:
            found_NV = self.native.next_logits(self.memory, pieces)
            logits_NV = next_logits(self.model, self.memory, pieces) if found_NV is None else found_NV
            rows = iter(logits_NV.cpu())  # a GPU is waited for once, and not for each text
        except (RuntimeError, ValueError, LookupError) as error:
            if len(parts) == 1:
                return [_failed(error)]
            return [result for part in parts for result in self._passed([part])]
        for running, count in parts:
            if not self.whole_prompts:
                self.blocks.tell(running.place.held, running.ids, running.past + count)
        return [next(rows) if piece.logits else None for piece in pieces]

    def _piece(self, running: Running, count: int) -> Piece:
        place: _Place = running.place
        stop = running.past + count
        slots = place.slots_now()[: len(place.prefix) + stop]
        mix = running.mix
        asked = stop == len(running.ids)
        return Piece(running.ids[:stop], running.past, slots, mix.length, mix.shift, mix.loras, asked)

    def _prefix_for(self, mix: Mix) -> list[int] | None:
        """The blocks of the mix's prefixes, written where they are not yet; None where there is no room."""
        key = _prefix_key(mix)
        if not key:
            return []
        if key not in self._prefixes:
            wanted = -(-mix.length // BLOCK)
            if wanted > self.blocks.available:
                self._drop_prefixes()
            if (blocks := self.blocks.take(wanted)) is None:
                return None
            slots, dtype = slots_of(blocks, mix.length, self.model.device), computed_dtype(self.model)
            for layer, keys, values in prefix_layers(self.model, mix):
                self.memory.put(layer, slots, keys.to(self.model.device, dtype), values.to(dtype))
            self._prefixes[key] = (blocks, 0)
        blocks, users = self._prefixes[key]
        self._prefixes[key] = (blocks, users + 1)
        return blocks

    def _drop_prefixes(self) -> None:
        """Give back the blocks of prefixes that no request has."""
        for key in [key for key, (_, users) in self._prefixes.items() if not users]:
            self.blocks.release(self._prefixes.pop(key)[0])

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """See Passes."""
        with attending(self.model, self._attention):
            yield
            self._attention = attention_of(self.model)  # a first prefix changes it
        self.native.changed = True
        self._drop_prefixes()

    def close(self) -> None:
        """See Passes."""
        self.model.set_attn_implementation(self._attention)


class SinglePasses:
    """The model's own pass for each request."""

    whole_prompts = True

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def used(self) -> float:
        """See Passes: each request has its own."""
        return 0.0

    def begin(self, running: Running) -> bool:
        """See Passes."""
        running.place, running.past = OwnPasses(self.model), 0
        return True

    def extend(self, running: Running, length: int) -> bool:
        """See Passes."""
        return True

    def release(self, running: Running) -> None:
        """See Passes."""
        running.place, running.past = None, 0

    def logits(self, parts: Sequence[Part]) -> list[Result]:
        """See Passes."""
        return [self._passed(running) for running, _ in parts]

    def _passed(self, running: Running) -> Result:
        weights = {name: weight for name, _, weight in running.mix.root}
        try:
            logits_V: Tensor = running.place.next_logits(running.ids, weights)
        except (RuntimeError, ValueError, LookupError) as error:
            return _failed(error)
        return logits_V

    @contextmanager
    def own_attention(self) -> Iterator[None]:
        """See Passes."""
        yield

    def close(self) -> None:
        """See Passes."""


def _prefix_key(mix: Mix) -> tuple[tuple[str, int, float], ...]:
    return tuple(part for part in mix.root if part[0] in mix.prefixes)


def _failed(error: Exception) -> PassError:
    return PassError(
        f"a pass through the model failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
    )
