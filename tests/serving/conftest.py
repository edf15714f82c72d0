"""A tiny model to talk to."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qgraft

sys.path.insert(0, str(Path(__file__).parent))

from talkers import with_adapters

Maker = Callable[..., Any]


@pytest.fixture
def talker(tiny_gguf: Maker) -> Any:
    """(model, tokenizer) of a tiny Llama with adapters."""
    model, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    return with_adapters(model), tokenizer
