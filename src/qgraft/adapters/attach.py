"""Put LoRAs on a model, and take adapters of either kind off it.

The base's weights are never touched. Each target linear layer is replaced by a LoraLinear that wraps it; detaching puts
the wrapped layer back. Which modules are targets is asked of the modules themselves (`isinstance`, their names), never
of an architecture's name. Prefixes are put on by attach_prefix.py.

An adapter is made first, as a value (adapter.py), and put on the model then (`put_on`): nothing is changed by one that
cannot be made, and one that was taken off, or is on another copy of the model, is put on in the same way. What is done
here takes no longer for the hundredth adapter than for the first.

Once a model has an adapter, others may be attached, chosen and detached while threads answer with it. An adapter that a
call uses cannot be detached, and the first prefix cannot come, or the last one go, while there are calls.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from qgraft.adapters.adapter import Adapter, Part
from qgraft.adapters.base import adapter_names, adapters_of, gather, one_at_a_time, require_model, selection_of
from qgraft.adapters.batch_rows import accept_rows, refuse_rows
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.dora import DoraLora, check_dora
from qgraft.adapters.exact import check_exact, make_part
from qgraft.adapters.holder import Holder, modules_outside_adapters, set_module
from qgraft.adapters.layer_choice import LayerNumbers, parse_layers, within_layers
from qgraft.adapters.layer_ranks import configs_of
from qgraft.adapters.lora import Lora, LoraConfig, LoraLayer, LoraLinear, Values, starts_from_base
from qgraft.adapters.lora_conv import LoraConv
from qgraft.adapters.lora_embedding import LoraEmbedding
from qgraft.adapters.lora_experts import LoraExperts, find_parameters, nest
from qgraft.adapters.pissa import PissaLora, check_pissa
from qgraft.adapters.prefix import Prefixes
from qgraft.adapters.selection import Selection
from qgraft.adapters.targets import find_targets
from qgraft.adapters.token_rows import (
    TiedRows,
    TokenEmbedding,
    TokenHead,
    TokenLayer,
    TokenRows,
)
from qgraft.adapters.token_tables import TokenIndices, make_token_rows, settle_vocabulary
from qgraft.adapters.whole import WholeHolder, WholeModule, check_free, put_whole, whole_modules
from qgraft.errors import AdapterError, OptionError, option
from qgraft.experts import QuantizedExperts
from qgraft.linear import QuantizedEmbedding, QuantizedLinear
from qgraft.model_parts import heads_of

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
Place = Callable[
    [nn.Module, str, Selection], Holder
]  # what holds parts at a path of the model, put there if it has to be


def attach_lora(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
    name: str = "default",
    layers_to_transform: LayerNumbers | None = None,
    exact: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_dora: bool = False,
    init_lora_weights: bool | str = True,
    trainable_token_indices: TokenIndices | None = None,
    target_parameters: Sequence[str] = (),
) -> LoraConfig:
    """Freeze the model, wrap its target layers with a new LoRA `name` and make it the active adapter.

    Of a classifier (...ForSequenceClassification, ...ForTokenClassification) it also trains a copy of the head, whole.

    Args:
        model: any module tree with QuantizedLinear or nn.Linear layers; changed in place.
        r, lora_alpha, lora_dropout, use_rslora: see LoraConfig.
        target_modules: "all-linear" (every linear layer but the output layer), names of layers ("q_proj" or
            "layers.0.self_attn.q_proj"), a comma-separated list of them, or a regular expression that matches whole
            module paths, as in PEFT.
        name: how the adapter is called in use_adapter(); letters, digits, "_" and "-".
        layers_to_transform: only targets in these layers of the decoder, "15-29", "15,16" or [15, 16]; None for all.
        exact: change the base's minimums only, so that a merge loses nothing but their rounding; for layers in formats
            with minimums (q4_1, q5_1, q2_k, q4_k, q5_k). A rank above the number of groups of a row adds nothing.
        rank_pattern, alpha_pattern: ranks and alphas of single layers, see layer_ranks.py.
        use_dora: train the length of each row of the weight apart from its direction (dora.py).
        init_lora_weights: "pissa" or "pissa_niter_16" begins with the principal components of the packed weight, at rest
            (pissa.py); its files are those of an ordinary LoRA of twice the rank.
        trainable_token_indices: tokens whose rows of the table are trained beside it, as in PEFT: ids of the input
            embedding (and of a tied output layer), or ids by the layer's name. Ids behind the end of the table are new
            tokens, which begin with the mean of its rows and need rows in the output layer, too.
        target_parameters: the weights of experts that get one beside them, as in PEFT: "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj", or the whole names of such parameters. With them target_modules may be ().

    Returns the common options as a LoraConfig. Raises OptionError for a name that is of no linear layer, AdapterError for a
    name that is taken, UnsupportedError for an exact LoRA on layers without minimums.
    """
    require_model(model)
    check_new_name(model, name)
    targets = target_modules if isinstance(target_modules, str) else _names("target_modules", target_modules)
    numbers = None if layers_to_transform is None else parse_layers(layers_to_transform)
    named = target_parameters.split(",") if isinstance(target_parameters, str) else target_parameters
    parameters = _names("target_parameters", named)
    config = LoraConfig(
        r, lora_alpha, lora_dropout, use_rslora, targets, numbers, exact, use_dora, init_lora_weights, parameters
    )
    rows = {} if trainable_token_indices is None else make_token_rows(model, trainable_token_indices)
    chosen = chosen_layers(model, targets, numbers, parameters)
    attach_layers(model, name, configs_of(chosen, config, rank_pattern, alpha_pattern), rows=rows)
    return config


def chosen_layers(
    model: nn.Module,
    target_modules: str | Sequence[str],
    layers_to_transform: LayerNumbers | None,
    target_parameters: Sequence[str] = (),
) -> list[str]:
    """The paths of the layers that attach_lora() would put a LoRA on. Raises OptionError for none."""
    paths = [] if target_parameters and not target_modules else find_targets(model, target_modules)
    paths += find_parameters(model, target_parameters) if target_parameters else []
    return paths if layers_to_transform is None else within_layers(paths, parse_layers(layers_to_transform))


def _names(argument: str, given: Any) -> tuple[str, ...]:
    """Names of layers as a tuple. Raises OptionError for what is none."""
    names = tuple(given) if isinstance(given, Collection) else (given,)
    if not all(isinstance(name, str) for name in names):
        known = {"target_modules": "all-linear", "target_parameters": "mlp.experts.down_proj"}[argument]
        raise OptionError(f"{argument}={given!r}: expected names of layers, a text or a list of them",
                          hint=option(argument, known))  # fmt: skip
    return names


@one_at_a_time
def attach_layers(
    model: nn.Module,
    name: str,
    layers: Mapping[str, LoraConfig],
    values: Mapping[str, Values] | None = None,
    rows: Mapping[str, Part] | None = None,
) -> None:
    """Attach a LoRA `name` to the linear layers at these module paths, each with its own options, and make it active.

    Args:
        values: A and B of each layer (of DoRA the magnitudes, too) as files have them, copied; without them it is a new one.
        rows: of single tokens, which go with it (token_rows.make_token_rows).

    Raises OptionError for an impossible name, AdapterError for one that is taken, UnsupportedError for an exact LoRA on
    a layer without minimums.
    """
    check_new_name(model, name)
    put_loras(model, make_loras(model, name, layers, values, rows, dict.fromkeys(heads_of(model))))
    use_adapter(model, name)


def make_loras(
    model: nn.Module,
    name: str,
    layers: Mapping[str, LoraConfig],
    values: Mapping[str, Values] | None = None,
    rows: Mapping[str, Part] | None = None,
    whole: Mapping[str, Mapping[str, Tensor] | None] | None = None,
) -> Adapter:
    """A LoRA for these layers of the model, inactive and not on it yet; see attach_layers. Changes nothing of the model.

    Args:
        whole: modules that it has copies of and trains whole: path -> their tensors, None for those of the base.
    """
    wrapped = {path: _wrapper(model, path) for path in layers}
    check_exact({path: wrapped[path] for path, config in layers.items() if config.exact})
    check_dora({path: wrapped[path] for path, config in layers.items() if config.use_dora})
    check_pissa({path: (wrapped[path], config) for path, config in layers.items()})
    order = {path: index for index, (path, _) in enumerate(modules_outside_adapters(model))}
    if both := sorted(layers.keys() & (rows or {}).keys()):
        raise AdapterError(f"{both[0]}: a LoRA and rows of single tokens on one layer are not there together",
                           hint="leave the layer out of target_modules, or the tokens out")  # fmt: skip
    parts: dict[str, Part] = {
        path: _part(wrapped[path], layers[path], values[path] if values else None)
        for path in sorted(layers, key=lambda path: order.get(path, len(order)))
    }
    nest(parts)
    parts |= rows or {}
    parts |= {path: _copied(model, path, state) for path, state in (whole or {}).items()}
    adapter = Adapter(name, "lora", parts)
    adapter.let_train(False)
    return adapter


def _part(layer: LoraLayer, config: LoraConfig, values: Values | None) -> Lora:
    """A LoRA that fits the layer, of the kind that its options say."""
    if not isinstance(layer, LoraLinear):
        return layer.make(config, values)
    if config.use_dora:
        return DoraLora(layer, config, values)
    if starts_from_base(config.init_lora_weights):
        return PissaLora(layer, config)
    return make_part(layer, config, values)


def put_loras(model: nn.Module, adapter: Adapter) -> None:
    """Put a LoRA that fits the model on it, inactive: these modules, not copies of them."""
    rows = {path for path, part in adapter.parts.items() if isinstance(part, TokenRows | TiedRows)}
    whole = whole_modules(adapter)
    for path in adapter.parts:  # or an error, before anything is changed
        if path in whole:
            check_free(model.get_submodule(path), path)
        else:
            _wrapper(model, path, path in rows)

    def place(model: nn.Module, path: str, selection: Selection) -> Holder:
        return put_whole(model, path, selection) if path in whole else _wrapped(model, path, selection, path in rows)

    put_on(model, adapter, place)
    settle_vocabulary(model)


def _copied(model: nn.Module, path: str, state: Mapping[str, Tensor] | None) -> WholeModule:
    """A copy of the base's module at `path`, with these tensors if there are any."""
    module = model.get_submodule(path)
    part = WholeModule(module.base if isinstance(module, WholeHolder) else module)
    if state is not None:
        part.module.load_state_dict({leaf: tensor.float() for leaf, tensor in state.items()})
    return part


@one_at_a_time
def put_on(model: nn.Module, adapter: Adapter, place: Place) -> None:
    """Put an adapter on the model, inactive; nothing of the base trains from then on.

    Raises OptionError for an impossible name, AdapterError for one that is taken, UnsupportedError where another thread
    has the model for itself.
    """
    check_new_name(model, adapter.name)
    selection_of(model).check_free()
    base = gather(model)
    _freeze(model)
    holders = {path: place(model, path, base.selection) for path in adapter.parts}
    for path, part in adapter.parts.items():
        holders[path].add(adapter.name, part)
    base.selection.add(adapter.under(base.stem))
    accept_rows(model)


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise OptionError for a name that no adapter can have, AdapterError for one that is taken."""
    check_name(name)
    if name in adapter_names(model):
        raise AdapterError(f"an adapter named {name!r} is already attached", hint="choose another name for this one")


def check_name(name: str) -> None:
    """Raise OptionError for a name that no adapter can have."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OptionError(f"adapter name {name!r}: expected 1 to 64 letters, digits, '_' or '-'")
    if is_reserved(name):
        raise OptionError(f"adapter name {name!r} is reserved", hint=f"call it {name}-1 or {name}-adapter")


def is_reserved(name: str) -> bool:
    """Whether somebody has this word: torch, as adapters are the children of a ModuleDict, with `train`, `keys` ...; or PEFT,
    whose adapter_names calls the base `__base__`."""
    return name == "__base__" or hasattr(nn.ModuleDict(), name)


@one_at_a_time
def detach_adapter(model: nn.Module, name: str | None = None) -> None:
    """Take the adapter `name` (default: every adapter), LoRA or prefix, off the model.

    A layer left without LoRAs is the base's own again; without prefixes the model attends as it did before.
    Raises AdapterError for an unknown name, or one that a call in another thread is using. Does nothing on a model
    without adapters.
    """
    selection = selection_of(model)
    if name is not None:
        selection.require([name])
    attached = adapters_of(model)
    gone = {each: attached[each] for each in ([name] if name else attached)}
    holders = {path: _holder(model, path) for adapter in gone.values() for path in adapter.parts}
    left = [path for path, holder in holders.items() if holder.held.keys() <= gone.keys()]
    last_prefix = any(isinstance(holders[path], Prefixes) for path in left)
    with selection.taken("relieved of its last prefix") if last_prefix else nullcontext():
        selection.forget({each: adapter.parts.values() for each, adapter in gone.items()})
        for each, adapter in gone.items():
            for path in adapter.parts:
                holders[path].drop(each)
        for path in left:
            holders[path].take_away(model, path)
    settle_vocabulary(model)
    if not selection.adapters:
        refuse_rows(model)


detach_lora = detach_adapter  # its name in the tutorials, beside attach_lora and merge_lora


def _holder(model: nn.Module, path: str) -> Holder:
    holder = model.get_submodule(path)
    assert isinstance(holder, Holder)
    return holder


def _freeze(model: nn.Module) -> None:
    """Let nothing of the base train; wrapping a layer freezes that layer, and adapters are use_adapter's affair."""
    for _, module in modules_outside_adapters(model):
        if not isinstance(module, Holder):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def _wrapped(model: nn.Module, path: str, selection: Selection, rows: bool = False) -> LoraLayer:
    """The layer with adapters at `path`, put there around the base's layer if it is not yet; see _wrapper."""
    module = model.get_submodule(path)
    layer = _wrapper(model, path, rows, selection)
    if layer is not module:
        set_module(model, path, layer.train(module.training))
    return layer


def _wrapper(model: nn.Module, path: str, rows: bool = False, selection: Selection | None = None) -> LoraLayer:
    """A layer around the base's at `path`, which is in no model yet; the one that is there where there is one.

    Args:
        rows: whether it is to carry rows of single tokens, and not LoRAs.

    Raises AdapterError where the layer carries the other kind.
    """
    module = model.get_submodule(path)
    if isinstance(module, LoraLayer):
        if isinstance(module, TokenLayer) == rows:
            return module
        kinds = ("rows of single tokens", "a LoRA") if rows else ("a LoRA", "rows of single tokens")
        raise AdapterError(
            f"{path} carries {kinds[1]} of {', '.join(module.loras)}: {kinds[0]} of another adapter cannot go there, too",
            hint="detach_adapter() takes the other adapter off",
        )
    if isinstance(module, QuantizedExperts):
        return LoraExperts(module, selection)
    if isinstance(module, QuantizedEmbedding | nn.Embedding):
        return TokenEmbedding(module, selection) if rows else LoraEmbedding(module, selection)
    if isinstance(module, nn.Conv2d):
        return LoraConv(module, selection)
    assert isinstance(module, QuantizedLinear | nn.Linear)
    return TokenHead(module, selection) if rows else LoraLinear(module, selection)
