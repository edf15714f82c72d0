"""Attention of samples that share a row by varlen_attention.c, with gradients for everything that is no number."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qgraft.kernels import reference
from qgraft.kernels.cpu.abi import Attention, Strided, pointer
from qgraft.kernels.cpu.library import loaded
from qgraft.kernels.reference import Pair

Inputs = Sequence[Any]  # query, key, value, a prefix's keys and values or two None, bounds, contexts or None
Numbers = tuple[float, int | None]  # scale, window


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    contexts: Tensor | None = None,
    prefix: Pair | None = None,
) -> Tensor:
    """As varlen_attention.attend; what C does not take goes to the reference."""
    if not takes(query, key, value, bounds, dropout, prefix):
        return reference.attend(query, key, value, bounds, scale, dropout, window, contexts, prefix)
    numbers = (query.shape[-1] ** -0.5 if scale is None else scale, window)
    tensors = (query, key, value, *(prefix or (None, None)))
    bounds = bounds.to(torch.int64).contiguous()
    contexts = None if contexts is None else contexts.to(torch.int64).contiguous()
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        out: Tensor = _Attend.apply(*tensors, bounds, contexts, numbers)
        return out
    return _forward((*tensors, bounds, contexts), numbers, None)


def takes(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, dropout: float = 0.0, prefix: Pair | None = None
) -> bool:
    """Whether C computes this."""
    tensors = (query, key, value, *(prefix or ()))
    return (
        all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors)
        and bounds.device.type == "cpu"
        and not dropout
        and not torch.is_autocast_enabled("cpu")
        and key.shape == value.shape == (query.shape[0], key.shape[1], *query.shape[2:])
        and query.shape[0] == 1
        and query.shape[1] % key.shape[1] == 0
        and all(part.shape == (1, key.shape[1], tensors[-1].shape[2], key.shape[3]) for part in prefix or ())
    )


class _Attend(torch.autograd.Function):
    """varlen_attention.c, with gradients for everything that is no number."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        front_key: Tensor | None,
        front_value: Tensor | None,
        bounds: Tensor,
        contexts: Tensor | None,
        numbers: Numbers,
    ) -> Tensor:
        """Shapes as in `attend`."""
        lse_HT = query.new_empty(query.shape[1:3])
        inputs = (query, key, value, front_key, front_value, bounds, contexts)
        out = _forward(inputs, numbers, lse_HT)
        ctx.save_for_backward(*inputs, out, lse_HT)
        ctx.numbers = numbers
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad [1, T, H, D] -> gradients that are stored as [1, T, H or G, D]."""
        *inputs, out, lse_HT = ctx.saved_tensors
        held: list[Tensor] = []
        call = _describe(inputs, ctx.numbers, held)
        key, front = inputs[1], inputs[3]
        grad = grad.contiguous()
        gq = torch.empty_like(out)
        gk, gv = (out.new_empty(1, out.shape[1], *key.shape[1::2]) for _ in range(2))
        front_gk, front_gv = (None if front is None else out.new_empty(front.shape) for _ in range(2))
        code = loaded().qgraft_varlen_attention_backward(
            ctypes.byref(call), grad.data_ptr(), out.data_ptr(), lse_HT.data_ptr(), gq.data_ptr(), gk.data_ptr(),
            gv.data_ptr(), pointer(front_gk), pointer(front_gv), torch.get_num_threads(),
        )  # fmt: skip
        _check(code, inputs)
        return gq.transpose(1, 2), gk.transpose(1, 2), gv.transpose(1, 2), front_gk, front_gv, None, None, None


def _forward(inputs: Inputs, numbers: Numbers, lse_HT: Tensor | None) -> Tensor:
    query, held = inputs[0], list[Tensor]()
    call = _describe(inputs, numbers, held)
    out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    code = loaded().qgraft_varlen_attention(
        ctypes.byref(call), out.data_ptr(), pointer(lse_HT), torch.get_num_threads()
    )
    _check(code, inputs)
    return out


def _describe(inputs: Inputs, numbers: Numbers, held: list[Tensor]) -> Attention:
    """The structure for C; `held` must live as long as it does."""
    *tensors, bounds, contexts = inputs
    query, key, _, front, _ = tensors
    samples = len(bounds) - 1
    if contexts is not None and contexts.shape != (samples,):
        raise ValueError(f"got contexts {list(contexts.shape)}, expected one for each of {samples} samples")
    _, heads, tokens, channels = query.shape
    scale, window = numbers
    return Attention(
        *(_strided(tensor, held) for tensor in tensors), heads, key.shape[1], channels, tokens, samples,
        0 if front is None else front.shape[2], window or 0, bounds.data_ptr(), pointer(contexts), scale,
    )  # fmt: skip


def _strided(tensor: Tensor | None, held: list[Tensor]) -> Strided:
    if tensor is None:
        return Strided(None, 0, 0)
    if tensor.stride(3) != 1:
        tensor = tensor.contiguous()
        held.append(tensor)
    return Strided(tensor.data_ptr(), tensor.stride(2), tensor.stride(1))


def _check(code: int, inputs: Inputs) -> None:
    query, bounds = inputs[0], inputs[5]
    if code == -1:
        raise ValueError(
            f"{query.shape[1]} heads, samples of a row of {query.shape[2]} tokens: got bounds {bounds.tolist()}"
        )
    if code == -2:
        raise MemoryError(f"qgraft_varlen_attention: no memory for {query.shape[2]} tokens")
