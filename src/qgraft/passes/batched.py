"""Texts that go on at once: the new tokens of all of them in one row, each with its own adapters, in one pass.

    row          a12 | b40 | c0 c1 c2 c3 | d7        three texts that get their next token, and a prompt
    linear       one product for all tokens; what a LoRA adds goes to the tokens of the texts that have it
    attention    text by text: over its own keys and values in a memory of slots (key_values.py), a prefix's in front

It is a padding-free batch (decoder.py) whose texts began earlier. The attention function is exchanged, for one that writes
the keys and values of the new tokens into the memory and reads each text's from there, and the note of the mask
(attention.py) says how far back a layer sees. transformers' cache is not used: one cache for texts of different lengths is
full of padding, and would have to be copied whenever one comes or goes.

Whether a model can be passed so is found out by its own forward pass (`why_not_batched`): texts in pieces, together,
against each alone and whole. What it cannot show is asked of the mask's note and of the modules: windows that are longer
than the texts of the trial; rotations that go by the longest text of a pass. A text comes out as alone up to the rounding
of products with other numbers of rows.

Shapes: T new tokens in the row, n of one text, K keys of one text, G groups of heads that share keys, h heads of a group,
H of all.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from qgraft.adapters.base import selection_of
from qgraft.adapters.lora import LoraLayer
from qgraft.adapters.lora_function import LayerSegment
from qgraft.attention import MaskNote, attend_capped, note_mask, unknown_arguments
from qgraft.errors import UnsupportedError
from qgraft.model_parts import argument_names, decoder_of, decoder_states
from qgraft.models.prefix_lm import context_positions
from qgraft.passes.decoder import output_head
from qgraft.passes.key_values import KeyValues, as_slices

CACHED = "qgraft_cached"
_TEXTS: ContextVar["_Texts | None"] = ContextVar("qgraft_texts", default=None)


@dataclass(frozen=True, eq=False)
class Piece:
    """New tokens of one text.

    Attributes:
        text: all ids so far, the new ones last.
        past: how many of them have been passed through before.
        slots: where its keys and values are, [prefix + len(text)] int64; the new ones will be written there.
        prefix: how many slots at the beginning are a prefix's, which has no tokens.
        shift: the position of the text's first token.
        loras: the adapters with their weights.
        logits: whether those after the last new token are asked for.
    """

    text: Sequence[int]
    past: int
    slots: Tensor
    prefix: int = 0
    shift: int = 0
    loras: Mapping[str, float] = field(default_factory=dict)
    logits: bool = True

    @property
    def new(self) -> int:
        """How many tokens are new."""
        return len(self.text) - self.past


def next_logits(model: PreTrainedModel, memory: KeyValues, pieces: Sequence[Piece], *, trial: bool = False) -> Tensor:
    """The logits [asked for, vocabulary] after the last new token of each piece that asks for them, in their order.

    Args:
        trial: look at what the mask's note says of windows, too.

    Within `attending(model, CACHED)` only, and for models that `why_not_batched` has nothing against. Raises
    UnsupportedError where layers do not see every token of the row, so that texts with different adapters cannot share it.
    """
    texts = _Texts(memory, pieces, getattr(decoder_of(model), "marks", None), trial)
    parts = [(piece.loras, piece.new) for piece in pieces]
    with with_adapters(model, parts), _passing(texts):
        ids, positions = (part.to(model.device, non_blocking=True) for part in (texts.ids, texts.positions))
        states_TH = decoder_states(model, input_ids=ids, position_ids=positions)[0]
    asked = [(index, piece) for index, piece in enumerate(pieces) if piece.logits]
    if not asked:
        return states_TH[:0]
    last_N = torch.tensor([texts.bounds[index + 1] - 1 for index, _ in asked])
    with with_adapters(model, [(piece.loras, 1) for _, piece in asked]):
        return output_head(model)(states_TH.index_select(0, last_N.to(states_TH.device, non_blocking=True)))


@contextmanager
def _passing(texts: "_Texts") -> Iterator[None]:
    """Within the block attention goes by these texts. Not a keyword of the forward pass: not every model passes one on."""
    token = _TEXTS.set(texts)
    try:
        yield
    finally:
        _TEXTS.reset(token)


@contextmanager
def with_adapters(model: PreTrainedModel, parts: Sequence[tuple[Mapping[str, float], int]]) -> Iterator[None]:
    """Within the block a row goes by these adapters, each set for so many of its tokens."""
    runs = [(dict(loras), sum(count for _, count in run)) for loras, run in groupby(parts, key=lambda part: part[0])]
    if len(runs) == 1:
        given: dict[str, Any] = {"weights": runs[0][0]}
    else:
        given = {"weights": {name: 1.0 for loras, _ in runs for name in loras}, "serve": _Segments(runs)}
    with selection_of(model).within(None, **given):
        yield


class _Segments:
    """Which LoRAs serve which tokens of a row."""

    def __init__(self, runs: Sequence[tuple[Mapping[str, float], int]]) -> None:
        self.segments: list[tuple[Mapping[str, float], int, int]] = []
        self.tokens = 0
        for loras, count in runs:
            self.segments.append((loras, self.tokens, self.tokens + count))
            self.tokens += count

    def __call__(self, layer: LoraLayer, x: Tensor) -> Tensor:
        """What the layer makes of x: tokens of the whole row."""
        if layer.tokens_of(x) != self.tokens:
            raise UnsupportedError(
                f"a layer got an input {list(x.shape)}, expected {self.tokens} tokens: this architecture does not pass "
                "every token through every layer, so that texts with different adapters cannot share a pass"
            )
        served = [
            (lora, LayerSegment(start, stop, lora.config.scaling * weight, 0.0, 0))
            for loras, start, stop in self.segments
            for name, weight in loras.items()
            if (lora := layer.named(name)) is not None
        ]
        return layer.with_segments(x, served)


class _Texts:
    """What the attention of all layers needs to know of a row."""

    def __init__(self, memory: KeyValues, pieces: Sequence[Piece], marks: Any, trial: bool) -> None:
        self.memory, self.pieces, self.trial = memory, pieces, trial
        self.bounds = [0]
        for piece in pieces:
            self.bounds.append(self.bounds[-1] + piece.new)
        self.ids = torch.tensor([[token for piece in pieces for token in piece.text[piece.past :]]])
        rows = [_positions(piece, marks) for piece in pieces]
        self.contexts = [context for _, context in rows]
        self.positions = torch.cat([positions for positions, _ in rows], dim=-1)[None]
        self.has_contexts = marks is not None
        self._slots: dict[int | None, list[Tensor | slice]] = {}  # window -> those of each text

    @cached_property
    def new_slots(self) -> Tensor:
        """Where the keys and values of the new tokens go, [T]."""
        return torch.cat([piece.slots[piece.prefix + piece.past :] for piece in self.pieces])

    def window(self, mask: Tensor | None) -> int | None:
        """How many tokens a layer with this mask sees. Raises ValueError for a mask that is of no known kind."""
        note: MaskNote | None = getattr(mask, "qgraft_note", None)
        if (note is None) != self.has_contexts:
            raise ValueError(f"{CACHED}: a mask of a kind of its own")
        if note is None:
            return None
        if self.trial:
            note.window(torch.tensor([0, max(self.bounds[-1], (note.local_size or 0) + 2)]))
        return note.local_size

    def read(self, layer: int, index: int, window: int | None) -> tuple[Tensor, Tensor]:
        """The keys [G, K, D] and values [G, K, E] that a layer reads of a text: of one new token, those that it sees."""
        if window not in self._slots:
            self._slots[window] = as_slices(
                [_seen_by_last(piece, window) if piece.new == 1 else piece.slots for piece in self.pieces]
            )
        return self.memory.take(layer, self._slots[window][index])


def _positions(piece: Piece, marks: Any) -> tuple[Tensor, int]:
    """(positions of the new tokens, [n], or [2, n] in a prefix language model; how many tokens its context is)."""
    if marks is None:
        return torch.arange(piece.past, len(piece.text)) + piece.shift, 0
    rows_2T = context_positions(torch.tensor([list(piece.text)]), marks)[0]
    context = int((rows_2T[1] == 0).sum())
    if 0 < piece.past < context or len(piece.text) < context:
        raise ValueError("the context of a prefix language model goes through in one pass: each token sees all of it")
    return rows_2T[:, piece.past :], context


def _seen_by_last(piece: Piece, window: int | None) -> Tensor:
    """The slots that the last token of a text sees."""
    if window is None or len(piece.text) <= window:
        return piece.slots
    recent = piece.slots[-window:]
    return torch.cat([piece.slots[: piece.prefix], recent]) if piece.prefix else recent


def attend_cached(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key [1, G, T, D], value [1, G, T, E] of the new tokens -> [1, T, H, E].

    Raises ValueError for what this implementation does not compute: other masks, arguments that it does not know.
    """
    unknown = unknown_arguments(kwargs)
    texts = _TEXTS.get()
    if texts is None or unknown or dropout:
        raise ValueError(f"{CACHED} is for next_logits, without dropout and {', '.join(unknown) or 'other arguments'}")
    layer: Any = module.layer_idx
    window = texts.window(attention_mask)
    texts.memory.put(layer, texts.new_slots, key[0], value[0])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out_THE = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    for index, piece in enumerate(texts.pieces):
        rows = slice(texts.bounds[index], texts.bounds[index + 1])
        q_1HnD, kv = query[:, :, rows], texts.read(layer, index, window)
        if piece.new == 1:
            out_THE[rows] = _attend_one(q_1HnD[0, :, 0], *kv, scale, softcap)
        else:
            visible = _visible(piece, window, texts.contexts[index])
            out_THE[rows] = _attend_piece(q_1HnD, *kv, visible, scale, softcap)
    return out_THE[None], None


def _attend_one(q_HD: Tensor, k_GKD: Tensor, v_GKE: Tensor, scale: float, cap: float | None) -> Tensor:
    """[1, H, E]: the query of one token, which sees all of these keys. The heads that share keys are queries of one head."""
    q_GhD = q_HD.unflatten(0, (len(k_GKD), -1))
    if cap is None:
        mixed_GhE = F.scaled_dot_product_attention(q_GhD[None], k_GKD[None], v_GKE[None], scale=scale)[0]
    else:
        scores_GhK = torch.tanh((q_GhD @ k_GKD.mT).float() * scale / cap) * cap
        mixed_GhE = scores_GhK.softmax(-1).to(v_GKE.dtype) @ v_GKE
    return mixed_GhE.flatten(0, 1)[None]


def _attend_piece(
    query_1HnD: Tensor, k_GKD: Tensor, v_GKE: Tensor, visible_nK: Tensor | None, scale: float, cap: float | None
) -> Tensor:
    """[n, H, E]: several queries of one text; causal where it is not said what is visible."""
    if cap is not None:
        n, keys = query_1HnD.shape[2], k_GKD.shape[1]
        mask = torch.ones(n, keys, dtype=torch.bool, device=k_GKD.device).tril() if visible_nK is None else visible_nK
        return attend_capped(query_1HnD, k_GKD[None], v_GKE[None], mask[None, None], cap, scaling=scale)[0]
    grouped = query_1HnD.shape[1] != k_GKD.shape[0]
    out = F.scaled_dot_product_attention(
        query_1HnD, k_GKD[None], v_GKE[None], attn_mask=visible_nK, is_causal=visible_nK is None, scale=scale,
        enable_gqa=grouped,
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _visible(piece: Piece, window: int | None, context: int) -> Tensor | None:
    """Which keys each new token sees, [n, K] bool; None where all from the beginning are new, and it is causal."""
    past, length = piece.past, len(piece.text)
    narrow = window if window is not None and length > window else None
    if not (past or piece.prefix or narrow or context > past):
        return None
    at_n = torch.arange(past, length, device=piece.slots.device)[:, None]
    of_K = torch.arange(-piece.prefix, length, device=piece.slots.device)
    visible = of_K <= at_n
    if narrow is not None:
        visible &= (at_n - of_K < narrow) | (of_K < 0)
    if context > past:
        visible |= (at_n < context) & (of_K < context)
    return visible


def takes_texts(model: PreTrainedModel) -> bool:
    """Whether positions may be told to the decoder; without them all texts of a row would be one."""
    return "position_ids" in argument_names(decoder_of(model))


AttentionInterface.register(CACHED, attend_cached)
AttentionMaskInterface.register(CACHED, note_mask)
