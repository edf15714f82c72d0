"""Trained rows of single tokens: new tokens, and some that are there, in float beside the packed tables.

    ids [..]  ->  table[ids]                  packed, frozen          states [.., in]  ->  x W^T       packed, frozen
                  rows[slot of the id]        where the id has one                         x rows^T    in the tokens' columns

A row stands in for that of the table and is not added to it, as in PEFT (`trainable_token_indices`; its files call the rows
`trainable_tokens_delta`, and what they hold are whole rows). Ids behind the end of the table are new tokens: while an
adapter that has such rows is on the model, the model has as many rows as the highest of them needs, and
`config.vocab_size` says so. For what is not active they do not exist: their columns are the lowest number of the dtype,
so that no text holds them and no other logit's probability changes, and an input with such an id is an error.

Of a tied output layer the rows are those of the input. `TiedRows` stands there for them.

Not chosen: a longer copy of the packed table, which would take its memory again and make another base of it; rows that are
added, as those of a LoRA, because a table whose new rows were begun otherwise would make other rows of them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from qgraft.adapters.adapter import Adapter, Part
from qgraft.adapters.lora import LoraLayer
from qgraft.adapters.lora_function import LayerSegment
from qgraft.adapters.peft_names import rows_name
from qgraft.adapters.selection import BatchRows, Selection
from qgraft.errors import AdapterError
from qgraft.kernels.autocast import to_autocast
from qgraft.linear import QuantizedEmbedding, QuantizedLinear, nothing, table_rows

Where = slice | Tensor  # tokens of a pass: some in a row, or by their places


@dataclass(frozen=True)
class TokenRowsConfig:
    """Which tokens have rows, in the order of the rows. What every part of a LoRA is asked is answered, too."""

    token_indices: tuple[int, ...]
    lora_dropout: ClassVar[float] = 0.0
    scaling: ClassVar[float] = 1.0
    exact: ClassVar[bool] = False


class TokenRows(Part):
    """Rows of some tokens of a table or an output layer, [tokens, width] in float32.

    Args:
        values: what they begin with, copied.
    """

    kind = "lora"
    config: TokenRowsConfig

    def __init__(self, config: TokenRowsConfig, values: Tensor) -> None:
        super().__init__()
        self.config = config
        self.rows = nn.Parameter(values.detach().float().clone())
        ids = torch.tensor(config.token_indices, device=values.device)
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("ordered", ids.sort().values, persistent=False)
        self.register_buffer("slots", ids.argsort(), persistent=False)

    @property
    def end(self) -> int:
        """How many rows a vocabulary has at least that holds all of these tokens."""
        return max(self.config.token_indices) + 1

    def find(self, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """(Which of the ids have a row, [n] bool; the number of the row there, [n] int64)."""
        ordered, slots = cast(Tensor, self.ordered), cast(Tensor, self.slots)
        place_N = torch.searchsorted(ordered, ids_N).clamp_(max=len(ordered) - 1)
        return ordered[place_N] == ids_N, slots[place_N]

    def slot_of(self, token: int | None) -> int | None:
        """The number of the token's row; None where it has none."""
        return self.config.token_indices.index(token) if token in self.config.token_indices else None

    def tensors(self, path: str) -> dict[str, Tensor]:
        """See Part."""
        return {rows_name(path): self.rows.detach()}


class TiedRows(Part):
    """What stands at a tied output layer for the rows of the input: these, which are trained and saved once."""

    kind = "lora"
    config: TokenRowsConfig

    def __init__(self, source: TokenRows) -> None:
        super().__init__()
        self.config = source.config
        self._source = (source,)  # no module of this one

    @property
    def source(self) -> TokenRows:
        """The rows."""
        return self._source[0]

    def tensors(self, path: str) -> dict[str, Tensor]:
        """See Part."""
        return {}


def rows_in(part: nn.Module) -> TokenRows:
    """The rows that a part stands for."""
    return part.source if isinstance(part, TiedRows) else cast(TokenRows, part)


def token_rows_of(adapter: Adapter) -> dict[str, TokenRows]:
    """The rows that the adapter trains, by module path; a tied output layer's are those of the input."""
    return {path: part for path, part in adapter.parts.items() if isinstance(part, TokenRows)}


def token_ids(adapter: Adapter) -> list[int]:
    """The tokens that the adapter has rows of, in order, each once."""
    return sorted({each for part in token_rows_of(adapter).values() for each in part.config.token_indices})


def grows_vocabulary(model: nn.Module, adapter: Adapter) -> bool:
    """Whether the model gets more rows than it has now when the adapter is put on it."""
    return any(part.end > table_rows(model.get_submodule(path)) for path, part in token_rows_of(adapter).items())


def unknown_tokens(model: nn.Module, names: Iterable[str], ids: Iterable[int]) -> list[int]:
    """Those of the ids that there is no row of where these adapters are active."""
    table: Any = cast(Any, model).get_input_embeddings()
    count = table.base_rows if isinstance(table, TokenLayer) else table.weight.shape[0]
    beyond = {each for each in ids if not 0 <= each < count}
    if beyond and isinstance(table, TokenLayer):
        parts = [rows_in(part) for name in names if (part := table.named(name)) is not None]
        beyond -= {token for part in parts for token in part.config.token_indices}
    return sorted(beyond)


class TokenLayer(LoraLayer):
    """A table or an output layer of the base with rows of any number of adapters beside it."""

    base: Any

    def add(self, name: str, part: Part) -> None:
        """See Holder."""
        super().add(name, part)
        self._resize()

    def drop(self, name: str) -> None:
        """See Holder."""
        super().drop(name)
        self._resize()

    @property
    def base_rows(self) -> int:
        """How many rows the base's own weight has."""
        return table_rows(self.base)

    def _resize(self) -> None:
        """Have as many rows as the adapters need."""
        ends = [rows_in(part).end for part in self.loras.values()]
        self._set_rows(max([self.base_rows, *ends]))

    def _set_rows(self, count: int) -> None:
        raise NotImplementedError

    def with_segments(self, x: Tensor, served: Sequence[tuple[Any, LayerSegment]]) -> Tensor:
        """The output for x with each of these adapters' rows for its own tokens."""
        return self._with_rows(x, [(rows_in(part), slice(segment.start, segment.stop)) for part, segment in served])

    def _row_by_row(self, x: Tensor, rows: BatchRows | None) -> Tensor:
        assert rows is not None
        tokens = self.tokens_of(x) // max(rows.batch, 1)
        each_T = torch.arange(tokens, device=x.device)
        served = [
            (rows_in(part), (index[:, None] * tokens + each_T).reshape(-1))
            for name, index in rows.groups
            if (part := self.named(name)) is not None
        ]
        y = self._with_rows(x, served)
        rows.check(y)
        return y

    def _with_rows(self, x: Tensor, served: Sequence[tuple[TokenRows, Where]]) -> Tensor:
        raise NotImplementedError

    def _device(self) -> torch.device:
        return self.base.weight.device


class TokenEmbedding(TokenLayer):
    """A table with rows beside it; ids [...] int64 -> [..., embedding_dim]."""

    base: QuantizedEmbedding | nn.Embedding

    def __init__(self, base: QuantizedEmbedding | nn.Embedding, selection: Selection | None = None) -> None:
        super().__init__(base, (base.num_embeddings, base.embedding_dim), selection)
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.padding_idx = base.padding_idx

    def _set_rows(self, count: int) -> None:
        self.num_embeddings = self.in_features = count

    def tokens_of(self, ids: Tensor) -> int:
        """How many tokens ids [...] are."""
        return ids.numel()

    def _with_rows(self, ids: Tensor, served: Sequence[tuple[TokenRows, Where]]) -> Tensor:
        ids_N, longer = ids.reshape(-1), self.num_embeddings > self.base_rows
        missing_N = ids_N >= self.base_rows
        y_NH = self.base(ids_N.masked_fill(missing_N, 0) if longer else ids_N)
        factor = self.base.scale if isinstance(self.base, QuantizedEmbedding) else 1.0
        for part, where in served:
            has_N, slot_N = part.find(ids_N[where])
            untrained = part.slot_of(self.padding_idx)  # as PEFT has it: a table's padding token learns nothing
            added_NH = (embedding(slot_N, part.rows, untrained) * factor).to(y_NH.dtype)
            y_NH[where] = torch.where(has_N[:, None], added_NH, y_NH[where])
            missing_N[where] = missing_N[where] & ~has_N
        if longer:
            _check_known(ids_N, missing_N)
            y_NH = y_NH.masked_fill(missing_N[:, None], torch.nan)
        return y_NH.view(*ids.shape, self.embedding_dim)

    @property
    def weight(self) -> Tensor:
        """As that of a QuantizedEmbedding, with all rows; the values are NaN."""
        return nothing(self.num_embeddings, self.embedding_dim, self.base.weight.dtype, self._device())


def _check_known(ids_N: Tensor, missing_N: Tensor) -> None:
    """Raise AdapterError for an id without a row. On a GPU, where asking waits for all that runs, the row is NaN instead."""
    if missing_N.device.type == "cpu" and bool(missing_N.any()):
        raise AdapterError(
            f"token {int(ids_N[missing_N][0])} has no row here: it is a new token of an adapter that is not active",
            hint="use_adapter() makes it active; a text for the base, or for another adapter, must not hold it",
        )


class TokenHead(TokenLayer):
    """An output layer with rows beside it; x [..., in] -> logits [..., out]."""

    base: QuantizedLinear | nn.Linear

    def __init__(self, base: QuantizedLinear | nn.Linear, selection: Selection | None = None) -> None:
        super().__init__(base, (base.in_features, base.out_features), selection)

    def _set_rows(self, count: int) -> None:
        self.out_features = count

    def tokens_of(self, x: Tensor) -> int:
        """How many tokens x [..., in] is of."""
        return x.numel() // x.shape[-1]

    def parameters(self, recurse: bool = True) -> Any:
        """Those of its own, and the rows of the input that it computes with: a loss needs their gradients."""
        yield from super().parameters(recurse)
        yield from (part.source.rows for part in self.loras.values() if isinstance(part, TiedRows))

    def _with_rows(self, x: Tensor, served: Sequence[tuple[TokenRows, Where]]) -> Tensor:
        x_NI = to_autocast(x).reshape(-1, self.in_features)
        y_NV = self.base(x_NI)
        if (more := self.out_features - self.base_rows) > 0:
            lowest = torch.finfo(y_NV.dtype).min
            y_NV = torch.cat([y_NV, y_NV.new_full((len(y_NV), more), lowest)], dim=1)
        for part, where in served:
            logits_NR = (x_NI[where] @ part.rows.to(x_NI.dtype).T).to(y_NV.dtype)
            columns = cast(Tensor, part.ids)
            if isinstance(where, slice):
                y_NV[where].index_copy_(1, columns, logits_NR)
            else:
                y_NV[where[:, None], columns[None]] = logits_NR
        return y_NV.view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """As that of a QuantizedLinear, with all rows; the values are NaN."""
        return nothing(self.out_features, self.in_features, self.base.weight.dtype, self._device())


def check_together(adapters: Mapping[str, Adapter], weights: Mapping[str, float]) -> None:
    """Raise AdapterError for active adapters whose rows have no meaning so: in part, or of the same tokens twice."""
    seen: dict[tuple[str, int], str] = {}
    for name, weight in weights.items():
        rows = token_rows_of(adapters[name])
        if rows and weight != 1:
            raise AdapterError(
                f"adapter {name!r} with the weight {weight}: it has rows of tokens, which stand in for those of the table, "
                "expected 1",
                hint="a share of a row means nothing for a token that the table does not have",
            )
        for path, part in rows.items():
            for token in part.config.token_indices:
                other = seen.setdefault((path, token), name)
                if other != name:
                    raise AdapterError(
                        f"adapters {other!r} and {name!r} both have a row of token {token} ({path}): which one counts?",
                        hint="use one of them at a time",
                    )
