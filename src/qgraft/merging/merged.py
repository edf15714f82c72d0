"""What merges took away from a model, so that `unmerge` can put it back: bytes, adapters, and the way into its file."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qgraft.adapters.adapter import Adapter
from qgraft.adapters.base import BaseInfo, base_of
from qgraft.adapters.targets import lora_layers
from qgraft.adapters.token_rows import token_rows_of
from qgraft.checkpoints.origin import module_at
from qgraft.formats import PackedTensor
from qgraft.merging.token_rows import put_table


@dataclass(frozen=True)
class Merged:
    """What merges took away, kept as `model.qgraft.merged`.

    Attributes:
        info: of the base before the first merge.
        packed: the original bytes, by module path.
        adapters: those that were merged, by the names they will have when they come back.
        weights: what they were merged with.
        origin: the way back into the model's container before the first merge, which may have had fewer tokens.
        heads: of a classifier, the base's own, by module path.
    """

    info: BaseInfo | None
    packed: dict[str, PackedTensor]
    adapters: dict[str, Adapter]
    weights: dict[str, float]
    origin: Any = None
    heads: dict[str, nn.Module] = field(default_factory=dict)


def merged_of(model: nn.Module) -> Merged | None:
    """What earlier merges took away, if there were any."""
    merged = base_of(model).merged
    assert isinstance(merged, Merged | None)
    return merged


def put_back(model: PreTrainedModel, merges: Merged) -> None:
    """Put the original bytes in place, of tables that a merge made longer, too: their tokens are new ones again."""
    base = base_of(model)
    base.tokens |= {token.text: token for token in getattr(base.origin, "tokens", ())}
    tables = {path for adapter in merges.adapters.values() for path in token_rows_of(adapter)}
    wrapped = dict(lora_layers(model))
    for path, packed in merges.packed.items():
        layer: Any = wrapped.get(path) or module_at(model, path)
        if path in tables:
            put_table(model, path, packed)
        else:
            layer.replace(packed)
