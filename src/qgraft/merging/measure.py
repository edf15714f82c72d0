"""What was kept: losses on the task's rows, and how far two models are apart on any rows.

Everything comes from the states at label positions (outputs.py), which are small enough to keep for three models at
once; logits are formed a few rows at a time, once for each model: they cost as much as a third of the layers before them. The
head is the same for all of them: merging leaves an output layer alone, and a classifier has the adapter's meanwhile.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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
            base = self._states()
        self._adapter = self._states()
        self._before = self._compared(base, self._adapter)

    def kept(self, packed: Packed) -> Kept:
        """What is kept of the adapter's gain when the layers hold these weights."""
        with in_place(self._layers, packed), adapters_off(self._model):
            merged = self._states()
        (before, before_drift), (task, drift) = self._before, self._compared(self._adapter, merged)
        return Kept(
            base=before.losses[0],
            adapter=before.losses[1],
            merged=task.losses[1],
            task_kl=task.divergence,
            drift_kl=drift.divergence,
            adapter_kl=before_drift.divergence,
            rows=len(self._rows.measure),
            labels=len(merged.labels),
            held_out=self._rows.held_out,
            same_token=task.same,
            unit=outputs_of(self._model).unit,
        )

    def _compared(self, p: States, q: States) -> tuple["Compared", "Compared"]:
        """Two models on the task and on unrelated text."""
        head = outputs_of(self._model).head(self._model)
        return compare(p.task, q.task, head, p.labels), compare(p.drift, q.drift, head)

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


@dataclass(frozen=True)
class Compared:
    """Two models p and q, by what they say at some positions.

    Attributes:
        losses: cross-entropies of both, in nats a label; 0 without labels that weigh something.
        divergence: KL(p || q) in nats a position.
        same: the share of the positions at which both find the same token likeliest.
    """

    losses: tuple[float, float]
    divergence: float
    same: float


@torch.no_grad()
def compare(
    states_p: Tensor, states_q: Tensor, head: Head, labels_N: Tensor | None = None, weights_N: Tensor | None = None
) -> Compared:
    """Two models by their last hidden states [positions, hidden], and the labels there, with what each weighs (None: 1)."""
    count = max(len(states_p), 1)
    losses, divergence, same = [0.0, 0.0], 0.0, 0
    whole = count if weights_N is None else max(float(weights_N.sum()), 1e-9)
    for start in range(0, len(states_p), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        log_p, log_q = (_log_probs(head(states[rows])) for states in (states_p, states_q))
        if labels_N is not None:
            for number, log in enumerate((log_p, log_q)):
                each = F.nll_loss(log, labels_N[rows], reduction="none")
                losses[number] += float(each.sum() if weights_N is None else weights_N[rows] @ each)
        same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        divergence += float(_divergence(log_p, log_q))
    return Compared((losses[0] / whole, losses[1] / whole), divergence / count, same / count)


def summed_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """The sum over rows of KL(softmax(p) || softmax(q)), a float32 scalar."""
    return _divergence(_log_probs(logits_p), _log_probs(logits_q))


def _log_probs(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.float(), -1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
