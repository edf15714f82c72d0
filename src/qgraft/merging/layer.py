"""One layer: from what it sees and what it should give to new packed bytes.

A method is a chain of algorithms, each starting from what the one before it left. A step is kept only when it lowers
the error on tokens that the step has not seen, so a chain never does worse than not merging. `auto` is

    grids with scales       (requantize ->) fit_reals -> descend_codes -> descend_integers (K-quants) -> fit_reals
    f32, f16, bf16          the nearest numbers: their steps are finer than any delta

Fitting the real numbers comes first because it moves every weight a little, which is what a delta does; whole steps of
codes then repair what a scale for 32 weights cannot express, and the second fit follows the moved codes. Requantizing
W + delta is where it starts when the delta is large beside a step, as in 8 bits: fresh scales bring rounding noise in every
direction, of which the judging tokens see only a part, so it has to win clearly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from qgraft.errors import OptionError, near_match
from qgraft.formats import FORMATS, PackedTensor, dequantize, pack, quantize, unpack
from qgraft.merging.algorithms import (
    Algorithm,
    Problem,
    descend_codes,
    descend_integers,
    feed_errors,
    fit_reals,
    nearest_codes,
)

CHAINS: Final[dict[str, tuple[Algorithm, ...]]] = {
    "auto": (fit_reals, descend_codes, descend_integers, fit_reals),
    "scales": (fit_reals,),
    "codes": (descend_codes, descend_integers),
    "feedback": (feed_errors, descend_codes),
}
DAMPING = 0.02  # see Problem.damped
CLEARLY = 0.25  # of the squared error without merging: requantizing must be better than that to be where auto starts
METHODS = (*CHAINS, "nearest", "grid")
"""auto and its parts; nearest: requantize; grid: requantize with the base's own scales."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What calibration showed of a layer's inputs. a: in the adapter's model, m: in the merged one up to this layer.

    Attributes:
        H: [in, in], X_m^T X_m / T.
        C: [in, in], X_a^T X_m / T.
        held_a, held_m: [n, in], tokens kept back to judge by.
    """

    H: Tensor
    C: Tensor
    held_a: Tensor
    held_m: Tensor


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
        path: the module's path.
        format: of its weight.
        delta_in_steps: root mean square of the delta, in quantization steps.
        codes_changed: share of the codes that differ from the base's.
        error: root mean square error of the outputs on held-out tokens; 1 is not merging, None is not measured.
        steps: the algorithms that were kept, in their order.
    """

    path: str
    format: str
    delta_in_steps: float
    codes_changed: float
    error: float | None
    steps: tuple[str, ...]

    @property
    def effect_kept(self) -> float | None:
        """How much of what the delta does to this layer's outputs is there after the merge; None is not measured.

        1 - sum |y_merged - y_adapter|^2 / sum |y_base - y_adapter|^2 on held-out tokens, which is 1 - error^2: 1 is all of
        it, 0 is as if nothing had been merged, below 0 is worse. Layers make up for each other, so the gain that all of
        them keep together is larger.
        """
        return None if self.error is None else 1.0 - self.error**2


def check_method(method: str) -> None:
    """Raises OptionError for a method that does not exist."""
    if method not in METHODS:
        expected = f"method={method!r}: expected one of {', '.join(METHODS)}"
        raise OptionError(expected, hint=near_match(method, METHODS))


def is_writable(packed: PackedTensor) -> bool:
    """Whether merged weights can be written in this format."""
    return FORMATS[packed.format].quantize is not None


def merge_nearest(path: str, packed: PackedTensor, delta_OI: Tensor, method: str) -> tuple[PackedTensor, LayerReport]:
    """Round W + delta, which is all that can be done without calibration: `nearest`, or on the base's own `grid`."""
    target_OI = dequantize(packed, torch.float32) + delta_OI
    if method == "grid" and has_grid(packed):
        merged = pack(nearest_codes(unpack(packed), target_OI), packed.format)
    else:
        merged = _requantize(packed, target_OI)
    return merged, _report(path, packed, merged, delta_OI, None, ("nearest",))


def merge_layer(
    path: str, packed: PackedTensor, delta_OI: Tensor, inputs: Inputs, method: str
) -> tuple[PackedTensor, LayerReport]:
    """Solve for bytes whose outputs on the merged model's inputs are those of W + delta on the adapter's.

    Args:
        packed: the base's weight W.
        delta_OI: float32 [out, in].
        method: a key of CHAINS.

    Returns the merged weight in the same format, and what was done.
    """
    base_OI = dequantize(packed, torch.float32)
    target_OI = base_OI + delta_OI
    held = inputs.held_a @ target_OI.T  # [n, out], what the outputs should be
    unmerged = _held_error(base_OI, inputs, held)
    if not has_grid(packed):
        merged = quantize(target_OI, packed.format)
        error = _held_error(dequantize(merged, torch.float32), inputs, held)
        return merged, _report(path, packed, merged, delta_OI, _ratio(error, unmerged), ("nearest",))
    problem = Problem(inputs.H, target_OI @ inputs.C).damped(target_OI, DAMPING)
    best, least = unpack(packed), unmerged
    kept: list[str] = []
    if method == "auto":
        rounded = unpack(_requantize(packed, target_OI))
        error = _held_error(rounded.weight(), inputs, held)
        if error < CLEARLY * unmerged:
            best, least, kept = rounded, error, ["nearest"]
    for algorithm in CHAINS[method]:
        if kept and kept[-1] == algorithm.__name__:
            continue  # nothing has changed since it was done
        candidate = algorithm(best, problem)
        if candidate is best:
            continue  # the algorithm has nothing to do in this format
        error = _held_error(candidate.weight(), inputs, held)
        if error < least:
            best, least = candidate, error
            kept.append(algorithm.__name__)
    merged = pack(best, packed.format)
    return merged, _report(path, packed, merged, delta_OI, _ratio(least, unmerged), tuple(kept))


def _requantize(packed: PackedTensor, w_OI: Tensor) -> PackedTensor:
    """w in the format of `packed`, with fresh scales; those that may have several dtypes are stored in that of w."""
    parts = zip(FORMATS[packed.format].parts, packed.parts, strict=True)
    kept = [tensor.dtype for part, tensor in parts if len(part.dtypes) > 1]
    return quantize(w_OI.to(kept[0]) if kept else w_OI, packed.format)


def has_grid(packed: PackedTensor) -> bool:
    """Whether the format has codes and scales to solve for; f32, f16 and bf16 have none."""
    return FORMATS[packed.format].unpack is not None


def _held_error(w_OI: Tensor, inputs: Inputs, held: Tensor) -> float:
    """Mean squared error of the outputs on the tokens kept back."""
    return float((inputs.held_m @ w_OI.T).sub_(held).square_().mean())


def _ratio(error: float, unmerged: float) -> float:
    return (error / unmerged) ** 0.5 if unmerged else 0.0


def _report(
    path: str, packed: PackedTensor, merged: PackedTensor, delta_OI: Tensor, error: float | None, steps: Sequence[str]
) -> LayerReport:
    if not has_grid(packed):
        return LayerReport(path, packed.format, 0.0, 0.0, error, tuple(steps))
    before, after = unpack(packed), unpack(merged)
    changed = float((before.codes != after.codes).float().mean())
    step = before.spacing() * float(before.steps().square().mean().sqrt())
    delta_in_steps = float(delta_OI.square().mean().sqrt()) / max(step, 1e-30)
    return LayerReport(path, packed.format, delta_in_steps, changed, error, collapse(steps))


def collapse(steps: Sequence[str]) -> tuple[str, ...]:
    """The steps without immediate repetitions."""
    return (*steps[:1], *(after for before, after in pairwise(steps) if after != before))
