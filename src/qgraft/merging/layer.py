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

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Final, NamedTuple

import torch
from torch import Tensor

from qgraft.errors import OptionError, near_match
from qgraft.formats import FORMATS, PackedTensor, dequantize, join_rows, pack, quantize, take_rows, unpack
from qgraft.merging.algorithms import (
    Algorithm,
    descend_codes,
    descend_integers,
    feed_errors,
    fit_reals,
    nearest_codes,
)
from qgraft.merging.problem import Problem, TokenProblem

CHAINS: Final[dict[str, tuple[Algorithm, ...]]] = {
    "auto": (fit_reals, descend_codes, descend_integers, fit_reals),
    "scales": (fit_reals,),
    "codes": (descend_codes, descend_integers),
    "feedback": (feed_errors, descend_codes),
}
DAMPING = 0.02  # see Problem.damped
CLEARLY = 0.25  # of the squared error without merging: requantizing must be better than that to be where auto starts
WIDE = 2048  # inputs of a layer from which on its problem may be kept by its tokens
MOMENT_PANELS = 8  # of columns
FINE = 2.0**-7  # between stored numbers, as a share of them: bfloat16
PANEL_BYTES = 64 << 20  # of a panel's weights in float32
TRIED_ROWS = 64  # that are requantized first, to see whether it may help: in a coarse format it never does
METHODS = (*CHAINS, "nearest", "grid")
"""auto and its parts; nearest: requantize; grid: requantize with the base's own scales."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What calibration showed of a layer's inputs. a: in the adapter's model, m: in the merged one up to this layer.

    Attributes:
        X_a, X_m: [T, in] float32, over the root of T.
        held_a, held_m: [n, in], tokens kept back to judge by.
    """

    X_a: Tensor
    X_m: Tensor
    held_a: Tensor
    held_m: Tensor

    @property
    def few(self) -> bool:
        """Whether the tokens of a wide layer are less than their moments."""
        tokens, width = self.X_m.shape
        return width >= WIDE and 2 * tokens < width

    @cached_property
    def H(self) -> Tensor:
        """[in, in], X_m^T X_m."""
        return _second_moments(self.X_m)

    @cached_property
    def C(self) -> Tensor:
        """[in, in], X_a^T X_m; layers that are given the same inputs share it."""
        return self.X_a.T @ self.X_m

    def problem(self, target_OI: Tensor, wanted: "Wanted | None" = None) -> Problem | TokenProblem:
        """What is to be solved for some rows of the target W + delta, whose outputs may be known."""
        rows, width = target_OI.shape
        if not self.few and rows >= width:  # else the outputs are the smaller matrix
            return Problem(self.H, target_OI @ self.C).damped(target_OI, DAMPING)
        Y = self.X_a @ target_OI.T if wanted is None else wanted.fit
        if self.few:
            noise = DAMPING * float(self.X_m.square().sum()) / width
            return TokenProblem(self.X_m, Y, target_OI, noise)
        return Problem(self.H, Y.T @ self.X_m).damped(target_OI, DAMPING)


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a layer should give: the outputs of W + delta on the adapter's inputs, without bias.

    Attributes:
        fit: [T, out] float32, of X_a.
        held: [n, out], of held_a.
    """

    fit: Tensor
    held: Tensor


def seen(x_a: Tensor, x_m: Tensor, held_a: Tensor, held_m: Tensor) -> Inputs:
    """A layer's inputs, each [tokens, in] float32 in memory of its own."""
    root = max(len(x_m), 1) ** -0.5
    return Inputs(x_a.mul_(root), x_m.mul_(root), held_a, held_m)


def _second_moments(x_TI: Tensor) -> Tensor:
    """X^T X, of which one half is computed."""
    width = x_TI.shape[1]
    H_II, panel = x_TI.new_empty(width, width), max(1, width // MOMENT_PANELS)
    for start in range(0, width, panel):
        columns, rest, below = slice(start, start + panel), slice(start, None), slice(start + panel, None)
        H_II[columns, rest] = x_TI[:, columns].T @ x_TI[:, rest]
        H_II[below, columns] = H_II[columns, below].T
    return H_II


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
        rounded: of a stack of experts, those that saw too few tokens.
    """

    path: str
    format: str
    delta_in_steps: float
    codes_changed: float
    error: float | None
    steps: tuple[str, ...]
    rounded: tuple[int, ...] = ()

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
        merged, step = pack(nearest_codes(unpack(packed), target_OI), packed.format), "nearest_codes"
    else:
        merged, step = _requantize(packed, target_OI), "nearest"
    sizes = _sizes(packed, merged, delta_OI)
    return merged, _joined(path, packed, [_Panel(merged, (step,), None, 0.0, sizes)])


def merge_layer(
    path: str,
    packed: PackedTensor,
    delta_OI: Tensor | Callable[[slice], Tensor],
    inputs: Inputs,
    method: str,
    wanted: Callable[[slice], Wanted] | None = None,
) -> tuple[PackedTensor, LayerReport]:
    """Solve for bytes whose outputs on the merged model's inputs are those of W + delta on the adapter's.

    A row is a problem of its own, so a large layer is solved in panels of rows, which bounds the memory.

    Args:
        packed: the base's weight W.
        delta_OI: float32 [out, in], or what gives some rows of it.
        method: a key of CHAINS.
        wanted: gives the outputs of some rows of W + delta, where they are known.

    Returns the merged weight in the same format, and what was done.
    """
    panels = []
    for rows in _panels(packed):
        part = (
            take_rows(packed, torch.arange(rows.start, rows.stop, device=packed.device)) if is_large(packed) else packed
        )
        delta = delta_OI[rows] if isinstance(delta_OI, Tensor) else delta_OI(rows)
        panels.append(_merge_panel(part, delta, inputs, method, None if wanted is None else wanted(rows)))
    return join_rows([panel.packed for panel in panels]), _joined(path, packed, panels)


def is_large(packed: PackedTensor) -> bool:
    """Whether a weight is solved in panels of rows."""
    return packed.shape[0] > _panel_rows(packed) and FORMATS[packed.format].by_rows


def _panel_rows(packed: PackedTensor) -> int:
    return max(1, PANEL_BYTES // (4 * packed.shape[1]))


def _panels(packed: PackedTensor) -> list[slice]:
    """Rows that are solved at a time."""
    rows = packed.shape[0]
    count = _panel_rows(packed) if is_large(packed) else rows
    return [slice(start, min(start + count, rows)) for start in range(0, rows, count)]


@dataclass(frozen=True, eq=False)
class _Panel:
    """Some rows, solved; sums over their weights, and over their outputs on held-out tokens."""

    packed: PackedTensor
    steps: tuple[str, ...]
    error: float | None  # squared, where it was measured; of the base: `unmerged`
    unmerged: float
    sizes: "_Sizes"


class _Sizes(NamedTuple):
    changed: float  # codes
    delta: float  # squared
    step: float  # squared, of the mean of each row's groups
    rows: int


def _merge_panel(packed: PackedTensor, delta_OI: Tensor, inputs: Inputs, method: str, wanted: Wanted | None) -> _Panel:
    base_OI = dequantize(packed, torch.float32)
    target_OI = base_OI + delta_OI
    held = inputs.held_a @ target_OI.T if wanted is None else wanted.held  # [n, out], what the outputs should be
    unmerged = _held_error(base_OI, inputs, held)
    del base_OI
    if not has_grid(packed):
        merged = quantize(target_OI, packed.format)
        error = _held_error(dequantize(merged, torch.float32), inputs, held)
        return _Panel(merged, ("nearest",), error, unmerged, _sizes(packed, merged, delta_OI))
    problem = inputs.problem(target_OI, wanted)
    best, least = unpack(packed), unmerged
    kept: list[str] = []
    if method == "auto" and _may_round(packed, target_OI, inputs, held):
        rounded = unpack(_requantize(packed, target_OI))
        error = _held_error(rounded.weight(), inputs, held)
        if error < CLEARLY * unmerged:
            best, least, kept = rounded, error, ["nearest"]
        del rounded
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
    return _Panel(merged, tuple(kept), least, unmerged, _sizes(packed, merged, delta_OI))


def _may_round(packed: PackedTensor, target_OI: Tensor, inputs: Inputs, held: Tensor) -> bool:
    """Whether requantizing comes anywhere near CLEARLY better on some rows from all over."""
    step = len(target_OI) // TRIED_ROWS
    if step < 2 or not FORMATS[packed.format].by_rows:
        return True
    some = take_rows(packed, torch.arange(0, len(target_OI), step, device=packed.device))
    wanted, rounded = held[:, ::step], _requantize(some, target_OI[::step])
    error, unmerged = (_held_error(dequantize(each, torch.float32), inputs, wanted) for each in (rounded, some))
    return error < 2 * CLEARLY * unmerged


def _requantize(packed: PackedTensor, w_OI: Tensor) -> PackedTensor:
    """w in the format of `packed`, with fresh scales; those that may have several dtypes are stored in that of w."""
    parts = zip(FORMATS[packed.format].parts, packed.parts, strict=True)
    kept = [tensor.dtype for part, tensor in parts if len(part.dtypes) > 1]
    return quantize(w_OI.to(kept[0]) if kept else w_OI, packed.format)


def has_grid(packed: PackedTensor) -> bool:
    """Whether the format has codes and scales to solve for; f32, f16 and bf16 have none."""
    return FORMATS[packed.format].unpack is not None


def has_fine_reals(packed: PackedTensor) -> bool:
    """Whether the format has scales or minimums that small steps can change: those of mxfp4 and nvfp4 are too far apart."""
    if not has_grid(packed):
        return False
    row = unpack(take_rows(packed, torch.zeros(1, dtype=torch.int64, device=packed.device)))
    return torch.finfo(row.real_dtype).eps <= FINE


def _held_error(w_OI: Tensor, inputs: Inputs, held: Tensor) -> float:
    """Summed squared error of the outputs on the tokens kept back."""
    return float((inputs.held_m @ w_OI.T).sub_(held).square_().sum(dtype=torch.float64))


def _sizes(packed: PackedTensor, merged: PackedTensor, delta_OI: Tensor) -> _Sizes:
    if not has_grid(packed):
        return _Sizes(0.0, 0.0, 0.0, packed.shape[0])
    before, after = unpack(packed), unpack(merged)
    step = before.spacing() ** 2 * float(before.steps().square().mean(1).sum())
    changed = float((before.codes != after.codes).sum())
    return _Sizes(changed, float(delta_OI.square().sum(dtype=torch.float64)), step, packed.shape[0])


def _joined(path: str, packed: PackedTensor, panels: Sequence[_Panel]) -> LayerReport:
    """What happened to the layer, by its panels; the steps are those of most rows."""
    sizes, weights = [panel.sizes for panel in panels], packed.shape[0] * packed.shape[1]
    rows = Counter[tuple[str, ...]]()
    for panel in panels:
        rows[panel.steps] += panel.sizes.rows
    errors = [panel.error for panel in panels if panel.error is not None]
    unmerged = sum(panel.unmerged for panel in panels)
    error = (sum(errors) / unmerged) ** 0.5 if unmerged else 0.0
    step = (sum(each.step for each in sizes) / packed.shape[0]) ** 0.5
    delta = (sum(each.delta for each in sizes) / weights) ** 0.5
    return LayerReport(
        path,
        packed.format,
        delta / max(step, 1e-30) if has_grid(packed) else 0.0,
        sum(each.changed for each in sizes) / weights,
        error if errors else None,
        collapse(rows.most_common(1)[0][0]),
    )


def collapse(steps: Sequence[str]) -> tuple[str, ...]:
    """The steps without immediate repetitions."""
    return (*steps[:1], *(after for before, after in pairwise(steps) if after != before))
