"""The merges of a sentencepiece vocabulary, which holds scores instead: what `tokenizers` needs to give sentencepiece's ids.

sentencepiece, and llama.cpp after it, joins at each step the two neighbours whose texts together are the token with the
highest score, of several places the leftmost. `tokenizers` takes a list of pairs and joins the one that stands first in it.
Most tokens can be cut in several ways (▁the: ▁ + the, ▁t + he, ▁th + e), but only one of them ever leads to the token:

    What is joined within a stretch of text that becomes one token has never been joined with anything around it. So it went
    as if the stretch stood alone: the last pair is the one that the token's own text ends in.

One pair for each token, ordered by the tokens' scores, is therefore exact, and half as long as the list of all pairs (for
262,144 pieces 255,000 instead of 513,000). Which pair it is, is found without joining letters, for tokens from short to
long: l + r is the last pair where nothing across the border of l and r would have been joined before l and r were complete.
That is asked at each step back, always undoing the younger of the two neighbours:

    ▁th e  ->  ▁t h | e     "he" has a better score than ▁th, so h would have gone with e: not ▁th + e

That needs tokens whose parts all have better scores than they have, as training makes them. What is otherwise is joined
letter by letter (`_last_pair`). The work is done on arrays: Python takes seconds for the largest vocabularies.

Two different tokens with the same score have no order in sentencepiece: the leftmost is joined. Their pairs are put so that
this holds where two of them lie over each other. Where that cannot be, the vocabulary is refused: so it is without scores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from qgraft.checkpoints.gguf_vocabulary import BYTE, CUT_OUT, Vocabulary
from qgraft.errors import UnsupportedError

Pair = tuple[str, str]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Finder = Callable[[Hashes], tuple[NDArray[np.bool_], Ints]]
_LOW_LINE = "\u2581"
MOST_TIED = 2048  # tokens of one score
MOST_CHARACTERS = 1 << 24  # of all tokens; the largest vocabularies have a tenth of it
MOST_STEPS = 1 << 21  # of joining letter by letter, for all tokens that need it: some seconds; Gemma needs 447
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64


@dataclass(frozen=True)
class _Pieces:
    """The tokens that merging can make, and behind them the characters that they are made of.

    Attributes:
        texts, scores: of both; a character's score is infinite: it is there from the beginning.
        tokens: how many of them are tokens of more than one character.
        whole, left, right: [pairs] each way to cut a token into two pieces, as indexes; the shortest tokens first.
        ends: [longest + 1] where the pairs of tokens of that length end.
        find: says of hashes of (left, right) which are pairs, and where.
    """

    texts: list[str]
    scores: NDArray[np.float64]
    tokens: int
    whole: Ints
    left: Ints
    right: Ints
    ends: Ints
    find: Finder

    def joined(self, left: Ints, right: Ints) -> NDArray[np.float64]:
        """The score of what `left` and `right` are together, -inf where that is no token."""
        found, at = self.find(_mixed(left * len(self.texts) + right))
        return np.where(found, self.scores[self.whole[at]], -np.inf)


def merges_by_score(vocabulary: Vocabulary, scores: Sequence[float]) -> list[Pair]:
    """The pairs that tokens are joined of, the best score first.

    Raises UnsupportedError where the order of a list cannot say what the scores say.
    """
    pieces = _pieces(vocabulary, scores)
    last = _last_pairs(vocabulary, pieces)
    made = np.flatnonzero(last >= 0)
    made = made[np.argsort(-pieces.scores[made], kind="stable")]
    left, right = pieces.left[last[made]], pieces.right[last[made]]
    _check_letters(vocabulary, pieces, made, left, right)
    _put_ties_in_order(vocabulary, pieces, made, left, right)
    text = pieces.texts.__getitem__
    return list(zip(map(text, left.tolist()), map(text, right.tolist()), strict=True))


def _pieces(vocabulary: Vocabulary, scores: Sequence[float]) -> _Pieces:
    # Blanks are low lines by then, and what is cut out of a text is no longer there, but where a low line was a blank.
    numbers = [
        number
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if len(token) > 1 and (kind not in CUT_OUT or _LOW_LINE in token) and kind != BYTE and " " not in token
    ]
    tokens = [vocabulary.tokens[number] for number in numbers]
    text = "".join(tokens)
    if len(text) > MOST_CHARACTERS:
        raise UnsupportedError(f"{vocabulary.path}: tokenizer.ggml.tokens: got {len(text)} characters, expected at most "
                               f"{MOST_CHARACTERS}")  # fmt: skip
    letters = sorted(set(text))
    values = np.fromiter((scores[number] for number in numbers), np.float64, len(numbers))
    values = np.concatenate([values, np.full(len(letters), np.inf)])
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    whole, left, right = _cuts(np.frombuffer(text.encode("utf-32-le"), np.uint32), lengths, "".join(letters))
    shortest = np.argsort(lengths[whole], kind="stable")
    whole, left, right = whole[shortest], left[shortest], right[shortest]
    ends = np.searchsorted(lengths[whole], np.arange(lengths.max(initial=1) + 1), side="right")
    find = _finder(_mixed(left * (len(tokens) + len(letters)) + right))
    return _Pieces([*tokens, *letters], values, len(tokens), whole, left, right, ends, find)


def _cuts(text: NDArray[np.uint32], lengths: Ints, letters: str) -> tuple[Ints, Ints, Ints]:
    """Which token is cut, and the two pieces, for each cut of each token of `text` into two pieces.

    Pieces are found by a polynomial hash of 64 bits, which is that of any part of the text by two sums.
    """
    base = np.full(len(text) + 1, _BASE, np.uint64)
    base[0] = 1
    powers = np.multiply.accumulate(base)
    base[1:] = pow(_BASE, -1, 1 << 64)
    inverses = np.multiply.accumulate(base)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mixed(text) * powers[:-1], dtype=np.uint64)])
    starts = np.cumsum(lengths) - lengths
    ends = starts + lengths

    def hashes(first: Ints, end: Ints) -> Hashes:
        return (sums[end] - sums[first]) * inverses[first]

    known = np.concatenate([hashes(starts, ends), _mixed(np.frombuffer(letters.encode("utf-32-le"), np.uint32))])
    find = _finder(known)
    whole = np.repeat(np.arange(len(lengths)), lengths - 1)
    at = np.delete(np.arange(len(text)), starts)
    found, left = find(hashes(starts[whole], at))
    whole, at, left = whole[found], at[found], left[found]
    found, right = find(hashes(at, ends[whole]))
    return whole[found], left[found], right[found]


def _finder(known: Hashes) -> Finder:
    """A function that says which of the wanted hashes are known, and where: a table by their last bits.

    What shares those bits with a later one is searched for in a sorted list, which is ten times as slow.
    """
    mask = np.uint64((1 << max(len(known) * 8, 2).bit_length()) - 1)
    slots = (known & mask).astype(np.int64)
    table = np.zeros(int(mask) + 1, np.int64)
    table[slots] = np.arange(len(known))
    hidden = np.flatnonzero(table[slots] != np.arange(len(known)))
    hidden = hidden[np.argsort(known[hidden])]

    def find(wanted: Hashes) -> tuple[NDArray[np.bool_], Ints]:
        at = table[(wanted & mask).astype(np.int64)]
        if len(hidden):
            others = np.flatnonzero(known[at] != wanted)
            place = np.minimum(np.searchsorted(known[hidden], wanted[others]), len(hidden) - 1)
            at[others] = hidden[place]
        return known[at] == wanted, at

    return find


def _mixed(numbers: NDArray[np.uint32] | Ints) -> Hashes:
    """Other numbers, one for each, whose last bits have nothing to do with each other (the finalizer of MurmurHash3)."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(33))


def _last_pairs(vocabulary: Vocabulary, pieces: _Pieces) -> Ints:
    """For each piece which pair it is joined of, -1 where merging never leads to it, or it is a character."""
    last = np.full(len(pieces.texts), -1)
    plain = np.zeros(len(pieces.texts), bool)  # made of parts with better scores only, these as well
    plain[pieces.tokens :] = True
    made = plain.copy()
    known = dict(zip(pieces.texts[: pieces.tokens], pieces.scores.tolist(), strict=False))
    steps = 0
    for start, end in pairwise(pieces.ends.tolist()):
        pairs = np.arange(start, end)
        whole, left, right = pieces.whole[pairs], pieces.left[pairs], pieces.right[pairs]
        possible = made[left] & made[right]
        better = np.minimum(pieces.scores[left], pieces.scores[right]) > pieces.scores[whole]
        easy = np.flatnonzero(possible & better & plain[left] & plain[right])
        easy = easy[_nothing_crosses(pieces, last, left[easy], right[easy])]
        last[whole[easy]] = pairs[easy]
        plain[whole[easy]] = made[whole[easy]] = True
        for piece in np.unique(whole[possible & ~made[whole]]).tolist():
            steps += len(pieces.texts[piece]) ** 2
            if steps > MOST_STEPS:
                got = f"{vocabulary.path}: tokenizer.ggml.scores: too many tokens have parts of worse scores"
                raise UnsupportedError(got, hint="BPE gives a token a worse score than its parts")
            cut = _last_cut(pieces.texts[piece], known)
            of_piece = pairs[(whole == piece) & possible]
            found = [pair for pair in of_piece.tolist() if len(pieces.texts[pieces.left[pair]]) == cut]
            last[piece], made[piece] = (found[0], True) if found else (-1, False)
    return last


def _nothing_crosses(pieces: _Pieces, last: Ints, left: Ints, right: Ints) -> NDArray[np.bool_]:
    """Whether each `left` and `right` become complete side by side: nothing joins a part of one with a part of the other.

    Each round undoes the piece that was joined last, and asks whether its part and the neighbour had a better score.
    """
    holds = np.ones(len(left), bool)
    open_pairs, left, right = np.arange(len(left)), left.copy(), right.copy()
    while True:
        going = (np.minimum(left, right) < pieces.tokens) & holds[open_pairs]
        if not going.any():
            return holds
        open_pairs, left, right = open_pairs[going], left[going], right[going]
        undo_right = pieces.scores[right] <= pieces.scores[left]  # of equal scores the left is joined first
        undone = np.where(undo_right, right, left)
        left = np.where(undo_right, left, pieces.right[last[left]])
        right = np.where(undo_right, pieces.left[last[right]], right)
        crossing, limit = pieces.joined(left, right), pieces.scores[undone]
        holds[open_pairs[(crossing > limit) | ((crossing == limit) & undo_right)]] = False


def _last_cut(text: str, known: Mapping[str, float]) -> int:
    """Where the last two pieces of `text` meet, joined as sentencepiece does; 0 where it does not become one piece."""
    parts = list(text)
    while len(parts) > 2:
        scores = [known.get(a + b, -np.inf) for a, b in pairwise(parts)]
        best = max(scores)
        if best == -np.inf:
            return 0
        at = scores.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return len(parts[0])


def _check_letters(vocabulary: Vocabulary, pieces: _Pieces, made: Ints, left: Ints, right: Ints) -> None:
    """llama.cpp joins characters that are no tokens themselves; `tokenizers` has spelled them in bytes by then."""
    missing = [n for n in range(pieces.tokens, len(pieces.texts)) if pieces.texts[n] not in vocabulary.ids]
    for at in np.flatnonzero(np.isin(left, missing) | np.isin(right, missing))[:1].tolist():
        pair = [pieces.texts[left[at]], pieces.texts[right[at]]]
        raise UnsupportedError(
            f"{vocabulary.path}: token {pieces.texts[made[at]]!r} is joined of {pair[0]!r} and {pair[1]!r}, "
            "expected tokens of the vocabulary"
        )


def _ties(scores: NDArray[np.float64]) -> list[tuple[int, int]]:
    """The stretches of several equal values in `scores`."""
    borders = np.flatnonzero(np.diff(scores) != 0) + 1
    edges = [0, *borders.tolist(), len(scores)]
    return [(start, end) for start, end in pairwise(edges) if end - start > 1]


def _best_uses(pieces: _Pieces) -> NDArray[np.float64]:
    """For each piece the best score of what it is a part of."""
    best = np.full(len(pieces.texts), -np.inf)
    for part in (pieces.left, pieces.right):
        np.maximum.at(best, part, pieces.scores[pieces.whole])
    return best


def _in_order(left: Ints, right: Ints) -> Ints | None:
    """The order of pairs with one score in which the first of two that overlap is the left one; None where none is."""
    follows = {number: np.flatnonzero((right == first) & (np.arange(len(left)) != number)).tolist()
               for number, first in enumerate(left.tolist())}  # fmt: skip
    try:
        return np.array(list(TopologicalSorter(follows).static_order()))
    except CycleError:
        return None


def _put_ties_in_order(vocabulary: Vocabulary, pieces: _Pieces, made: Ints, left: Ints, right: Ints) -> None:
    ties = _ties(pieces.scores[made])
    uses = _best_uses(pieces) if ties else pieces.scores
    for start, end in ties:
        tied, score = made[start:end], pieces.scores[made[start]]
        # What is joined further at once takes neighbours that others of this score were next to: no order holds then.
        possible = end - start <= MOST_TIED and not (uses[tied] >= score).any()
        order = _in_order(left[start:end], right[start:end]) if possible else None
        if order is None:
            some = ", ".join(repr(pieces.texts[number]) for number in tied[:4].tolist())
            raise UnsupportedError(
                f"{vocabulary.path}: tokenizer.ggml.scores: {len(tied)} tokens have the score {score:g} ({some}, ...), "
                "and which is joined first depends on the text",
                hint="BPE gives each token a score of its own; these may be a unigram model's scores, or none",
            )
        for array in (made, left, right):
            array[start:end] = array[start:end][order]
