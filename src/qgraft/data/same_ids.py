"""Whether two tokenizers make the same ids of the same texts: what one model says of ids means nothing to another else.

Vocabularies are compared token by token. A GGUF names the rows of its embedding that no token has [PAD123]; such names, and
how many rows there are, differ between models of one family, and say nothing.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qgraft.data.templates import tokenizers_own
from qgraft.data.tokenizing import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNUSED = re.compile(r"\[PAD\d+\]")
SHOWN = 3  # of differences


def vocabulary_problem(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> str | None:
    """The first ids that mean other tokens, in words; None where there are none."""
    first, second = (_tokens(each) for each in (one, other))
    differ = [number for number in sorted({*first, *second}) if first.get(number) != second.get(number)]
    if not differ:
        return None
    shown = ", ".join(f"{n} is {_word(first.get(n))} and {_word(second.get(n))}" for n in differ[:SHOWN])
    return f"{len(differ)} of {len({*first, *second})} ids mean other tokens: {shown}"


def are_one(one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase") -> bool:
    """Whether they are known to be the same, template and all; else the ids of texts must be compared."""
    texts = [getattr(each, "backend_tokenizer", None) for each in (one, other)]
    if None in texts or texts[0].to_str() != texts[1].to_str():  # type: ignore[union-attr]
        return False
    specials = [(each.bos_token_id, each.eos_token_id, getattr(each, "add_bos_token", None)) for each in (one, other)]
    return specials[0] == specials[1] and tokenizers_own(one) == tokenizers_own(other)


def sample_problem(one: Sequence[Sample], other: Sequence[Sample], tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Where the samples of the same rows, by one tokenizer and by another, first differ; None where they do not."""
    for sample, again in zip(one, other, strict=False):
        if sample.source != again.source:
            return f"{sample.source} gives a sample to one of them alone"
        ids, others = sample.input_ids, again.input_ids
        if ids != others or sample.labels != again.labels:
            at = next((n for n, pair in enumerate(zip(ids, others, strict=False)) if pair[0] != pair[1]), None)
            if at is None:
                return f"{sample.source} has {len(ids)} and {len(others)} tokens, or others of them are learned"
            words = (_word(tokenizer.convert_ids_to_tokens(each[at])) for each in (ids, others))
            return f"{sample.source}, token {at}: " + " and ".join(words)
    return None if len(one) == len(other) else f"{len(one)} and {len(other)} samples of the same rows"


def _tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items() if not _UNUSED.fullmatch(token)}


def _word(token: object) -> str:
    return "no token" if token is None else repr(token)
