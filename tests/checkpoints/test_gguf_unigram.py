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
    "か\u3099 カ\u3099は\u309a", "\u1112\u1161\u11ab 하\u11ab", "①②℃ ﬁﬀi e\u0301 a\u0323\u0302 a\u0302\u0323",
    "x\r\ny\r\n\r\nz",
    "\u24b6\u030a A\u030a", "½\u0301 ﬁ\u0301", "ＡＢ\u3000Ｃ", "\u212b\u0323", "a\u00ad\u200bb",
]  # fmt: skip
AROUND = [
    "the</s>the",
    "<pad> the",
    "the<extra>the",
    "<extra>  the ",
    "  the  the ",
    "   ",
    "</s>",
    "<unk>the",
    "the <unk>",
]


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
        pytest.param(
            {"add_eos_token": False, "unknown_token_id": None, "padding_token_id": None}, marks=pytest.mark.slow
        ),
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


def test_normalizations_are_sentencepieces(charsmap: bytes) -> None:
    """The package that made the table, on odd texts and random ones; its own reading of what is there."""
    import sentencepiece

    table, theirs = read_charsmap("x", charsmap), sentencepiece.SentencePieceNormalizer(
        rule_name="nmt_nfkc", add_dummy_prefix=False, remove_extra_whitespaces=False, escape_whitespaces=False
    )  # fmt: skip
    assert isinstance(table, Charsmap) and table.leaves_ascii
    texts = [*TEXTS, *ODD, *made_texts(300), *made_texts(300, anything=True, number=5), "plain"]
    assert [table.normalize(text) for text in texts] == [theirs.normalize(text) for text in texts]


def test_texts_that_tokens_are_hidden_in(tmp_path: Path, charsmap: bytes) -> None:
    """What would become a control token, or spells one that texts are never made of, is refused; a user's token is not."""
    words = [f"{LINE}the", *"abc<>pd[]PADextr0", LINE]
    path = write(tmp_path / "tiny.gguf", unigrams(words, precompiled_charsmap=charsmap))
    tokenizer = gguf_tokenizer(read_gguf(path))
    for text in ("the \uff1cpad\uff1e", "a [PAD0] b", "\uff1cunk>"):
        with pytest.raises(DataError, match="a token that this vocabulary makes of no text"):
            tokenizer(text)
    texts = ["the <pad>", "\uff1cextra>", "a<extra>b \uff1cextra\uff1e", "[PAD 0]"]
    assert differing(path, texts) == ([], [])
    with pytest.raises(DataError, match="no places of its tokens"):
        tokenizer("か\u3099", return_offsets_mapping=True)
    assert tokenizer("a", text_target="か\u3099")["labels"] == tokenizer("が")["input_ids"]
    assert tokenizer.encode("か\u3099") == tokenizer(["が"])["input_ids"][0]


def test_copies_and_saved_folders(tmp_path: Path, charsmap: bytes) -> None:
    """A copy reads as the tokenizer does; a folder as transformers' own T5 tokenizer does: alike but for marks."""
    texts = [*TEXTS[:40], *AROUND]
    tokenizer = gguf_tokenizer(
        read_gguf(write(tmp_path / "t.gguf", unigrams(pieces(texts), precompiled_charsmap=charsmap)))
    )
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert [other(each)["input_ids"] for each in ODD[:4]] == [tokenizer(each)["input_ids"] for each in ODD[:4]]
    tokenizer.save_pretrained(tmp_path / "folder")
    saved = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert [saved(each)["input_ids"] for each in texts] == [tokenizer(each)["input_ids"] for each in texts]
    assert saved.decode(saved("the  end")["input_ids"], skip_special_tokens=True) == "the end"


def entry(label: int = 0, offset: int = 0, *, leaf: bool = False, value: int | None = None) -> int:
    return label | leaf << 8 | offset << 10 if value is None else 1 << 31 | value


@pytest.mark.parametrize(
    ("entries", "texts"),
    [
        ([entry()] * 256, b"a"),  # no zero byte
        ([entry()] * 255, b"a\0"),  # a block that is not whole
        ([entry(offset=300)] + [entry()] * 255, b"a\0"),
        ([entry(value=0)] + [entry()] * 255, b"a\0"),
        ([entry(), entry(leaf=True), *[entry()] * 254], b"a\0"),  # a leaf without a value
        ([entry(), entry(value=9)] + [entry()] * 254, b"a\0"),
        ([entry(), entry(value=1)] + [entry()] * 254, "\u00e9\0".encode()),  # inside of a character
        ([], b"a\0"),
        ([entry()] * 256, b"\xff\0"),
    ],
)
def test_tables_that_a_walk_could_leave(entries: list[int], texts: bytes) -> None:
    raw = struct.pack("<I", 4 * len(entries)) + struct.pack(f"<{len(entries)}I", *entries) + texts
    with pytest.raises(CheckpointError, match="no table of normalizations"):
        read_charsmap("x.gguf", raw)
    assert read_charsmap("x.gguf", b"") is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"scores": [float("nan")] * 8}, "expected finite numbers"),
        ({"token_type": [3] * 10}, "expected tokens that texts are made of"),
        ({"remove_extra_whitespaces": "yes"}, "got 'yes', expected true or false"),
    ],
)
def test_refused(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    keys = unigrams(["a", "b", "c", "d"], **({} if "scores" in more else more))
    keys["scores"] = [*keys["scores"][:4], *more.get("scores", keys["scores"][4:])][:10]
    keys["scores"] += [0.0] * (10 - len(keys["scores"]))
    with pytest.raises(CheckpointError, match=said):
        gguf_tokenizer(read_gguf(write(tmp_path / "tiny.gguf", keys)))
