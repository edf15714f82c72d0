"""One forward and backward pass for the batches of several jobs: the work that training together saves.

What a job hands in are the parts that its batch would pass through the model in alone. A pass takes one part of as many
jobs as the token budget allows, one after another in one row, so the packed weights are unpacked once for all of them:

    tokens    part of a (65) | part of b (80) | part of c (41) | ...   up to max_tokens_per_pass
    loss      sum over jobs of (cross-entropy of its labels, weighed / what its own labels weigh)

A token's loss reaches only the adapter of its segment (jobs/segments.py), attention goes sample by sample, and all
else is row by row; so each job gets the gradient that it would have alone, to the rounding of sums. Where a loss is not
finite, every part of that pass goes through the model alone, and a job whose loss is not finite then has no backward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.data.batches import Batch, count_labels, label_weights
from qgraft.jobs.segments import Segment, serving_segments
from qgraft.passes.decoder import label_states, output_head
from qgraft.passes.loss import weighted_cross_entropy
from qgraft.passes.neftune import Noisy, noisy_embeddings


@dataclass(eq=False)
class HandIn:
    """What a job wants to learn in one optimizer step, and what came of it.

    Attributes:
        adapter: the job's adapter on the shared model.
        parts: its batches, each at most the job's budget; each passes the model by itself, in their order.
        count: what the labels weigh that its optimizer step learns; the loss is divided by it.
        generator: where its dropout, and the noise of NEFTune, is drawn from.
        noise_alpha: how much of that noise its embeddings get; None for none.
        loss: the sum so far; NaN once a part's is not finite, and its later parts are left out.
    """

    adapter: str
    parts: list[Batch]
    count: float
    generator: torch.Generator
    noise_alpha: float | None
    loss: Tensor


def learn_together(model: PreTrainedModel, handed: Sequence[HandIn], budget: int, label_smoothing: float) -> None:
    """Add the gradients of all parts to the adapters' parameters, and each job's loss to its HandIn.

    Args:
        budget: tokens in a pass, of which a single part may have more; 0 for every part alone.
    """
    waiting = [(job, list(job.parts)) for job in handed]
    while waiting := [(job, parts) for job, parts in waiting if parts and bool(torch.isfinite(job.loss))]:
        chosen: list[tuple[HandIn, Batch]] = []
        tokens = 0
        for job, parts in waiting:
            size = parts[0]["input_ids"].numel()
            if not chosen or tokens + size <= budget:
                chosen.append((job, parts.pop(0)))
                tokens += size
        _pass(model, chosen, label_smoothing)


def _pass(model: PreTrainedModel, chosen: Sequence[tuple[HandIn, Batch]], label_smoothing: float) -> None:
    """Forward and backward of one part of each of these jobs."""
    keys = ("input_ids", "position_ids", "labels")
    batch = {key: torch.cat([part[key] for _, part in chosen], dim=1) for key in keys}
    counts = torch.tensor([count_labels(part) for _, part in chosen], device=model.device)
    weights_J = torch.tensor([1.0 / job.count for job, _ in chosen], device=model.device)
    before = [job.generator.get_state() for job, _ in chosen]
    noisy = [Noisy(part["position_ids"][0], job.noise_alpha, job.generator) for job, part in chosen]
    with serving_segments(model, _segments(chosen)), noisy_embeddings(model, noisy):
        states_NH, targets_N = label_states(model, batch)
        own_N = torch.cat([_own_weights(part) for _, part in chosen]).to(model.device)
        weights_N = weights_J.repeat_interleave(counts) * own_N
        loss, each_N = weighted_cross_entropy(states_NH, targets_N, weights_N, output_head(model), label_smoothing)
        if torch.isfinite(loss):
            loss.backward()
    if not torch.isfinite(loss) and len(chosen) > 1:
        for (job, part), state in zip(chosen, before, strict=True):
            job.generator.set_state(state)
            _pass(model, [(job, part)], label_smoothing)
        return
    weighed = (each_N * own_N).split(counts.tolist())
    for (job, _), each, weight in zip(chosen, weighed, weights_J, strict=True):
        job.loss += each.sum() * weight


def _own_weights(part: Batch) -> Tensor:
    """The weights of a part's labels, [labels]."""
    weights = label_weights(part)
    return torch.ones(count_labels(part)) if weights is None else weights


def _segments(chosen: Sequence[tuple[HandIn, Batch]]) -> list[Segment]:
    segments, start = [], 0
    for job, part in chosen:
        stop = start + part["input_ids"].shape[1]
        segments.append(Segment(job.adapter, start, stop, job.generator))
        start = stop
    return segments
