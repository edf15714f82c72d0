"""merge() and save(): a LoRA into the weights of a denoiser, and the denoiser as a folder that diffusers reads.

    floats   W + delta, in the dtype that W has
    packed   the codes nearest to W + delta (requantize); an exact LoRA in closed form (merging/exact.py)

Solving for codes by what layers see, as merge() does for language models, needs their rows and their losses. Here rounding is
all that is done, and what it loses is measured on the weights: 0.3 of a delta that is as large as a step, all of one that is
far below. A step of q8_0 is 1/50 of the weights' spread, of q4_1 1/4, and a delta is often less than either: a LoRA for
packed weights is better kept beside them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qgraft import storage
from qgraft.adapters.attach import detach_adapter
from qgraft.adapters.base import adapter_names, alone, base_of, find_adapter
from qgraft.adapters.choose import active_adapters
from qgraft.adapters.lora import Lora, LoraLinear
from qgraft.adapters.lora_conv import LoraConv
from qgraft.adapters.states import loras_of, non_finite
from qgraft.adapters.targets import adapted_layers
from qgraft.checkpoints.folder_write import write_safetensors
from qgraft.checkpoints.pickles import WORDS
from qgraft.diffusion.denoisers import CONFIG, describe
from qgraft.diffusion.families import family_of
from qgraft.errors import AdapterError, StorageError, UnsupportedError, option
from qgraft.formats import dequantize
from qgraft.given import path_given
from qgraft.linear import QuantizedLinear
from qgraft.merging.exact import merge_exactly
from qgraft.merging.layer import LayerReport, is_writable, merge_nearest

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class DenoiserMerge:
    """What merge() did.

    Attributes:
        adapters: with their weights.
        floats: the paths of float layers.
        packed: a report of each packed layer.
        error: |merged - (W + delta)| / |delta| over all packed layers: 0 is all kept, 1 as if nothing had been merged.
    """

    adapters: dict[str, float]
    floats: tuple[str, ...]
    packed: tuple[LayerReport, ...]
    error: float

    def __str__(self) -> str:
        said = f"merged {', '.join(self.adapters)} into {len(self.floats)} float layers"
        if self.packed:
            said += f", {len(self.packed)} packed ones, whose rounding loses {min(self.error, 1.0):.0%} of the delta"
        return said


@alone("merged")
@torch.no_grad()
def merge(denoiser: Any) -> DenoiserMerge:
    """Merge the active LoRAs, with their weights, into the weights of the denoiser, and take them off it.

    Raises AdapterError (none is active, NaN), UnsupportedError for formats that cannot be written. Nothing is changed then.
    There is no unmerge: load the denoiser again.
    """
    family_of(denoiser)
    weights = _active_loras(denoiser)
    layers = {path: layer for path, layer in adapted_layers(denoiser)
              if isinstance(layer, LoraLinear | LoraConv) and any(name in layer.loras for name in weights)}  # fmt: skip
    packed = {path: layer for path, layer in layers.items() if isinstance(layer, LoraLinear) and layer.is_packed}
    exact = merge_exactly(packed, weights)
    if unwritable := [f"{path} is {layer.packed.format}" for path, layer in packed.items()
                      if path not in exact and not is_writable(layer.packed)]:  # fmt: skip
        raise UnsupportedError(f"merge: {unwritable[0]}, which qgraft does not write ({len(unwritable)} layers)")
    done, lost, of = dict(exact), 0.0, 0.0
    for path, layer in packed.items():
        delta = _delta(layer, weights)
        if path not in exact:
            done[path] = merge_nearest(path, layer.packed, delta, "nearest")
        missed = dequantize(done[path][0], torch.float32) - layer.dequantize() - delta
        lost, of = lost + float(missed.square().sum()), of + float(delta.square().sum())
    sums = {path: _sum(layer, weights) for path, layer in layers.items() if path not in packed}
    if broken := [path for path, weight in sums.items() if not bool(torch.isfinite(weight).all())]:
        dtype = sums[broken[0]].dtype
        raise AdapterError(f"merge: {broken[0]} overflows {dtype} with its delta ({len(broken)} layers)")
    for path, (merged, _) in done.items():
        packed[path].replace(merged)
    for path, weight in sums.items():
        cast(nn.Linear | nn.Conv2d, layers[path].base).weight.copy_(weight)
    for name in weights:
        detach_adapter(denoiser, name)
    if (info := base_of(denoiser).info) is not None:
        describe(denoiser, info.source, info.notes)
    reports = tuple(report for _, report in done.values())
    return DenoiserMerge(dict(weights), tuple(sums), reports, math.sqrt(lost / of) if of else 0.0)


def _active_loras(denoiser: Any) -> dict[str, float]:
    """The active adapters with their weights. Raises AdapterError where there is none, or one holds no numbers."""
    weights = active_adapters(denoiser)
    if not weights:
        raise AdapterError(f"merge: no adapter is active (attached: {', '.join(adapter_names(denoiser)) or 'none'})",
                           hint="attach or load one, and choose it with use_adapter()")  # fmt: skip
    for name in weights:
        loras_of(adapter := find_adapter(denoiser, name), "merge")
        if broken := non_finite(dict(adapter.named_parameters())):
            raise AdapterError(f"merge: NaN or infinity in {len(broken)} tensors of {name!r}, {broken[0]} first")
    return dict(weights)


def _delta(layer: LoraLinear | LoraConv, weights: Mapping[str, float]) -> Tensor:
    """What the active adapters add to the weight, [out, in] float32."""
    loras = [(cast(Lora, layer.loras[name]), weight) for name, weight in weights.items() if name in layer.loras]
    base = layer.base if isinstance(layer, LoraLinear) else None
    return torch.stack([weight * lora.delta(base=base) for lora, weight in loras]).sum(0)


def _sum(layer: LoraLinear | LoraConv, weights: Mapping[str, float]) -> Tensor:
    own = cast(nn.Linear | nn.Conv2d, layer.base).weight
    return (own.float() + _delta(layer, weights).view_as(own)).to(own.dtype)


def save(denoiser: Any, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write the denoiser as diffusers' save_pretrained does, whole or not at all; packed weights as their floats.

    Args:
        overwrite: replace a folder that is there.

    Raises AdapterError while adapters are on it, StorageError for a folder that is there or cannot be written.
    """
    family_of(denoiser)
    target = path_given("folder", folder).expanduser()
    if attached := adapter_names(denoiser):
        raise AdapterError(f"save: {', '.join(attached)} is not merged, and would be missing from the folder",
                           hint="merge() first, or save_lora_weights() for the LoRA alone")  # fmt: skip
    if target.exists() and not overwrite:
        raise StorageError(f"{target} exists", hint=f"choose another folder, or {option('overwrite')}")
    tensors: dict[str, Tensor] = {}
    for path, module in denoiser.named_modules():
        if isinstance(module, QuantizedLinear):
            tensors[f"{path}.weight"] = module.dequantize(module.dtype)
            if module.bias is not None:
                tensors[f"{path}.bias"] = module.bias.detach()
    packed = tuple(f"{path}." for path, module in denoiser.named_modules() if isinstance(module, QuantizedLinear))
    tensors |= {
        name: tensor for name, tensor in denoiser.state_dict().items() if not name.startswith(packed or ("\0",))
    }
    storage.make_folder(target.parent)
    with storage.publish_folder(target) as staging:
        denoiser.save_config(staging)
        write_safetensors(staging / WEIGHTS, {name: (WORDS[each.dtype], each.cpu().contiguous()) for name, each in
                                              tensors.items()}, {"format": "pt"})  # fmt: skip
        if not (staging / CONFIG).is_file():
            raise StorageError(f"{target}: diffusers has written no {CONFIG}")
