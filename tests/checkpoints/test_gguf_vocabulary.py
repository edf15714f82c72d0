"""The kinds of tokens, with llama.cpp's corrections by their texts, against llama.cpp."""

from pathlib import Path
from typing import Any

import pytest
from vocabularies import byte_pairs, llamacpp, sentencepiece, write

from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_tokenizer import gguf_tokenizer
from qgraft.checkpoints.gguf_vocabulary import (
    BYTE,
    CONTROL,
    FILL_IN_TEXTS,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_vocabulary,
)
from qgraft.data.ends import ENDS, end_token_ids
from qgraft.errors import CheckpointError

BITS = {UNKNOWN: 1, UNUSED: 2, NORMAL: 4, CONTROL: 8, USER_DEFINED: 16, BYTE: 32}  # llama.cpp's llama_token_attr
FILL_IN = [text for texts in FILL_IN_TEXTS.values() for text in texts]
ONE_OF_EACH = [texts[0] for texts in FILL_IN_TEXTS.values()]  # of several, llama.cpp takes what a hash table has first
HARMONY = ["<|start|>", "<|message|>", "<|channel|>", "<|constrain|>"]


def vocabulary(tokens: list[str], kind: int, **keys: Any) -> dict[str, Any]:
    plain = byte_pairs("gpt-2", [("a", "b")])
    return {
        **plain,
        "tokens": [*plain["tokens"], *tokens],
        "token_type": [*plain["token_type"], *[kind] * len(tokens)],
        **keys,
    }


CASES = {
    "ends": vocabulary([t for t in ENDS if t not in ("<|endoftext|>", "<|im_end|>", "<|tool_response>")], NORMAL),
    "ends, user-defined": vocabulary(["<|eot_id|>", "<end_of_turn>", "</s>", "<|end|>"], USER_DEFINED),
    "fill-in": vocabulary(ONE_OF_EACH, NORMAL),
    "fill-in with a key": vocabulary(ONE_OF_EACH, NORMAL, fim_pre_token_id=9, suffix_token_id=8, fim_pad_token_id=7),
    "gpt-oss": vocabulary([*HARMONY, "<|end|>", "<|return|>", "<|call|>"], CONTROL),
    "solar": vocabulary(["<|end|>", "<|flush|>", "<|calls|>"], CONTROL),
    "only a call": vocabulary(["<|end|>", "<|call|>"], CONTROL),
    "gemma 4": vocabulary(["<|tool_response>", "</s>", "<turn|>"], CONTROL),
    "words": vocabulary(["<user>", "<s>", "<pad>", "[MASK]"], NORMAL),
    "no kinds": vocabulary(["<user>", "</s>", "<|eom_id|>"], NORMAL, token_type=None),
    "unknown kinds": vocabulary(["<user>", "</s>", "x y"], 9),
    "sentencepiece": sentencepiece(["\u2581", "a", "<end_of_turn>", "\u2581<PRE>", "<unused0>"]),
}


def test_kinds_are_llamacpps(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    paths = [write(tmp_path / f"{number}.gguf", keys) for number, keys in enumerate(CASES.values())]
    for name, path, answer in zip(CASES, paths, llamacpp([(path, []) for path in paths]), strict=True):
        for token, kind, bits in zip(
            (found := read_vocabulary(read_gguf(path))).tokens, found.kinds, answer["kinds"], strict=True
        ):
            expected = BITS.get(kind, 0)
            # what becomes control keeps the bit of its former kind; control tokens named "unused" get one more
            assert bits & expected == expected and (kind == CONTROL or not bits & BITS[CONTROL]), (
                name,
                token,
                kind,
                bits,
            )


def test_what_ends_an_answer_is_llamacpps(tmp_path: Path) -> None:
    """Beside it only GLM's starts of a next turn count here, and llama.cpp counts its tokens of filling in the middle."""
    pytest.importorskip("xllamacpp")
    names = [name for name in CASES if "fill-in" not in name and name not in ("no kinds", "unknown kinds")]
    others = [text for text in ENDS if text not in CASES["words"]["tokens"]]
    more = {f"only {text}": vocabulary([text], USER_DEFINED) for text in others}
    cases = {name: CASES[name] for name in names} | more
    paths = [write(tmp_path / f"{number}.gguf", keys) for number, keys in enumerate(cases.values())]
    for name, path, answer in zip(cases, paths, llamacpp([(path, []) for path in paths]), strict=True):
        assert sorted(end_token_ids(gguf_tokenizer(read_gguf(path)))) == answer["ends"], name


def test_more_ends_than_one_and_fill_in_by_text() -> None:
    assert len(set(ENDS)) == len(ENDS) and len(set(FILL_IN)) == len(FILL_IN)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokens": None, "token_type": None}, "no tokenizer inside"),
        ({"tokens": ["a", "b", "a"], "token_type": [1] * 3}, "token 'a' has the ids 0 and 2, expected each token once"),
        ({"tokens": ["a", "b\0c", "d"], "token_type": [1] * 3}, "a token with a zero byte"),
    ],
)
def test_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "tiny.gguf", {**byte_pairs("gpt-2", [("a", "b")]), **keys})
    with pytest.raises(CheckpointError, match=message):
        read_vocabulary(read_gguf(path))


def test_empty_tokens_get_llamacpps_name(tmp_path: Path) -> None:
    keys = vocabulary(["", "", "end"], NORMAL)
    found = read_vocabulary(read_gguf(write(tmp_path / "tiny.gguf", keys)))
    first = len(keys["tokens"]) - 3
    assert found.tokens[first:] == [f"[EMPTY_{first}]", f"[EMPTY_{first + 1}]", "end"]


def test_roles_of_a_sentencepiece_file_without_keys(tmp_path: Path) -> None:
    keys = sentencepiece(["\u2581"], bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    found = read_vocabulary(read_gguf(write(tmp_path / "tiny.gguf", keys)))
    assert found.roles == {"bos": 1, "eos": 2, "unk": 0}
    assert (found.text("bos"), found.text("pad")) == ("<s>", None)
