"""Deltas that only change minimums, merged in closed form: m' = m + sum of weight * dm, rounded as the format stores it.

Nothing is solved for, so no rows are needed. What is lost is the rounding of the new minimums: float16 in all formats that
have them, relative 2^-11 a number at most. A layer is merged so where every active adapter on it is exact there, by what
its numbers are and not by what a file says: a LoRA of PEFT's files whose A is the same in the columns of each group is
exact, too, and so are sums of such. An exact LoRA on a K-quant has to be for the very integers that the layer has now.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qgraft.adapters.exact import BlockLora, MinimumLora, blocks, minimums_of
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
        if not layer.is_packed or minimums_of(layer.packed.format) is None:
            continue
        grid = unpack(layer.packed)
        if (change := _change(grid, layer, weights)) is not None:
            merged[path] = _merged(path, layer.packed, grid, change)
    return merged


def _change(grid: Grid, layer: LoraLinear, weights: Mapping[str, float]) -> Tensor | None:
    """What the active adapters change the minimums by, [out, groups] float64; None where one does more than that."""
    assert grid.m is not None
    total = torch.zeros_like(grid.m, dtype=torch.float64)
    for name, weight in weights.items():
        if name not in layer.loras:
            continue
        lora = layer.loras[name]
        assert isinstance(lora, Lora)
        if (change := _change_of(grid, lora)) is None:
            return None
        total += weight * change
    return total


def _change_of(grid: Grid, lora: Lora) -> Tensor | None:
    if grid.sub_minimums is not None:
        fits = isinstance(lora, MinimumLora) and torch.equal(lora.integers, grid.sub_minimums)
        return lora.change() if fits and isinstance(lora, MinimumLora) else None
    if isinstance(lora, BlockLora):
        return lora.change()
    pair = lora.factors()
    A = None if pair is None else blocks(pair[0], grid.codes.shape[1] // grid.d.shape[1])
    return None if A is None or pair is None else (pair[1].double() @ A.double()) * lora.config.scaling


def _merged(path: str, packed: PackedTensor, grid: Grid, change: Tensor) -> tuple[PackedTensor, LayerReport]:
    assert grid.m is not None
    try:
        merged = pack(replace(grid, m=(grid.m + change).float()), packed.format)
    except UnsupportedError as error:
        raise UnsupportedError(f"merge: {path}: {error.message}", hint="a smaller weight of the adapter") from error
    integers = 1.0 if grid.sub_minimums is None else grid.sub_minimums.double()
    delta = change.repeat_interleave(grid.steps().shape[1] // change.shape[1], dim=1) * integers
    size, step = float(delta.square().mean().sqrt()), float(grid.steps().square().mean().sqrt())
    return merged, LayerReport(path, packed.format, size / max(step, 1e-30), 0.0, None, (STEP,))
