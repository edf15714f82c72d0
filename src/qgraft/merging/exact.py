"""Deltas that only change minimums, merged in closed form: m' = m + sum of weight * dm, rounded as the format stores it.

Nothing is solved for, so no rows are needed. What is lost is the rounding of the new minimums: float16 in all formats that
have them, relative 2^-11 a number at most. A layer is merged so where every active adapter on it is exact there, by what
its numbers are and not by what a file says: a LoRA of PEFT's files whose A is the same in the columns of each group is
exact, too, and so are sums of such. An exact LoRA on a K-quant has to be for the very integers that the layer has now.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from qgraft.adapters.exact import BlockLora, MinimumLora, Minimums, blocks, minimums_at
from qgraft.adapters.lora import Lora, LoraLinear
from qgraft.errors import UnsupportedError
from qgraft.formats import Grid, PackedTensor, pack, unpack
from qgraft.merging.layer import LayerReport

STEP = "exact"  # in LayerReport.steps


@torch.no_grad()
def merge_exactly(
    layers: Mapping[str, LoraLinear], weights: Mapping[str, float]
) -> dict[str, tuple[PackedTensor, LayerReport]]:
    """The layers that can be merged in closed form, by module path: merged weight and what was done.

    Args:
        layers: wrapped layers that an active adapter is on.
        weights: the active adapters. Raises UnsupportedError for minimums too large to store.
    """
    merged = {}
    for path, layer in layers.items():
        place = minimums_at(layer)
        loras = [(cast(Lora, layer.loras[name]), weight) for name, weight in weights.items() if name in layer.loras]
        if place is None or not all(_changes_minimums(lora, place) for lora, _ in loras):
            continue  # before anything is unpacked
        grid = unpack(layer.packed)
        if all(_has_integers(lora, grid) for lora, _ in loras):
            change = sum(
                (weight * _change(lora, place) for lora, weight in loras), start=torch.zeros((), dtype=torch.float64)
            )
            merged[path] = _merged(path, layer.packed, grid, change)
    return merged


def _changes_minimums(lora: Lora, place: Minimums) -> bool:
    if place.subs > 1:
        return isinstance(lora, MinimumLora)
    pair = lora.factors()
    return pair is not None and blocks(pair[0], place.width) is not None


def _has_integers(lora: Lora, grid: Grid) -> bool:
    """Whether the integers that the minimums are multiplied by are those that the adapter was made for."""
    return grid.sub_minimums is None or (
        isinstance(lora, MinimumLora) and torch.equal(lora.integers, grid.sub_minimums)
    )


def _change(lora: Lora, place: Minimums) -> Tensor:
    """What the adapter changes the minimums by, [out, groups] float64."""
    if isinstance(lora, BlockLora | MinimumLora):
        return lora.change()
    pair = lora.factors()
    assert pair is not None
    return (pair[1].double() @ pair[0][:, :: place.width].double()) * lora.config.scaling


def _merged(path: str, packed: PackedTensor, grid: Grid, change: Tensor) -> tuple[PackedTensor, LayerReport]:
    try:
        merged = _with_minimums(grid, packed.format, change)
    except UnsupportedError as error:
        raise UnsupportedError(f"merge: {path}: {error.message}", hint="a smaller weight of the adapter") from error
    integers = 1.0 if grid.sub_minimums is None else grid.sub_minimums.double()
    delta = change.repeat_interleave(grid.steps().shape[1] // change.shape[1], dim=1) * integers
    size, step = float(delta.square().mean().sqrt()), float(grid.steps().square().mean().sqrt())
    return merged, LayerReport(path, packed.format, size / max(step, 1e-30), 0.0, None, (STEP,))


def with_minimums(packed: PackedTensor, change: Tensor) -> PackedTensor:
    """The weight with `change` [out, groups] added to its stored minimums. Raises UnsupportedError for too large ones."""
    return _with_minimums(unpack(packed), packed.format, change)


def _with_minimums(grid: Grid, format: str, change: Tensor) -> PackedTensor:
    assert grid.m is not None
    return pack(replace(grid, m=(grid.m + change).float()), format)
