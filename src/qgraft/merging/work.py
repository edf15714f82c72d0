"""One merge on its way: measure before, solve the layers, measure after, distill where that is not enough."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.adapters.choose import adapters_off
from qgraft.adapters.lora import LoraLinear
from qgraft.data.tokenizing import Sample
from qgraft.formats import PackedTensor
from qgraft.merging.calibration import Calibration
from qgraft.merging.distill import distill
from qgraft.merging.layer import CHAINS, LayerReport, has_grid, merge_nearest
from qgraft.merging.lockstep import merge_in_step
from qgraft.merging.measure import mean_divergence, mean_loss, states_of
from qgraft.merging.report import Kept
from qgraft.passes.decoder import output_head

TARGET = 0.99  # of the gain; below it the real numbers are distilled
DISTILL_RATE = 1e-3  # relative to the scales of a row

Packed = Mapping[str, PackedTensor]  # module path -> weight


@dataclass(frozen=True)
class Outcome:
    """Merged weights, what happened to each layer, what was kept (None: not measured), and steps of distilling."""

    packed: Packed
    layers: list[LayerReport]
    kept: Kept | None = None
    distilled_steps: int = 0


@dataclass(frozen=True, eq=False)
class _States:
    """Last hidden states of one model at the label positions of the rows that measure, and the task's labels."""

    task: Tensor
    labels: Tensor
    drift: Tensor


class Work:
    """Solves for merged weights; the model is left as it was.

    Args:
        layers: module path -> layer to merge.
        deltas: module path -> what computes its delta, [out, in] float32.
        chosen: the rows; None measures nothing, and only nearest and grid can do without.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Mapping[str, LoraLinear],
        deltas: Mapping[str, Callable[[], Tensor]],
        chosen: Calibration | None,
        bar: Progress,
    ) -> None:
        self.model, self.layers, self.deltas, self.chosen, self.bar = model, layers, deltas, chosen, bar

    def run(self, method: str) -> Outcome:
        """Merge with `method`, and measure where there are rows."""
        if self.chosen is None:
            return self._round(method)
        with adapters_off(self.model):
            base = self._states(self.chosen)
        adapter = self._states(self.chosen)
        outcome = self._solve(self.chosen, method) if method in CHAINS else self._round(method)
        packed, steps = outcome.packed, 0
        kept = self._compare(self.chosen, base, adapter, packed)
        if method == "auto" and kept.retained_gain is not None and kept.retained_gain < TARGET:
            packed, steps = self._distill(self.chosen, packed)
            if steps:
                kept = self._compare(self.chosen, base, adapter, packed)
        return Outcome(packed, outcome.layers, kept, steps)

    def _round(self, method: str) -> Outcome:
        pairs = [merge_nearest(path, layer.packed, self.deltas[path](), method) for path, layer in self.layers.items()]
        return Outcome({report.path: packed for packed, report in pairs}, [report for _, report in pairs])

    def _solve(self, chosen: Calibration, method: str) -> Outcome:
        task = self.bar.add_task("layers", total=len(self.layers))
        packed, reports = merge_in_step(
            self.model, self.deltas, chosen.fit, chosen.judge, method, lambda _: self.bar.advance(task)
        )
        return Outcome(packed, reports)

    def _distill(self, chosen: Calibration, packed: Packed) -> tuple[Packed, int]:
        """(better weights, steps), or the same and 0 where the rows that judge come no closer to the adapter's model."""
        trainable = {path: each for path, each in packed.items() if has_grid(each)}
        if not trainable:
            return packed, 0
        targets, _ = states_of(self.model, chosen.fit)
        judge, _ = states_of(self.model, chosen.judge)
        task = self.bar.add_task("distilling", total=None)

        def show(step: int, steps: int) -> None:
            self.bar.update(task, completed=step, total=steps)

        trained, steps = distill(self.model, trainable, chosen.fit, targets, learning_rate=DISTILL_RATE, progress=show)
        candidates: list[Packed] = [packed, {**packed, **trained}]
        apart = [self._apart(chosen.judge, judge, candidate) for candidate in candidates]
        return (candidates[1], steps) if apart[1] < apart[0] else (packed, 0)

    def _apart(self, samples: list[Sample], states: Tensor, packed: Packed) -> float:
        """Mean KL of the merged model from the one whose states are given."""
        with in_place(self.layers, packed), adapters_off(self.model):
            return mean_divergence(states, states_of(self.model, samples)[0], output_head(self.model))

    def _states(self, chosen: Calibration) -> _States:
        return _States(*states_of(self.model, chosen.measure), states_of(self.model, chosen.drift)[0])

    def _compare(self, chosen: Calibration, base: _States, adapter: _States, packed: Packed) -> Kept:
        with in_place(self.layers, packed), adapters_off(self.model):
            merged = self._states(chosen)
        head = output_head(self.model)
        return Kept(
            base=mean_loss(base.task, base.labels, head),
            adapter=mean_loss(adapter.task, adapter.labels, head),
            merged=mean_loss(merged.task, merged.labels, head),
            task_kl=mean_divergence(adapter.task, merged.task, head),
            drift_kl=mean_divergence(adapter.drift, merged.drift, head),
            adapter_kl=mean_divergence(base.drift, adapter.drift, head),
            rows=len(chosen.measure),
            labels=len(base.labels),
            held_out=chosen.held_out,
        )


@contextmanager
def in_place(layers: Mapping[str, LoraLinear], packed: Packed) -> Iterator[None]:
    """Within the block the layers hold these weights."""
    before = {path: layers[path].packed for path in packed}
    for path, each in packed.items():
        layers[path].replace(each)
    try:
        yield
    finally:
        for path, each in before.items():
            layers[path].replace(each)
