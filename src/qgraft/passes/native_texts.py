"""New tokens of texts that go on at once, in one C call, over the memory that they share (key_values.py).

What fast_decoding does for the one text of a generate() (decoding.py), for the same decoders and by the same structures: any
number of texts, each with new tokens of its own, its own adapters and its own slots. Where C does not compute what is asked
for, the answer is None, and the facade's pass does (batched.py), over the same memory: texts may go on by the one or the
other at every token.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.adapters.base import selection_of
from qgraft.kernels.cpu import decode
from qgraft.model_parts import decoder_of
from qgraft.passes.batched import Piece, with_adapters
from qgraft.passes.decoder import output_head
from qgraft.passes.decoding import why_not
from qgraft.passes.decoding_adapters import Decoding
from qgraft.passes.decoding_network import Network
from qgraft.passes.key_values import KeyValues

CHOICES = 128  # choices of adapters whose structures are kept: more than texts go on at once


class NativeTexts:
    """Passes of a model's texts in C.

    Its structures are compared with the model where adapters were attached or taken off, and where `changed` is set. At every
    pass that would take as long as some products: who does something else to the model must say so.

    Attributes:
        steps: how many there were.
        changed: whether somebody may have done something to the model since the last pass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.base, self.steps = model, decoder_of(model), 0
        self.serves = model.dtype == torch.float32 and model.device.type == "cpu" and why_not(self.base) is None
        self.changed = True
        self._structures = Decoding(self.base, CHOICES)
        self._attached: object = None  # the adapters that there were at the last pass: another one after each change

    def next_logits(self, memory: KeyValues, pieces: Sequence[Piece]) -> Tensor | None:
        """As batched.next_logits; None where C does not compute them."""
        network = self._network() if self.serves else None
        if network is None or not _fits(memory, network):
            return None
        parts = self._parts(pieces)
        if parts is None:
            return None
        of_tokens = [(piece.loras, piece.new) for piece in pieces]
        base: Any = self.base
        with with_adapters(self.model, of_tokens):
            ids = torch.tensor([[token for piece in pieces for token in piece.text[piece.past :]]])
            x_1TH = base.embed_tokens(ids).clone()  # C writes over it
        positions = torch.cat([torch.arange(piece.past, len(piece.text)) + piece.shift for piece in pieces])
        cos, sin = base.rotary_emb(x_1TH, position_ids=positions[None])
        if not x_1TH.dtype == cos.dtype == torch.float32 or cos.shape != (1, len(positions), network.channels):
            return None
        network.use_slots(memory)
        rows = [row for piece in pieces for row in _rows(piece)]
        decode.step(network.model, parts, rows, x_1TH[0], cos[0], sin[0])
        self.steps += 1
        return self._logits(x_1TH[0], pieces)

    def _network(self) -> Network | None:
        """The structures of what the decoder is now; None where C cannot compute that."""
        attached = selection_of(self.model).adapters
        if self.changed or attached is not self._attached:
            self._structures.check()
            self._structures.check_loras()
            self.changed, self._attached = False, attached
        return self._structures.network

    def _parts(self, pieces: Sequence[Piece]) -> list[decode.Part] | None:
        """The adapters of the row; None where C does not add them."""
        parts = []
        for weights, run in groupby(pieces, key=lambda piece: piece.loras):
            loras = self._structures.loras(weights)
            if loras is None:
                return None
            parts.append(decode.Part(loras.loras, sum(piece.new for piece in run)))
        return parts

    def _logits(self, states_TH: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """The logits [asked for, vocabulary]."""
        ends = torch.tensor([piece.new for piece in pieces]).cumsum(0) - 1
        asked = [index for index, piece in enumerate(pieces) if piece.logits]
        if not asked:
            return states_TH[:0]
        with with_adapters(self.model, [(pieces[index].loras, 1) for index in asked]):
            return output_head(self.model)(states_TH.index_select(0, ends[asked]))


def _fits(memory: KeyValues, network: Network) -> bool:
    """Whether C can write to what is laid out."""
    shape = (network.groups, memory.slots, network.channels)
    return all(
        part.shape == shape and part.dtype == torch.float32 and part.device.type == "cpu" and part.is_contiguous()
        for pair in memory.layers.values()
        for part in pair
    )


def _rows(piece: Piece) -> list[decode.Row]:
    """The piece's new tokens: each sees those before it."""
    front = piece.prefix
    return [decode.Row(piece.slots, front + seen, front) for seen in range(piece.past + 1, len(piece.text) + 1)]
