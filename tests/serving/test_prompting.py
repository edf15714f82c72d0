"""Prompts of requests are made as those of the adapter's training."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("fastapi")

import qgraft
from qgraft.data.messages import Message
from qgraft.serving.prompting import Prompter, Prompting
from qgraft.serving.protocol import Ask
from qgraft.serving.sampling import Sampling


def test_a_text_in_front_of_every_prompt_is_that_of_the_training(tiny_gguf: Callable[..., Any]) -> None:
    _, tokenizer = qgraft.load(tiny_gguf("llama").path, device="cpu")
    prompter, trained = Prompter(tokenizer, Prompting()), {"source_prefix": "say: ", "template": "plain"}

    def ids(text: str, *arguments: dict[str, Any]) -> list[int]:
        return prompter.chat(Ask("m", Sampling(), (Message("user", text),)), arguments)[0]

    plain = {"template": "plain"}
    assert ids("the cat", trained) == ids("say: the cat", plain) != ids("the cat", plain)
    assert ids("the cat", trained, plain) == ids("the cat", plain)  # they do not agree
