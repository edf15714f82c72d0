"""What tests of decoding in C share: tokens one by one through a model, and which of them C decoded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qgraft.compat import CACHE
from qgraft.kernels.cpu import decode


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The positions of all tokens that were decoded in C within the block."""
    steps: list[int] = []
    step = decode.step

    def count(*args: Any) -> None:
        steps.append(args[2][0].seen - 1)
        step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "step", count)
        yield steps


def logits(model: Any, ids: torch.Tensor, prompt: int = 5, cache: DynamicCache | None = None) -> torch.Tensor:
    """Of the prompt's last token and of all that follow it, decoded one by one: [tokens, vocabulary]."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.inference_mode():
        rows = [model(ids[:, :prompt], **{CACHE: cache}, use_cache=True).logits[0, -1]]
        for t in range(prompt, ids.shape[1]):
            mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
            rows.append(model(ids[:, t : t + 1], attention_mask=mask, **{CACHE: cache}, use_cache=True).logits[0, -1])
    return torch.stack(rows)


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
