"""The last part of a merge: the scales and minimums of all layers together, against the adapter's logits.

Layer by layer a merge cannot weigh which of its remaining errors matter to the logits. So where the gain is not yet
kept, the real-valued numbers of all merged layers (codes untouched) are trained for three passes to minimize

    KL(adapter || merged) = sum_v p_v (log p_v - log q_v)        at the label positions of the calibration rows

by Adam. A number's learning rate is relative to the scales of its row. Codes are int8 and constant; the gradient of a
weight matrix, which the frozen base never needs, is formed layer by layer and summed at once:

    G = g^T x [out, in]        dE/d_k = sub_scale * sum over group k of G * value       dE/m_k = sub_minimum * sum of G

The forward pass uses the numbers as they will be stored (float16), the steps add to float32 ones. PEQA
(arXiv:2305.14152) trains scales as the only parameters; here they imitate the adapter instead of learning the task,
and the calibration's unrelated text is in it, so that drift costs as well.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qgraft.adapters.choose import adapters_off
from qgraft.adapters.lora import LoraLinear
from qgraft.data.batches import Batch, collate, count_labels, split_batch
from qgraft.data.tokenizing import Sample
from qgraft.formats import Grid, PackedTensor, pack, unpack
from qgraft.formats.grid import combine
from qgraft.merging.calibration import Calibration
from qgraft.merging.layer import has_grid
from qgraft.merging.lockstep import standing_in
from qgraft.merging.measure import CHUNK_ROWS, Packed, in_place, mean_divergence, states_of, summed_divergence
from qgraft.passes.decoder import Head, label_states, output_head, padding_free

PASSES = 3
PASS_TOKENS = 128  # at a time: bounds the memory of activations
PARTS = 2  # of so many tokens in a step
LEARNING_RATE = 1e-3  # relative to the scales of a row


def distill_if_better(
    model: PreTrainedModel,
    layers: Mapping[str, LoraLinear],
    packed: Packed,
    rows: Calibration,
    progress: Callable[[int, int], None],
) -> tuple[Packed, int]:
    """(distilled weights, steps), or the same and 0 where the rows that judge come no closer to the adapter's model."""
    trainable = {path: each for path, each in packed.items() if has_grid(each)}
    if not trainable:
        return packed, 0
    targets, judge = (states_of(model, samples)[0] for samples in (rows.fit, rows.judge))
    trained, steps = distill(
        model, trainable, rows.fit, targets, learning_rate=LEARNING_RATE, progress=progress
    )  # fmt: skip

    def apart(candidate: Packed) -> float:
        with in_place(layers, candidate), adapters_off(model):
            return mean_divergence(judge, states_of(model, rows.judge)[0], output_head(model))

    distilled = {**packed, **trained}
    return (distilled, steps) if apart(distilled) < apart(packed) else (packed, 0)


def distill(
    model: PreTrainedModel,
    merged: Mapping[str, PackedTensor],
    samples: Sequence[Sample],
    targets: Tensor,
    *,
    learning_rate: float,
    progress: Callable[[int, int], None],
) -> tuple[dict[str, PackedTensor], int]:
    """The merged weights with their real numbers trained, and the steps taken.

    The model is left as it was.

    Args:
        merged: module path of a LoraLinear -> its merged weight, in a format with a grid.
        samples: what to train on.
        targets: the adapter's last hidden states at the label positions of the samples, [labels, hidden].
        learning_rate: of a step, relative to the mean scale of a row.
        progress: called after each step with (step, steps).
    """
    layers = {path: _RealLinear(unpack(packed)) for path, packed in merged.items()}
    parameters = [parameter for layer in layers.values() for parameter in layer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99))
    head = output_head(model)
    shuffled = random.Random(0)

    def trained(path: str, layer: LoraLinear) -> nn.Module:
        return layers[path] if layer.base.bias is None else _Biased(layers[path], layer.base.bias)

    with padding_free(model, samples) as problem, standing_in(model, layers, trained):
        batches = split_batch(collate(samples), 0 if problem else PASS_TOKENS)
        parts = list(zip(batches, targets.split([count_labels(batch) for batch in batches]), strict=True))
        passes = [shuffled.sample(parts, len(parts)) for _ in range(PASSES)]
        groups = [order[at : at + PARTS] for order in passes for at in range(0, len(order), PARTS)]
        for step, group in enumerate(groups):
            optimizer.param_groups[0]["lr"] = learning_rate * _schedule(step, len(groups))
            positions = sum(len(states) for _, states in group)
            for batch, states in group:
                _backward(model, head, batch, states, positions, parameters)
            optimizer.step()
            optimizer.zero_grad()
            progress(step + 1, len(groups))
    return {path: pack(layer.grid(), merged[path].format) for path, layer in layers.items()}, len(groups)


def _schedule(step: int, steps: int) -> float:
    """A tenth of warmup, then a half cosine to zero."""
    return min(1.0, (step + 1) / max(1, steps // 10)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _backward(
    model: PreTrainedModel, head: Head, batch: Batch, targets: Tensor, positions: int, parameters: list[nn.Parameter]
) -> None:
    """Accumulate the gradients of a part's KL over `positions`, without ever holding the logits of all its positions."""
    states, _ = label_states(model, {key: value.to(model.device) for key, value in batch.items()})
    free = states.detach().requires_grad_()
    for chunk, target in zip(free.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True):
        with torch.no_grad():
            wanted = head(target)
        (summed_divergence(wanted, head(chunk)) / positions).backward()
    states.backward(free.grad, inputs=parameters)  # not into adapters of layers that are not distilled


class _RealLinear(nn.Module):
    """A merged layer whose d and m train, as offsets in units of the row's mean scale over the root of its groups.

    Adam moves every number by about the learning rate; so divided, a step moves a row's output as far in any format.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.start = grid
        self.unit = grid.steps().abs().mean(dim=1, keepdim=True)  # [out, 1]
        self.d = nn.Parameter(torch.zeros_like(grid.d))
        self.m = None if grid.m is None else nn.Parameter(torch.zeros_like(grid.m))

    def grid(self) -> Grid:
        """The grid with the trained numbers as they are stored."""
        d_unit, m_unit = self._units()
        d = self.start.d + self.d.detach() * d_unit
        m = None if self.m is None or self.start.m is None else self.start.m + self.m.detach() * m_unit
        return replace(self.start, d=d, m=m).rounded()

    def _units(self) -> tuple[Tensor, Tensor]:
        """What a step of 1 means for d and for m: a change of weights by about the row's mean step."""
        start, share = self.start, self.start.d.shape[1] ** -0.5
        d_unit = self.unit if start.sub_scales is None else start.d.abs().mean(dim=1, keepdim=True)
        if start.m is None or start.sub_minimums is None:
            # a scale moves weights by up to so many steps
            m_unit = self.unit * (0.5 * start.spacing() * (start.high - start.low))
        else:
            m_unit = start.m.abs().mean(dim=1, keepdim=True)
        return d_unit * share, m_unit * share

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], without the bias."""
        return _RealFunction.apply(x, self.d, self.m, self.grid(), *self._units())


class _RealFunction(torch.autograd.Function):
    """y = x W^T with gradients for x and for the real numbers of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, m: Tensor | None, grid: Grid, d_unit: Tensor, m_unit: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x."""
        ctx.grid, ctx.units = grid, (d_unit, m_unit)
        ctx.save_for_backward(x)
        return x @ grid.weight(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """g [..., out] -> gradients of x, d and m."""
        (x,), grid = ctx.saved_tensors, ctx.grid
        g_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        G_OI = (g_NO.T @ x_NI).float()
        grad_d = grid.group_sums(_times(grid.values(), grid.sub_scales).mul_(G_OI)) * ctx.units[0]
        grad_m = None
        if grid.m is not None:
            grad_m = grid.group_sums(_times(G_OI, grid.sub_minimums)) * ctx.units[1]  # G is not needed any more
        grad_x = (g_NO @ grid.weight(grad.dtype)).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_d, grad_m, None, None, None


def _times(values_OI: Tensor, integers_OS: Tensor | None) -> Tensor:
    """The values times the integers of their sub-groups, in place; the values without them."""
    return values_OI if integers_OS is None else combine(values_OI, integers_OS.float(), None)


class _Biased(nn.Module):
    def __init__(self, layer: nn.Module, bias: Tensor) -> None:
        super().__init__()
        self.layer, self.bias = layer, bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = self.layer(x)
        return y + self.bias.to(y.dtype)
