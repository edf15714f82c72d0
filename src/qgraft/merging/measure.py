"""What was kept: losses on the task's rows, and how far two models are apart on any rows.

Everything comes from the states at label positions (outputs.py), which are small enough to keep for three models at
once; logits are formed a few rows at a time. The head is the same for all of them: merging leaves an output layer alone, and
a classifier has the adapter's meanwhile.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.adapters.choose import adapters_off
from qgraft.adapters.lora import LoraLinear
from qgraft.data.tokenizing import Sample
from qgraft.experts import ExpertStack
from qgraft.formats import PackedTensor
from qgraft.mapped import release
from qgraft.merging.calibration import Calibration
from qgraft.merging.outputs import outputs_of
from qgraft.merging.report import Kept
from qgraft.passes.decoder import Head
from qgraft.passes.loss import summed_cross_entropy

PASS_TOKENS = 1024
CHUNK_ROWS = 128  # of logits at a time

Packed = Mapping[str, PackedTensor]  # module path -> weight


@dataclass(frozen=True, eq=False)
class States:
    """States of one model at the label positions of the rows that measure, and the task's labels."""

    task: Tensor
    labels: Tensor
    drift: Tensor


class Measurement:
    """Base and base + adapter on the rows that measure, to compare merged weights with."""

    def __init__(
        self, model: PreTrainedModel, layers: Mapping[str, LoraLinear | ExpertStack], rows: Calibration
    ) -> None:
        self._model, self._layers, self._rows = model, layers, rows
        with adapters_off(model):
            self._base = self._states()
        self._adapter = self._states()

    def kept(self, packed: Packed) -> Kept:
        """What is kept of the adapter's gain when the layers hold these weights."""
        with in_place(self._layers, packed), adapters_off(self._model):
            merged = self._states()
        outputs = outputs_of(self._model)
        base, adapter, head = self._base, self._adapter, outputs.head(self._model)
        return Kept(
            base=mean_loss(base.task, base.labels, head),
            adapter=mean_loss(adapter.task, adapter.labels, head),
            merged=mean_loss(merged.task, merged.labels, head),
            task_kl=mean_divergence(adapter.task, merged.task, head),
            drift_kl=mean_divergence(adapter.drift, merged.drift, head),
            adapter_kl=mean_divergence(base.drift, adapter.drift, head),
            rows=len(self._rows.measure),
            labels=len(base.labels),
            held_out=self._rows.held_out,
            same_token=same_token(adapter.task, merged.task, head),
            unit=outputs.unit,
        )

    def _states(self) -> States:
        return States(*states_of(self._model, self._rows.measure), states_of(self._model, self._rows.drift)[0])


@contextmanager
def in_place(layers: Mapping[str, LoraLinear | ExpertStack], packed: Packed) -> Iterator[None]:
    """Within the block the layers hold these weights."""
    before = {path: layers[path].packed for path in packed}
    for path, each in packed.items():
        layers[path].replace(each)
    try:
        yield
    finally:
        for path, each in before.items():
            layers[path].replace(each)


@torch.no_grad()
def states_of(model: PreTrainedModel, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """The states [labels, width] of the model as it is now, and the labels, in the order of `samples`."""
    outputs = outputs_of(model)
    with outputs.together(model, samples) as problem:
        pairs = [outputs.states(model, part) for part in outputs.batches(samples, 0 if problem else PASS_TOKENS)]
    release(*model.buffers())  # of other weights, or none, is what comes next
    states, labels = zip(*pairs, strict=True)
    return torch.cat(states), torch.cat(labels)


def mean_loss(states_NH: Tensor, labels_N: Tensor, head: Head) -> float:
    """Cross-entropy in nats a label."""
    with torch.no_grad():
        return float(summed_cross_entropy(states_NH, labels_N, head)) / max(len(labels_N), 1)


@torch.no_grad()
def mean_divergence(states_p: Tensor, states_q: Tensor, head: Head) -> float:
    """KL(p || q) in nats a position, of two models by their last hidden states [positions, hidden]."""
    total = 0.0
    for p, q in zip(states_p.split(CHUNK_ROWS), states_q.split(CHUNK_ROWS), strict=True):
        total += float(summed_divergence(head(p), head(q)))
    return total / max(len(states_p), 1)


@torch.no_grad()
def same_token(states_p: Tensor, states_q: Tensor, head: Head) -> float:
    """The share of positions at which two models find the same token likeliest."""
    same = 0
    for p, q in zip(states_p.split(CHUNK_ROWS), states_q.split(CHUNK_ROWS), strict=True):
        same += int((head(p).argmax(-1) == head(q).argmax(-1)).sum())
    return same / max(len(states_p), 1)


def summed_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """The sum over rows of KL(softmax(p) || softmax(q)), a float32 scalar."""
    log_p, log_q = torch.log_softmax(logits_p.float(), -1), torch.log_softmax(logits_q.float(), -1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
