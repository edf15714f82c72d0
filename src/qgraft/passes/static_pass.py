"""Forward and backward of a padding-free batch in tables of a fixed size, so that it can be recorded as a CUDA graph.

A graph reads and writes the same memory at every replay, and knows no number that Python had when it was recorded. So a batch
is put into tables (`StaticPass`):

    input_ids     a0 a1 a2 a3 b0 b1 b2 |  0  0  0 |        filled up to `tokens` with samples of their own, which nobody
    position_ids   0  1  2  3  0  1  2 |  0  1  2 |        learns; no kernel mixes the tokens of two samples
    bounds         0 4 7 10 10 10                          of `samples` samples, the last of no tokens
    places        of the states that predict a label, `labels` of them: the batch's own, over and over
    labels        their tokens
    weights       the weight of each, divided by what the step's loss is divided by; 0 for one that stands there again

What fills the tables up changes neither loss nor gradients: a label that weighs nothing has no gradient, and LoRAs get
none from a token without one.

Recording fails where a pass waits for the GPU or lets the CPU look at its numbers. So the bounds of samples are on the GPU
in a recorded pass: code that would go by the samples of one batch for all of them cannot read them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.attention import mark_checked
from qgraft.data.batches import IGNORED, Batch
from qgraft.kernels import varlen
from qgraft.kernels.cuda_graphs import power_of_two, recorded
from qgraft.kernels.summed_lora import casts_kept
from qgraft.passes.decoder import output_head, states_at
from qgraft.passes.loss import check_gradient, weighted_cross_entropy

ALIGNED = 64  # bytes that a table begins at a multiple of: kernels are compiled anew for other addresses
LEAST_SAMPLES = 8  # in a bucket; one of no tokens takes no time
STEP = 64  # tokens that small buckets differ by
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the tokens, that are labels
JUDGED = 2  # replays of a graph, in steps of their own, that are compared


@dataclass(frozen=True, order=True)
class Shape:
    """How large a batch is, or the tables of a static pass are; `longest` is the most tokens of a sample."""

    tokens: int
    labels: int
    samples: int
    longest: int

    @classmethod
    def of(cls, batch: Batch) -> "Shape":
        """That of a padding-free batch on the CPU."""
        tokens, starts = batch["input_ids"].shape[1], _starts(batch)
        ends = torch.cat([starts[1:], starts.new_tensor([tokens])])
        labels = int((batch["labels"] != IGNORED).sum())
        return cls(tokens, labels, len(starts), int((ends - starts).max()))

    def holds(self, batch: "Shape") -> bool:
        """Whether a batch of that shape, with what fills it up, has room in tables of this one."""
        return (
            batch.tokens <= self.tokens
            and batch.labels <= self.labels
            and batch.longest <= self.longest
            and batch.samples + _fillers(self.tokens - batch.tokens, self.longest) <= self.samples
        )


def bucket_of(batch: Shape, budget: int) -> Shape:
    """The tables for a batch: rounded up, tokens to quarters of powers of two, but to no more than `budget`."""
    quarter = max(STEP, 1 << max(0, batch.tokens.bit_length() - 3))
    tokens = max(batch.tokens, min(-(-batch.tokens // quarter) * quarter, budget))
    longest = min(power_of_two(max(batch.longest, STEP)), tokens)
    labels = next(most for share in SHARES if (most := -int(-tokens * share // 1)) >= batch.labels)
    fillers = max(_fillers(tokens - batch.tokens, longest), batch.samples // 4 + 2)  # the same for as many samples
    samples = power_of_two(max(batch.samples + fillers, LEAST_SAMPLES))
    return Shape(tokens, max(labels, 1), samples, longest)


def _fillers(tokens: int, longest: int) -> int:
    """How many samples of at most so many tokens fill up a pass by so many."""
    return -(-tokens // longest)


def _starts(batch: Batch) -> Tensor:
    return (batch["position_ids"][0] == 0).nonzero()[:, 0]


class Tables:
    """Views of one block of bytes, so that one copy moves all of them; see the module's docstring."""

    def __init__(self, shape: Shape, device: torch.device, pinned: bool = False) -> None:
        sizes = {
            "input_ids": (shape.tokens, torch.int64), "position_ids": (shape.tokens, torch.int64),
            "places": (shape.labels, torch.int64), "labels": (shape.labels, torch.int64),
            "weights": (shape.labels, torch.float32), "bounds": (shape.samples + 1, torch.int32),
        }  # fmt: skip
        bytes_of = [-(-count * dtype.itemsize // ALIGNED) * ALIGNED for count, dtype in sizes.values()]
        self.block = torch.empty(sum(bytes_of), dtype=torch.uint8, device=device, pin_memory=pinned)
        parts = zip(sizes.items(), self.block.split(bytes_of), strict=True)
        views = {name: part.view(dtype)[:count] for (name, (count, dtype)), part in parts}
        self.input_ids, self.position_ids, self.places = views["input_ids"], views["position_ids"], views["places"]
        self.labels, self.weights, self.bounds = views["labels"], views["weights"], views["bounds"]

    def fill(self, batch: Batch, count: float, longest: int) -> None:
        """Write a batch on the CPU whose loss is divided by `count`, and what fills the tables up."""
        labels_T, starts, used = batch["labels"][0], _starts(batch), batch["input_ids"].shape[1]
        tokens = len(self.input_ids)
        fillers = torch.arange(used, tokens, longest)
        self.input_ids[:used], self.input_ids[used:] = batch["input_ids"][0], 0
        self.position_ids[:used] = batch["position_ids"][0]
        self.position_ids[used:] = torch.arange(tokens - used) % longest
        self.bounds.fill_(tokens)
        self.bounds[: len(starts) + len(fillers)] = torch.cat([starts, fillers])
        chosen_N = (labels_T != IGNORED).nonzero()[:, 0]
        self.weights.zero_()
        if not len(chosen_N):
            self.places.zero_()
            self.labels.zero_()
            return
        self.places.copy_(chosen_N[torch.arange(len(self.places)) % len(chosen_N)])
        self.labels.copy_(labels_T[self.places])
        weights = batch.get("weights")
        self.weights[: len(chosen_N)] = (1.0 if weights is None else weights[0][chosen_N]) / count


class StaticPass:
    """Forward and backward of whatever batch is in the tables.

    Attributes:
        loss: the weighted sum of the last one, float32; overwritten by the next.
        replay: what runs the recorded pass; None until it is.
        judged: versions of the adapter's weights that a replay was compared with the ordinary pass at.
    """

    def __init__(self, model: PreTrainedModel, shape: Shape, label_smoothing: float = 0.0) -> None:
        self.model, self.shape, self.label_smoothing = model, shape, label_smoothing
        self.tables = Tables(shape, model.device)
        self.loss = torch.zeros((), dtype=torch.float32, device=model.device)
        self.replay: Callable[[], None] | None = None
        self.judged: list[int] = []
        self._host = self.tables
        self._bounds = self.tables.bounds.view_as(self.tables.bounds)
        mark_checked(self._bounds)  # by the eager pass
        varlen.keep_placed(self._bounds, self.tables.bounds, shape.longest)

    def may_be_judged(self, version: int) -> bool:
        """Whether a replay is to be compared: the first ones, with weights of the adapter of this version."""
        return len(self.judged) < JUDGED and version not in self.judged

    def fill(self, batch: Batch, count: float) -> None:
        """Take a batch that `shape` holds, on the CPU. A GPU is not waited for: the copy reads memory of its own."""
        on_gpu = self.model.device.type == "cuda"
        self._host = Tables(self.shape, torch.device("cpu"), pinned=on_gpu)
        self._host.fill(batch, count, self.shape.longest)
        self.tables.block.copy_(self._host.block, non_blocking=True)

    def run(self) -> None:
        """The pass, eagerly: gradients are added to those that are there."""
        bounds = self._host.bounds
        varlen.keep_placed(bounds, self.tables.bounds, self.shape.longest)
        self._learn(bounds)

    def record(self, pool: Any) -> None:
        """Let `replay` be the pass. Nothing is computed. Raises RuntimeError where it cannot be recorded."""
        self.replay = recorded(lambda: self._learn(self._bounds), self.model.device, pool)

    def _learn(self, bounds: Tensor) -> None:
        """Everything that a graph consists of; it must not depend on what is in the tables."""
        tables = self.tables
        with casts_kept():  # its own: A and B are others at every replay
            states_NH = states_at(
                self.model, tables.places, tables.input_ids[None], tables.position_ids[None], cu_seq_lens_q=bounds
            )
            loss, _ = weighted_cross_entropy(
                states_NH, tables.labels, tables.weights, output_head(self.model), self.label_smoothing
            )
            check_gradient(self.model, loss)
            loss.backward()
        self.loss.copy_(loss.detach())
