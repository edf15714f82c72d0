"""Rows of single tokens made for a model: where its tables are, which tokens they may be of, what they begin with.

What PEFT's `trainable_token_indices` means is here: ids are those of the input embedding, of a tied model of both tables;
lists by names of layers say it of each. What the rows do is in token_rows.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qgraft.adapters.adapter import Part
from qgraft.adapters.lora import LoraLayer
from qgraft.adapters.token_rows import TiedRows, TokenRows, TokenRowsConfig, rows_in
from qgraft.errors import AdapterError, UnsupportedError, option
from qgraft.formats import take_rows
from qgraft.kernels import dequantize
from qgraft.linear import QuantizedEmbedding, QuantizedLinear, table_rows
from qgraft.plain_layers import is_plain_linear, weight_is_read

TokenIndices = Sequence[int] | Mapping[str, Sequence[int]]
MOST_NEW = 1 << 20  # rows behind the end of a table


def path_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    """The path of a module of the model; None where it has none."""
    return next((path for path, module in model.named_modules() if module is wanted and path), None)


@dataclass(frozen=True)
class Tables:
    """Where a model has the rows of its vocabulary.

    Attributes:
        table: path of the input embedding.
        head: path of the output layer; None where it has none.
        tied: whether both have the same rows.
    """

    table: str
    head: str | None
    tied: bool

    def named(self, indices: TokenIndices) -> dict[str, tuple[int, ...]]:
        """The tokens by the path of the layer, with PEFT's meaning: a list is of the input embedding, of a tied model of
        both; a tied output layer is named only where it has other ones.

        Raises AdapterError for a name that is of neither, and for no tokens, an impossible id, or one twice.
        """
        if not isinstance(indices, Mapping):
            return {self.table: _checked(indices)}
        found = {self._path(str(name)): _checked(each) for name, each in indices.items()}
        if self.tied and self.head and found.get(self.head) == found.get(self.table):
            found.pop(self.head)
        return found

    def _path(self, name: str) -> str:
        for path in filter(None, (self.table, self.head)):
            if f".{path}".endswith(f".{name}"):
                return path
        raise AdapterError(
            f"trainable_token_indices: {name!r} is neither the input embedding ({self.table}) nor the output layer "
            f"({self.head})"
        )


def _checked(indices: Any) -> tuple[int, ...]:
    """Ids of tokens. Raises AdapterError for none, a value that is no id, or one that is there twice."""
    ids = tuple(indices) if isinstance(indices, Sequence) and not isinstance(indices, str) else ()
    if not ids or not all(type(each) is int and 0 <= each < 2**31 for each in ids):
        raise AdapterError(f"trainable_token_indices: got {str(indices)[:80]}, expected a list of token ids")
    if len(set(ids)) < len(ids):
        twice = next(each for each in ids if ids.count(each) > 1)
        raise AdapterError(f"trainable_token_indices: token {twice} is there twice")
    return ids


def tables_of(model: nn.Module) -> Tables:
    """Where the model has the rows of its vocabulary.

    Raises UnsupportedError for a model whose rows cannot be stood in for: it has other tables, reads the weights itself, or
    adds a bias to its logits, which PEFT leaves out of them.
    """
    owner: Any = model
    table = path_of(model, getattr(owner, "get_input_embeddings", lambda: None)())
    output: Any = getattr(owner, "get_output_embeddings", lambda: None)()
    head, name = path_of(model, output), type(model).__name__
    config = getattr(owner, "config", None)
    if table is None or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{name}: rows of single tokens are trained in decoders only, beside one input embedding"
        )
    source: Any = _base(model, table)
    layer: Any = getattr(output, "base", output)
    if not (isinstance(source, QuantizedEmbedding) or type(source) is nn.Embedding):
        raise UnsupportedError(f"{name}: {table} is a {type(source).__name__}, which has no rows to stand in for")
    if output is not None and not (isinstance(layer, QuantizedLinear) or is_plain_linear(layer)):
        raise UnsupportedError(
            f"{name}: its output layer is a {type(layer).__name__}, which has no rows to stand in for"
        )
    if output is not None and layer.bias is not None:
        raise UnsupportedError(f"{name}: its output layer adds a bias, which rows of single tokens have none of")
    if any(path and weight_is_read(model, path) for path in (table, head)):
        raise UnsupportedError(f"{name}: its code reads the weights of {table} or {head} by itself")
    tied = output is not None and _weight(source) is _weight(layer)
    return Tables(table, head, tied)


def _weight(layer: Any) -> Any:
    return layer.packed_weight if hasattr(layer, "packed_weight") else layer.weight


def make_token_rows(
    model: nn.Module, indices: TokenIndices, values: Mapping[str, Mapping[int, Tensor]] | None = None
) -> dict[str, Part]:
    """Parts for these tokens of the model, by module path, on no model yet.

    Args:
        indices: ids, or ids by the layer's name, as PEFT's trainable_token_indices.
        values: what rows begin with, by path and id, [width]; without one a token of the table begins with its row there,
            and one behind its end with the mean of all rows.

    Raises AdapterError, UnsupportedError.
    """
    tables = tables_of(model)
    parts: dict[str, Part] = {}
    for path, ids in tables.named(indices).items():
        _check_end(model, path, max(ids) + 1)
        own = {} if values is None else values.get(path, {})
        parts[path] = TokenRows(TokenRowsConfig(ids), _first_values(model.get_submodule(path), ids, own))
    source = parts.get(tables.table)
    if tables.tied and tables.head and tables.head not in parts and isinstance(source, TokenRows):
        parts[tables.head] = TiedRows(source)
    first = next((rows_in(part) for part in parts.values()), None)
    longer = max((rows_in(part).end for part in parts.values()), default=0) > table_rows(_base(model, tables.table))
    if first is not None and longer and tables.head and parts.keys() != {tables.table, tables.head}:
        missing = tables.head if tables.head not in parts else tables.table
        raise AdapterError(
            f"new tokens, behind the {table_rows(_base(model, tables.table))} rows of the table, need rows in both: none are "
            f"given for {missing}",
            hint=f"trainable_token_indices={{{tables.table.rpartition('.')[2]!r}: ids, {tables.head!r}: ids}}",
        )
    return parts


def _check_end(model: nn.Module, path: str, end: int) -> None:
    """Raise where rows behind the end of the table cannot be had."""
    rows, config = table_rows(_base(model, path)), cast(Any, getattr(model, "config", None))
    if end - rows > MOST_NEW:
        raise AdapterError(
            f"trainable_token_indices: token {end - 1} is {end - rows} rows behind the end of {path}, which has {rows}"
        )
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    if end > rows and any(getattr(text, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")):
        raise UnsupportedError(
            f"new tokens: {type(model).__name__} caps its logits, so a token that is not there cannot be ruled out",
            hint=f"train one of its unused tokens: {option('trainable_token_indices', '[ID]')}",
        )


def _base(model: nn.Module, path: str) -> Any:
    module = model.get_submodule(path)
    return module.base if isinstance(module, LoraLayer) else module


@torch.no_grad()
def _first_values(layer: Any, ids: Sequence[int], own: Mapping[int, Tensor]) -> Tensor:
    """What rows begin with, [tokens, width] float32; see make_token_rows."""
    base: Any = layer.base if isinstance(layer, LoraLayer) else layer
    count, mean = table_rows(base), None
    rows = []
    for each in ids:
        if each in own:
            rows.append(own[each].float())
        elif each < count:
            rows.append(table_values(base, [each])[0])
        else:
            mean = mean_of_table(base) if mean is None else mean
            rows.append(mean)
    device = base.weight.device
    return torch.stack([row.to(device) for row in rows])


@torch.no_grad()
def table_values(layer: Any, ids: Sequence[int]) -> Tensor:
    """Rows of a table or an output layer without any adapter, [n, width] float32."""
    base: Any = layer.base if isinstance(layer, LoraLayer) else layer
    index = torch.tensor(list(ids))
    if not hasattr(base, "packed_weight"):
        return base.weight[index.to(base.weight.device)].float()
    packed = base.packed_weight.get()
    return dequantize(take_rows(packed, index.to(packed.device)), torch.float32)


@torch.no_grad()
def mean_of_table(layer: Any, chunk: int = 4096) -> Tensor:
    """The mean of all rows, [width] float32, summed in float64."""
    count = table_rows(layer)
    total = sum(
        table_values(layer, range(start, min(count, start + chunk))).double().sum(0) for start in range(0, count, chunk)
    )
    return (cast(Tensor, total) / count).float()


def settle_vocabulary(model: nn.Module) -> None:
    """Let the configuration say how many rows the model has now: that of its table, with the rows of its adapters."""
    owner: Any = model
    table: Any = getattr(owner, "get_input_embeddings", lambda: None)()
    config: Any = getattr(owner, "config", None)
    if table is None or not hasattr(config, "get_text_config"):
        return
    text: Any = config.get_text_config()
    count = getattr(table, "num_embeddings", None)
    if count is not None and getattr(text, "vocab_size", count) != count:
        text.vocab_size = count
        if hasattr(owner, "vocab_size"):
            owner.vocab_size = count
