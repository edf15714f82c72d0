"""Whether texts can share the passes of a model (batched.py), or go on one by one (own_passes.py): its own forward pass says.

Three made-up texts go through in pieces, as requests of a server do: prompts whole and in parts, single tokens, together
with others. After every piece the logits must be those of the model's own forward pass over that text alone. What texts so
short cannot show is asked: of a mask's note how far back it sees, of the modules whether rotations go by the longest text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.adapters.base import selection_of
from qgraft.attention import attending, attention_of
from qgraft.compat import counts_chunks_over_samples
from qgraft.errors import UnsupportedError
from qgraft.linear import computing
from qgraft.model_parts import computed_dtype, context_of, decoder_of, has_decoder, mixes_neighbours
from qgraft.passes.batched import CACHED, Piece, next_logits, takes_texts
from qgraft.passes.decoder import EXACT, ROUNDED, evaluating
from qgraft.passes.key_values import BLOCK, KeyValues, slots_of
from qgraft.passes.own_passes import OwnPasses
from qgraft.rotary import by_length

LENGTHS, CONTEXT = (21, 13, 7), 4  # of the texts, and of what a prefix language model reads in both directions
_PASSES = (  # which pieces go through together: (text, up to which token)
    ((0, 5),),
    ((0, 18), (1, 5)),
    ((0, 19), (1, 12), (2, 5)),
    ((0, 20), (1, 13), (2, 6)),
    ((0, 21), (2, 7)),
)
_BLOCKS = ([3, 1], [0], [2])
# Models of transformers that keep what they know of a text in their modules, so that two texts would mix.
_KEEP_STATE = {"moshi", "recurrent_gemma", "reformer", "rwkv"}
_Passes = Callable[[dict[int, Piece]], Tensor]  # number of a text -> its piece


def why_not_batched(model: PreTrainedModel) -> str | None:
    """Why texts cannot share passes of this model, or None."""
    name = type(model).__name__
    if not has_decoder(model) or not takes_texts(model):
        return f"{name} has no decoder that is told positions"
    if mixes_neighbours(model):
        return f"{name} keeps a state instead of keys and values"
    if counts_chunks_over_samples(model.config):
        return f"{name}: this release of transformers counts chunks of attention over all texts of a pass"
    if by_length(model):
        return f"{name}: rotations depend on the longest text of a pass"
    memory = KeyValues((max(map(max, _BLOCKS)) + 1) * BLOCK)

    def together(pieces: dict[int, Piece]) -> Tensor:
        alone = len(pieces) == 1  # several are told apart by the mask, too, which says nothing of longer texts then
        return next_logits(model, memory, list(pieces.values()), trial=alone)

    return _differs(model, together, CACHED)


def why_not_own(model: PreTrainedModel) -> str | None:
    """Why texts cannot go on by the model's own passes with a cache each, or None."""
    if getattr(model.config, "model_type", None) in _KEEP_STATE:
        return f"{type(model).__name__} keeps what it knows of a text in its modules"
    own = [OwnPasses(model) for _ in LENGTHS]

    def by_turns(pieces: dict[int, Piece]) -> Tensor:
        return torch.stack([own[text].next_logits(piece.text, {}) for text, piece in pieces.items()])

    return _differs(model, by_turns, attention_of(model))


def _differs(model: PreTrainedModel, passes: _Passes, attention: str) -> str | None:
    """What is wrong with these passes of the texts' pieces, in a sentence, or None."""
    name = type(model).__name__
    try:
        with torch.inference_mode(), evaluating(model), computing(model, "float32"):
            texts = _texts(model)
            expected = [_own_logits(model, text) for text in texts]
            with attending(model, attention):
                off = _furthest_off(model, texts, expected, passes)
    except (torch.OutOfMemoryError, torch.AcceleratorError, RecursionError):
        raise  # RuntimeErrors that say nothing about the model
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, UnsupportedError) as error:
        return f"{name}: {str(error).partition(chr(10))[0][:200]}"
    allowed = EXACT if computed_dtype(model) == torch.float32 else ROUNDED
    return None if off <= allowed else f"{name}: texts come out otherwise in pieces, off by {off:.2g}"


def _furthest_off(
    model: PreTrainedModel, texts: Sequence[list[int]], expected: Sequence[Tensor], passes: _Passes
) -> float:
    """How far logits are off, relative to the largest of the text's."""
    worst, past = 0.0, [0] * len(texts)
    for row in _PASSES:
        pieces = {}
        for text, stop in row:
            ids = texts[text][:stop]
            if len(ids) > past[text]:
                pieces[text] = Piece(ids, past[text], slots_of(_BLOCKS[text], len(ids), model.device))
                past[text] = len(ids)
        for (text, piece), got_V in zip(pieces.items(), passes(pieces) if pieces else (), strict=True):
            own_TV = expected[text]
            off = (got_V.float() - own_TV[len(piece.text) - 1]).abs().max() / own_TV.abs().max().clamp(min=1e-3)
            worst = max(worst, float(off) if off.isfinite() else float("inf"))
    return worst


def _own_logits(model: PreTrainedModel, text: list[int]) -> Tensor:
    """The logits [T, vocabulary] of a whole text, as anybody would call the model."""
    with selection_of(model).within(None, weights={}):
        output: Any = model(input_ids=torch.tensor([text], device=model.device), use_cache=False)
    logits: Tensor = output.logits[0].float()
    return logits


def _texts(model: PreTrainedModel) -> list[list[int]]:
    """Texts of random tokens, and of a prefix language model with the ends of their contexts."""
    longest = min(context_of(model) or LENGTHS[0], LENGTHS[0])
    marks = getattr(decoder_of(model), "marks", None)
    table: Any = model.get_input_embeddings()
    size = int(table.weight.shape[0])
    draw = torch.Generator().manual_seed(0)
    texts = []
    for length in LENGTHS:
        ids = torch.randint(min(4, size - 1), size, (min(length, longest),), generator=draw).tolist()
        if marks is not None:
            ids = [0 if token in (marks.sop, marks.gmask, marks.mask) else token for token in ids]
            ids[CONTEXT - 1 : CONTEXT + 1] = [marks.gmask, marks.sop]
        texts.append(ids)
    return texts
