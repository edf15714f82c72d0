"""Which linear layers of a model a LoRA can be put on, by the names that people give them, and which carry one."""

import re
from collections.abc import Iterator, Sequence

from torch import nn

from qgraft.adapters.holder import modules_outside_adapters
from qgraft.adapters.lora import LoraLayer, LoraLinear
from qgraft.adapters.lora_conv import is_pointwise
from qgraft.adapters.lora_embedding import LoraEmbedding
from qgraft.errors import OptionError, near_match
from qgraft.linear import QuantizedEmbedding, QuantizedLinear
from qgraft.model_parts import heads_of, is_within, vision_of
from qgraft.patterns import matches
from qgraft.plain_layers import is_plain_linear, weight_is_read


def find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """The paths of the linear layers that `target_modules` names; see attach_lora. Raises OptionError for none."""
    layers = _linear_layers(model)
    linears, vision = list(layers), vision_of(model)
    if target_modules in ("all-linear", "all"):
        getter = getattr(model, "get_output_embeddings", None)
        output = getter() if getter else None
        inner = [path for path, layer in layers.items()
                 if layer is not output and not is_within(path, vision) and not is_pointwise(layer)]  # fmt: skip
        if not inner:
            raise OptionError(f"target_modules={target_modules!r}: the model has no linear layer but its output layer")
        return inner
    if isinstance(target_modules, str) and not re.fullmatch(r"[\w.,\s-]+", target_modules):
        return _match_regex(linears, target_modules)
    names = target_modules.split(",") if isinstance(target_modules, str) else target_modules
    wanted = [name.strip() for name in names if name.strip()]
    named = {name: [path for path in linears if is_named(path, name)] for name in wanted}
    if (missing := [name for name in wanted if not named[name]]) or not wanted:
        _raise_unknown_targets(missing, linears)
    if not vision:
        return [path for path in linears if any(is_named(path, name) for name in wanted)]
    # the last part of a path alone names layers of the decoder of text, where one there is called so
    reads = {
        name: [p for p in paths if "." in name or not is_within(p, vision)] or paths for name, paths in named.items()
    }
    chosen = {path for paths in reads.values() for path in paths}
    return [path for path in linears if path in chosen]


def _match_regex(linears: list[str], pattern: str) -> list[str]:
    try:
        matched = [path for path in linears if matches(pattern, path)]
    except ValueError as error:
        raise OptionError(f"target_modules={pattern!r} is not a regular expression: {error}") from error
    if not matched:
        _raise_unknown_targets([pattern], linears)
    return matched


def _raise_unknown_targets(missing: Sequence[str], linears: list[str]) -> None:
    leaves = sorted({path.rsplit(".", 1)[-1] for path in linears})
    close = [hint for name in missing if (hint := near_match(name, leaves))]
    raise OptionError(
        f"target_modules: no linear layer is named {', '.join(missing) or '(nothing)'}; "
        f"the model has: {', '.join(leaves) or 'none'}",
        hint=" ".join(close) or 'use one of these names, or "all-linear"',
    )


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers and convolutions of 1x1 by their paths, wrapped ones by their wrapper's; the model itself is none.

    Those whose weights the model reads itself are left out: it would pass by what a LoRA adds (see weight_is_read). So are
    those of a classifier's head, which is trained whole (whole.py).
    """
    heads, layers = heads_of(model), adaptable_layers(model)
    return {path: layer for path, layer in layers.items() if not is_embedding(layer) and not is_within(path, heads)}


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers that a LoRA of a file can be on, by their paths: linear ones, convolutions of 1x1 and embeddings."""
    return {
        path: module
        for path, module in modules_outside_adapters(model)
        if path and (is_embedding(module) or (_is_linear(module) and not weight_is_read(model, path)))
    }


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, LoraLinear | QuantizedLinear) or is_plain_linear(module) or is_pointwise(module)


def is_embedding(module: nn.Module) -> bool:
    """Whether this is a table whose rows are looked up, with adapters on it or not."""
    return isinstance(module, LoraEmbedding | QuantizedEmbedding) or type(module) is nn.Embedding


def is_named(path: str, name: str) -> bool:
    """Whether `name` is the module path or its last parts, as in PEFT."""
    return path == name or path.endswith(f".{name}")


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(module path, layer) of every wrapped layer, in the order of the model; an embedding may be among them."""
    return ((path, module) for path, module in modules_outside_adapters(model) if isinstance(module, LoraLayer))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(module path, layer) of every wrapped linear layer, in the order of the model."""
    return ((path, layer) for path, layer in adapted_layers(model) if isinstance(layer, LoraLinear))
