"""Attention within samples that share a row of tokens, on a GPU: torch's varlen kernel (FlashAttention), one call for all.

    torch.nn.attention.varlen.varlen_attn(q [T, H, D], k [T, G, D], v, bounds, bounds, longest, longest, window_size=(w, 0))

No mask, and nothing of the square between two samples: 16 samples of 512 tokens, forward and backward, take 0.9 ms where
a masked square of them takes 12 ms (H100, 32 heads of 128 channels). Its arguments changed between releases of torch, so
they are looked up: `enable_gqa` is new in 2.12. Before it FlashAttention takes grouped heads without being told, if at all:
that is tried once on each GPU. Where it does not, keys and values of a group are repeated for each of its heads, and kept so
for the backward pass: of a layer of Llama 3 8B's shape an eighth more.

What it does not do (`takes` is the list) goes sample by sample through torch's scaled_dot_product_attention
(reference.py): keys in front of every sample, a context that is read in both directions, dropout, float32.
"""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qgraft.kernels import reference
from qgraft.kernels.reference import Pair

LARGEST_HEAD = 256  # channels that FlashAttention takes, and only multiples of 8


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
    """As varlen_attention.attend; what the kernel does not take goes to the reference."""
    if dropout or contexts is not None or prefix is not None or not takes(query, key, value):
        return reference.attend(query, key, value, bounds, scale, dropout, window, contexts, prefix)
    q_THD, k_TGD, v_TGD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    starts, longest = _placed(bounds, query.device)
    function, arguments = _function()
    options: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if q_THD.shape[1] != k_TGD.shape[1]:
        if "enable_gqa" in arguments:
            options["enable_gqa"] = True
        elif not _groups_untold(query.device):
            k_TGD, v_TGD = (_repeated(t, q_THD.shape[1]) for t in (k_TGD, v_TGD))
    out: Tensor = function(q_THD, k_TGD, v_TGD, starts, starts, longest, longest, **options)[None]
    return out


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes this, prefix, context and dropout aside."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[0] == 1
        and query.shape[1] % key.shape[1] == 0
        and key.shape == value.shape == (1, key.shape[1], query.shape[2], width)
        and width % 8 == 0
        and width <= LARGEST_HEAD
    )


@cache
def status() -> tuple[bool, str]:
    """(available, one line that says why) for `qgraft doctor`."""
    try:
        _, arguments = _function()
    except ImportError:
        return False, f"torch {torch.__version__} has no torch.nn.attention.varlen: sample by sample"
    missing = {"scale", "window_size"} - arguments
    if missing:
        return False, f"varlen_attn of torch {torch.__version__} has no {', '.join(sorted(missing))}: sample by sample"
    if torch.version.hip is not None:
        return False, "this GPU is not one of NVIDIA, the one kind that was tried: sample by sample"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return False, "this GPU is older than compute capability 8.0, which FlashAttention needs: sample by sample"
    return (
        True,
        "torch's varlen kernel in half precision; with a prefix, a context, dropout or float32 sample by sample",
    )


def _repeated(x_TGD: Tensor, heads: int) -> Tensor:
    """[T, heads, D]: each group for all of its heads."""
    return x_TGD.repeat_interleave(heads // x_TGD.shape[1], dim=1)


@cache
def _groups_untold(device: torch.device) -> bool:
    """Whether the kernel computes grouped heads on this GPU, forward and backward, where no argument says so: by trial."""
    with torch.inference_mode(False), torch.enable_grad():
        drawn = torch.Generator(device).manual_seed(0)
        q, k, v, g = (torch.randn(48, n, 64, device=device, generator=drawn).bfloat16() for n in (4, 2, 2, 4))
        bounds = torch.tensor([0, 17, 48], dtype=torch.int32, device=device)

        def gradients(heads: int) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            keys, values = (_repeated(x, heads) for x in leaves[1:])
            out = _function()[0](leaves[0], keys, values, bounds, bounds, 31, 31, window_size=(-1, 0))
            return [out.detach(), *torch.autograd.grad(out, leaves, g)]

        expected = gradients(4)
        try:
            got = gradients(2)
        except (RuntimeError, ValueError):
            return False
        pairs = zip(got, expected, strict=True)
        return all(float((one - other).norm()) <= 0.02 * float(other.norm()) for one, other in pairs)


@cache
def _function() -> tuple[Any, frozenset[str]]:
    """(varlen_attn, the names of its arguments)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def keep_placed(bounds: Tensor, starts: Tensor, longest: int) -> None:
    """Let a pass take `starts` for these bounds, the same as int32 on its device; no sample is longer than `longest`."""
    bounds.qgraft_placed = starts, longest  # type: ignore[attr-defined]


def _placed(bounds: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """(the bounds as the kernel takes them, the longest sample's tokens), kept with them: all layers ask for the same."""
    known: tuple[Tensor, int] | None = getattr(bounds, "qgraft_placed", None)
    if known is None or known[0].device != device:
        on_cpu = bounds.cpu()
        longest = int(on_cpu.diff().max()) if len(on_cpu) > 1 else 0
        known = on_cpu.to(torch.int32).to(device, non_blocking=True), longest
        bounds.qgraft_placed = known  # type: ignore[attr-defined]
    return known
