"""Which tokens of a vocabulary can come next in an answer that must be an object: all of them at once, by their texts.

To ask of one token after another would take a pass over the vocabulary for a model that has nothing to say in JSON, while
everybody else waits. So tokens are grouped by the first character of their text once; a state (json_text.py) lets some of
these characters through, and with them some groups. What is left is asked one by one, exactly, in its place in the answer.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from qgraft.serving.json_text import JsonText

_PARTLY = "\ufffd"  # of a character: what it becomes depends on what comes before


class JsonTokens:
    """The texts of a vocabulary's tokens.

    Args:
        texts: of each token alone; "" for what is no text.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        numbers = {first: number for number, first in enumerate(dict.fromkeys(text[:1] for text in texts))}
        self._firsts = list(numbers)
        self._first_V = torch.tensor([numbers[text[:1]] for text in texts])
        self.beginning = lru_cache(maxsize=256)(self._beginning)

    def _beginning(self, state: JsonText) -> Tensor:
        """The tokens [vocabulary] whose first character may come next, bool."""
        may = [
            state.in_string if first == _PARTLY else bool(first) and state.after(first) is not None
            for first in self._firsts
        ]
        return torch.tensor(may)[self._first_V]

    def whole(self, state: JsonText) -> Tensor:
        """The tokens whose whole text may."""
        may_V = self.beginning(state).clone()
        for token in may_V.nonzero()[:, 0].tolist():
            text = self.texts[token].rstrip(_PARTLY)
            may_V[token] = not text or state.after(text) is not None
        return may_V
