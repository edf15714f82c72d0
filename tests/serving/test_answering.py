"""Answers end where turns end, and at the end of the model's context; nothing of the end is seen or remembered."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import qgraft
from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.cli import main as cli
from qgraft.cli.chat import WordPrinter
from qgraft.data.tokenizing import encode_prompt
from qgraft.errors import CheckpointError, DataError
from qgraft.serving.answering import answer

Maker = Callable[..., Any]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def forced(model: Any, prompt_length: int, ids: list[int]) -> None:
    """Let the model write these ids, whatever it sees, by a bias on its output layer."""

    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        place = min(max(int(seen["tokens"]) - prompt_length, 0), len(ids) - 1)
        return torch.nn.functional.one_hot(torch.tensor(ids[place]), output.shape[-1]) * 1e4 + output * 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else args[0]
        new = given.shape[1]
        seen["tokens"] = new if new > 1 else seen["tokens"] + 1

    seen = {"tokens": 0}
    model.register_forward_pre_hook(count, with_kwargs=True)
    model.get_output_embeddings().register_forward_hook(hook)


@pytest.fixture
def talker(make_gguf: Maker, tmp_path: Path) -> Any:
    """A model whose file names <|endoftext|> as its end, and whose template ends turns with a user-defined <|im_end|>."""
    plain = make_gguf(tmp_path / "plain.gguf", "llama")
    found = read_gguf(plain.path).metadata
    tokens, kinds = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    renamed = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *tokens[3:]]
    metadata = {
        "tokenizer.ggml.tokens": renamed, "tokenizer.ggml.token_type": [3, 4, 4, *kinds[3:]],
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.bos_token_id": 0, "tokenizer.chat_template": CHATML,
    }  # fmt: skip
    tiny = make_gguf(tmp_path / "talker.gguf", "llama", metadata=metadata)
    return qgraft.load(str(tiny.path), device="cpu")


def test_the_end_of_a_turn_ends_it_and_is_not_seen(talker: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = talker
    assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == ["<|endoftext|>", "<|im_end|>"]
    turns = [("user", "hello world")]
    said = tokenizer("hello the world", add_special_tokens=False)["input_ids"]
    forced(model, len(encode_prompt(tokenizer, turns)), [*said, 2, *said])
    got = answer(model, tokenizer, turns, max_new_tokens=40, streaming=WordPrinter, do_sample=False)
    assert (got.text, got.note) == ("hello the world", "")
    assert capsys.readouterr().out == "hello the world\n"


def test_a_full_context_is_said(make_gguf: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for architecture, size in (("llama", "max_position_embeddings"), ("gpt2", "n_positions")):
        tiny = make_gguf(tmp_path / f"{architecture}.gguf", architecture, config={size: 32})
        model, tokenizer = qgraft.load(str(tiny.path), device="cpu")
        forced(model, 0, [5])
        turns = [("user", "hello")]
        length = len(encode_prompt(tokenizer, turns))
        assert length < 30
        full = answer(model, tokenizer, turns, max_new_tokens=100, do_sample=False)
        assert full.note == "the answer stops here: with it the model's context of 32 tokens is full"
        exact = answer(model, tokenizer, turns, max_new_tokens=32 - length, do_sample=False)
        assert exact.text == full.text and exact.note == ""  # it was asked for no more
        with pytest.raises(DataError, match=r"the prompt is \d+ tokens, and the model's context is 32 with the answer"):
            answer(model, tokenizer, [("user", "hello world " * 30)])
        words = ["chat", "--model", str(tiny.path), "--device", "cpu", "--prompt"]
        capsys.readouterr()
        assert cli.main([*words, "hello world " * 30]) == 2
        assert "error: the prompt is" in capsys.readouterr().err
        assert cli.main([*words, "hello", "--max_new_tokens", "100"]) == 0


def test_a_folder_says_it_in_generation_config(tiny_gguf: Maker, tmp_path: Path) -> None:
    model, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    made = AutoModelForCausalLM.from_config(model.config)
    made.generation_config = GenerationConfig(eos_token_id=[2, 7, 9])
    made.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    assert qgraft.load(str(tmp_path / "folder"), device="cpu")[0].generation_config.eos_token_id[:3] == [2, 7, 9]
    path = tmp_path / "folder" / "generation_config.json"
    for wrong in ("two", [2, -1], [True]):
        path.write_text(json.dumps({"eos_token_id": wrong}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"eos_token_id: got .*, expected ids of tokens"):
            qgraft.load(str(tmp_path / "folder"), device="cpu")
