"""A LoRA between a model and the two files of its adapter folder: PEFT's options (peft_config.py) and PEFT's tensors, whose
names adapters/peft_names.py knows.

Writing takes both from the model. Reading compares both with the model before anything is attached, and finds all that
differs; folder.py decides what is to be done about it.

Beside a LoRA on the embedding or the output layer PEFT puts a copy of the base's weight. It is not trained, and is passed
over where it is the base's; a larger vocabulary, or another base's, is a difference.
"""

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from qgraft.adapter_files.expert_loras import parameter_names, take_experts
from qgraft.adapter_files.peft_config import (
    CONFIG,
    MINIMUMS,
    layer_config,
    peft_config,
    stated_rank,
)
from qgraft.adapter_files.seal import SEAL
from qgraft.adapter_files.whole import Whole
from qgraft.adapters.adapter import Adapter, Part
from qgraft.adapters.attach import make_loras
from qgraft.adapters.exact import blocks, minimums_at
from qgraft.adapters.holder import modules_outside_adapters
from qgraft.adapters.layer_choice import layer_number
from qgraft.adapters.lora import Lora, LoraLayer
from qgraft.adapters.lora_conv import is_pointwise
from qgraft.adapters.lora_experts import expert_loras
from qgraft.adapters.peft_names import (
    MAGNITUDE,
    is_lora,
    magnitude_name,
    minimums_name,
    parse_name,
    rows_name,
    tensor_name,
    whole_path,
)
from qgraft.adapters.targets import adaptable_layers, is_embedding, is_named
from qgraft.adapters.token_rows import token_rows_of
from qgraft.adapters.token_tables import make_token_rows, tables_of
from qgraft.adapters.weight_copies import copy_problem
from qgraft.adapters.whole import whole_modules
from qgraft.checkpoints.thudm_prefix import tensor_names
from qgraft.errors import AdapterError, CheckpointError, UnsupportedError
from qgraft.linear import table_rows
from qgraft.model_parts import is_within, peft_task
from qgraft.patterns import matches

Pairs = dict[str, dict[str, Tensor]]  # module path -> {"A": [r, in], "B": [out, r]}, of DoRA MAGNITUDE: [out]


@dataclass(frozen=True)
class StoredLoras:
    """What the tensors of a LoRA's file are.

    Attributes:
        pairs: A and B, and the magnitudes of DoRA, by the module path of the layer.
        embeddings: the paths that are said to be embeddings.
        minimums: the paths of exact LoRAs on K-quants, whose A is [r, groups].
        copies: weights of the base by the module path.
        rows: of single tokens by the module path of the layer.
        whole: modules that are trained whole, by their paths, each its tensors.
        problems: what is wrong with the names.
    """

    pairs: Pairs
    embeddings: set[str]
    minimums: set[str]
    copies: dict[str, Tensor]
    rows: dict[str, Tensor]
    problems: list[str]
    whole: Whole = field(default_factory=dict)


def lora_content(model: nn.Module, adapter: Adapter, source: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(PEFT's options, PEFT's tensors) of a LoRA on the model, whose base came from `source`."""
    parameters = [path for path, _ in expert_loras(adapter.parts)]
    layers = {path: part.stored_config for path, part in adapter.parts.items() if isinstance(part, Lora)}
    linears = [path for path in layers if path not in parameters]
    targets, numbers = _target_names(model, linears) if linears else ([], None)
    state, whole = adapter.state_dict(), list(whole_modules(adapter))
    peft_type = MINIMUMS if parse_state(state).minimums else "LORA"
    config = peft_config(layers, targets, source, numbers, peft_type, peft_task(model), token_indices(adapter))
    config |= {"target_parameters": parameter_names(model, parameters)} if parameters else {}
    return config | ({"modules_to_save": whole} if whole else {}), state


def token_indices(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """PEFT's trainable_token_indices of an adapter: ids by the last part of the layer's name."""
    return {path.rpartition(".")[2]: part.config.token_indices for path, part in token_rows_of(adapter).items()}


def refuse_minimums(adapter: Adapter) -> None:
    """Raise UnsupportedError for an adapter that PEFT cannot compute: an exact LoRA with layers in K-quants."""
    if found := sorted(parse_state(adapter.state_dict()).minimums):
        raise UnsupportedError(
            f"{adapter.name}: an exact LoRA with {len(found)} layers in K-quants ({found[0]} first) is none of PEFT's",
            hint="merge it: the merged file has all of it",
        )


def parse_state(state: Mapping[str, Tensor], saved: Sequence[str] | None = None) -> StoredLoras:
    """The tensors of a file by what they are; `saved` are PEFT's modules_to_save."""
    stored = StoredLoras({}, set(), set(), {}, {}, [])
    loras = stored.pairs
    for key, tensor in state.items():
        if (within := whole_path(key, saved or ())) is not None:
            stored.whole.setdefault(within[0], {})[within[1]] = tensor
            continue
        name = parse_name(key)
        if name is None:
            stored.problems.append(f"unexpected tensor {key}")
        elif name.part is None:
            stored.copies[name.path] = tensor
        elif name.part == "rows":
            stored.rows[name.path] = tensor
        else:
            loras.setdefault(name.path, {})[name.part] = tensor
            stored.embeddings.update([name.path] if name.of_embedding else [])
            stored.minimums.update([name.path] if name.of_minimums else [])
    for path, pair in list(loras.items()):
        for missing in sorted({"A", "B"} - pair.keys()):
            of_minimums, of_embedding = path in stored.minimums, path in stored.embeddings
            key = minimums_name(path, missing) if of_minimums else tensor_name(path, missing, of_embedding)
            stored.problems.append(f"missing tensor {key}")
            loras.pop(path, None)
    return stored


def holds_lora(path: Path) -> bool:
    """Whether any of the tensors in a file is of a LoRA, by PEFT's names. Raises AdapterError where it cannot be read."""
    try:
        return any(map(is_lora, tensor_names(path)))
    except CheckpointError as error:
        raise AdapterError(error.message, hint=error.hint) from error


def bare_options(state: Mapping[str, Tensor], lora_alpha: float) -> dict[str, Any]:
    """PEFT's options of a LoRA of which only the tensors are known, and its alpha."""
    pairs = parse_state(state).pairs
    ranks = {path: pair["A"].shape[0] for path, pair in pairs.items() if pair["A"].dim()}
    patterns = {f"^{re.escape(path)}": rank for path, rank in ranks.items()}
    return {
        "peft_type": "LORA",
        "r": max(ranks.values(), default=1),
        "lora_alpha": lora_alpha,
        "rank_pattern": patterns,
        "use_dora": any(MAGNITUDE in pair for pair in pairs.values()),
    }


def fit_layers(
    model: nn.Module, config: Mapping[str, Any], stored: StoredLoras, longer: Container[str] = ()
) -> tuple[Pairs, list[str]]:
    """(those that fit the model's layers, what differs). Copies of the base's layers `longer` may have more rows."""
    loras, layers = dict(stored.pairs), adaptable_layers(model)  # a walk over the model, so once
    fitting, problems = take_experts(model, config, loras)
    copies = stored.copies.items()
    problems += [p for path, copy in copies if (p := _copy_problem(model, layers, path, copy, path in longer))]
    for path, pair in loras.items():
        if is_pointwise(layers.get(path, model)):
            pair = {part: as_matrix(tensor) for part, tensor in pair.items()}
        if (MAGNITUDE in pair) != bool(config.get("use_dora")):
            problems.append(f"{'unexpected' if MAGNITUDE in pair else 'missing'} tensor {magnitude_name(path)}")
            if MAGNITUDE not in pair:
                continue
        if problem := _shape_problem(model, layers, path, pair, stored):
            problems.append(problem)
            continue
        fitting[path] = pair
        if pair["A"].shape[0] != (rank := stated_rank(config, path)):
            problems.append(f"{path}: rank {pair['A'].shape[0]}, but {CONFIG} says r={rank}")
    targets = config.get("target_modules")
    if targets and targets != "all-linear" and loras and not config.get("exclude_modules"):
        expected = named = {path for path in _targets_of(layers, targets) if not is_within(path, stored.whole)}
        if isinstance(targets, list):
            expected = {path for path in expected if path in targets or _in_layers(path, config)}
        problems += [f"missing tensors of {path}" for path in sorted(expected - loras.keys())]
        problems += [
            f"{path}: it has tensors, but target_modules does not name it"
            for path in sorted((fitting.keys() & layers.keys()) - named)
        ]
    return fitting, problems


def is_of_convolution(pair: Mapping[str, Tensor]) -> bool:
    """Whether A [r, in, 1, 1] and B [out, r, 1, 1] are those of a convolution of 1x1."""
    return all(pair[part].dim() == 4 and pair[part].shape[2:] == (1, 1) for part in "AB")


def as_matrix(tensor: Tensor) -> Tensor:
    """A or B of a convolution of 1x1 as a matrix; another tensor of two dimensions as one of three, which fits nothing."""
    return tensor[..., 0, 0] if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) else tensor[..., None]


def inexact_layers(model: nn.Module, stored: StoredLoras, fitting: Pairs) -> dict[str, str]:
    """Layers that cannot have the exact LoRA that their file says it is, each with the reason."""
    problems = {}
    for path, pair in fitting.items():
        place = minimums_at(model.get_submodule(path))
        if path in stored.minimums:
            continue  # which fit no other layer
        if place is None or place.subs > 1:
            problems[path] = f"{path}: an exact LoRA, and the layer has no such minimums: it would be an ordinary one"
        elif blocks(pair["A"], place.width) is None:
            problems[path] = f"{path}: A differs within {place.width} columns, so it is no exact LoRA, as {SEAL} says"
    return problems


def fit_rows(model: nn.Module, config: Mapping[str, Any], stored: StoredLoras) -> tuple[dict[str, Part], list[str]]:
    """(the rows of single tokens that fit the model, as parts on no model yet; what differs).

    PEFT keeps copies of tables that were resized: their new rows that were not trained are taken from there.
    """
    indices = config.get("trainable_token_indices") or {}
    if not indices:
        return {}, [f"unexpected tensor {rows_name(path)}" for path in stored.rows]
    try:
        tables = tables_of(model)
        named = tables.named(indices)
        if missing := [path for path in named if path not in stored.rows]:
            return {}, [f"missing tensor {rows_name(missing[0])}"]
        if wrong := [
            line for path, ids in named.items() if (line := _rows_problem(model, path, ids, stored.rows[path]))
        ]:
            return {}, wrong
        values = {path: dict(zip(ids, stored.rows[path], strict=True)) for path, ids in named.items()}
        for path in (tables.table, *([] if tables.head is None or tables.tied else [tables.head])):
            copy, count = stored.copies.get(path), table_rows(_base(model, path))
            for token in range(count, 0 if copy is None else len(copy)):
                values.setdefault(path, {}).setdefault(token, cast(Tensor, copy)[token])
        parts = make_token_rows(model, {path: list(rows) for path, rows in values.items()}, values)
    except AdapterError as error:
        return {}, [error.message]
    others = stored.rows.keys() - named.keys()
    if tables.tied and tables.head in others and tables.table in named:  # PEFT may keep a tied layer's once more
        others -= {tables.head} if stored.rows[tables.head].equal(stored.rows[tables.table]) else set()
    return parts, [f"unexpected tensor {rows_name(path)}" for path in sorted(others)]


def _rows_problem(model: nn.Module, path: str, ids: Sequence[int], rows: Tensor) -> str | None:
    layer: Any = _base(model, path)
    expected = [len(ids), getattr(layer, "embedding_dim", None) or layer.in_features]
    if list(rows.shape) == expected and rows.is_floating_point():
        return None
    return f"{rows_name(path)}: got {rows.dtype} {list(rows.shape)}, expected floats {expected}"


def _base(model: nn.Module, path: str) -> Any:
    """The base's own layer at `path`, below adapters."""
    module = model.get_submodule(path)
    return module.base if isinstance(module, LoraLayer) else module


def made_of_pairs(
    model: nn.Module,
    name: str,
    config: Mapping[str, Any],
    loras: Pairs,
    exact: Container[str] = (),
    rows: Mapping[str, Part] | None = None,
    whole: Whole | None = None,
) -> Adapter:
    """The LoRA, on no model yet: each layer with the rank of its tensors and the alpha of its pattern, those in `exact` as
    exact LoRAs; and the modules that are trained whole."""
    layers = {path: layer_config(config, path, pair["A"].shape[-2], path in exact) for path, pair in loras.items()}
    one = {config: config for config in layers.values()}  # for all layers that are alike: a hundred adapters are held
    layers = {path: one[config] for path, config in layers.items()}
    parts = ("A", "B", MAGNITUDE) if config.get("use_dora") else ("A", "B")
    values = {path: tuple(pair[part] for part in parts) for path, pair in loras.items()}
    return make_loras(model, name, layers, values, rows, whole)


def _targets_of(layers: Iterable[str], targets: str | list[str]) -> set[str]:
    """The layers that PEFT's target_modules names: last parts or whole paths, or one regular expression."""
    if isinstance(targets, str):
        return {path for path in layers if matches(targets, path)}
    return {path for path in layers for target in targets if is_named(path, target)}


def _in_layers(path: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT's layers_to_transform, a number or a list, lets the module at `path` have an adapter."""
    numbers = config.get("layers_to_transform")
    if numbers is None or numbers == []:
        return True
    return layer_number(path, config.get("layers_pattern")) in ([numbers] if isinstance(numbers, int) else numbers)


def _shape_problem(
    model: nn.Module, layers: Mapping[str, nn.Module], path: str, pair: dict[str, Tensor], stored: StoredLoras
) -> str | None:
    of_embedding = path in stored.embeddings
    if path not in layers:
        there = dict(model.named_modules()).get(path)
        if there is None:
            return f"the model has no layer {path}"
        return f"{path} is a {type(there).__name__}, neither a linear layer nor an embedding"
    layer: Any = layers[path]
    if of_embedding != is_embedding(layer):
        got, expected = ("an embedding", "a linear layer") if of_embedding else ("a linear layer", "an embedding")
        return f"{path}: got the LoRA of {got}, and the model has {expected} there"
    A, B = pair["A"], pair["B"]
    if A.dim() != 2 or not A.is_floating_point() or not B.is_floating_point():
        got = f"A {list(A.shape)} {A.dtype}, B {list(B.shape)} {B.dtype}"
        return f"{path}: got {got}, expected two floating point matrices"
    out, width = _sizes(layer)
    if path in stored.minimums:
        place = minimums_at(layer)
        if place is None or place.subs == 1:
            return f"{path}: got a change of a K-quant's minimums, and the layer has none"
        width //= place.width
    expected_sizes = [A.shape[0], width], [out, A.shape[0]]
    if (list(A.shape), list(B.shape)) != expected_sizes:
        got = f"A {list(A.shape)}, B {list(B.shape)}"
        return f"{path}: got {got}, expected {expected_sizes[0]}, {expected_sizes[1]}"
    magnitude = pair.get(MAGNITUDE)
    if magnitude is not None and (list(magnitude.shape) != [out] or not magnitude.is_floating_point()):
        return f"{path}: got magnitudes {list(magnitude.shape)} {magnitude.dtype}, expected floats [{out}]"
    return None


def _sizes(layer: Any) -> tuple[int, int]:
    """(rows of B, columns of A) of a LoRA on the layer."""
    if is_embedding(layer):
        return layer.embedding_dim, layer.num_embeddings
    return (
        (layer.out_channels, layer.in_channels)
        if isinstance(layer, nn.Conv2d)
        else (layer.out_features, layer.in_features)
    )


def _copy_problem(
    model: nn.Module, layers: Mapping[str, nn.Module], path: str, copy: Tensor, longer: bool
) -> str | None:
    """What tells a copy of the base's layer at `path` from that layer; None where it is the same, but for its rounding."""
    layer = _base(model, path) if longer else layers.get(path)
    if layer is None:
        return f"unexpected tensor: a weight of {path}, which the model does not have"
    base = layer.base if isinstance(layer, LoraLayer) else layer
    return copy_problem(path, base, copy[: table_rows(base)] if longer else copy)


def _leaf(path: str) -> str:
    """The last part of a path, or the last two: a number alone would name other lists' modules too, which PEFT refuses."""
    parts = path.split(".")
    return ".".join(parts[-2:] if parts[-1].isdecimal() else parts[-1:])


def _target_names(model: nn.Module, paths: list[str]) -> tuple[list[str] | str, list[int] | None]:
    """The shortest names that select exactly these layers in PEFT, and the numbers that narrow them, if any do.

    The names are the last parts of the paths, with the one before where that is a number in a list, or the whole paths.
    PEFT takes a name for modules of every class, and raises where one is no layer: in Gemma 4's tower `q_proj` is a module
    around the layer `q_proj.linear`.
    """
    leaves = sorted({_leaf(path) for path in paths})
    modules = [path for path, _ in modules_outside_adapters(model)]
    named = {path for path in modules for leaf in leaves if is_named(path, leaf)}
    selected = {path: layer_number(path) for path in named}
    if selected.keys() == set(paths):
        return leaves, None
    numbers = {layer_number(path) for path in paths}
    if None not in numbers and {path for path, number in selected.items() if number in numbers} == set(paths):
        return leaves, sorted(number for number in numbers if number is not None)
    if {path for path in modules for whole in paths if is_named(path, whole)} == set(paths):
        return sorted(paths), None
    return "|".join(re.escape(path) for path in sorted(paths)), None  # one is the end of another layer's path
