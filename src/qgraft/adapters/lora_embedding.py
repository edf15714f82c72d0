"""A LoRA on the embedding: what it adds to the rows of the table, for the tokens that are looked up.

                 ids [..]
                /        \\
        table[ids]     A^T[ids]  [.., r]        A [r, vocabulary], B [width, r]
                |         |
                 \\       / · B^T
          y = table[ids] + s · f · A^T[ids] B^T

Names and sizes are PEFT's (`lora_embedding_A`, `lora_embedding_B`), and so is the factor f: a table that scales its rows
(Gemma's) scales what is added to them, too. PEFT draws no dropout here, and learns nothing for the table's padding token. A
tied output layer shares the base's table and not what is added: with PEFT it is a module of its own, too.

Such adapters come from PEFT's files; qgraft puts its own LoRAs on linear layers only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from qgraft.adapters.lora import Lora, LoraLayer
from qgraft.adapters.lora_function import LayerSegment
from qgraft.adapters.selection import Selection
from qgraft.linear import QuantizedEmbedding


class EmbeddingLora(Lora):
    """A LoRA whose A is [r, vocabulary] and whose B is [width, r]."""

    of_embedding = True


class LoraEmbedding(LoraLayer):
    """An embedding with adapters on it; ids [...] int64 -> [..., embedding_dim]."""

    base: QuantizedEmbedding | nn.Embedding
    part = EmbeddingLora

    def __init__(self, base: QuantizedEmbedding | nn.Embedding, selection: Selection | None = None) -> None:
        super().__init__(base, (base.num_embeddings, base.embedding_dim), selection)
        self.num_embeddings, self.embedding_dim, self.padding_idx = (
            self.in_features,
            self.out_features,
            base.padding_idx,
        )

    def tokens_of(self, ids: Tensor) -> int:
        """How many tokens ids [...] are."""
        return ids.numel()

    def with_segments(self, ids: Tensor, served: Sequence[tuple[Lora, LayerSegment]]) -> Tensor:
        """ids [...] -> [..., embedding_dim] with each of these adapters on its own tokens."""
        y = self.base(ids)
        for lora, segment in served:
            added = self._added(ids.reshape(-1)[segment.start : segment.stop], lora, segment.scaling).to(y.dtype)
            if segment.stop - segment.start == ids.numel():
                y = y + added.view_as(y)
                continue
            rows = torch.arange(segment.start, segment.stop, device=y.device)
            y = y.reshape(-1, self.embedding_dim).index_add(0, rows, added).view_as(y)
        return y

    def _add_to_rows(self, y: Tensor, x: Tensor, index: Tensor, lora: Lora) -> Tensor:
        added = self._added(x.index_select(0, index), lora, lora.config.scaling)
        return y.index_add(0, index, added.to(y.dtype))

    def _added(self, ids: Tensor, lora: Lora, scaling: float) -> Tensor:
        """What the adapter adds for ids [...], [..., embedding_dim] float32."""
        factor = self.base.scale if isinstance(self.base, QuantizedEmbedding) else 1.0
        return (embedding(ids, lora.lora_A.T, self.padding_idx) @ lora.lora_B.T) * (scaling * factor)

    @property
    def weight(self) -> Tensor:
        """As that of a QuantizedEmbedding or nn.Embedding: the base's table, without what the adapters add."""
        return self.base.weight

    def _device(self) -> torch.device:
        base = self.base
        return base.weight.device if isinstance(base, nn.Embedding) else base.packed_weight.device
