"""The next token of a text that goes on alone, in one C call, over the memory that texts share (key_values.py).

What fast_decoding does within generate() (decoding.py), for the same decoders and by the same structures. C reads the keys
of a text one after another, and a memory of slots has them so where the text's slots follow each other, as they do unless
several texts were written by turns. Then nothing is copied between this and passes that texts share (batched.py): a text
may go on by the one or the other at every token. Where anything else is asked for, the answer is None.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.adapters.base import selection_of
from qgraft.errors import UnsupportedError
from qgraft.kernels.cpu import decode
from qgraft.model_parts import decoder_of
from qgraft.passes.batched import Piece
from qgraft.passes.decoder import output_head
from qgraft.passes.decoding import CHOICES, why_not
from qgraft.passes.decoding_network import Network
from qgraft.passes.key_values import KeyValues, as_slice


class SingleText:
    """Single steps of a model's texts in C.

    Attributes:
        steps: how many there were.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.base, self.steps = model, decoder_of(model), 0
        self.serves = model.dtype == torch.float32 and model.device.type == "cpu" and why_not(self.base) is None
        self._networks: dict[tuple[tuple[str, float], ...], Network] = {}

    def next_logits(self, memory: KeyValues, piece: Piece) -> Tensor | None:
        """The logits [vocabulary] after one new token; None where C does not compute them."""
        keys = piece.prefix + piece.past
        if not self.serves or piece.new != 1 or not keys or not memory.layers:
            return None
        slots = as_slice(piece.slots)
        if not isinstance(slots, slice):
            return None
        with selection_of(self.model).within(None, weights=dict(piece.loras)):
            network = self._network(piece)
            if network is None or piece.past + 1 >= network.window:
                return None
            if not network.write_behind(memory.layers, slots.start):
                return None
            base: Any = self.base
            x_11H = base.embed_tokens(torch.tensor([list(piece.text[-1:])])).clone()  # C writes over it
            cos, sin = base.rotary_emb(x_11H, position_ids=torch.tensor([[piece.past + piece.shift]]))
            if not x_11H.dtype == cos.dtype == torch.float32 or cos.shape != (1, 1, network.channels):
                return None
            decode.step(network.model, x_11H.view(-1), cos.view(-1), sin.view(-1), keys)
            self.steps += 1
            logits_V: Tensor = output_head(self.model)(x_11H[0])[0]
            return logits_V

    def _network(self, piece: Piece) -> Network | None:
        """The structures for the piece's adapters as they are now."""
        wanted = tuple(piece.loras.items())
        network = self._networks.get(wanted)
        if network is None or not network.holds():
            if network is not None:  # the others neither; and they keep what was detached in memory
                self._networks.clear()
            try:
                network = Network(self.base)
            except (UnsupportedError, ValueError):  # an adapter that C does not take
                return None
            while len(self._networks) >= CHOICES:
                del self._networks[next(iter(self._networks))]
            self._networks[wanted] = network
        return network
