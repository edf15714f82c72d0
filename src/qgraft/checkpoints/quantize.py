"""quantize(): the linear layers of a model in memory in another format, as load(quantize=...) does from a folder.

Which layers: all linear layers but the output layer, as in load(). 16-bit weights of a loaded folder are quantized in their
own dtype, so a float16 ChatGLM becomes the published INT4 or INT8 checkpoint, bit for bit.
"""

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qgraft.adapters.base import adapters_of, base_of
from qgraft.adapters.lora_experts import stack_paths
from qgraft.adapters.targets import find_targets
from qgraft.checkpoints.assemble import weight_formats
from qgraft.checkpoints.origin import Origin, Stored
from qgraft.checkpoints.pack_experts import float_experts, float_experts_note, pack_experts, packs_experts
from qgraft.checkpoints.save import CONTAINERS, current_fingerprint
from qgraft.errors import AdapterError, UnsupportedError, worded
from qgraft.experts import IMPLEMENTATION, place
from qgraft.formats import convert, fitting_format, get_format, misfit_notes
from qgraft.formats import quantize as quantize_weight
from qgraft.linear import QuantizedLinear


def quantize(model: nn.Module, format: str) -> tuple[str, ...]:
    """Pack every linear layer of `model` but the output layer, and the experts of a mixture, in `format`, in place.

    Args:
        model: from load(), or any module tree with nn.Linear layers.
        format: a format that can be written: "chatglm-int4", "q4_1", ...

    Returns what a reader should know, each one sentence: the layers whose width the format has no blocks for, with the
    format that they get instead (`fitting_format`), or that they stay as they are. Raises UnsupportedError for a format
    that cannot be written, AdapterError while LoRAs are attached: they were trained on the weights as they are. A prefix
    stays, as in ChatGLM's own quantize().
    """
    if attached := [name for name, adapter in adapters_of(model).items() if not adapter.is_prefix]:
        raise AdapterError(
            f"quantize: the adapter {', '.join(attached)} is on the model",
            hint=worded(flags="leave --quantize out", python="detach_lora() first"),
        )
    chosen = get_format(format)
    if chosen.quantize is None:
        raise UnsupportedError(f"quantize: {format} can be read but not written yet")
    fitted: dict[str, tuple[int, str | None]] = {}
    for path in find_targets(model, "all-linear"):
        layer: Any = model.get_submodule(path)
        fitting = fitting_format(format, layer.in_features)
        fitted[path] = (layer.in_features, fitting)
        if fitting is None:
            continue
        if isinstance(layer, QuantizedLinear):
            layer.replace(convert(layer.packed, fitting))
        else:
            model.set_submodule(path, QuantizedLinear(quantize_weight(layer.weight.detach(), fitting), layer.bias))
    for path in stack_paths(model):
        stack: Any = model.get_submodule(path)
        fitting = fitting_format(format, stack.in_features)
        fitted[path] = (stack.in_features, fitting)
        if fitting is not None:
            stack.replace(convert(stack.packed, fitting))
    if packs_experts(format):
        _pack_experts(model, format, fitted)
    _tell_base(model)
    return (*misfit_notes(format, fitted), *float_experts_note(model, format))


def _pack_experts(model: Any, format: str, fitted: dict[str, tuple[int, str | None]]) -> None:
    """Put stacks in the place of experts that are floats, and say so in what the model remembers of its container."""
    found = float_experts(model)
    for name, (module, leaf) in found.items():
        stacks, fitting = pack_experts(name, module, getattr(module, leaf).detach(), format)
        fitted |= {f"{name}.{part}": (stack.shape[2], fitting) for part, stack in stacks.items()}
        place(module, leaf, stacks)
    for each in model.modules() if found else ():
        if isinstance(each, PreTrainedModel):
            each.set_experts_implementation(IMPLEMENTATION)
    base = base_of(model)
    if isinstance(base.origin, Origin):
        stored = {path: Stored(path) for path in stack_paths(model) if path not in base.origin.matrices}
        base.origin = replace(base.origin, matrices=base.origin.matrices | stored)


def _tell_base(model: Any) -> None:
    """What `load` noted of the weights, as they are now."""
    base = base_of(model)
    info, origin = base.info, base.origin
    if info is not None and isinstance(origin, Origin):
        formats = weight_formats(model)
        held = formats.keys() <= CONTAINERS[origin.container].held
        sign = current_fingerprint(model) if held else f"{info.fingerprint} in {', '.join(sorted(formats))}"
        base.info = replace(info, formats=formats, fingerprint=sign)
