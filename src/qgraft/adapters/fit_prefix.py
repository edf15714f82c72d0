"""Whether a prefix that some file holds fits a model, and how it differs; which file it was, nothing here asks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qgraft.adapters.attach_prefix import layout_of, make_encoder, model_geometry, put_encoder
from qgraft.adapters.prefix import Geometry, PrefixConfig, PrefixEncoder
from qgraft.adapters.states import non_finite

ROWS = "embedding.weight"  # of a PrefixEncoder: a row for each token of the prefix
LONGEST = 10**6  # tokens, layers and widths that a file may say: far beyond any model, and small enough to be counted


def is_size(value: object, most: int = LONGEST) -> bool:
    """Whether what a file says is a whole number from 1 to `most`."""
    return type(value) is int and 1 <= value <= most


@dataclass(frozen=True, eq=False)
class StoredPrefix:
    """A prefix as some file has it, not yet compared with a model. What is None the file does not say.

    Attributes:
        values: of a PrefixEncoder, by its names.
        pre_seq_len: how many tokens the options say it has.
        said: where they say so, for messages.
        prefix_projection, prefix_hidden_size, prefix_dropout, layout: see PrefixConfig.
        geometry: of the model it was trained on; `layers` are numbers from 0 where they are only counted.
        layers_known: whether they are more than counted.
        problems: what is wrong whatever the model.
        key: what stands before the names of the values in the file.
        rows: another name there for embedding.weight.
        notes: what a reader should know, each one sentence.
    """

    values: Mapping[str, Tensor]
    pre_seq_len: int | None
    said: str
    prefix_projection: bool | None = None
    prefix_hidden_size: int | None = None
    prefix_dropout: float = 0.1
    layout: str | None = None
    geometry: Geometry | None = None
    layers_known: bool = False
    problems: tuple[str, ...] = ()
    key: str = ""
    rows: str | None = None
    notes: tuple[str, ...] = ()

    def called(self, line: str) -> str:
        """A line that begins with the name of a value, with the name that the file has for it."""
        renamed = self.rows is not None and line.startswith(ROWS)
        return f"{self.rows}{line.removeprefix(ROWS)}" if renamed else f"{self.key}{line}"


@dataclass(frozen=True, eq=False)
class FittedPrefix:
    """A stored prefix beside a model.

    Attributes:
        encoder: for the model, on the meta device: shapes, no values.
        misfits: differences with which it cannot be attached.
        doubts: differences that force=True passes over.
    """

    stored: StoredPrefix
    encoder: PrefixEncoder
    misfits: list[str]
    doubts: list[str]

    def put(self, model: nn.Module, name: str) -> None:
        """Put it on the model as `name`, inactive; there must be no misfits."""
        encoder = self.encoder.to_empty(device="cpu")
        encoder.load(self.stored.values)
        put_encoder(model, name, encoder)


def fit_prefix(model: nn.Module, stored: StoredPrefix) -> FittedPrefix:
    """Compare a stored prefix with a model. Raises UnsupportedError for a model that takes none, OptionError."""
    own, layout = model_geometry(model), layout_of(model)
    misfits, doubts = list(stored.problems), []
    rows = stored.values.get(ROWS)
    length = stored.pre_seq_len or 1
    if rows is not None and rows.dim() == 2 and len(rows):
        length = len(rows)
        if stored.pre_seq_len not in (None, length):
            doubts.append(f"{stored.said}={stored.pre_seq_len}, but {stored.called(ROWS)} holds {length} tokens")
    projection = stored.prefix_projection
    if projection is None:
        projection = any(name.startswith("trans.") for name in stored.values)
    if stored.layout not in (None, layout):
        misfits.append(f"trained with the layout {stored.layout!r}; this model's is {layout!r}")
    if problem := _geometry_problem(stored, own):
        misfits.append(problem)
    config = PrefixConfig(length, projection, stored.prefix_hidden_size, stored.prefix_dropout, layout)
    with torch.device("meta"):
        encoder = make_encoder(model, config, own)
    wrong = encoder.differences(stored.values)
    wrong += [
        f"{name}: got {value.dtype}, expected floating point"
        for name, value in stored.values.items()
        if not value.is_floating_point()
    ]
    misfits += map(stored.called, wrong)
    doubts += [stored.called(f"{name}: NaN or infinity") for name in non_finite(stored.values)]
    return FittedPrefix(stored, encoder, misfits, doubts)


def _geometry_problem(stored: StoredPrefix, own: Geometry) -> str | None:
    """How the model that the prefix was trained on differs from this one in its keys."""
    theirs = stored.geometry
    if theirs is None or theirs == own:
        return None
    if str(theirs) != str(own):
        return f"trained on {theirs}; this model has {own}"
    return f"trained on the layers {theirs.layers}; this model attends in {own.layers}" if stored.layers_known else None
