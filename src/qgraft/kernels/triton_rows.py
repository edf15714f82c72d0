# mypy: disable-error-code="no-untyped-def, no-redef"
"""Triton: norms, gated products, rotations and the loss of logits, each one pass over memory. Imported by gpu_rows.py only.

The formulas are those of pointwise.py and loss.py. All of it is computed in float32 and rounded once; whatever the dtype, a
row's result does not depend on other rows. `EXACT` is Triton's interpreter, see triton_blocks.py.
"""

import triton
import triton.language as tl

from qgraft.kernels.triton_blocks import rounded

jit = triton.jit


@jit
def norm_kernel(x, w, y, r, H, eps, KNOWN: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """y = w x r of row program_id(0), with r = 1 / sqrt(mean(x²) + eps) written, or KNOWN and read."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    ok = c < H
    a = tl.load(x + row * H + c, mask=ok, other=0).to(tl.float32)
    if KNOWN:
        inverse = tl.load(r + row)
    else:
        inverse = 1.0 / tl.sqrt(tl.sum(a * a, axis=0) / H + eps)
        tl.store(r + row, inverse)
    weight = tl.load(w + c, mask=ok, other=0).to(tl.float32)
    tl.store(y + row * H + c, rounded(a * inverse * weight, y.dtype.element_ty, EXACT), mask=ok)


@jit
def norm_backward_kernel(g, x, w, r, gx, H, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """gx = r (g w - x r² mean(g w x))."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    ok = c < H
    a = tl.load(x + row * H + c, mask=ok, other=0).to(tl.float32)
    gw = tl.load(g + row * H + c, mask=ok, other=0).to(tl.float32) * tl.load(w + c, mask=ok, other=0).to(tl.float32)
    inverse = tl.load(r + row)
    mean = tl.sum(gw * a, axis=0) / H
    result = inverse * gw - a * (mean * inverse * inverse * inverse)
    tl.store(gx + row * H + c, rounded(result, gx.dtype.element_ty, EXACT), mask=ok)


@jit
def tanh(x):
    """By sigmoid, which is right for arguments of any size."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@jit
def activation(ACT: tl.constexpr, x):
    """act(x): 0 silu, 1 gelu by tanh, 2 gelu by erf."""
    if ACT == 0:
        return x * tl.sigmoid(x)
    elif ACT == 1:
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))


@jit
def slope(ACT: tl.constexpr, x):
    """act'(x)."""
    if ACT == 0:
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACT == 1:
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    else:
        return 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@jit
def gated_kernel(gate, up, h, n, ACT: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """h = act(gate) up."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + i, mask=i < n, other=0).to(tl.float32)
    b = tl.load(up + i, mask=i < n, other=0).to(tl.float32)
    tl.store(h + i, rounded(activation(ACT, a) * b, h.dtype.element_ty, EXACT), mask=i < n)


@jit
def gated_backward_kernel(g, gate, up, g_gate, g_up, n, ACT: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """g_gate = g up act'(gate), g_up = g act(gate)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(g + i, mask=i < n, other=0).to(tl.float32)
    a = tl.load(gate + i, mask=i < n, other=0).to(tl.float32)
    b = tl.load(up + i, mask=i < n, other=0).to(tl.float32)
    tl.store(g_gate + i, rounded(grad * b * slope(ACT, a), g_gate.dtype.element_ty, EXACT), mask=i < n)
    tl.store(g_up + i, rounded(grad * activation(ACT, a), g_up.dtype.element_ty, EXACT), mask=i < n)


@jit
def rotate_kernel(
    x, y, cos, sin, stride_head, stride_token, heads, channels, width,
    BACKWARD: tl.constexpr, BH: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y [T, heads, channels], contiguous, from x with these strides: the first `width` channels turned in pairs.

    One program: a token, BH of its heads. HALF holds width / 2 channels, REST those that are copied.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BH + tl.arange(0, BH)[:, None]
    j = tl.arange(0, HALF)[None, :]
    half = width // 2
    ok = (head < heads) & (j < half)
    source = x + token * stride_token + head.to(tl.int64) * stride_head
    target = y + (token * heads + head) * channels
    x1 = tl.load(source + j, mask=ok, other=0).to(tl.float32)
    x2 = tl.load(source + half + j, mask=ok, other=0).to(tl.float32)
    c1 = tl.load(cos + token * width + j, mask=j < half, other=0).to(tl.float32)
    c2 = tl.load(cos + token * width + half + j, mask=j < half, other=0).to(tl.float32)
    s1 = tl.load(sin + token * width + j, mask=j < half, other=0).to(tl.float32)
    s2 = tl.load(sin + token * width + half + j, mask=j < half, other=0).to(tl.float32)
    if BACKWARD:
        y1 = x1 * c1 + x2 * s2
        y2 = x2 * c2 - x1 * s1
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    DT: tl.constexpr = y.dtype.element_ty
    tl.store(target + j, rounded(y1, DT, EXACT), mask=ok)
    tl.store(target + half + j, rounded(y2, DT, EXACT), mask=ok)
    if REST > 0:
        k = width + tl.arange(0, REST)[None, :]
        more = (head < heads) & (k < channels)
        tl.store(target + k, tl.load(source + k, mask=more, other=0), mask=more)


@jit
def loss_kernel(z, target, losses, V, stride, smoothing, BLOCK: tl.constexpr, EXACT: tl.constexpr):
    """The cross-entropy of row program_id(0) of the logits z, which are overwritten with its gradient."""
    row = tl.program_id(0).to(tl.int64)
    start = z + row * stride
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for at in range(0, V, BLOCK):
        c = at + tl.arange(0, BLOCK)
        a = tl.load(start + c, mask=c < V, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, a, propagate_nan=tl.PropagateNan.ALL)
    top = tl.max(largest, axis=0)
    total = tl.zeros((BLOCK,), tl.float32)
    plain = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, V, BLOCK):
        c = at + tl.arange(0, BLOCK)
        a = tl.load(start + c, mask=c < V, other=float("-inf")).to(tl.float32)
        total += tl.exp(a - top)
        plain += tl.where(c < V, a, 0.0)
    whole = tl.sum(total, axis=0)
    wanted = tl.load(target + row)
    kept = (1.0 - smoothing) * tl.load(start + wanted).to(tl.float32)
    if smoothing > 0.0:
        kept += smoothing * tl.sum(plain, axis=0) / V
    tl.store(losses + row, tl.log(whole) + top - kept)
    for at in range(0, V, BLOCK):
        c = at + tl.arange(0, BLOCK)
        a = tl.load(start + c, mask=c < V, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(a - top) / whole - smoothing / V - tl.where(c == wanted, 1.0 - smoothing, 0.0)
        tl.store(start + c, rounded(gradient, z.dtype.element_ty, EXACT), mask=c < V)
