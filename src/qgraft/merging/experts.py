"""LoRAs on experts, merged: each expert of a stack is a layer of its own, which sees the tokens that are routed to it.

    stream a | stream m      the rows of both lie together in each expert (lockstep.py); a token that both streams send to the
                             expert is a pair of inputs that its weight can be solved for

An expert that fewer than FEWEST pairs reached, or none, is not solved for: W + delta is rounded on the grid it has, which
changes nothing where a delta is smaller than half a step. The report names these. An expert without a delta keeps its bytes.
Where another format is asked for, each expert is rounded to it first, and what that took away is a part of its delta.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from qgraft.adapters.lora_experts import ExpertLora, LoraExperts, expert_layers
from qgraft.errors import UnsupportedError
from qgraft.experts import ExpertStack, Routed
from qgraft.formats import PackedTensor, dequantize, fitting_format, join_rows, quantize
from qgraft.kernels import linear
from qgraft.merging.layer import Inputs, LayerReport, merge_layer, merge_nearest, seen

FEWEST, FEWEST_JUDGING = 32, 8  # pairs of inputs that an expert is solved and judged with
ROUNDED = "grid"  # the method for the others


@dataclass(frozen=True, eq=False)
class StackToMerge:
    """A stack that active adapters change, as part of the projection that they are on."""

    layer: LoraExperts
    part: str
    weights: Mapping[str, float]
    to: str | None = None  # the format that was asked for

    @property
    def stack(self) -> ExpertStack:
        """The weights of all experts."""
        return self.layer.base.stacks()[self.part]

    @property
    def format(self) -> str:
        """That of the merged weights."""
        fitting = None if self.to is None else fitting_format(self.to, self.stack.in_features)
        return fitting or self.stack.packed.format

    def start(self, expert: int) -> PackedTensor:
        """An expert's weight in that format."""
        packed = self.stack.expert(expert)
        return packed if packed.format == self.format else quantize(dequantize(packed, torch.float32), self.format)

    @torch.no_grad()
    def delta(self, expert: int, start: PackedTensor) -> Tensor:
        """What an expert's adapted weight is above `start`, [out, in]: what adapters add, and what rounding took away."""
        delta = self._added(expert)
        if start.format == (packed := self.stack.expert(expert)).format:
            return delta
        return delta + (dequantize(packed, torch.float32) - dequantize(start, torch.float32))

    def _added(self, expert: int) -> Tensor:
        """What the active adapters add to an expert's weight, [out, in]."""
        outputs = self.layer.base.outputs()[self.part]
        named = [(self.layer.named(name), weight) for name, weight in self.weights.items()]
        parts = [
            weight * cast(ExpertLora, lora).delta_of(expert, outputs) for lora, weight in named if lora is not None
        ]
        return torch.stack(parts).sum(0)


def stacks_to_merge(model: nn.Module, weights: Mapping[str, float], to: str | None = None) -> dict[str, StackToMerge]:
    """The stacks that these adapters are on, by their paths in the model without adapters."""
    return {
        f"{path}.{part}": StackToMerge(layer, part, weights, to)
        for path, layer in expert_layers(model).items()
        if isinstance(layer, LoraExperts) and any(name in layer.loras for name in weights)
        for part in layer.base.stacks()
    }


def round_stack(path: str, merged: StackToMerge, method: str) -> tuple[PackedTensor, LayerReport]:
    """W + delta of each expert, rounded, without calibration."""
    experts = range(merged.stack.num_experts)
    return _joined(path, [_rounded(path, merged, expert, method) for expert in experts], ())


@contextmanager
def standing_in_experts(
    stacks: Mapping[str, StackToMerge], method: str, tokens: Callable[[], tuple[Tensor, Tensor]],
    done: Callable[[str, PackedTensor, LayerReport], None],
) -> Iterator[None]:  # fmt: skip
    """Within the block the projections of these stacks compute both streams, and merge their experts as the pass comes by.

    Args:
        tokens: which tokens of a stream calibrate, which judge.
        done: is given each merged stack.
    """
    layers: dict[int, tuple[LoraExperts, dict[str, StackToMerge]]] = {}
    for path, stack in stacks.items():
        layers.setdefault(id(stack.layer), (stack.layer, {}))[1][path] = stack
    for layer, own in layers.values():
        layer.stands_in = _Split(own, method, tokens, done)
    try:
        yield
    finally:
        for layer, _ in layers.values():
            layer.stands_in = None


class _Split:
    """What a projection computes instead: the adapter's for stream a, with the merged experts for stream m."""

    def __init__(self, stacks: Mapping[str, StackToMerge], method: str, tokens: Any, done: Any) -> None:
        self.stacks, self.method, self.tokens, self.done = stacks, method, tokens, done

    def __call__(self, layer: LoraExperts, routed: Routed) -> Tensor:
        calibrates, judges = self.tokens()
        count = len(calibrates)
        if routed.total != 2 * count:
            raise UnsupportedError(
                f"merge: experts are given {routed.total} tokens, expected all {2 * count} of two streams"
            )
        y = layer.forward_alone(routed)
        found: dict[str, list[tuple[PackedTensor, LayerReport]]] = {path: [] for path in self.stacks}
        few, groups = [], {index: (start, stop) for index, start, stop in routed.groups}
        outputs = layer.base.outputs()
        for expert in range(layer.base.num_experts):
            start, stop = groups.get(expert, (0, 0))
            x, tokens = routed.x[start:stop].float(), routed.tokens[start:stop]
            inputs = _pairs(x, tokens, count, calibrates.to(x.device), judges.to(x.device))
            few += [expert] if inputs is None else []
            of_m = tokens >= count
            for path, stack in self.stacks.items():
                merged = _merged(path, stack, expert, inputs, self.method)
                found[path].append(merged)
                if bool(of_m.any()):
                    rows = torch.arange(start, stop, device=x.device)[of_m]
                    y[rows[:, None], _columns(outputs[stack.part], y)] = linear(routed.x[rows], merged[0])
        for path, parts in found.items():
            self.done(path, *_joined(path, parts, few))
        return y


def _columns(outputs: slice, y: Tensor) -> Tensor:
    return torch.arange(y.shape[1], device=y.device)[outputs]


def _pairs(
    x: Tensor, tokens: Tensor, count: int, calibrates: Tensor, judges: Tensor
) -> Inputs | None:  # fmt: skip
    """An expert's inputs of the tokens that both streams send to it; None where these are too few."""
    at = torch.full((2 * count,), -1, dtype=torch.int64, device=x.device)
    at[tokens] = torch.arange(len(tokens), device=x.device)
    both = (at[:count] >= 0) & (at[count:] >= 0)
    chosen = [both & kind for kind in (calibrates, judges)]
    if int(chosen[0].sum()) < FEWEST or int(chosen[1].sum()) < FEWEST_JUDGING:
        return None
    return seen(*(x[places[kind]] for kind in chosen for places in (at[:count], at[count:])))


def _merged(
    path: str, stack: StackToMerge, expert: int, inputs: Inputs | None, method: str
) -> tuple[PackedTensor, LayerReport]:
    if inputs is None:
        return _rounded(path, stack, expert, ROUNDED)
    start = stack.start(expert)
    delta = stack.delta(expert, start)
    if not bool(delta.any()):
        return _untouched(path, start)
    return merge_layer(path, start, delta, inputs, method)


def _rounded(path: str, stack: StackToMerge, expert: int, method: str) -> tuple[PackedTensor, LayerReport]:
    start = stack.start(expert)
    delta = stack.delta(expert, start)
    if not bool(delta.any()):
        return _untouched(path, start)
    return merge_nearest(path, start, delta, method)


def _untouched(path: str, start: PackedTensor) -> tuple[PackedTensor, LayerReport]:
    return start, LayerReport(path, start.format, 0.0, 0.0, None, ())


def _joined(
    path: str, parts: Sequence[tuple[PackedTensor, LayerReport]], rounded: Sequence[int]
) -> tuple[PackedTensor, LayerReport]:
    """The stack of these experts, and what happened to it: means over the experts, the steps that most of them took."""
    reports = [report for _, report in parts]
    errors = [report.error for report in reports if report.error is not None]
    steps = Counter(report.steps for report in reports).most_common(1)[0][0]
    report = replace(
        reports[0],
        delta_in_steps=sum(each.delta_in_steps for each in reports) / len(reports),
        codes_changed=sum(each.codes_changed for each in reports) / len(reports),
        error=(sum(each**2 for each in errors) / len(errors)) ** 0.5 if errors else None,
        steps=steps,
        rounded=tuple(rounded),
    )
    return join_rows([packed for packed, _ in parts]), report


def rounded_notes(reports: Sequence[LayerReport]) -> list[str]:
    """Which experts were rounded because too few calibration tokens came to them, a sentence for each projection."""
    notes = []
    for report in reports:
        if report.rounded:
            listed = ", ".join(map(str, report.rounded[:16])) + (", ..." if len(report.rounded) > 16 else "")
            notes.append(
                f"{report.path}: too few calibration tokens came to {len(report.rounded)} of its experts ({listed}), whose "
                "weights were rounded"
            )
    return notes
