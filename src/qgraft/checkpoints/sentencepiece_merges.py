"""The merges of a sentencepiece vocabulary, which holds scores instead: what `tokenizers` needs to give sentencepiece's ids.

sentencepiece, and llama.cpp after it, joins at each step the two neighbours whose text together is the token with the
highest score, of several places the leftmost. `tokenizers` takes a list of pairs and joins the one that stands first in it.
So a token's pairs (all ways to cut it into two tokens) go into the list by the token's score, and the two agree as long as
no two pairs with the same score can lie over each other:

    x y z    x+y and y+z are tokens of one score: sentencepiece takes x+y, the leftmost

Such pairs are put into the list in that order. Where that cannot be (x+y before y+z, and in other texts y+z before x+y),
the vocabulary is refused: so it is without scores, when all are equal. Only a token of one character or word repeated, as
a run of blanks, may be cut both ways; there the longer part is put first, which is what leftmost joining leaves over.
"""

from collections.abc import Container, Iterator, Sequence
from itertools import groupby

from qgraft.checkpoints.gguf_vocabulary import BYTE, CUT_OUT, Vocabulary
from qgraft.errors import UnsupportedError

Pair = tuple[str, str]
MOST_TIED = 2000  # pairs of one score; vocabularies of the field have a dozen


def merges_by_score(vocabulary: Vocabulary, scores: Sequence[float]) -> list[Pair]:
    """All pairs of tokens that are a token together, the highest score first.

    Raises UnsupportedError where the order of pairs cannot say what the scores say.
    """
    tokens, kinds = vocabulary.tokens, vocabulary.kinds
    order = sorted((number for number in range(len(tokens)) if len(tokens[number]) > 1), key=scores.__getitem__, reverse=True)
    merges: list[Pair] = []
    for _, numbers in groupby(order, key=scores.__getitem__):
        pairs = [list(_cuts(tokens[number], vocabulary.ids)) for number in numbers if _can_be_made(tokens[number], kinds[number])]
        pairs = [cuts for cuts in pairs if cuts]
        for cuts in pairs: merges += cuts
    return merges


def _can_be_made(token: str, kind: int) -> bool:
    """Whether merging can lead to it: blanks are low lines by then, and what is cut out of a text is no longer there."""
    return " " not in token and kind != BYTE and (kind not in CUT_OUT or "▁" in token)


def _cuts(token: str, known: Container[str]) -> Iterator[Pair]:
    """The longer first part first."""
    for at in range(len(token) - 1, 0, -1):
        if (left := token[:at]) in known and (right := token[at:]) in known:
            yield left, right
