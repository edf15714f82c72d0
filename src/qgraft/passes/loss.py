"""The loss over label positions only, in chunks that never hold the whole logits matrix.

Logits are the largest tensor of a small model's step: 512 tokens x 49 152 words x 4 bytes = 100 MB, and a plain
implementation holds three or four of them. Most of these rows belong to prompt tokens that nobody learns. So the
decoder runs on all tokens, the output layer only on hidden states whose next token is a label, and that in chunks: each
chunk's logits, loss and gradient are computed and let go during the forward pass, which keeps one [labels, hidden]
gradient. The gradient of the logits is written over them.
(The idea of taking the gradient in the forward pass is Liger Kernel's fused linear cross entropy, arXiv:2410.10989.)

What the states are, and what comes after the output layer, is in decoder.py.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from qgraft.data.batches import Batch, label_weights
from qgraft.errors import UnsupportedError
from qgraft.kernels import cross_entropy
from qgraft.passes.decoder import Head, label_states, output_head

CHUNK_BYTES = 48 << 20  # of float32 logits at a time: 256 rows of a 49k vocabulary, two tensors of them at most
GPU_CHUNK_BYTES = 1 << 30  # likewise on a GPU: 8192 rows of a 32k vocabulary; but no more than
GPU_CHUNK_SHARE = 32  # this part of its memory
MIN_CHUNK_ROWS = 32


def batch_loss(model: PreTrainedModel, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy summed over the labels of a padding-free batch, each times its weight, a float32 scalar.

    Args:
        batch: input_ids, position_ids, labels, each [1, tokens], on the CPU or where the model is (see label_states);
            labels are aligned with the token that predicts them. Its weights, if it has any, likewise.
    """
    states_NH, labels_N = label_states(model, batch)
    weights_N = label_weights(batch)
    weights_N = None if weights_N is None else weights_N.to(states_NH.device, non_blocking=True)
    return weighted_cross_entropy(states_NH, labels_N, weights_N, output_head(model), label_smoothing)[0]


def check_gradient(model: nn.Module, loss: Tensor) -> None:
    """Raise UnsupportedError where nothing that is trained reaches the loss: training would do nothing."""
    if not loss.requires_grad:
        raise UnsupportedError(
            f"{type(model).__name__}: no gradient reaches the adapter",
            hint="its layers compute their gradients in a way of their own, or the adapter is on none that is used",
        )


def chunk_bytes(device: torch.device) -> int:
    """Bytes of float32 logits that the loss computes at a time on this device."""
    if device.type != "cuda":
        return CHUNK_BYTES
    return min(GPU_CHUNK_BYTES, torch.cuda.get_device_properties(device).total_memory // GPU_CHUNK_SHARE)


def summed_cross_entropy(states_NH: Tensor, targets_N: Tensor, head: Head, label_smoothing: float = 0.0) -> Tensor:
    """sum_i -log softmax(head(state_i))[target_i], differentiable in the states and in the head's parameters."""
    return weighted_cross_entropy(states_NH, targets_N, None, head, label_smoothing)[0]


class RowLoss(Protocol):
    """A loss of each row of logits by itself.

    Attributes:
        tensors: how many of the logits' size it holds at a time, beside the logits.
    """

    tensors: int

    def dtype_for(self, logits: Tensor) -> torch.dtype:
        """In which dtype it wants these logits."""

    def to_gradient(self, logits_CV: Tensor, rows: slice) -> Tensor:
        """The losses [C] float32 of these rows, whose logits are overwritten with their gradients."""


class CrossEntropy:
    """-log softmax(logits)[target], smoothed; see kernels/cross_entropy.py."""

    tensors = 1

    def __init__(self, targets_N: Tensor, label_smoothing: float = 0.0) -> None:
        self.targets, self.smoothing = targets_N, label_smoothing

    def dtype_for(self, logits: Tensor) -> torch.dtype:
        """That of the kernel."""
        return cross_entropy.dtype_for(logits)

    def to_gradient(self, logits_CV: Tensor, rows: slice) -> Tensor:
        """See RowLoss."""
        return cross_entropy.loss_to_gradient(logits_CV, self.targets[rows], self.smoothing)


def as_they_are(logits_NV: Tensor) -> Tensor:
    """The head of a model whose own forward pass made the logits."""
    return logits_NV


def weighted_cross_entropy(
    states_NH: Tensor, targets_N: Tensor, weights_N: Tensor | None, head: Head, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(The sum of weight times cross-entropy, differentiable; the cross-entropy of each label [n], without gradient)."""
    return weighted_loss(states_NH, weights_N, head, CrossEntropy(targets_N, label_smoothing))


def weighted_loss(states_NH: Tensor, weights_N: Tensor | None, head: Head, loss: RowLoss) -> tuple[Tensor, Tensor]:
    """(The sum of weight times loss, differentiable in the states and the head's parameters; each loss [n], without)."""
    return _ChunkedLoss.apply(states_NH, weights_N, head, loss, *getattr(head, "parameters", []))


def label_log_probs(states_NH: Tensor, targets_N: Tensor, head: Head) -> Tensor:
    """log softmax(head(state_i))[target_i] of each label, [n] float32, differentiable in states and the head's parameters."""
    return -_EachCrossEntropy.apply(states_NH, targets_N, head, *getattr(head, "parameters", []))


class _ChunkedLoss(torch.autograd.Function):
    """The loss, and with it the gradients, computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, states_NH: Tensor, weights_N: Tensor | None, head: Head, loss: RowLoss, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        """states [n, hidden], weights [n] or None for ones -> scalar float32, [n] float32."""
        wanted = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=states_NH.device)
        grads = [torch.zeros_like(t) for t in (states_NH, *parameters)] if wanted else []
        each_N = torch.empty(len(states_NH), dtype=torch.float32, device=states_NH.device)
        start, vocabulary, most = 0, getattr(head, "vocabulary", None), chunk_bytes(states_NH.device)
        most = 2 * most // (1 + loss.tensors)
        once = getattr(head, "unpacked", None) if states_NH.is_cuda else None
        logits_of = head if once is None else once(states_NH.dtype)  # a GPU unpacks the whole layer for each product
        while start < len(states_NH):
            rows = max(MIN_CHUNK_ROWS, most // (4 * vocabulary)) if vocabulary else MIN_CHUNK_ROWS
            chunk = states_NH[start : start + rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted), torch.autocast(chunk.device.type, enabled=False):
                logits = logits_of(chunk)
            vocabulary = logits.shape[-1]
            own_CV = logits.detach().to(loss.dtype_for(logits), copy=getattr(head, "keeps_logits", True))
            each_C = loss.to_gradient(own_CV, slice(start, start + rows))
            each_N[start : start + rows] = each_C
            weights_C1 = None if weights_N is None else weights_N[start : start + rows, None]
            if weights_C1 is not None:
                each_C = each_C * weights_C1[:, 0]
                if parameters:  # else the states' gradients are weighed, which are fewer numbers
                    own_CV, weights_C1 = own_CV.mul_(weights_C1), None
            total += each_C.sum()
            if wanted:
                chunk_grads = torch.autograd.grad(logits, (chunk, *parameters), own_CV.to(logits.dtype))
                weighed = chunk_grads[0] if weights_C1 is None else chunk_grads[0] * weights_C1
                grads[0][start : start + rows] = weighed
                for grad, part in zip(grads[1:], chunk_grads[1:], strict=True):
                    grad += part
            start += len(chunk)
            del logits, own_CV  # or they would be there while the next chunk's are computed
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(each_N)
        return total, each_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scales what the forward pass computed."""
        states, *parameters = (saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return states, None, None, None, *parameters


class _EachCrossEntropy(torch.autograd.Function):
    """The loss of each label by itself, for whatever is then made of them.

    A label's loss depends on its own state alone: one backward pass of their sum gives the gradients of all, a row each, and
    what comes from above multiplies the rows. A head that trains has no such rows: its gradients are computed when that is
    known.
    """

    @staticmethod
    def forward(ctx: Any, states_NH: Tensor, targets_N: Tensor, head: Head, *parameters: Tensor) -> Tensor:
        """states [n, hidden], targets [n] int64 -> [n] float32."""
        by_rows = ctx.needs_input_grad[0] and not parameters
        with torch.set_grad_enabled(by_rows):
            own_NH = states_NH.detach().requires_grad_(by_rows)
            total, each_N = _ChunkedLoss.apply(own_NH, None, head, CrossEntropy(targets_N))
            saved = torch.autograd.grad(total, own_NH)[0] if by_rows else states_NH
        ctx.head, ctx.by_rows = head, by_rows
        ctx.save_for_backward(saved, targets_N, *parameters)
        return each_N

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        """Weighs the rows."""
        saved_NH, targets_N, *parameters = ctx.saved_tensors
        if ctx.by_rows:
            return saved_NH * grad_N[:, None].to(saved_NH.dtype), None, None
        with torch.enable_grad():
            states_NH = saved_NH.detach().requires_grad_()
            total, _ = weighted_cross_entropy(states_NH, targets_N, grad_N, ctx.head)
            states, *heads = torch.autograd.grad(total, (states_NH, *parameters))
        return states, None, None, *heads
