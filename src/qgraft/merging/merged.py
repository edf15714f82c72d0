"""What merges took away from a model, to be put back by unmerge(): kept as `model.qgraft.merged`."""

from dataclasses import dataclass, field

from torch import nn

from qgraft.adapters.adapter import Adapter
from qgraft.adapters.base import BaseInfo, base_of
from qgraft.formats import PackedTensor


@dataclass(frozen=True)
class Merged:
    """See the module's docstring.

    Attributes:
        info: of the base before the first merge.
        packed: the original bytes, by module path.
        adapters: those that were merged, by the names they will have when they come back.
        weights: what they were merged with.
        heads: of a classifier, the base's own, by module path.
    """

    info: BaseInfo | None
    packed: dict[str, PackedTensor]
    adapters: dict[str, Adapter]
    weights: dict[str, float]
    heads: dict[str, nn.Module] = field(default_factory=dict)


def merged_of(model: nn.Module) -> Merged | None:
    """What earlier merges took away, if there were any."""
    merged = base_of(model).merged
    assert isinstance(merged, Merged | None)
    return merged
