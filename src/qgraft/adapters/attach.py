"""Put LoRAs on a model; choose which adapters are active and take them off, LoRAs and prefixes alike.

The base's weights are never touched. Each target linear layer is replaced by a LoraLinear that wraps it; detaching puts
the wrapped layer back. Which modules are targets is asked of the modules themselves (`isinstance`, their names), never
of an architecture's name. Prefixes are put on by attach_prefix.py.

What is active stands in one Selection that all adapters of the model share (selection.py), so a switch sets one dict,
and `requires_grad` where it changes; what this file does takes no longer for the hundredth adapter than for the first.

Once a model has an adapter, others may be attached, chosen and detached while threads answer with it. An adapter that a
call uses cannot be detached, and the first prefix cannot come, or the last one go, while there are calls.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qgraft.adapters.layer_choice import LayerNumbers, parse_layers, within_layers
from qgraft.adapters.lora import Lora, LoraConfig, LoraLayer, LoraLinear
from qgraft.adapters.lora_embedding import LoraEmbedding
from qgraft.adapters.prefix import HOME, PrefixEncoder, Prefixes
from qgraft.adapters.rows import accept_rows, refuse_rows
from qgraft.adapters.selection import SHARED, Selection, one_at_a_time, selection_of
from qgraft.adapters.targets import find_targets, modules_outside_adapters
from qgraft.errors import AdapterError, OptionError
from qgraft.linear import QuantizedEmbedding, QuantizedLinear

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def attach_lora(
    model: nn.Module,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    use_rslora: bool = False,
    name: str = "default",
    layers_to_transform: LayerNumbers | None = None,
) -> LoraConfig:
    """Freeze the model, wrap its target layers with a new LoRA `name` and make it the active adapter.

    Args:
        model: any module tree with QuantizedLinear or nn.Linear layers; changed in place.
        r, lora_alpha, lora_dropout, use_rslora: see LoraConfig.
        target_modules: "all-linear" (every linear layer but the output layer), names of layers ("q_proj" or
            "layers.0.self_attn.q_proj"), a comma-separated list of them, or a regular expression that matches whole
            module paths, as in PEFT.
        name: how the adapter is called in use_adapter(); letters, digits, "_" and "-".
        layers_to_transform: only targets in these layers of the decoder, "15-29", "15,16" or [15, 16]; None for all.

    Returns the options as a LoraConfig. Raises OptionError for a target that names no linear layer, AdapterError for a
    name that is taken.
    """
    targets = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    numbers = None if layers_to_transform is None else parse_layers(layers_to_transform)
    config = LoraConfig(r, lora_alpha, lora_dropout, use_rslora, targets, numbers)
    paths = find_targets(model, targets)
    attach_layers(model, name, dict.fromkeys(paths if numbers is None else within_layers(paths, numbers), config))
    return config


@one_at_a_time
def attach_layers(
    model: nn.Module,
    name: str,
    layers: Mapping[str, LoraConfig],
    values: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Attach a LoRA `name` to the linear layers at these module paths, each with its own options, and make it active.

    Args:
        values: A and B of each layer, copied; without them A is random and B zero.

    Raises OptionError for an impossible name, AdapterError for one that is taken.
    """
    check_new_name(model, name)
    selection_of(model).check_free()
    freeze(model)
    selection = share(model)
    for path, config in layers.items():
        wrapped(model, path, selection).add(name, config, values[path] if values else None)
    accept_rows(model, selection)
    use_adapter(model, name)


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise OptionError for a name that no adapter can have, AdapterError for one that is taken."""
    if not _NAME.fullmatch(name):
        raise OptionError(f"adapter name {name!r}: expected 1 to 64 letters, digits, '_' or '-'")
    if is_reserved(name):
        raise OptionError(f"adapter name {name!r} is reserved", hint=f"call it {name}-1 or {name}-adapter")
    if name in adapter_names(model):
        raise AdapterError(f"an adapter named {name!r} is already attached", hint="choose another name for this one")


def is_reserved(name: str) -> bool:
    """Whether torch has this word for itself: adapters are the children of a ModuleDict, which has `train`, `keys` ..."""
    return hasattr(nn.ModuleDict(), name)


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
    holders = [
        (path, module) for path, module in modules_outside_adapters(model) if isinstance(module, LoraLayer | Prefixes)
    ]
    names = list(selection.parts) if name is None else [name]
    homes = [(path, home) for path, home in holders if isinstance(home, Prefixes) and set(home.encoders) <= set(names)]
    with selection.taken("relieved of its last prefix") if homes else nullcontext():
        selection.forget({name: [part for _, holder in holders for part in holder.parts_of(name)] for name in names})
        for path, holder in holders:
            for adapter in names:
                holder.remove(adapter)
            if isinstance(holder, LoraLayer) and not holder.loras:
                _set_module(model, path, holder.base)
        for path, home in homes:
            _remove_home(model, path, home)
    if not selection.parts:
        refuse_rows(model)


detach_lora = detach_adapter  # its name in the tutorials, beside attach_lora and merge_lora


def use_adapter(model: nn.Module, adapter: str | Mapping[str, float] | None) -> None:
    """Make one adapter active ("law"), a weighted few ({"law": 0.7, "med": 0.3}), or none (None), for all threads.

    It is a default: a call of the model that has begun, or is within adapters_off(), goes on by its own, and one with
    `adapter_names` names its own. The active adapters are the ones that train: their weights require gradients, all
    others do not.
    Raises AdapterError when a name is not attached, OptionError for a weight that is not finite, or not 1 for a prefix,
    UnsupportedError while another thread trains or merges.
    """
    weights = {adapter: 1.0} if isinstance(adapter, str) else dict(adapter or {})
    selection = selection_of(model)
    selection.require(weights)
    check_weights(weights)
    if wrong := [f"{name}={weights[name]}" for name in _prefixes_among(selection, weights) if weights[name] != 1]:
        raise OptionError(
            f"weights of prefixes: got {', '.join(wrong)}, expected 1",
            hint="a prefix is there or not: attention is not proportional to its keys, so a share of one means nothing",
        )
    selection.choose(weights)


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise OptionError for a weight that is not finite."""
    wrong = [f"{name}={weight}" for name, weight in weights.items() if not math.isfinite(weight)]
    if wrong:
        raise OptionError(f"weights of adapters: got {', '.join(wrong)}, expected finite numbers")


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the base, in this thread or asyncio task alone; afterwards adapters are active again.

    A thread that is started in the block does not know of it.
    """
    with selection_of(model).within(None, weights={}):
        yield


def adapter_names(model: nn.Module) -> list[str]:
    """The attached adapters, in the order they were attached."""
    return list(selection_of(model).parts)


def active_adapters(model: nn.Module) -> dict[str, float]:
    """The adapters with their weights that a call from here would go by."""
    return dict(selection_of(model).now().weights)


def lora_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The weights of one LoRA under PEFT's names, sharing memory with the model.

    Args:
        name: the adapter; may be left out when only one is attached.

    Returns `base_model.model.<module path>.lora_A.weight` [r, in] and `...lora_B.weight` [out, r], float32; of an
    embedding `...lora_embedding_A` [r, vocabulary] and `...lora_embedding_B` [width, r].
    Raises AdapterError when there is no adapter, or several and no name, or when it is a prefix.
    """
    name = only_adapter(model, name)
    require_loras(model, [name], "lora_state_dict")
    state: dict[str, Tensor] = {}
    for path, lora in lora_modules(model, name):
        of_embedding = isinstance(model.get_submodule(path), LoraEmbedding)
        state[tensor_name(path, "A", of_embedding)] = lora.lora_A.detach()
        state[tensor_name(path, "B", of_embedding)] = lora.lora_B.detach()
    return state


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str | None = None) -> None:
    """Put the weights that lora_state_dict gave back into an attached LoRA, all of them or none.

    Args:
        state: tensors by the names of lora_state_dict, of any floating point dtype.
        name: the adapter; may be left out when only one is attached.

    A state dict holds no lora_alpha: the options are those of the attached adapter. Raises AdapterError that lists all
    that is missing, unexpected, of another size or not finite.
    """
    own = lora_state_dict(model, name)
    problems = [f"missing tensor {key}" for key in own.keys() - state.keys()]
    problems += [f"unexpected tensor {key}" for key in state.keys() - own.keys()]
    for key in own.keys() & state.keys():
        if state[key].shape != own[key].shape or not state[key].is_floating_point():
            got = f"{state[key].dtype} {list(state[key].shape)}"
            problems.append(f"{key}: got {got}, expected floats {list(own[key].shape)}")
        elif non_finite({key: state[key]}):
            problems.append(f"{key}: NaN or infinity")
    if problems:
        listed = "\n  ".join(sorted(problems)[:20] + ["..."] * (len(problems) > 20))
        raise AdapterError(f"these tensors do not fit the adapter {only_adapter(model, name)!r}:\n  {listed}",
                           hint="attach_lora() with the options that it was trained with comes first")  # fmt: skip
    for key, tensor in own.items():
        tensor.copy_(state[key])


def tensor_name(path: str, part: str, of_embedding: bool = False) -> str:
    """PEFT's name of the A or B of a LoRA on the layer at this module path."""
    return f"base_model.model.{path}." + (f"lora_embedding_{part}" if of_embedding else f"lora_{part}.weight")


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The weights of one adapter of either kind, sharing memory with the model: lora_state_dict or prefix_state_dict."""
    name = only_adapter(model, name)
    return prefix_state_dict(model, name) if is_prefix(model, name) else lora_state_dict(model, name)


def prefix_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The weights of one prefix, sharing memory with the model: embedding.weight and trans.{0,2}.{weight,bias}, float32.

    Raises AdapterError when there is no adapter, or several and no name, or when it is a LoRA.
    """
    return {key: parameter.detach() for key, parameter in prefix_encoder(model, name).named_parameters()}


def prefix_encoder(model: nn.Module, name: str | None = None) -> PrefixEncoder:
    """The network of one prefix, with its options and geometry. Raises AdapterError as prefix_state_dict does."""
    name = only_adapter(model, name)
    home = prefixes_of(model)
    if home is None or name not in home.encoders:
        raise AdapterError(f"adapter {name!r} is a LoRA, expected a prefix")
    return home.encoder(name)


def is_prefix(model: nn.Module, name: str) -> bool:
    """Whether the attached adapter `name` is a prefix."""
    return bool(_prefixes_among(selection_of(model), [name]))


def require_loras(model: nn.Module, names: Iterable[str], action: str) -> None:
    """Raise AdapterError when one of the attached adapters `names` is a prefix, which `action` cannot take."""
    if prefixes := _prefixes_among(selection_of(model), names):
        raise prefix_error(action, prefixes)


def prefix_error(action: str, names: Iterable[str]) -> AdapterError:
    """The error where `action` needs deltas and these adapters have none."""
    return AdapterError(
        f"{action}: {', '.join(map(repr, names))} is a prefix (P-Tuning v2): keys and values in front of the "
        "attention, which change no weight, so there is no delta",
        hint="choose LoRAs with use_adapter(); a prefix stays an adapter beside its base",
    )


def _prefixes_among(selection: Selection, names: Iterable[str]) -> list[str]:
    return [name for name in names if any(isinstance(part, PrefixEncoder) for part in selection.parts.get(name, ()))]


def only_adapter(model: nn.Module, name: str | None) -> str:
    """`name` when it is attached; without a name the only attached adapter. Raises AdapterError otherwise."""
    attached = adapter_names(model)
    if name is None and len(attached) == 1:
        return attached[0]
    if name is None:
        listed = ", ".join(attached) or "none"
        raise AdapterError(f"which adapter? attached: {listed}", hint="give name= (attach one first if there is none)")
    selection_of(model).require([name])
    return name


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(module path, layer) of every wrapped layer, in the order of the model; an embedding may be among them."""
    for path, module in modules_outside_adapters(model):
        if isinstance(module, LoraLayer):
            yield path, module


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(module path, layer) of every wrapped linear layer, in the order of the model."""
    for path, layer in adapted_layers(model):
        if isinstance(layer, LoraLinear):
            yield path, layer


def lora_modules(model: nn.Module, name: str) -> Iterator[tuple[str, Lora]]:
    """(module path, Lora) of every layer that the adapter `name` is on."""
    for path, layer in adapted_layers(model):
        if name in layer.loras:
            lora = layer.loras[name]
            assert isinstance(lora, Lora)
            yield path, lora


def freeze(model: nn.Module) -> None:
    """Let nothing of the base train; wrapping a layer freezes that layer, and adapters are use_adapter's affair."""
    for _, module in modules_outside_adapters(model):
        if not isinstance(module, LoraLayer):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def share(model: nn.Module) -> Selection:
    """One Selection for the whole model, also where parts of it had adapters attached, each with its own."""
    selection = selection_of(model)
    for _, module in modules_outside_adapters(model):
        if SHARED in vars(module):
            setattr(module, SHARED, selection)
        if isinstance(module, LoraLayer | Prefixes) and module.selection is not selection:
            module.selection = selection
            held = module.loras if isinstance(module, LoraLayer) else module.encoders
            for name, part in held.items():
                selection.add(name, part)
    return selection


def prefixes_of(model: nn.Module) -> Prefixes | None:
    """What holds the model's prefixes, if it has any."""
    return next((module for _, module in modules_outside_adapters(model) if isinstance(module, Prefixes)), None)


def _remove_home(model: nn.Module, path: str, home: Prefixes) -> None:
    base: Any = model.get_submodule(path.removesuffix(HOME).removesuffix("."))
    home.hook.remove()
    delattr(base, HOME)
    base.set_attn_implementation(home.attention)


def wrapped(model: nn.Module, path: str, selection: Selection) -> LoraLayer:
    """The LoraLinear or LoraEmbedding at `path`, put there around the base's layer if it is not yet."""
    module = model.get_submodule(path)
    if isinstance(module, LoraLayer):
        return module
    layer: LoraLayer
    if isinstance(module, QuantizedEmbedding | nn.Embedding):
        layer = LoraEmbedding(module, selection)
    else:
        assert isinstance(module, QuantizedLinear | nn.Linear)
        layer = LoraLinear(module, selection)
    layer.train(module.training)
    _set_module(model, path, layer)
    return layer


def _set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def count_parameters(model: nn.Module, name: str) -> int:
    """Trainable numbers of the adapter `name`."""
    return sum(p.numel() for part in selection_of(model).parts.get(name, ()) for p in part.parameters())


def non_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
