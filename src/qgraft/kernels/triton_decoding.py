# mypy: disable-error-code="no-untyped-def, no-redef"
"""Triton: rotation and attention of new tokens, each with keys and values in its own slots. Imported by gpu_decode.py only.

    places [2] int64            addresses of a layer's keys and values [groups, capacity, channels]
    shape  [1] int64            the capacity
    rows   [M, 2] int64         of each token: how many slots it sees, its own the last; how many in front no window hides.
                                A row that sees none is there to fill up: nothing of it is written
    slots  [M, S] int64         which slots, in the order of positions

These lie in the GPU's memory, so that one CUDA graph serves any texts and any memory.
"""

import triton
import triton.language as tl

from qgraft.kernels.triton_blocks import rounded

jit = triton.jit


@jit
def turned(x, weight, cos, sin, eps, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr):
    """Both halves of a head x [D], normed where the model does so, rotated."""
    j = tl.arange(0, HALF)
    ok = j < D // 2
    x1 = tl.load(x + j, mask=ok, other=0)
    x2 = tl.load(x + D // 2 + j, mask=ok, other=0)
    if NORM:
        inverse = 1.0 / tl.sqrt((tl.sum(x1 * x1, axis=0) + tl.sum(x2 * x2, axis=0)) / D + eps)
        x1 = x1 * inverse * tl.load(weight + j, mask=ok, other=0).to(tl.float32)
        x2 = x2 * inverse * tl.load(weight + D // 2 + j, mask=ok, other=0).to(tl.float32)
    c1 = tl.load(cos + j, mask=ok, other=0)
    c2 = tl.load(cos + D // 2 + j, mask=ok, other=0)
    s1 = tl.load(sin + j, mask=ok, other=0)
    s2 = tl.load(sin + D // 2 + j, mask=ok, other=0)
    return x1 * c1 - x2 * s1, x2 * c2 + x1 * s2


@jit
def rotate_kernel(
    qkv, q_norm, k_norm, cos, sin, q, places, shape, rows, slots, S, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, KV: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """qkv [M, H + 2 G, D] -> q [M, H, D] rotated; keys rotated, and values, to the token's slot. One program: a head."""
    head = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    j = tl.arange(0, HALF)
    ok = j < D // 2
    x = qkv + (m * (H + 2 * G) + head) * D
    if head < H:
        y1, y2 = turned(x, q_norm, cos + m * D, sin + m * D, eps, D, HALF, NORM)
        tl.store(q + (m * H + head) * D + j, y1, mask=ok)
        tl.store(q + (m * H + head) * D + D // 2 + j, y2, mask=ok)
    else:
        seen = tl.load(rows + 2 * m)
        if seen > 0:
            slot = tl.load(slots + m * S + seen - 1).to(tl.int64)
            capacity = tl.load(shape)
            if head < H + G:
                memory = tl.load(places).to(tl.pointer_type(KV)) + ((head - H) * capacity + slot) * D
                y1, y2 = turned(x, k_norm, cos + m * D, sin + m * D, eps, D, HALF, NORM)
            else:
                memory = tl.load(places + 1).to(tl.pointer_type(KV)) + ((head - H - G) * capacity + slot) * D
                y1 = tl.load(x + j, mask=ok, other=0)
                y2 = tl.load(x + D // 2 + j, mask=ok, other=0)
            tl.store(memory + j, rounded(y1, KV, EXACT), mask=ok)
            tl.store(memory + D // 2 + j, rounded(y2, KV, EXACT), mask=ok)


@jit
def attend_kernel(
    q, places, shape, rows, slots, parts, S, window, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    KV: tl.constexpr,
):  # fmt: skip
    """A share of a softmax attention: of head program_id(0), of token program_id(1), over each SPLITS-th run of BLOCK keys.

    parts [M, H, SPLITS, D + 2] float32: the largest score, the sum of exp(score - largest), and the values summed likewise.
    """
    head = tl.program_id(0)
    m = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    d = tl.arange(0, WIDE)
    inside = d < D
    seen = tl.load(rows + 2 * m).to(tl.int32)
    front = tl.load(rows + 2 * m + 1).to(tl.int32)
    capacity = tl.load(shape)
    group = (head // (H // G)).to(tl.int64) * capacity
    keys = tl.load(places).to(tl.pointer_type(KV))
    values = tl.load(places + 1).to(tl.pointer_type(KV))
    query = tl.load(q + (m * H + head) * D + d, mask=inside, other=0) * scale
    first = 0
    if window > 0:
        first = tl.maximum(seen - window, 0)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)  # of each place in a run by itself, joined at the end
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, WIDE), tl.float32)
    for start in range(split * BLOCK, seen, SPLITS * BLOCK):
        i = start + tl.arange(0, BLOCK)
        visible = (i < seen) & ((i >= first) | (i < front))
        slot = tl.load(slots + m * S + i, mask=visible, other=0).to(tl.int64)
        at = (group + slot)[:, None] * D + d[None, :]
        take = visible[:, None] & inside[None, :]
        score = tl.sum(tl.load(keys + at, mask=take, other=0).to(tl.float32) * query[None, :], axis=1)
        new = tl.where(visible, tl.maximum(top, score), top)
        kept = tl.where(top == float("-inf"), 0.0, tl.exp(top - new))
        weight = tl.where(visible, tl.exp(score - new), 0.0)
        total = total * kept + weight
        mixed = mixed * kept[:, None] + weight[:, None] * tl.load(values + at, mask=take, other=0).to(tl.float32)
        top = new
    largest = tl.max(top, axis=0)
    share = tl.where(top == float("-inf"), 0.0, tl.exp(top - largest))
    out = parts + ((m * H + head) * SPLITS + split) * (D + 2)
    tl.store(out, largest)
    tl.store(out + 1, tl.sum(total * share, axis=0))
    tl.store(out + 2 + d, tl.sum(mixed * share[:, None], axis=0), mask=inside)


@jit
def join_kernel(parts, y, H, D: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):
    """The shares of attend_kernel to y [M, H, D]; 0 for a token that sees nothing."""
    which = tl.program_id(1).to(tl.int64) * H + tl.program_id(0)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, WIDE)
    start = parts + (which * SPLITS + s) * (D + 2)
    top = tl.load(start)
    largest = tl.max(top, axis=0)
    share = tl.where(top == float("-inf"), 0.0, tl.exp(top - largest))
    whole = tl.sum(tl.load(start + 1) * share, axis=0)
    values = tl.load(start[:, None] + 2 + d[None, :], mask=(d < D)[None, :], other=0)
    mixed = tl.sum(values * share[:, None], axis=0)
    tl.store(y + which * D + d, tl.where(whole > 0, mixed / tl.where(whole > 0, whole, 1.0), 0.0), mask=d < D)
