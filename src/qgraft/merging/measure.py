"""What was kept: losses on the task's rows, and how far two models are apart on any rows.

Everything comes from the last hidden states at label positions, which are small enough to keep for three models at
once; logits are formed a few rows at a time. The output layer is the same for all of them: merging leaves it alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.data.batches import collate, split_batch
from qgraft.data.tokenizing import Sample
from qgraft.passes.decoder import Head, label_states, padding_free
from qgraft.passes.loss import summed_cross_entropy

PASS_TOKENS = 1024
CHUNK_ROWS = 128  # of logits at a time


@torch.no_grad()
def states_of(model: PreTrainedModel, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """The last hidden states [labels, hidden] of the model as it is now, and the labels, in the order of `samples`."""
    with padding_free(model, samples) as problem:
        parts = split_batch(collate(samples), 0 if problem else PASS_TOKENS)
        pairs = [label_states(model, {key: value.to(model.device) for key, value in part.items()}) for part in parts]
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


def summed_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """The sum over rows of KL(softmax(p) || softmax(q)), a float32 scalar."""
    log_p, log_q = torch.log_softmax(logits_p.float(), -1), torch.log_softmax(logits_q.float(), -1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
