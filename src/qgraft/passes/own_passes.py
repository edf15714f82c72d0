"""A text that goes on by itself: the model's own forward pass with transformers' cache, as generate() calls it.

For models whose texts cannot share passes (batched.py), and what those are compared with. Each text has its own cache, so
any number of them may go on by turns; single tokens are decoded in C where that is on (decoding.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qgraft.adapters.base import selection_of
from qgraft.compat import CACHE, cache_in


class OwnPasses:
    """The passes of one text.

    Attributes:
        past: how many of the text's tokens have gone through.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.past = model, 0
        self._cache: Any = None
        self._prefixes: dict[str, Tensor] = {}  # what prefixes evaluate to, once for the text

    def next_logits(self, text: Sequence[int], weights: Mapping[str, float]) -> Tensor:
        """The logits [vocabulary] after the text, all ids so far, with these adapters."""
        ids_1T = torch.tensor([list(text)], device=self.model.device)
        model: Any = self.model
        inputs = model.prepare_inputs_for_generation(
            ids_1T,
            next_sequence_length=len(text) - self.past,
            attention_mask=torch.ones_like(ids_1T),
            is_first_iteration=not self.past,
            use_cache=True,
            **{CACHE: self._cache},
        )
        with selection_of(model).within(None, weights=dict(weights), evaluated=self._prefixes):
            output = model(**inputs, return_dict=True)
        self._cache, self.past = cache_in(output), len(text)
        logits: Tensor = output.logits[0, -1]
        return logits
