"""Rows of single tokens, written into the packed tables before the layers are merged.

    table [V, width], packed    ->    table [V + new, width] in its own format
    an adapter's rows                 rounded to it, in the places of their tokens; all other rows byte for byte as they were

So what is merged then is a plain LoRA on a base that has the tokens: its gain, and what the merge keeps of it, are
measured with the rounded rows on both sides. What rounding does to the rows themselves is in the report's notes.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.adapters.adapter import Adapter
from qgraft.adapters.attach import detach_adapter, put_loras
from qgraft.adapters.base import base_of, find_adapter
from qgraft.adapters.choose import active_adapters, use_adapter
from qgraft.adapters.lora import Lora, LoraLayer
from qgraft.adapters.token_rows import check_together, token_rows_of
from qgraft.adapters.token_tables import settle_vocabulary, tables_of
from qgraft.checkpoints.origin import Origin
from qgraft.errors import AdapterError, UnsupportedError
from qgraft.formats import PackedTensor, dequantize, get_format, join_rows, quantize, take_rows
from qgraft.linear import QuantizedEmbedding, QuantizedLinear, in_stored_order, table_rows


@dataclass
class Written:
    """What writing rows changed.

    Attributes:
        adapters: as they were with their rows, by name.
        packed: the tables' bytes before, by module path.
        origin: that of the model before.
        notes: what a reader should know.
        kept: whether the rows stay where the block ends; set by whoever merged.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    packed: dict[str, PackedTensor] = field(default_factory=dict)
    origin: Any = None
    notes: list[str] = field(default_factory=list)
    kept: bool = False


@contextmanager
def rows_written(model: PreTrainedModel) -> Iterator[Written]:
    """Within the block the rows of the active adapters are in the tables, and the adapters are their LoRAs alone.

    Afterwards all is as it was, unless the block sets `kept`. Raises AdapterError for rows of tokens that have no text,
    UnsupportedError for a table that cannot be written.
    """
    base, weights = base_of(model), active_adapters(model)
    adapters = {name: find_adapter(model, name) for name in weights}
    written = Written(origin=base.origin)
    if not any(map(token_rows_of, adapters.values())):
        yield written
        return
    check_together(adapters, weights)
    tables, notes, tokens = _tables_with_rows(model, adapters)
    written.notes = notes
    written.adapters = {name: each for name, each in adapters.items() if token_rows_of(each)}
    for name, adapter in written.adapters.items():
        loras = {path: part for path, part in adapter.parts.items() if isinstance(part, Lora)}
        detach_adapter(model, name)
        put_loras(model, replace(adapter, parts=loras))
    use_adapter(model, weights)
    for path, packed in tables.items():
        written.packed[path] = _base(model, path).packed_weight.get()
        put_table(model, path, packed)
    if isinstance(base.origin, Origin):
        base.origin = replace(base.origin, tokens=_united(base.origin.tokens, tokens))
    try:
        yield written
    finally:
        if written.kept:  # they are the base's own now
            base.tokens = {text: token for text, token in base.tokens.items() if token not in tokens}
        else:
            base.origin = written.origin
            for path, packed in written.packed.items():
                put_table(model, path, packed)
            for name, adapter in written.adapters.items():
                detach_adapter(model, name)
                put_loras(model, adapter)
            use_adapter(model, weights)


def _united(before: Iterable[Any], more: Iterable[Any]) -> tuple[Any, ...]:
    """Tokens in the order of their ids, each once."""
    by_id = {token.id: token for token in (*before, *more)}
    return tuple(by_id[number] for number in sorted(by_id))


def put_table(model: PreTrainedModel, path: str, packed: PackedTensor) -> None:
    """Put a table of any number of rows at `path`, and at an output layer that is tied to it."""
    changed = _base(model, path)
    shared = changed.packed_weight
    changed.resize(packed)
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear | QuantizedEmbedding) and layer.packed_weight is shared:
            layer.resize(packed)
    settle_vocabulary(model)


def _base(model: PreTrainedModel, path: str) -> Any:
    module = model.get_submodule(path)
    return module.base if isinstance(module, LoraLayer) else module


@torch.no_grad()
def _tables_with_rows(
    model: PreTrainedModel, adapters: Mapping[str, Adapter]
) -> tuple[dict[str, PackedTensor], list[str], list[Any]]:
    """(The tables with the rows in them by path, notes, the tokens that the container does not have)."""
    rows: dict[str, dict[int, Tensor]] = {}
    for adapter in adapters.values():
        for path, part in token_rows_of(adapter).items():
            rows.setdefault(path, {}).update(zip(part.config.token_indices, part.rows, strict=True))
    where, base = tables_of(model), base_of(model)
    if where.tied and where.head in rows:
        raise UnsupportedError(
            f"merge: {where.head} is tied to {where.table}, and the adapter has other rows for it: a weight cannot hold both"
        )
    count = table_rows(_base(model, where.table))
    new = sorted({token for each in rows.values() for token in each if token >= count})
    tokens = {token.id: token for token in base.tokens.values()}
    if base.origin is not None and (unnamed := [token for token in new if token not in tokens]):
        raise AdapterError(f"merge: token {unnamed[0]} is new, and no tokenizer says which text it is",
                           hint="the tokenizer's files belong into the adapter's folder")  # fmt: skip
    if new != list(range(count, count + len(new))):
        missing = next(number for number in range(count, new[-1]) if number not in new)
        raise AdapterError(f"merge: the new tokens end with {new[-1]}, and none of the adapters has a row of {missing}")
    merged, errors = {}, []
    for path, each in rows.items():
        merged[path], error = _table_with(_base(model, path), path, each)
        errors.append(f"{path} in {merged[path].format} (relative rounding {error:.2g})")
    written = sorted({token for each in rows.values() for token in each})
    notes = [f"rows of {len(written)} tokens are written into {', '.join(errors)}"]
    return merged, notes, [tokens[each] for each in written if each in tokens]


def _table_with(layer: Any, path: str, rows: Mapping[int, Tensor]) -> tuple[PackedTensor, float]:
    """(The layer's weight with these rows in it, how far rounding moved them relative to their size)."""
    if not isinstance(layer, QuantizedEmbedding | QuantizedLinear):
        raise UnsupportedError(f"merge: {path} holds no packed weight, so no rows can be written into it")
    packed = layer.packed_weight.get()
    layout = get_format(packed.format)
    if layout.quantize is None or not layout.by_rows:
        raise UnsupportedError(
            f"merge: {path} is {packed.format}, of which qgraft writes no single rows",
            hint="keep the adapter beside its base, or save the base with its tables in another format",
        )
    ids = sorted(rows)
    values = in_stored_order(layer, torch.stack([rows[each] for each in ids]).float())
    rounded = quantize(values, packed.format)
    error = float((dequantize(rounded, torch.float32) - values).norm() / values.norm().clamp(min=1e-30))
    count = packed.shape[0]
    index = torch.arange(max(count, ids[-1] + 1), device=packed.device)
    index[torch.tensor(ids, device=packed.device)] = count + torch.arange(len(ids), device=packed.device)
    return take_rows(join_rows([packed, rounded]), index), error
