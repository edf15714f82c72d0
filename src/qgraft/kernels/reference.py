"""The reference kernels: plain torch for every row of the table, format and device. Slow, impossible to misread.

Each function states one computation; faster kernels are compared with these on values and gradients. Names: x_BI input,
w_OI weight, g_BO gradient of the output; `...` leading dimensions of x are kept.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qgraft.formats import PackedTensor, slice_rows, unpack
from qgraft.formats import dequantize as format_dequantize
from qgraft.kernels.terms import Grads, Term

if TYPE_CHECKING:
    from qgraft.kernels.grouped import Group, Product
    from qgraft.kernels.pointwise import Activation

HALVES = (torch.bfloat16, torch.float16)
Pair = tuple[Tensor, Tensor]


def dequantize(packed: PackedTensor, dtype: torch.dtype) -> Tensor:
    """w_OI in `dtype`."""
    return format_dequantize(packed, dtype)


def linear(x: Tensor, packed: PackedTensor) -> Tensor:
    """y = x W^T, computed in the dtype of x: [..., in] -> [..., out]."""
    return x @ format_dequantize(packed, x.dtype).T


def linear_grad_input(grad: Tensor, packed: PackedTensor) -> Tensor:
    """dL/dx = g W, computed in the dtype of g: [..., out] -> [..., in]."""
    return grad @ format_dequantize(packed, grad.dtype)


def linear_bf16(x: Tensor, packed: PackedTensor) -> Tensor:
    """y = x W^T with x and W rounded to bfloat16, their products summed in float32."""
    return x.bfloat16().float() @ format_dequantize(packed, torch.bfloat16).float().T


def linear_grad_input_bf16(grad: Tensor, packed: PackedTensor) -> Tensor:
    """dL/dx = g W with g and W rounded to bfloat16, their products summed in float32."""
    return grad.bfloat16().float() @ format_dequantize(packed, torch.bfloat16).float()


def linear_int8(x: Tensor, packed: PackedTensor) -> Tensor:
    """y = x W^T with x rounded to 8 bits in groups of 32 columns, summed in float64 and given as float32.

    step = max |x| / 127 over a group and code = round(x * (127 / max |x|)); a group below 2^-100 counts as zero, one
    with a NaN or an infinity makes its token NaN. The weights are not rounded: their codes times these codes are what
    the native kernel sums as integers.
    """
    x_BI = x.reshape(-1, x.shape[-1]).to(torch.float32)
    code_BGN, step_BG1 = _integers(F.pad(x_BI, (0, -x.shape[-1] % 32)).unflatten(1, (-1, 32)), 127)
    rounded_BI = (code_BGN * step_BG1).flatten(1)[:, : x.shape[-1]]
    y = rounded_BI.reshape(x.shape) @ format_dequantize(packed, torch.float64).T
    return y.to(torch.float32)  # a copy, and no view, which could not be changed in place


def linear_grad_input_int8(grad: Tensor, packed: PackedTensor) -> Tensor:
    """dL/dx = g W with v = g d rounded to 8 bits, summed in float64 and given as float32; w = d q + m, q around 0.

    The scales d are those of W's groups of columns, so v is another for each. In runs of 32 rows of W g and d are rounded
    to integers of 16 bits a and b first, and a b / 2^23 to the code, -127 to 127. Minimums m are rounded to 12 bits. What is
    below 2^-100 in a whole run counts as zero; a NaN or an infinity makes its token NaN.
    """
    grid = unpack(packed)
    steps_OS, offsets_OS = grid.steps(), grid.offsets()
    middle = 0 if offsets_OS is None else (grid.high + 1) // 2
    q_SON = (grid.values().double() - middle).unflatten(1, (steps_OS.shape[1], -1)).transpose(0, 1)
    g_BO = grad.reshape(-1, grad.shape[-1])
    a_BRN, a_step_BR1 = _runs(g_BO, 32767)
    gx_BSN = [_of_group(a_BRN, a_step_BR1, d_O, q_ON) for d_O, q_ON in zip(steps_OS.T, q_SON, strict=True)]
    gx_BI = torch.stack(gx_BSN, dim=1)
    if offsets_OS is not None:
        m_OS = (offsets_OS.double() + middle * steps_OS.double()).float()
        m_SRN, m_step_SR1 = _runs(m_OS.T, 2047)
        gx_BI += ((a_BRN * a_step_BR1).flatten(1) @ (m_SRN * m_step_SR1).flatten(1).T)[..., None]
    return gx_BI.view(*grad.shape[:-1], packed.shape[1]).to(torch.float32)


def _of_group(a_BRN: Tensor, a_step_BR1: Tensor, d_O: Tensor, q_ON: Tensor) -> Tensor:
    """v of a group of columns with scales d, times their q."""
    b_1RN, b_step_1R1 = _runs(d_O[None], 32513)
    halves_BRN = (a_BRN * b_1RN / 2.0**15 + 0.5).floor()
    v_BRN = (halves_BRN / 2.0**8 + 0.5).floor() * (2.0**23 * a_step_BR1 * b_step_1R1)
    return v_BRN.flatten(1)[:, : len(d_O)] @ q_ON


def _runs(values_BO: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """_integers of runs of 32, zeros behind the last."""
    return _integers(F.pad(values_BO, (0, -values_BO.shape[1] % 32)).unflatten(1, (-1, 32)), most)


def _integers(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Integers up to `most` and what they are worth in float64, a step for each last dimension: 0 below 2^-100."""
    largest = values.abs().amax(dim=-1, keepdim=True)
    largest = largest.masked_fill(largest < 2.0**-100, 0.0)
    inverse = torch.full_like(largest, most) / largest  # most / t would be rounded twice: 1 / t, times most
    return (values * inverse).round().masked_fill(largest == 0.0, 0.0).double(), (largest / most).double()


def norm(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., H] -> y = w x r [..., H] in the dtype of x, rounded once, and r [..., 1] in float32 at least."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x.dtype)).square_()
    r = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return normalized(x, weight_H, r), r


def normalized(x: Tensor, weight_H: Tensor, r: Tensor) -> Tensor:
    """y of `norm` again, bit for bit."""
    return (x * r).mul_(weight_H).to(x.dtype)


def norm_backward(grad: Tensor, x: Tensor, weight_H: Tensor, r: Tensor) -> Tensor:
    """dL/dy -> dL/dx = r (g w - x r² mean(g w x))."""
    gw, x_wide = grad.to(r.dtype) * weight_H, x.to(r.dtype)
    mean = (gw * x_wide).mean(dim=-1, keepdim=True)
    return gw.mul_(r).addcmul_(x_wide, mean * r**3, value=-1).to(x.dtype)


def gated(
    act: "Activation", gate: Tensor, up: Tensor, rounded: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> Tensor:
    """h = act(gate) up in `dtype`, computed in float32 at least; gate and up go to `rounded` besides."""
    for source, copy in zip((gate, up), rounded or (), strict=False):
        copy.copy_(source)
    return act(gate.to(_wide(gate.dtype))).mul_(up).to(dtype)


def gated_backward(act: "Activation", grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dh -> dL/dgate, dL/dup in the dtype of dL/dh."""
    gate, up = gate.to(grad.dtype), up.to(grad.dtype)
    return act.backward(grad * up, gate), act(gate).mul_(grad)


def rotate(q_BHTD: Tensor, k_BGTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    """The first R channels of q and k turned by their angles, or gradients back; the others stay."""
    return _rotated(q_BHTD, cos_BTR, sin_BTR, backward), _rotated(k_BGTD, cos_BTR, sin_BTR, backward)


def _rotated(x_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, backward: bool) -> Tensor:
    half = cos_BTR.shape[-1] // 2
    cos1, cos2 = cos_BTR[:, None, :, :half], cos_BTR[:, None, :, half:]
    sin1, sin2 = sin_BTR[:, None, :, :half], sin_BTR[:, None, :, half:]
    x1, x2, rest = x_BHTD[..., :half], x_BHTD[..., half : 2 * half], x_BHTD[..., 2 * half :]
    if backward:
        return torch.cat((x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1, rest), dim=-1)
    return torch.cat((x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2, rest), dim=-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of numbers of this dtype are taken in."""
    return torch.promote_types(dtype, torch.float32)


def loss_to_gradient(logits_CV: Tensor, targets_C: Tensor, smoothing: float) -> Tensor:
    """The cross-entropy [C] of each row of float32 logits z, which are overwritten with its gradient.

    loss = log sum exp(z) - (1 - s) z[target] - s mean(z)      gradient = softmax(z) - s / V, and s - 1 at the target
    (label smoothing s as in torch: Szegedy et al. 2016, arXiv:1512.00567)
    """
    index_C1 = targets_C[:, None]
    largest_C1 = logits_CV.amax(dim=1, keepdim=True)
    kept = (1.0 - smoothing) * logits_CV.gather(1, index_C1)[:, 0]
    if smoothing:
        kept += smoothing * logits_CV.mean(dim=1)
    sums_C1 = logits_CV.sub_(largest_C1).exp_().sum(dim=1, keepdim=True)
    losses_C = (sums_C1.log() + largest_C1)[:, 0] - kept
    logits_CV.div_(sums_C1)
    if smoothing:
        logits_CV.sub_(smoothing / logits_CV.shape[1])
    logits_CV.scatter_add_(1, index_C1, torch.full_like(largest_C1, smoothing - 1.0))
    return losses_C


def grouped_linear(
    xs: Sequence[Tensor], stacks: Sequence[PackedTensor], experts: int, groups: Sequence["Group"], product: "Product"
) -> list[Tensor]:
    """y = x W_e^T or gx = g W_e of the rows of each expert, by the product of one matrix."""
    ys = []
    for x, stack in zip(xs, stacks, strict=True):
        rows = stack.shape[0] // experts
        y = x.new_empty(len(x), stack.shape[1] if product.backward else rows)
        for expert, start, stop in groups:
            packed = slice_rows(stack, expert * rows, (expert + 1) * rows)
            y[start:stop] = product.of(x[start:stop], packed)
        ys.append(y)
    return ys


def lora_forward(x_NI: Tensor, product_NO: Tensor, terms: Sequence[Term]) -> tuple[Tensor, list[Tensor]]:
    """(y = product + s h B^T, which overwrites it, h = x A^T of each term)."""
    hs = []
    for term in terms:
        h_SR = term.x @ term.A.to(term.x.dtype).T
        product_NO[term.start : term.stop].addmm_(h_SR, term.B.to(h_SR.dtype).T, alpha=term.scaling)
        hs.append(h_SR)
    return product_NO, hs


def lora_backward(
    g_NO: Tensor, product_NI: Tensor | None, terms: Sequence[Term], hs: Sequence[Tensor]
) -> tuple[Tensor | None, list[Grads]]:
    """(gx = product + gh A, which overwrites it, the gradients of each term); None for a gx that nobody wants."""
    grads = []
    for term, h_SR in zip(terms, hs, strict=True):
        g_SO = g_NO[term.start : term.stop]
        gh_SR = (g_SO @ term.B.to(g_SO.dtype)).mul_(term.scaling)
        if product_NI is not None and term.adds:
            product_NI[term.start : term.stop].addmm_(gh_SR, term.A.to(gh_SR.dtype))
        grads.append(lora_gradients(g_SO, gh_SR, term, h_SR))
    return product_NI, grads


def lora_gradients(g_SO: Tensor, gh_SR: Tensor, term: Term, h_SR: Tensor) -> Grads:
    """gA = gh^T x and gB = s g^T h, as they were summed: of half-precision factors in float32."""
    grad_B_OR = _unrounded(g_SO.T, h_SR).to(term.B.dtype)
    if term.scaling != 1.0:
        grad_B_OR.mul_(term.scaling)
    return Grads(_unrounded(gh_SR.T, term.x).to(term.A.dtype), grad_B_OR, gh_SR)


def _unrounded(a_RN: Tensor, b_NK: Tensor) -> Tensor:
    if a_RN.dtype not in HALVES:
        return a_RN @ b_NK
    return torch.mm(a_RN, b_NK, out_dtype=torch.float32) if a_RN.is_cuda else a_RN.float() @ b_NK.float()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    scale: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    contexts: Tensor | None = None,
    prefix: Pair | None = None,
) -> Tensor:
    """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D], sample by sample (see varlen_attention.attend)."""
    lengths = [stop - start for start, stop in pairwise(bounds.tolist())]
    read = [0] * len(lengths) if contexts is None else contexts.tolist()
    grouped = query.shape[1] != key.shape[1]
    # split, not slices: the gradient of each slice would be a tensor of zeros as large as the whole
    samples = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    parts = []
    for (q, k, v), context in zip(samples, read, strict=True):
        if prefix is not None:
            k, v = torch.cat([prefix[0], k], dim=2), torch.cat([prefix[1], v], dim=2)
        mask = _sample_mask(q.shape[2], k.shape[2] - q.shape[2], window, context, query.device)
        causal = mask is None
        parts.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
            ).transpose(1, 2)
        )
    return torch.cat(parts, dim=1)


def _sample_mask(tokens: int, prefix: int, window: int | None, context: int, device: torch.device) -> Tensor | None:
    """[T, P + T] bool, true where a token may look; None where that is itself and all before it, without a prefix."""
    if not prefix and context <= 1 and (window is None or tokens <= window):
        return None
    key = torch.arange(tokens, device=device)
    distance = key[:, None] - key
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    return F.pad(visible | (key < context), (prefix, 0), value=True)


def descend(R_BO: Tensor, codes_BO: Tensor, steps_BO: Tensor, H_BB: Tensor, low: int, high: int) -> Tensor:
    """Coordinate descent on the codes of B columns of a weight, once each; returns how far each weight moves, [B, O].

        n = -R_k / (H_kk step_k), rounded, within low..high        R += n step_k H_k

    Args:
        R_BO: half the gradient of the squared error, (W H - P)^T.
        codes_BO: whole float32 numbers, moved in place.
        steps_BO: what a code is worth; where it has no effect the code stays.
        H_BB: the curvature.
        low, high: of the codes; one below `low` (read, never written: -8 in 4 bits) may stay.
    """
    R_BO, moved_BO = R_BO.clone(), torch.zeros_like(R_BO)
    slope_BO = H_BB.diagonal()[:, None] * steps_BO
    inverse_BO = torch.where(slope_BO.abs() > 1e-30, 1.0 / slope_BO, 0.0)
    for k in range(len(R_BO)):
        wanted_O = (codes_BO[k] - (R_BO[k] * inverse_BO[k]).round_()).clamp_(max=high)
        best_O = torch.maximum(wanted_O, codes_BO[k].clamp(max=low))
        moved_BO[k] = (best_O - codes_BO[k]) * steps_BO[k]
        codes_BO[k] = best_O
        R_BO.addr_(H_BB[k], moved_BO[k])
    return moved_BO
