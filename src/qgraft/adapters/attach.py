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

from qgraft.adapters.adapter import Adapter
from qgraft.adapters.base import adapter_names, adapters_of, gather, one_at_a_time, require_model, selection_of
from qgraft.adapters.batch_rows import accept_rows, refuse_rows
from qgraft.adapters.choose import use_adapter
from qgraft.adapters.exact import check_exact, make_part
from qgraft.adapters.holder import Holder, modules_outside_adapters, set_module
from qgraft.adapters.layer_choice import LayerNumbers, parse_layers, within_layers
from qgraft.adapters.layer_ranks import configs_of
from qgraft.adapters.lora import LoraConfig, LoraLayer, LoraLinear
from qgraft.adapters.lora_embedding import LoraEmbedding
from qgraft.adapters.prefix import Prefixes
from qgraft.adapters.selection import Selection
from qgraft.adapters.targets import find_targets
from qgraft.adapters.whole import WholeHolder, WholeModule, check_free, put_whole, whole_modules
from qgraft.errors import AdapterError, OptionError, option
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

    Returns the common options as a LoraConfig. Raises OptionError for a name that is of no linear layer, AdapterError for a
    name that is taken, UnsupportedError for an exact LoRA on layers without minimums.
    """
    require_model(model)
    check_new_name(model, name)
    targets = target_modules if isinstance(target_modules, str) else _names(target_modules)
    numbers = None if layers_to_transform is None else parse_layers(layers_to_transform)
    config = LoraConfig(r, lora_alpha, lora_dropout, use_rslora, targets, numbers, exact)
    attach_layers(model, name, configs_of(chosen_layers(model, targets, numbers), config, rank_pattern, alpha_pattern))
    return config


def chosen_layers(
    model: nn.Module, target_modules: str | Sequence[str], layers_to_transform: LayerNumbers | None
) -> list[str]:
    """The paths of the layers that attach_lora() would put a LoRA on. Raises OptionError for none."""
    paths = find_targets(model, target_modules)
    return paths if layers_to_transform is None else within_layers(paths, parse_layers(layers_to_transform))


def _names(target_modules: Any) -> tuple[str, ...]:
    """Names of layers as a tuple. Raises OptionError for what is none."""
    names = tuple(target_modules) if isinstance(target_modules, Collection) else (target_modules,)
    if not all(isinstance(name, str) for name in names):
        raise OptionError(f"target_modules={target_modules!r}: expected names of layers, a text or a list of them",
                          hint=option("target_modules", "all-linear"))  # fmt: skip
    return names


@one_at_a_time
def attach_layers(
    model: nn.Module,
    name: str,
    layers: Mapping[str, LoraConfig],
    values: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Attach a LoRA `name` to the linear layers at these module paths, each with its own options, and make it active.

    Args:
        values: A and B of each layer as files have them, copied; without them A is random and B zero.

    Raises OptionError for an impossible name, AdapterError for one that is taken, UnsupportedError for an exact LoRA on
    a layer without minimums.
    """
    check_new_name(model, name)
    put_loras(model, make_loras(model, name, layers, values, dict.fromkeys(heads_of(model))))
    use_adapter(model, name)


def make_loras(
    model: nn.Module,
    name: str,
    layers: Mapping[str, LoraConfig],
    values: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    whole: Mapping[str, Mapping[str, Tensor] | None] | None = None,
) -> Adapter:
    """A LoRA for these layers of the model, inactive and not on it yet; see attach_layers. Changes nothing of the model.

    Args:
        whole: modules that it has copies of and trains whole: path -> their tensors, None for those of the base.
    """
    check_exact(model, [path for path, config in layers.items() if config.exact])
    order = {path: index for index, (path, _) in enumerate(modules_outside_adapters(model))}
    parts = {
        path: make_part(_wrapper(model.get_submodule(path)), layers[path], values[path] if values else None)
        for path in sorted(layers, key=lambda path: order.get(path, len(order)))
    }
    adapter = Adapter(
        name, "lora", parts | {path: _copied(model, path, state) for path, state in (whole or {}).items()}
    )
    adapter.let_train(False)
    return adapter


def put_loras(model: nn.Module, adapter: Adapter) -> None:
    """Put a LoRA that fits the model on it, inactive: these modules, not copies of them."""
    whole = whole_modules(adapter)
    for path in whole:
        check_free(model.get_submodule(path), path)

    def place(model: nn.Module, path: str, selection: Selection) -> Holder:
        return put_whole(model, path, selection) if path in whole else _wrapped(model, path, selection)

    put_on(model, adapter, place)


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
    for path, part in adapter.parts.items():
        place(model, path, base.selection).add(adapter.name, part)
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
                del holders[path].held[each]
        for path in left:
            holders[path].take_away(model, path)
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


def _wrapped(model: nn.Module, path: str, selection: Selection) -> LoraLayer:
    """The LoraLinear or LoraEmbedding at `path`, put there around the base's layer if it is not yet."""
    module = model.get_submodule(path)
    layer = _wrapper(module, selection)
    if layer is not module:
        set_module(model, path, layer.train(module.training))
    return layer


def _wrapper(module: nn.Module, selection: Selection | None = None) -> LoraLayer:
    """A layer around the base's, which is in no model yet; the module itself where it is one."""
    if isinstance(module, LoraLayer):
        return module
    if isinstance(module, QuantizedEmbedding | nn.Embedding):
        return LoraEmbedding(module, selection)
    assert isinstance(module, QuantizedLinear | nn.Linear)
    return LoraLinear(module, selection)
