"""Where the context of a prefix language model ends: its positions and its mask.

ChatGLM-6B reads a context in both directions and writes an answer from left to right. <sop> begins the answer; the
place that it fills is marked by [gMASK] at the end of the context, or by [MASK] inside of it.

              t0  t1 [gMASK] <sop> a0  a1         key ->   t0  t1  g  sop a0  a1
    row 0      0   1    2      2    2   2         query t0  x   x   x   .   .   .
    row 1      0   0    0      1    2   3               t1  x   x   x   .   .   .
                                                        g   x   x   x   .   .   .
    row 0: the place in the context, from <sop> on      sop x   x   x   x   .   .
           that of the mask token                       a0  x   x   x   x   x   .
    row 1: 0 in the context, then 1, 2, 3 ...           a1  x   x   x   x   x   x

So row 1 alone says what is visible: a key that is context (0), and a key that is not later than the query. Padding has
0 in both rows, is not counted, and is told apart by the attention mask. Samples packed in one row of the batch each have
their own <sop>, positions from 0 on, and see only themselves.

Everything here is integers over the whole batch at once, without a loop over samples. Shapes: B rows of the batch, T
tokens, N = B * T, S samples, Q queries, K keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, GenerationMixin

from qgraft.compat import takes_cache

HINT = "hint: end the prompt in [gMASK] <sop>, as the tokenizer does, or give position_ids [batch, 2, tokens]"


@dataclass(frozen=True)
class Marks:
    """The ids that say where the context ends."""

    sop: int
    gmask: int
    mask: int


def check_shapes(
    attention_mask: Tensor | None, position_ids: Tensor | None, batch: int, tokens: int, past: int
) -> None:
    """Raise ValueError for a mask or positions that are neither the original's nor ordinary ones, with all problems."""
    problems = []
    keys = past + tokens
    if attention_mask is not None:
        hides = attention_mask.dim() == 4 and attention_mask.dtype == torch.bool
        given = list(attention_mask.shape)
        if given not in ([[batch, 1, tokens, keys], [1, 1, tokens, keys]] if hides else [[batch, keys]]):
            problems.append(
                f"attention_mask: got {attention_mask.dtype} {given}, expected [{batch}, {keys}], 0 where padding is, or "
                f"torch.bool [{batch}, 1, {tokens}, {keys}], true where a key is hidden"
            )
    if position_ids is not None:
        given = list(position_ids.shape)
        if given not in [[rows, *two, tokens] for rows in (batch, 1) for two in ([], [2])]:
            problems.append(f"position_ids: got {given}, expected [{batch}, {tokens}] or [{batch}, 2, {tokens}]")
    if problems:
        raise ValueError("; ".join(problems))


def number_samples(ids_BT: Tensor, position_ids: Tensor | None, seen_BT: Tensor | None) -> Tensor:
    """Which sample each token is of, [B, T] int64 counting from 0 over the whole batch.

    A row is one sample, unless it is packed: positions that start again at 0, and no attention mask.
    """
    rows, tokens = ids_BT.shape
    if position_ids is None or seen_BT is not None:
        return torch.arange(rows, device=ids_BT.device)[:, None].expand(rows, tokens)
    starts = position_ids.expand(rows, tokens) == 0
    starts = starts | (torch.arange(tokens, device=ids_BT.device) == 0)
    return starts.flatten().cumsum(0).view(rows, tokens) - 1


def context_positions(
    ids_BT: Tensor, marks: Marks, position_ids: Tensor | None = None, seen_BT: Tensor | None = None
) -> Tensor:
    """The two rows of positions, [B, 2, T] int64, that follow from the ids.

    Args:
        position_ids: ordinary ones, [B, T]: 0, 1, 2 ... in each sample.
        seen_BT: the attention mask, 0 where padding is.

    Raises ValueError for a sample without <sop> or without a mask token before it, and for position_ids that count
    otherwise: they would be ignored.
    """
    sample_N = number_samples(ids_BT, position_ids, seen_BT).flatten()
    ids_N, index_N = ids_BT.flatten(), torch.arange(ids_BT.numel(), device=ids_BT.device)
    real_N = torch.ones_like(ids_N, dtype=torch.bool) if seen_BT is None else seen_BT.flatten().bool()
    samples, nowhere = int(sample_N[-1]) + 1, len(ids_N)

    def first(found_N: Tensor) -> Tensor:
        """The index of each sample's first token that is found, [S]."""
        start = torch.full((samples,), nowhere, device=ids_BT.device)
        return start.scatter_reduce(0, sample_N, torch.where(found_N & real_N, index_N, nowhere), "amin")

    sop_S = first(ids_N == marks.sop)
    answer_N = index_N >= sop_S[sample_N]
    gmask_S, mask_S = (first((ids_N == token) & ~answer_N) for token in (marks.gmask, marks.mask))
    marked_S = torch.where(gmask_S < nowhere, gmask_S, mask_S)
    _require_marks(sop_S == nowhere, marked_S == nowhere)

    count_N = real_N.cumsum(0)
    place_N = count_N - count_N[first(real_N)[sample_N]]  # 0, 1, 2 ... in each sample, without its padding
    if position_ids is not None and bool(((place_N != position_ids.expand(ids_BT.shape).flatten()) & real_N).any()):
        raise ValueError("position_ids: expected 0, 1, 2 ... in each sample, padding not counted, or two rows of them")
    row0_N = torch.where(answer_N, place_N[marked_S][sample_N], place_N)
    row1_N = torch.where(answer_N, place_N - place_N[sop_S][sample_N] + 1, 0)
    return (torch.stack([row0_N, row1_N]) * real_N).view(2, *ids_BT.shape).transpose(0, 1)


def _require_marks(no_sop_S: Tensor, no_mask_S: Tensor) -> None:
    """Raise ValueError for the samples whose context has no end, or no mask token."""
    if not bool((no_sop_S | no_mask_S).any()):
        return
    named = (("<sop>", no_sop_S), ("[gMASK] or [MASK] before <sop>", no_mask_S & ~no_sop_S))
    problems = [
        f"no {mark} in sample {', '.join(map(str, lacking.nonzero()[:8, 0].tolist()))}"
        for mark, lacking in named
        if bool(lacking.any())
    ]
    raise ValueError(f"where does the context end? {'; '.join(problems)} of {len(no_sop_S)}\n{HINT}")


def visible_keys(rows_B2Q: Tensor, past: int, keys: int, sample_BQ: Tensor | None, seen_BK: Tensor | None) -> Tensor:
    """Which keys each query may attend to, [B, 1, Q, K] bool.

    Args:
        rows_B2Q: the two rows of positions of the queries.
        past: how many keys the cache holds already; all of them are visible.
        keys: how many there are with the new ones; more than past + Q where a cache has room to spare.
        sample_BQ: which sample each token is of, where samples are packed; needs past = 0.
        seen_BK: the attention mask of past and new keys, 0 where padding is.
    """
    queries, device = rows_B2Q.shape[2], rows_B2Q.device
    visible = torch.arange(keys, device=device) <= torch.arange(past, past + queries, device=device)[:, None]
    context_BK = F.pad(rows_B2Q[:, 1] == 0, (past, keys - past - queries))
    visible = visible | context_BK[:, None]
    if sample_BQ is not None:
        visible = visible & (sample_BQ[:, :, None] == F.pad(sample_BQ, (0, keys - queries), value=-1)[:, None])
    if seen_BK is not None:
        visible = visible & F.pad(seen_BK.bool(), (0, keys - seen_BK.shape[1]))[:, None]
    return without_blind_rows(visible[:, None])


def sees_itself(hidden_B1TT: Tensor) -> Tensor:
    """Which tokens a mask of the original's (true = hidden) does not hide from themselves, [B, T] bool: all but padding."""
    return ~hidden_B1TT[:, 0].diagonal(dim1=1, dim2=2)


def without_blind_rows(visible: Tensor) -> Tensor:
    """The mask with the rows opened that see nothing (padding): their output means nothing, but must not be NaN."""
    return visible | ~visible.any(dim=-1, keepdim=True)


def context_lengths(rows_B2T: Tensor, sample_BT: Tensor) -> Tensor:
    """How many tokens of each packed sample are context, [S] int64."""
    lengths = sample_BT.new_zeros(int(sample_BT[-1, -1]) + 1)
    return lengths.scatter_add(0, sample_BT.flatten(), (rows_B2T[:, 1] == 0).long().flatten())


def continue_positions(rows_B2T: Tensor, tokens: int) -> Tensor:
    """The two rows of positions for so many `tokens` in all, those after the given ones being answer: [B, 2, tokens]."""
    steps = torch.arange(1, tokens - rows_B2T.shape[2] + 1, device=rows_B2T.device)
    return torch.cat([rows_B2T, rows_B2T[:, :, -1:] + torch.stack([0 * steps, steps])], dim=2)


def continue_mask(hidden_B1TT: Tensor, tokens: int) -> Tensor:
    """A mask (true = hidden) for so many `tokens` in all: each new one sees what the last one saw, and itself."""
    given = hidden_B1TT.shape[-1]
    rows = torch.cat([hidden_B1TT, hidden_B1TT[:, :, -1:].expand(-1, -1, tokens - given, -1)], dim=2)
    index = torch.arange(tokens, device=rows.device)
    later = index[:, None] < index[given:]
    return torch.cat([rows, later.expand(*rows.shape[:2], -1, -1)], dim=3)


class PrefixGenerationMixin(GenerationMixin):
    """generate() for a prefix language model whose forward pass takes what this file makes.

    (transformers types the `self` of its mixin as a protocol that no class fulfils: hence `Any`.)
    """

    @property
    def marks(self) -> Marks:
        """The ids that say where the context ends."""
        raise NotImplementedError

    def generate(
        self, *args: Any, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """transformers' generate(), which also takes the original's masks and positions (it knows other shapes only)."""
        if attention_mask is not None and attention_mask.dim() == 4:
            check_shapes(attention_mask, None, len(attention_mask), attention_mask.shape[-1], 0)
            kwargs["hidden_keys"], attention_mask = attention_mask, sees_itself(attention_mask).long()
        if position_ids is not None and position_ids.dim() == 3:
            kwargs["two_rows"], position_ids = position_ids, None
        base: Any = super()
        return base.generate(*args, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    @takes_cache
    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        *,
        two_rows: Tensor | None = None,
        hidden_keys: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of a step's forward pass; positions follow from all ids so far, or from `two_rows` of the prompt.

        Ordinary positions say no more than ids and mask do, so those that generate() counts are left aside.
        """
        kwargs.pop("position_ids", None)
        base: Any = super()
        inputs: dict[str, Any] = base.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            cache,
            attention_mask,
            inputs_embeds,
            is_first_iteration,
            **kwargs,
        )
        step = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        new = step.shape[1]
        total = new if cache is None else new + int(cache.get_seq_length())
        if two_rows is not None:
            rows = continue_positions(two_rows, total)
        elif input_ids.shape[1] == total:
            rows = context_positions(input_ids, self.marks, seen_BT=attention_mask)
        else:
            raise ValueError(f"generate: got {input_ids.shape[1]} ids, expected all {total} from the beginning\n{HINT}")
        inputs["position_ids"] = rows[:, :, total - new :]
        if hidden_keys is not None:
            inputs["attention_mask"] = continue_mask(hidden_keys, total)[:, :, total - new :]
        return inputs

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """Left to the model; transformers would make causal masks for caches of a fixed size."""
        return attention_mask
