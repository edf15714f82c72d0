"""New tokens of texts that go on at once, in one call of kernels, over the memory that they share (key_values.py).

What fast_decoding does for the one text of a generate() (decoding.py), for the same decoders and by the same structures: any
number of texts, each with new tokens of its own, its own adapters and its own slots. Where no kernel computes what is asked
for, the answer is None, and the facade's pass does (batched.py), over the same memory: texts may go on by the one or the
other at every token.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.adapters.adapter import Adapter
from qgraft.adapters.base import selection_of
from qgraft.kernels.decoder import Part, Row
from qgraft.model_parts import decoder_of
from qgraft.passes.batched import Piece, with_adapters
from qgraft.passes.decoder import output_head
from qgraft.passes.decoding import computes, why_not
from qgraft.passes.decoding_adapters import Decoding
from qgraft.passes.decoding_network import Network
from qgraft.passes.key_values import KeyValues

CHOICES = 128  # choices of adapters whose structures are kept: more than texts go on at once


class NativeTexts:
    """Passes of a model's texts by kernels, in C or on a GPU.

    Its structures are compared with the model where `changed` is set. At every pass that would take as long as some products:
    who does something to the model must say so. Only adapters may come and go without a word; of the choices of adapters
    those are made anew then that one of them is in.

    Attributes:
        steps: how many there were.
        changed: whether somebody may have done something to the model since the last pass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.base, self.steps = model, decoder_of(model), 0
        self.serves = why_not(self.base) is None
        self.changed = True
        self._structures = Decoding(self.base, CHOICES)
        self._attached: Mapping[str, Adapter] = {}  # those of the last pass: another one after each change

    def next_logits(self, memory: KeyValues, pieces: Sequence[Piece]) -> Tensor | None:
        """As batched.next_logits; None where no kernel computes them."""
        network = self._network() if self.serves else None
        if network is None or sum(piece.new for piece in pieces) > network.structures.most_rows:
            return None
        parts = self._parts(pieces)
        if parts is None:
            return None
        of_tokens = [(piece.loras, piece.new) for piece in pieces]
        base: Any = self.base
        with with_adapters(self.model, of_tokens):
            ids = torch.tensor([[token for piece in pieces for token in piece.text[piece.past :]]])
            embedded = base.embed_tokens(ids.to(self.model.device, non_blocking=True))
        layers = _laid_out(memory, network, embedded) if computes(embedded) else None
        if layers is None:
            return None
        positions = torch.cat([torch.arange(piece.past, len(piece.text)) + piece.shift for piece in pieces])
        begun = network.begin(embedded, positions[None].to(embedded.device, non_blocking=True))
        if begun is None:
            return None
        network.structures.use(layers)
        rows = [row for piece in pieces for row in _rows(piece)]
        states_TH = network.structures.step(parts, rows, *(part[0] for part in begun))
        self.steps += 1
        return self._logits(states_TH.to(embedded.dtype), pieces)

    def _network(self) -> Network | None:
        """The structures of what the decoder is now; None where no kernel can compute that."""
        attached = selection_of(self.model).adapters
        if self.changed or attached is not self._attached:
            self._structures.check()
            if self.changed:
                self._structures.check_loras()
            else:
                before = self._attached.items()
                self._structures.keep_loras({name for name, each in before if attached.get(name) is each})
            self.changed, self._attached = False, attached
        return self._structures.network

    def _parts(self, pieces: Sequence[Piece]) -> list[Part] | None:
        """The adapters of the row; None where no kernel adds them."""
        parts = []
        for weights, run in groupby(pieces, key=lambda piece: piece.loras):
            loras = self._structures.loras(weights)
            if loras is None:
                return None
            parts.append(Part(loras.loras, sum(piece.new for piece in run)))
        return parts

    def _logits(self, states_TH: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """The logits [asked for, vocabulary]."""
        ends = torch.tensor([piece.new for piece in pieces]).cumsum(0) - 1
        asked = [index for index, piece in enumerate(pieces) if piece.logits]
        if not asked:
            return states_TH[:0]
        with with_adapters(self.model, [(pieces[index].loras, 1) for index in asked]):
            return output_head(self.model)(
                states_TH.index_select(0, ends[asked].to(states_TH.device, non_blocking=True))
            )


def _laid_out(memory: KeyValues, network: Network, like: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """The keys and values of all layers; None where kernels cannot write to what is laid out."""
    groups, channels = network.decoder.groups, network.decoder.channels
    shape, kind = (groups, memory.slots, channels), (like.dtype, like.device)
    layers = [
        memory.laid_out(index, like.new_empty(groups, 0, channels)) for index in range(len(network.decoder.layers))
    ]
    written = all(
        part.shape == shape and (part.dtype, part.device) == kind and part.is_contiguous()
        for pair in layers
        for part in pair
    )
    return layers if written else None


def _rows(piece: Piece) -> list[Row]:
    """The piece's new tokens: each sees those before it."""
    front = piece.prefix
    return [Row(piece.slots, front + seen, front) for seen in range(piece.past + 1, len(piece.text) + 1)]
