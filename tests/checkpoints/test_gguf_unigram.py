"""T5's tokenizer in a GGUF file against llama.cpp: normalization, blanks, kinds of tokens, broken tables, what is saved."""

import copy
import pickle
import struct
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from vocabularies import TEXTS, llamacpp, made_texts, nfkc_charsmap, unigrams, write

from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_tokenizer import gguf_tokenizer
from qgraft.checkpoints.gguf_unigram import Charsmap, read_charsmap
from qgraft.errors import CheckpointError, DataError

LINE = "\u2581"
ODD = [  # longest keys, marks that are put together after others, keys across what a reader sees as one character
    "か\u3099 カ\u3099は\u309a", "\u1112\u1161\u11ab 하\u11ab", "①②℃ ﬁﬀi e\u0301 a\u0323\u0302 a\u0302\u0323", "x\r\ny\r\n\r\nz",
    "\u24b6\u030a A\u030a", "½\u0301 ﬁ\u0301", "ＡＢ\u3000Ｃ", "\u212b\u0323", "a\u00ad\u200bb",
]  # fmt: skip
AROUND = ["the</s>the", "<pad> the", "the<extra>the", "<extra>  the ", "  the  the ", "   ", "</s>", "<unk>the", "the <unk>"]


@pytest.fixture(scope="session")
def charsmap() -> bytes:
    pytest.importorskip("sentencepiece")
    return nfkc_charsmap()


def pieces(texts: list[str]) -> list[str]:
    """Single characters, as they stand and normalized, and some longer tokens, across blanks and marks too."""
    seen = dict.fromkeys(" ".join(texts) + unicodedata.normalize("NFKC", " ".join(texts)) + "\ufffd")
    single = [LINE if each == " " else each for each in seen if each not in "<\x00~"]  # these are unknown, as in T5's
    shown = [text.replace(" ", LINE).replace("\x00", "") for text in texts]
    longer = [text[at : at + size] for text in shown for size in (2, 3) for at in range(0, len(text) - size, 3)]
    return [f"{LINE}the", "the", *longer, *single]


def differing(path: Path, texts: list[str], special: bool = True) -> tuple[list[Any], list[str]]:
    """([text, our ids, llama.cpp's] where they differ, texts that are refused)."""
    pytest.importorskip("xllamacpp")
    tokenizer, wrong, refused = gguf_tokenizer(read_gguf(path)), [], []
    for text, expected in zip(texts, llamacpp([(path, texts)], special=special)[0]["ids"], strict=True):
        try:
            got = list(tokenizer(text, add_special_tokens=special)["input_ids"])
        except DataError:
            refused.append(text)
            continue
        if got != expected:
            wrong.append([text, got, expected])
    return wrong, refused


@pytest.mark.parametrize(
    "flags",
    [
        {},
        pytest.param({"remove_extra_whitespaces": False}, marks=pytest.mark.slow),
        pytest.param({"add_space_prefix": False}, marks=pytest.mark.slow),
        pytest.param({"add_space_prefix": None, "remove_extra_whitespaces": None}, marks=pytest.mark.slow),
        pytest.param({"add_eos_token": False, "unknown_token_id": None, "padding_token_id": None}, marks=pytest.mark.slow),
        pytest.param({"precompiled_charsmap": None}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ids_are_llamacpps(tmp_path: Path, charsmap: bytes, flags: dict[str, Any]) -> None:
    """Of odd texts and random ones; the `tokenizers` package by itself gives other ids for some of them."""
    texts = [*TEXTS, *ODD, *AROUND, *made_texts(150), *made_texts(150, anything=True, number=3)]
    path = write(tmp_path / "tiny.gguf", unigrams(pieces(texts), **{"precompiled_charsmap": charsmap, **flags}))
    wrong, refused = differing(path, texts)
    assert not wrong and len(refused) <= 2
    if not flags:
        plain = gguf_tokenizer(read_gguf(path))
        plain.exact = None
        ids = llamacpp([(path, ODD)], special=True)[0]["ids"]
        assert sum(list(plain(text)["input_ids"]) != each for text, each in zip(ODD, ids, strict=True)) >= 2
