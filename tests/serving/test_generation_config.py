"""What generation_config.json says of answers: rules that generate() goes by hold in served ones, draws are a default."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import qgraft
from qgraft.adapters.base import base_of
from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.errors import CheckpointError, OptionError
from qgraft.passes.rollouts import Asked, Rollouts
from qgraft.serving.catalogue import Catalogue
from qgraft.serving.engine import Engine, answer_all
from qgraft.serving.protocol import read_chat, read_completion
from qgraft.serving.requests import Request
from qgraft.serving.sampling import Sampling
from qgraft.serving.service import Service

Maker = Callable[..., Any]
PROMPT, COUNT = [20, 30, 25, 33], 10
RULES: list[dict[str, Any]] = [
    {"begin_suppress_tokens": "first"}, {"bad_words_ids": "pairs"}, {"sequence_bias": "biased"},
    {"no_repeat_ngram_size": 1}, {"min_new_tokens": 6}, {"min_length": 9}, {"forced_eos_token_id": 7},
    {"forced_bos_token_id": 9}, {"exponential_decay_length_penalty": [2, 1.9]},
]  # fmt: skip


@pytest.fixture
def folder(tiny_gguf: Maker, tmp_path: Path) -> Callable[[dict[str, Any]], tuple[Path, list[int]]]:
    """(a folder whose generation_config.json says this, what generate() answers without it)."""
    tiny = tiny_gguf("llama")
    plain, tokenizer = qgraft.load(tiny.path)
    tiny.model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    with torch.no_grad():
        first = plain.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=COUNT, eos_token_id=None)

    def make(said: dict[str, Any]) -> tuple[Path, list[int]]:
        (tmp_path / "folder" / "generation_config.json").write_text(json.dumps(said))
        return tmp_path / "folder", first[0, len(PROMPT) :].tolist()

    return make


def drawn(model: Any, tokenizer: Any, count: int = COUNT) -> tuple[list[int], list[int]]:
    """Ids of an answer, served and drawn in training; the end token is not one of the former."""
    engine = Engine(model, tokenizer)
    (answer,) = answer_all(engine, [Request(tuple(PROMPT), {}, Sampling(temperature=0), max_tokens=count)])
    engine.stop()
    rollouts = Rollouts(model, ends=sorted(engine.ends), width=model.config.vocab_size, tokens=64, temperature=0)
    return [token.id for token in answer["tokens"]], rollouts.answers([Asked(PROMPT, count, seed=0)])[0]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))
def test_rules_hold(folder: Any, rule: dict[str, Any]) -> None:
    (key, value), (_, plain) = *rule.items(), folder({})
    own = {"first": plain[:1], "pairs": [plain[:2], plain[5:6]], "biased": [[plain[1:3], -30.0], [[40], 2.0]]}
    late = key in ("min_new_tokens", "min_length")
    end = plain[0] if late else next(token for token in range(40, 60) if token not in plain)
    path, _ = folder({key: own.get(value, value) if isinstance(value, str) else value, "eos_token_id": end})
    model, tokenizer = qgraft.load(path)
    ends = model.generation_config.eos_token_id
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        ids = oracle.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=COUNT, eos_token_id=ends)
        own_ids = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=COUNT)
    right = ids[0, len(PROMPT) :].tolist()
    served, rolled = drawn(model, tokenizer)
    assert own_ids[0, len(PROMPT) :].tolist() == rolled == right
    assert served == (right[:-1] if right[-1] in ends else right)
    if key != "forced_bos_token_id":  # which is of prompts of one token alone
        assert right != (plain[:1] if late else plain)


def test_what_is_not_gone_by_is_noted_and_what_is_none_refused(folder: Any) -> None:
    harmless = {"num_beams": 1, "typical_p": 1.0, "max_length": 99, "do_sample": True, "pad_token_id": 0}
    notes = base_of(qgraft.load(folder(harmless)[0])[0]).info.notes
    assert not any("generation_config" in note for note in notes)
    notes = base_of(qgraft.load(folder({**harmless, "num_beams": 4, "typical_p": 0.9})[0])[0]).info.notes
    assert "generation_config.json: num_beams=4, typical_p=0.9: no answer goes by this here" in notes
    for odd in (
        {"bad_words_ids": [[-1]]},
        {"begin_suppress_tokens": 5},
        {"sequence_bias": "x"},
        {"temperature": "hot"},
    ):
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            qgraft.load(folder(odd)[0])


def test_draws_are_what_a_server_does_for_who_says_nothing(folder: Any, tmp_path: Path) -> None:
    said = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    model, tokenizer = qgraft.load(folder(said)[0])
    qgraft.save(model, tmp_path / "new.gguf")
    keys = read_gguf(tmp_path / "new.gguf").metadata
    assert keys["general.sampling.top_k"] == 20 and keys["general.sampling.temp"] == pytest.approx(0.7)
    engine = Engine(model, tokenizer)
    for info in (base_of(model).info, base_of(qgraft.load(tmp_path / "new.gguf")[0]).info):
        assert info.sampling == {key: said[key] for key in said if key != "do_sample"}
        service = Service(engine, Catalogue(engine, "base", None, 2), drawn=info.sampling)
        asked = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
        found = service.settled(read_chat({**asked, "top_p": 0.5, "temperature": 0})).sampling
        assert (found.temperature, found.top_p, found.top_k, found.repetition_penalty) == (0, 0.5, 20, 1.05)
        named = service.settled(read_completion({"model": "base", "prompt": "x", "repeat_penalty": 1.2})).sampling
        assert (named.repetition_penalty, named.temperature) == (1.2, 0.7)
    assert Service(engine, Catalogue(engine, "base", None, 2)).settled(read_chat(asked)).sampling == Sampling()
    with pytest.raises(OptionError, match="temperature=-1"):
        Service(engine, Catalogue(engine, "base", None, 2), drawn={"temperature": -1})
    engine.stop()
