"""One packed row whose tokens use different LoRAs: what several jobs need that train on one base at once.

    tokens        a0 a1 a2 a3 | b0 b1 b2 | c0 c1 ...       a padding-free batch is one row (data/batches.py)
    y             = base(x)                                once, for all tokens
    y[0:4]       += s_a · (x[0:4] A_a^T) B_a^T             each adapter over its own segment
    y[4:7]       += s_b · (x[4:7] A_b^T) B_b^T

The whole layer is one LoraFunction (adapters/lora_function.py): each adapter's gradients are those that it would have alone.

Not chosen: all A stacked to one matrix, with the foreign products masked out. It takes fewer and larger products, but
n times the work of each, and 0 · NaN is NaN: one broken adapter would break all others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from qgraft.adapters.base import selection_of
from qgraft.adapters.lora import Lora, LoraLayer
from qgraft.adapters.lora_function import LayerSegment
from qgraft.errors import UnsupportedError


@dataclass(eq=False)
class Segment:
    """Tokens start:stop of a packed row, which one adapter serves.

    Attributes:
        generator: where the seeds of its dropout masks are drawn, in the order in which layers are first reached.
        seeds: those drawn so far; a layer that gradient checkpointing runs again must drop the same inputs.
    """

    adapter: str
    start: int
    stop: int
    generator: torch.Generator
    seeds: dict[nn.Module, int] = field(default_factory=dict)

    def seed(self, layer: nn.Module) -> int:
        """The seed of this segment's mask in a layer."""
        if layer not in self.seeds:
            self.seeds[layer] = int(torch.randint(2**62, (), generator=self.generator).item())
        return self.seeds[layer]


@contextmanager
def serving_segments(model: nn.Module, segments: Sequence[Segment]) -> Iterator[None]:
    """Within the block every wrapped layer takes one row of tokens, each served by the adapter of its segment.

    The backward pass belongs into the block, too: gradient checkpointing runs layers again in it. Other threads are
    refused meanwhile.
    """
    selection = selection_of(model)

    def serve(layer: LoraLayer, x: Tensor) -> Tensor:
        return _layer_with_segments(layer, x, segments)

    with selection.taken("trained with several adapters"):
        selection.serve = serve
        try:
            yield
        finally:
            selection.serve = None


def _layer_with_segments(layer: LoraLayer, x: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The output for x, [1, tokens, in] of a linear layer or ids [1, tokens] of an embedding."""
    if layer.tokens_of(x) != segments[-1].stop:
        raise UnsupportedError(
            f"several jobs at once: a layer got an input {list(x.shape)}, expected {segments[-1].stop} tokens",
            hint="this architecture does not pass every token through every layer; train one adapter at a time",
        )
    served: list[tuple[Lora, LayerSegment]] = []
    for segment in segments:
        if segment.adapter in layer.loras:
            lora = cast(Lora, layer.loras[segment.adapter])
            dropout = lora.config.lora_dropout if layer.training else 0.0
            seed = segment.seed(layer) if dropout else 0
            served.append((lora, LayerSegment(segment.start, segment.stop, lora.config.scaling, dropout, seed)))
    return layer.with_segments(x, served)
