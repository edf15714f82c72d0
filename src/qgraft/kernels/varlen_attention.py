"""Attention within samples that share a row of tokens: each sample a softmax attention of its own.

    sample        a a a a b b b            a query sees itself and what is before it in its sample (x), a prefix in front
    bounds        0       4     7          of every sample, the sample's first `context` tokens; not beyond a window

    a0  x . . .                 . . .      C            float32 on a CPU: varlen_attention.c, forward and backward, no
    a1  x x . .                 . . .                   mask, nothing of the square but what is seen
    a2  x x x .                 . . .      varlen       half precision on a GPU: torch's kernel for it (varlen.py)
    a3  x x x x                 . . .      reference    everywhere else: torch's attention, sample by sample. Calls, masks
    b0  . . . .                 x . .                   and copies for each sample cost more than the arithmetic where
                                                        samples have a hundred tokens

C and the reference give a sample the same bits whatever the others are. Saved for the gradients: what comes in, the
result and the logarithm of each softmax's sum. Shapes: H heads, G groups of heads that share keys and values, T tokens, P
prefix, D channels.
"""

from torch import Tensor

from qgraft.kernels.choice import choose
from qgraft.kernels.reference import Pair


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
    """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    Args:
        bounds: [samples + 1], where each sample starts, and the end; on the CPU, or a GPU is waited for.
        scale: of the scores; None for D^-0.5.
        window: each token sees at most so many tokens, itself included.
        contexts: [samples], how many tokens at the start of a sample all of its tokens see.
        prefix: keys and values [1, G, P, D] in front of every sample.
    """
    kernel = choose("varlen_attention", None, query.device.type, query.dtype).module
    out: Tensor = kernel.attend(
        query, key, value, bounds,
        scale=scale, dropout=dropout, window=window, contexts=contexts, prefix=prefix,
    )  # fmt: skip
    return out
