"""Tokens that a model's files rule out are in no answer: those of transformers' generate(), and of llama.cpp for a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import qgraft
from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_model import SUPPRESSED
from qgraft.errors import CheckpointError
from qgraft.passes.rollouts import Asked, Rollouts
from qgraft.serving.engine import Engine, answer_all
from qgraft.serving.requests import Request
from qgraft.serving.sampling import Sampling

Maker = Callable[..., Any]
PROMPT, COUNT = [20, 30, 25, 33], 8


def greedy(model: Any) -> list[int]:
    """Ids, whatever ends a text."""
    with torch.no_grad():
        ids = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=COUNT, eos_token_id=None)
    return ids[0, len(PROMPT) :].tolist()


def served(model: Any, tokenizer: Any) -> list[int]:
    engine = Engine(model, tokenizer)
    request = Request(tuple(PROMPT), {}, Sampling(temperature=0), max_tokens=COUNT, ignore_ends=True)
    (answer,) = answer_all(engine, [request])
    engine.stop()
    return [token.id for token in answer["tokens"]]


def drawn(model: Any) -> list[int]:
    rollouts = Rollouts(model, ends=[], width=model.config.vocab_size, tokens=64, temperature=0)
    return rollouts.answers([Asked(PROMPT, COUNT, seed=0)])[0]


def test_they_are_in_no_answer(tiny_gguf: Maker, tmp_path: Path) -> None:
    tiny = tiny_gguf("llama")
    plain, tokenizer = qgraft.load(tiny.path)
    first = greedy(plain)
    never = [*dict.fromkeys(first)][:3]
    tiny.model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    GenerationConfig(suppress_tokens=never).save_pretrained(tmp_path / "folder")
    oracle = greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32))
    assert oracle != first and not {*never} & {*oracle}
    model, tokenizer = qgraft.load(tmp_path / "folder")
    assert greedy(model) == served(model, tokenizer) == drawn(model) == oracle
    qgraft.save(model, tmp_path / "new.gguf")
    assert read_gguf(tmp_path / "new.gguf").metadata[SUPPRESSED] == never
    assert greedy(qgraft.load(tmp_path / "new.gguf")[0]) == oracle


@pytest.mark.spread(1)
@pytest.mark.parametrize("odd", [[-1], 7, "7", [1 << 20], [0.5]])
def test_what_cannot_be_is_refused(tiny_gguf: Maker, tmp_path: Path, odd: Any) -> None:
    path = tiny_gguf("llama", metadata={SUPPRESSED: odd}).path
    with pytest.raises(CheckpointError, match=r"suppress_tokens: got .*, expected ids below"):
        qgraft.load(path)


@pytest.mark.spread(1)
@pytest.mark.parametrize("odd", [[-1], "7", [0.5]])
def test_what_cannot_be_in_a_folder(tiny_gguf: Maker, tmp_path: Path, odd: Any) -> None:
    tiny_gguf("llama").model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"suppress_tokens": odd}))
    with pytest.raises(CheckpointError, match=r"suppress_tokens: got .*, expected ids of tokens"):
        qgraft.load(tmp_path)
