"""The last part of a merge: what of all layers is free to move, together, against the adapter's logits.

Layer by layer a merge cannot weigh which of its remaining errors matter to the logits. So where not enough is kept yet,
the merged layers are trained to minimize, by Adam and in rounds of a few passes,

    KL(p || q) + max(0, lost)^2 / (4 worth)        lost = mean of log p_label - log q_label
                                                   worth = 2 % of what the adapter gained on its labels

with p the adapter's model and q the merged one, at the label positions of the calibration rows, unless the rows that judge
say that a round did harm. The divergence is of second order in what is wrong, what the adapter gained on its labels is lost
to first order: a merge that is near in KL still knows every fact a little less surely. The second term makes up for that and
no more, and weighs at most half of what is lost; it asks nothing of the unrelated text, whose labels weigh 0. A step sees too
few labels to know what they lost on the whole, so a running mean is asked as well.

The codes stay. What is trained is

    formats with minimums    an exact LoRA of a low rank (adapters/exact.py), folded into the minimums after each round
    mxfp4, nvfp4             nothing: their scales, of 8 bits, are too far apart for small steps (of 663,552 and 1,327,104 a
                             round of 42 steps changed one, and none)
    the others               the scales themselves

A change of minimums costs a LoRA's time and memory, and a low rank does not follow the noise of single rows as numbers of
their own do: Adam moves each of those by its learning rate, whether rows agree about it or not.

The scales of symmetric formats have no such narrow product; their gradient is that of a weight matrix, which the frozen base
never needs, formed layer by layer and summed at once:

    G = g^T x [out, in]        dE/d_k = sub_scale * sum over group k of G * value

The forward pass uses them as they will be stored (float16), the steps add to float32 ones; a scale's learning rate is
relative to those of its row. PEQA (arXiv:2305.14152) trains scales as the only parameters; here they imitate the adapter
instead of learning the task, and the calibration's unrelated text is in it, so that drift costs as well.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qgraft.adapters.choose import adapters_off
from qgraft.adapters.exact import BlockLora, MinimumLora, make_part, minimums_of
from qgraft.adapters.lora import LoraConfig, LoraLinear
from qgraft.data.batches import Batch
from qgraft.experts import ExpertStack
from qgraft.formats import Grid, PackedTensor, pack, unpack
from qgraft.formats.grid import combine
from qgraft.linear import QuantizedLinear, in_stored_order
from qgraft.merging.calibration import Calibration
from qgraft.merging.exact import with_minimums
from qgraft.merging.layer import has_fine_reals
from qgraft.merging.lockstep import standing_in
from qgraft.merging.measure import CHUNK_ROWS, Packed, compare, in_place, states_of, summed_divergence
from qgraft.merging.near_rows import near_rows
from qgraft.merging.outputs import Outputs, outputs_of
from qgraft.passes.labels import classifier_of

PASSES = 2  # of a round
PASS_TOKENS = 256  # of a step
SCALE_RATE = 1e-3  # of scales, relative to the scales of a row
LORA_RATE = 1e-3  # of the exact LoRAs; both in the first round, and a share of them in the others
RANK = 16  # of them; with 8 the FAQ of near_rows.py keeps 98.3 %, after three rounds
FAR = 0.1  # nats between merged and adapter's model, from which on rates are these; below, they fall as its root
MOST_LABELS = 0.5  # the largest share of the labels beside the divergence
WORTH = 0.02  # of the gain: labels that lost so much have it
HARM = 1.25  # of a small set few rows judge, so less than a quarter further from the adapter's model says nothing
REMEMBERED = 8  # chunks of labels, of which the mean says what they lost
_NAME: Final = "distilled"


class Distillation:
    """What rounds of distilling have in common: the rows, and what the adapter's model makes of them.

    Args:
        model: with the adapter active.
        layers: the wrapped layers that are merged.
        others: merged weights of those that are not distilled.
        gain: how much less the adapter's model loses on its labels than the base, in nats.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, LoraLinear | ExpertStack],
        others: Packed,
        rows: Calibration,
        gain: float,
    ) -> None:
        self._model, self._layers, self._others, self._rows, self._gain = model, layers, others, rows, gain
        self._fit, _ = states_of(model, rows.fit)
        self._judge, _ = states_of(model, rows.judge)
        self._rounds = 0
        self._nearest = math.nan  # that the rows which judge came

    @property
    def unseen(self) -> bool:
        """Whether there are rows for another round that nothing has learned from."""
        return self._rounds < len(self._rows.further)

    def round(self, packed: Packed, progress: Callable[[int, int], None]) -> tuple[Packed, int]:
        """(distilled weights, steps), or the same and 0 where the rows that judge say that it did harm."""
        if not self._rounds:
            self._nearest = self._apart(packed)
        if self.unseen:
            samples = self._rows.further[self._rounds]
            targets, _ = states_of(self._model, samples)
        else:
            near = [] if classifier_of(self._model) else near_rows(self._rows.fit, self._rounds)
            samples = [*self._rows.fit, *near]
            targets = torch.cat([self._fit, states_of(self._model, near)[0]]) if near else self._fit
        distilled, steps = self._distilled(packed, samples, targets, progress)
        apart = self._apart(distilled)
        if not apart <= HARM * self._nearest:
            return packed, 0
        self._nearest = min(apart, self._nearest)
        return distilled, steps

    def last_round(self, packed: Packed, progress: Callable[[int, int], None]) -> tuple[Packed, int]:
        """(distilled weights, steps): on all rows of the task, those that judge and those that measure, too."""
        samples = [*self._rows.fit, *self._rows.judge, *self._rows.measure]
        return self._distilled(packed, samples, torch.cat([self._fit, self._judge, self._measure]), progress)

    @cached_property
    def _measure(self) -> Tensor:
        """What the adapter's model makes of the rows that measure, which last rounds alone ask for."""
        return states_of(self._model, self._rows.measure)[0]

    def _distilled(
        self, packed: Packed, samples: Sequence[Any], targets: Tensor, progress: Callable[[int, int], None]
    ) -> tuple[Packed, int]:
        """(weights after one more round, steps); those whose scales no small step can change as they are."""
        self._rounds += 1
        trainable = {path: each for path, each in packed.items() if has_fine_reals(each)}
        # The less is left, the more of a step is noise, whose divergence grows as the square of the rate.
        pace = self._rounds**-0.5 * min(1.0, (self._nearest / FAR) ** 0.5)
        trained, steps = distill(self._model, trainable, samples, targets, progress=progress, seed=self._rounds,
                                 pace=pace, worth=WORTH * self._gain)  # fmt: skip
        return {**packed, **trained}, steps

    def _apart(self, candidate: Packed) -> float:
        """How far the rows that judge are from the adapter's model: their divergence, and what their labels lost, in nats."""
        with in_place(self._layers, {**self._others, **candidate}), adapters_off(self._model):
            states, labels = states_of(self._model, self._rows.judge)
        outputs = outputs_of(self._model)
        (every,) = outputs.batches(self._rows.judge, sys.maxsize)
        compared = compare(self._judge, states, outputs.head(self._model), labels, _weights_of(outputs, every, states))
        known, got = compared.losses
        return compared.divergence + max(0.0, got - known)


def distill(
    model: PreTrainedModel,
    merged: Packed,
    samples: Sequence[Any],
    targets: Tensor,
    *,
    progress: Callable[[int, int], None],
    seed: int = 0,
    pace: float = 1.0,
    worth: float = 0.25,
) -> tuple[dict[str, PackedTensor], int]:
    """The merged weights with what may move trained for PASSES passes, and the steps taken.

    The model is left as it was.

    Args:
        merged: module path of a LoraLinear -> its merged weight, in a format with a grid.
        samples: what to train on.
        targets: the adapter's states at the label positions of the samples, [labels, width].
        progress: called after each step with (step, steps).
        seed: of the order of the samples and of the LoRAs.
        pace: what the learning rates are multiplied by.
        worth: how much labels lost, in nats, that have their largest share.
    """
    layers: dict[str, _FreeMinimums | _FreeScales] = {}

    def free(path: str, layer: LoraLinear) -> nn.Module:
        packed, bias = merged[path], layer.base.bias
        if minimums_of(packed.format) is None:
            layers[path] = _FreeScales(partial(unpack, packed), packed.format, bias)
        else:
            layers[path] = _FreeMinimums(packed, bias)
        layers[path].register_forward_pre_hook(lambda _, given: (in_stored_order(layer.base, given[0]),))
        return layers[path]

    order = random.Random(seed)
    outputs = outputs_of(model)
    samples, targets = _shuffled(outputs, samples, targets, order)
    with outputs.together(model, samples) as problem, _seeded(seed, model.device), standing_in(model, merged, free):
        trained = [
            ([each for each in layer.parameters() if each.requires_grad], pace * layer.rate)
            for layer in layers.values()
        ]
        parameters = [each for group, _ in trained for each in group]
        optimizer = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in trained], betas=(0.9, 0.99))
        batches = outputs.batches(samples, 0 if problem else PASS_TOKENS)
        parts = list(zip(batches, targets.split([outputs.count(batch) for batch in batches]), strict=True))
        steps = [part for _ in range(PASSES) for part in order.sample(parts, len(parts))]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_schedule, steps=len(steps)))
        lost = _Labels(worth)
        for step, (batch, states) in enumerate(steps):
            _backward(model, outputs, batch, states, parameters, lost)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress(step + 1, len(steps))
    return {path: _sharing(layer.merged(), merged[path]) for path, layer in layers.items()}, len(steps)


def _sharing(packed: PackedTensor, before: PackedTensor) -> PackedTensor:
    """The weight with the very parts of `before` that it left as they were: the codes of row-wise formats, for one."""
    pairs = zip(packed.parts, before.parts, strict=True)
    return replace(packed, parts=tuple(old if torch.equal(new, old) else new for new, old in pairs))


def _shuffled(
    outputs: Outputs, samples: Sequence[Any], targets: Tensor, order: random.Random
) -> tuple[list[Any], Tensor]:
    """The samples in another order, so that rows of the task and unrelated text share steps, and their targets."""
    parts = targets.split([outputs.rows(sample) for sample in samples])
    pairs = order.sample([*zip(samples, parts, strict=True)], len(samples))
    return [sample for sample, _ in pairs], torch.cat([part for _, part in pairs])


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block torch draws by this seed, on the CPU and on `device`; afterwards as if there had been no block."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:  # torch.manual_seed would seed all of them
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def _schedule(step: int, steps: int) -> float:
    """A tenth of warmup, then a half cosine to zero."""
    return min(1.0, (step + 1) / max(1, steps // 10)) * 0.5 * (1 + math.cos(math.pi * step / steps))


class _Labels:
    """What labels lost by the merge, log p_label - log q_label in nats, as it is found in a few of them after others."""

    def __init__(self, worth: float) -> None:
        self._worth, self._mean, self._seen = worth, 0.0, 0

    def share(self, lost: float) -> float:
        """How much labels count that `lost` so much: the slope of the mean's square, nothing where these lost nothing."""
        self._seen += 1
        self._mean += (lost - self._mean) / min(self._seen, REMEMBERED)
        return MOST_LABELS * min(1.0, max(0.0, min(lost, self._mean)) / self._worth)


def _backward(
    model: PreTrainedModel, outputs: Outputs, batch: Batch, targets: Tensor, parameters: list[nn.Parameter],
    lost: _Labels,
) -> None:  # fmt: skip
    """Accumulate the gradients of a part's mean loss, without ever holding the logits of all its positions."""
    head, (states, labels) = outputs.head(model), outputs.states(model, batch)
    free, weights = states.detach().requires_grad_(), _weights_of(outputs, batch, states)
    parts = (each.split(CHUNK_ROWS) for each in (free, targets, labels, weights))
    for chunk, target, label, weight in zip(*parts, strict=True):
        with torch.no_grad():
            wanted = head(target)
            known = weight @ F.cross_entropy(wanted.float(), label, reduction="none")
        got = head(chunk)
        missed = weight @ F.cross_entropy(got.float(), label, reduction="none")
        total = float(weight.sum())
        share = lost.share(float(missed.detach() - known) / total) if total else 0.0
        ((summed_divergence(wanted, got) + share * missed) / len(targets)).backward()
    states.backward(free.grad, inputs=parameters)  # not into adapters of layers that are not distilled


def _weights_of(outputs: Outputs, batch: Batch, states: Tensor) -> Tensor:
    """What each label of the batch weighs, [labels] float32, where their states are."""
    weights = outputs.weights(batch)
    return torch.ones(len(states), device=states.device) if weights is None else weights.to(states.device)


class _FreeMinimums(LoraLinear):
    """A merged layer with an exact LoRA of its own on it: what it changes are the minimums."""

    def __init__(self, packed: PackedTensor, bias: Tensor | None) -> None:
        super().__init__(QuantizedLinear(packed, bias))
        self.lora = make_part(self, LoraConfig(r=RANK, lora_alpha=2 * RANK, exact=True))
        self.add(_NAME, self.lora)
        self.active = {_NAME: 1.0}
        self.rate = LORA_RATE

    @torch.no_grad()
    def merged(self) -> PackedTensor:
        """The weight with the minimums as they were trained and will be stored."""
        return with_minimums(self.packed, cast(BlockLora | MinimumLora, self.lora).change())


class _FreeScales(nn.Module):
    """A merged layer whose scales train, as offsets in units of the row's mean scale over the root of its groups.

    Adam moves every number by about the learning rate; so divided, a step moves a row's output as far in any format.

    Args:
        start: unpacks the weight, whenever it is needed: the codes of all layers take twice the memory of a 4-bit model.
    """

    def __init__(self, start: Callable[[], Grid], format: str, bias: Tensor | None) -> None:
        super().__init__()
        self.start, self.format, self.bias, grid = start, format, bias, start()
        sizes = grid.d if grid.sub_scales is not None else grid.steps()
        self.unit = sizes.abs().mean(dim=1, keepdim=True) * grid.d.shape[1] ** -0.5  # [out, 1]
        self.d = nn.Parameter(torch.zeros_like(grid.d))
        self.rate = SCALE_RATE

    def grid(self) -> Grid:
        """The grid with the trained scales as they are stored."""
        start = self.start()
        return replace(start, d=start.d + self.d.detach() * self.unit).rounded()

    def merged(self) -> PackedTensor:
        """The weight with the scales as they are stored."""
        return pack(self.grid(), self.format)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = _ScaleFunction.apply(x, self.d, self.grid, self.unit)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _ScaleFunction(torch.autograd.Function):
    """y = x W^T with gradients for x and for the scales of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, grid: Callable[[], Grid], unit: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in the dtype of x."""
        ctx.grid, ctx.unit = grid, unit
        ctx.save_for_backward(x)
        return x @ grid().weight(x.dtype).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """g [..., out] -> gradients of x and d."""
        (x,), grid = ctx.saved_tensors, ctx.grid()
        g_NO, x_NI = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        values_OI, G_OI = grid.values(), (g_NO.T @ x_NI).float()
        if grid.sub_scales is not None:
            values_OI = combine(values_OI, grid.sub_scales.float(), None)
        grad_d = grid.group_sums(values_OI.mul_(G_OI)) * ctx.unit
        grad_x = (g_NO @ grid.weight(grad.dtype)).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_d, None, None
