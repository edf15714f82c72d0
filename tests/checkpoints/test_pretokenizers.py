"""Each name of `tokenizer.ggml.pre` against llama.cpp, on a vocabulary with tokens across all cuts.

Where an entry is by design not llama.cpp's (docs/formats.md lists it), `differs` says for which texts, and there the judge
is the model's own tokenizer: transformers' class, or the published expression in Python's `regex`, another engine.
"""

import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from tokenizers import pre_tokenizers
from transformers import CohereTokenizer, GPTNeoXTokenizer, Qwen2Tokenizer
from vocabularies import (
    LETTERS,
    SPECIAL,
    TEXTS,
    byte_pairs,
    learned_merges,
    llamacpp,
    made_texts,
    ours,
    sentencepiece,
    with_special,
    write,
)

from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_tokenizer import gguf_tokenizer
from qgraft.checkpoints.pretokenizers import PRE_TOKENIZERS
from qgraft.errors import UnsupportedError

QUICK = (
    "default", "gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-r1-qwen", "deepseek-llm", "deepseek-coder", "deepseek-v3",
    "stablelm2", "gpt-4o", "tekken", "falcon", "seed-coder", "superbpe", "command-r",
)  # fmt: skip
BYTE_LEVEL = [name for name, entry in PRE_TOKENIZERS.items() if not entry.raw]
CASES = ("tekken", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "granite-embed-multi-97m")
CASES_IN_ASCII = ("youtu", "tiny_aya", "cohere2moe", "kimi-k2")


def differs(name: str, text: str) -> bool:
    """Whether our cuts are by design not llama.cpp's for a text like this."""
    cased = any(ord(c) > 127 and unicodedata.category(c)[0] in "LM" for c in text)
    if PRE_TOKENIZERS[name].nfc and unicodedata.normalize("NFC", text) != text:
        return True
    if name in CASES and cased:
        return True
    if name in CASES_IN_ASCII:  # llama.cpp's expressions for these know one class of letters
        digits = any(ord(c) > 127 and unicodedata.category(c)[0] == "N" for c in text)
        return cased or digits or any(a.islower() and b.isupper() for a, b in pairwise(text))
    if name in ("deepseek-llm", "deepseek-coder") and regex.search(r"[^\P{White_Space}\x00-\x7f]", text):
        return True
    if name == "afmoe" and regex.search(r"[\p{Cf}\p{Cc}]\p{N}", text):
        return True
    return "\u017f" in text  # which is a small s where case is ignored


def wrong(name: str, path: Path, texts: list[str], answers: list[list[int]]) -> list[str]:
    assert len(texts) == len(answers)
    return [x for x, a, b in zip(texts, ours(path, texts), answers, strict=True) if a != b and not differs(name, x)]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    plain = [*TEXTS, *made_texts(30), *made_texts(10, anything=True)]
    return [*plain, *map(with_special, TEXTS)]


@pytest.fixture(scope="module")
def merges() -> list[tuple[str, str]]:
    return learned_merges([*TEXTS, *made_texts(100)])


def test_ids_are_llamacpps(tmp_path: Path, texts: list[str], merges: list[tuple[str, str]]) -> None:
    pytest.importorskip("xllamacpp")
    paths = {name: write(tmp_path / f"{name}.gguf", byte_pairs(name, merges)) for name in QUICK}
    found = dict(zip(QUICK, llamacpp([(path, texts) for path in paths.values()]), strict=True))
    assert {name: bad for name in QUICK if (bad := wrong(name, paths[name], texts, found[name]["ids"]))} == {}
    for name in QUICK:
        assert sum(differs(name, text) for text in texts) < 0.4 * len(texts), f"{name}: little is left to compare"
    assert len({str(answer["ids"]) for answer in found.values()}) >= len(QUICK) - 3, "the names are told apart"


@pytest.mark.slow
@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_ids_are_llamacpps_for_every_name(tmp_path: Path, merges: list[tuple[str, str]], name: str) -> None:
    pytest.importorskip("xllamacpp")
    plain = [*TEXTS, *made_texts(200), *made_texts(100, anything=True, number=1)]
    texts = [*plain, *map(with_special, plain)]
    path = write(tmp_path / "tiny.gguf", byte_pairs(name, merges))
    assert wrong(name, path, texts, llamacpp([(path, texts)])[0]["ids"]) == []


def test_what_else_a_name_says(tmp_path: Path, merges: list[tuple[str, str]]) -> None:
    """Whether texts begin with bos, and whether a word that is a token is that token though no merges make it."""
    pytest.importorskip("xllamacpp")
    texts, paths = ["ab unmade", "", "unmade"], []
    for number, name in enumerate(PRE_TOKENIZERS):
        keys = byte_pairs(name, merges[:5])
        keys |= {"tokens": [*keys["tokens"], "Ġunmade", "unmade"], "token_type": [*keys["token_type"], 1, 1]}
        paths.append(write(tmp_path / f"{number}.gguf", keys))
    found = [answer["ids"] for answer in llamacpp([(path, texts) for path in paths], special=True)]
    assert [ours(path, texts, special=True) for path in paths] == found
    begin, whole = [ids[1] == [1] for ids in found], [len(ids[2]) < 3 for ids in found]
    assert sum(begin) > 5 and sum(whole) > 5 and sum(whole) < 30 and begin != whole


@pytest.mark.parametrize("pre", [None, ""])
def test_without_a_name_it_is_the_default(
    tmp_path: Path, texts: list[str], merges: list[tuple[str, str]], pre: str
) -> None:
    pytest.importorskip("xllamacpp")
    path = write(tmp_path / "tiny.gguf", byte_pairs(pre, merges))
    named = write(tmp_path / "named.gguf", byte_pairs("default", merges))
    assert ours(path, texts) == llamacpp([(path, texts)])[0]["ids"] == ours(named, texts)


@pytest.mark.parametrize(
    ("name", "own"),
    [("qwen2", Qwen2Tokenizer), ("command-r", CohereTokenizer), ("olmo", GPTNeoXTokenizer), ("mpt", GPTNeoXTokenizer)],
)
def test_composed_characters_are_those_of_the_models_own_class(
    tmp_path: Path, merges: list[tuple[str, str]], name: str, own: type
) -> None:
    """llama.cpp does not compose them: here the two differ, and the model's own tokenizer is right."""
    keys = byte_pairs(name, merges)
    vocabulary = {token: number for number, token in enumerate(keys["tokens"])}
    theirs = own(vocab=vocabulary, merges=merges, unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2])
    texts = [*TEXTS, *made_texts(60, number=2)]
    path = write(tmp_path / "tiny.gguf", keys)
    assert ours(path, texts) == [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert any(unicodedata.normalize("NFC", text) != text for text in texts)


SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED = {  # as the tokenizer.json or the tiktoken code of the model has it
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "kimi-k2": r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]&&[^\p{Han}]]*"
    r"[[\p{Ll}\p{Lm}\p{Lo}\p{M}]&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]&&[^\p{Han}]]+[[\p{Ll}\p{Lm}\p{Lo}\p{M}]&&[^\p{Han}]]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}",
    "qwen35": rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{REST}",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_cuts_are_those_of_the_published_expression(tmp_path: Path, name: str) -> None:
    tokenizer = gguf_tokenizer(read_gguf(write(tmp_path / "tiny.gguf", byte_pairs(name, [("a", "b")]))))
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    expression = regex.compile(PUBLISHED[name], regex.V1)
    for text in [*TEXTS, *made_texts(100, number=3)]:
        got = [part for part, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        expected = [bytes_of.pre_tokenize_str(match[0])[0][0] for match in expression.finditer(text)]
        assert got == expected, text


@pytest.mark.parametrize(
    ("pre", "message"),
    [
        ("qwen22", r"(?s)tokenizer\.ggml\.pre 'qwen22'; supported: a\.x-4\.0, .*did you mean qwen2"),
        ("whitespace", "pre 'whitespace' is not read: its tokens are whole words"),
        ("made-up-by-nobody", "(?s)'made-up-by-nobody'; supported: .*the ids would be wrong"),
    ],
)
def test_an_unknown_name_is_refused(tmp_path: Path, pre: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ours(write(tmp_path / "tiny.gguf", byte_pairs(pre, [("a", "b")])), [""])


def test_sentencepiece_has_no_use_for_the_name(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", sentencepiece(["\u2581", "a"], pre="made-up-by-nobody"))
    assert ours(path, ["a"]) == [[260, 261]]


def test_every_name_of_llamacpp_is_in_the_table() -> None:
    """Its library holds the names as strings; what it does not hold, nobody could have compared."""
    xllamacpp = pytest.importorskip("xllamacpp")
    library = next(Path(xllamacpp.__file__).parent.glob("*.so")).read_bytes()
    unheard = [name for name in PRE_TOKENIZERS if len(name) > 8 and name.encode() + b"\0" not in library]
    assert unheard == []
    assert len(LETTERS) == 256
