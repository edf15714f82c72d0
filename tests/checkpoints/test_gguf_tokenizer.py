"""The tokenizer of a GGUF file against llama.cpp: flags, special tokens, what is printed, what is saved, what is refused."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import (
    BYTES,
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
from qgraft.errors import CheckpointError, DataError, QgraftError, UnsupportedError

LINE = "\u2581"
SMOLLM2 = Path.home() / ".cache/qgraft/SmolLM2-135M-Instruct.Q4_1.gguf"
PIECES = [
    *f"{LINE}t", "he", f"{LINE}the", f"{LINE}he", "ll", "hell", "hello", f"{LINE}hello", LINE, LINE * 2, f"{LINE}<u>",
    *"abcdefghijklmnopqrstuvwxyz.[]/INST<>",
]  # fmt: skip
AROUND = [
    "hello the", " hello", "the\nhello", "</s>hello", "<s>hello</s> hello</s>", " <s> ", "<s>", "hello<extra>hello",
    "hello <extra> hello", "<extra>", "  <extra>  ", "<unk>the", "", " ", "   ", "\n", "<0x41>", "漢 é", "<s> hello",
]  # fmt: skip


def tokenizer_of(path: Path) -> PreTrainedTokenizerFast:
    return gguf_tokenizer(read_gguf(path))


def pair(tmp_path: Path, keys: dict[str, Any], texts: list[str], *, special: bool = False, **metadata: Any) -> Any:
    """Our ids and llama.cpp's."""
    pytest.importorskip("xllamacpp")
    path = write(tmp_path / "tiny.gguf", keys, **metadata)
    return ours(path, texts, special=special), llamacpp([(path, texts)], special=special)[0]["ids"]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"add_space_prefix": False},
        {"add_space_prefix": True, "add_bos_token": False},
        {"add_eos_token": True},
        {"add_bos_token": False, "add_eos_token": True, "add_space_prefix": False},
        {"remove_extra_whitespaces": True},  # of no effect on this kind
        {"bos_token_id": None, "eos_token_id": None, "unknown_token_id": None},
    ],
    ids=str,
)
def test_flags_of_sentencepiece(tmp_path: Path, flags: dict[str, Any], special: bool) -> None:
    got, expected = pair(tmp_path, sentencepiece(PIECES, **flags), AROUND, special=special)
    assert got == expected


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5])
def test_kinds_of_tokens_in_text(tmp_path: Path, kind: int) -> None:
    """`<extra>` and a token with a low line in it, of each kind."""
    keys = sentencepiece(PIECES)
    keys["token_type"] = [*keys["token_type"][:3], kind, *keys["token_type"][4:]]
    keys["token_type"][keys["tokens"].index(f"{LINE}<u>")] = kind
    got, expected = pair(tmp_path, keys, [*AROUND, f"a{LINE}<u>b", "a <u>b", " <u>"])
    assert got == expected


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_space_prefix": True},
        {"add_sep_token": True, "seperator_token_id": 2},
    ],
    ids=str,
)
def test_flags_of_byte_pairs(tmp_path: Path, flags: dict[str, Any]) -> None:
    texts = ["", " the", "<|im_end|>the", "the <think> the", *map(with_special, TEXTS[-5:])]
    got, expected = pair(tmp_path, byte_pairs("gpt-2", learned_merges(TEXTS), **flags), texts, special=True)
    assert got == expected


def test_phi3_takes_the_blanks_behind_its_special_tokens(tmp_path: Path) -> None:
    keys = sentencepiece([*PIECES, "<|endoftext|>"])
    texts = ["</s> \n hello", "<s> hello", "<extra>\n\nhello</s>  <extra> ", "hello </s>", "<|endoftext|> a"]
    got, expected = pair(tmp_path, keys, texts, general_name="Phi-3 mini")
    assert got == expected
    plain, _ = pair(tmp_path, keys, texts)
    assert got != plain


@pytest.mark.parametrize(
    ("pre", "name", "token"), [("jina-v2-code", "x", "<mask>"), ("gpt-2", "modern-bert", "[MASK]")]
)
def test_a_mask_takes_the_blanks_before_it(tmp_path: Path, pre: str, name: str, token: str) -> None:
    keys = byte_pairs(pre, [("a", "b")], seperator_token_id=0)
    keys |= {"tokens": [*keys["tokens"], token], "token_type": [*keys["token_type"], 3]}
    got, expected = pair(tmp_path, keys, [f"a  {token} b", token], general_name=name)
    assert got == expected


@pytest.mark.spread(2)
@pytest.mark.parametrize(
    ("model", "pre", "newlines"),
    [("gemma4", None, 0), ("gemma4", "x", 5), ("gpt2", "sarvam-moe", 0), ("gpt2", "gemma4", 3), ("gemma4", None, 1)],
)
def test_byte_pairs_in_utf8(tmp_path: Path, model: str, pre: str | None, newlines: int) -> None:
    made = [*TEXTS, *made_texts(60)]
    lines = [line for text in made if "\0" not in text for line in text.replace(" ", LINE).split("\n")]
    merges = learned_merges(lines, byte_level=False)
    words = [
        *sorted(set("".join(lines))),
        *(left + right for left, right in merges),
        *("\n" * n for n in range(1, newlines + 1)),
    ]
    tokens = list(dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", "<tool>", *BYTES, *words]))
    keys = {
        "model": model, "pre": pre, "tokens": tokens, "merges": [" ".join(each) for each in merges], "bos_token_id": 2,
        "token_type": [3, 3, 3, 3, 4] + [6] * 256 + [1] * (len(tokens) - 261), "eos_token_id": 1, "add_bos_token": False,
    }  # fmt: skip
    texts = [
        *made,
        *(f"<bos>{text}<tool>{text}" for text in TEXTS),
        *("\n" * n for n in range(12)),
        "<0x41>",
        "a\n\n<0x41>\n",
    ]
    got, expected = pair(tmp_path, keys, texts, special=True)
    assert got == expected
    tokenizer = tokenizer_of(tmp_path / "tiny.gguf")
    assert [tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) for text in made] == made


def test_missing_letters_are_left_out_as_llamacpp_does(tmp_path: Path) -> None:
    keys = byte_pairs("gpt-2", [("a", "b")])
    gone = keys["tokens"].index("z")
    keys["tokens"][gone] = "zz-unreachable"
    got, expected = pair(tmp_path, keys, ["abzab", "z", "ab"])
    assert got == expected


def test_of_equal_merges_the_first_counts(tmp_path: Path) -> None:
    keys = byte_pairs("gpt-2", [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")])
    keys["merges"].append("a b")
    got, expected = pair(tmp_path, keys, ["abc", "bc", "abcabc"])
    assert got == expected


def test_the_real_file(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    if not SMOLLM2.is_file():
        pytest.skip("the demo's model is not here")
    texts = [*TEXTS, *made_texts(100), *map(with_special, TEXTS)]
    assert ours(SMOLLM2, texts) == llamacpp([(SMOLLM2, texts)])[0]["ids"]


def test_round_trips(tmp_path: Path) -> None:
    """Byte-level BPE that composes no characters, and sentencepiece with bytes for what it does not know."""
    texts = [*TEXTS, *made_texts(60, number=4), *made_texts(40, anything=True)]
    bpe = tokenizer_of(write(tmp_path / "bpe.gguf", byte_pairs("llama-bpe", learned_merges(TEXTS))))
    no_prefix = tokenizer_of(write(tmp_path / "spm.gguf", sentencepiece(PIECES, add_space_prefix=False)))
    prefix = tokenizer_of(write(tmp_path / "prefix.gguf", sentencepiece(PIECES)))
    for tokenizer in (bpe, no_prefix, prefix):
        for text in texts:
            if tokenizer is bpe or LINE not in text:
                assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert bpe.decode(bpe("a . b ' s", add_special_tokens=False).input_ids) == "a . b ' s"


def test_user_defined_tokens_are_printed_and_control_tokens_are_not(tmp_path: Path) -> None:
    keys = byte_pairs("gpt-2", [("a", "b")])
    keys |= {"tokens": [*keys["tokens"], "<|eot_id|>", "<user>"], "token_type": [*keys["token_type"], 4, 4]}
    tokenizer = tokenizer_of(write(tmp_path / "tiny.gguf", keys))
    ids = tokenizer("<|im_start|>ab<think>ab<user><|eot_id|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "ab", "<think>", "ab", "<user>", "<|eot_id|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<think>ab<user>"
    assert tokenizer.decode(ids) == "<|im_start|>ab<think>ab<user><|eot_id|>"


def test_roles(tmp_path: Path) -> None:
    keys = sentencepiece([*PIECES, "!"], padding_token_id=3, seperator_token_id=2, mask_token_id=3, cls_token_id=1)
    tokenizer = tokenizer_of(write(tmp_path / "tiny.gguf", keys))
    named = {
        role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad", "sep", "mask", "cls")
    }
    assert named == {"bos": 1, "eos": 2, "unk": 0, "pad": 3, "sep": 2, "mask": 3, "cls": 1}


def test_a_word_that_files_pad_with_stays_a_word(tmp_path: Path) -> None:
    """Llama 3 files name "!", id 0, as padding; as a special token it would be cut out of texts, and never printed."""
    keys = byte_pairs("llama-bpe", [("!", "!"), ("Ġ", "!")])
    number = keys["tokens"].index("!")
    texts = ["a!!b !", "!", "!!!"]
    got, expected = pair(tmp_path, {**keys, "padding_token_id": number}, texts)
    assert got == expected
    tokenizer = tokenizer_of(tmp_path / "tiny.gguf")
    assert tokenizer.pad_token is None
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in got] == texts


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "phi3", "qwen2", "raw"])
def test_saved_copied_and_pickled_it_is_the_same(tmp_path: Path, kind: str) -> None:
    keys = sentencepiece(PIECES, padding_token_id=3, add_eos_token=True)
    if kind in ("bpe", "qwen2"):
        pre = "llama-bpe" if kind == "bpe" else "qwen2"
        keys = byte_pairs(pre, learned_merges(TEXTS))
    if kind == "raw":
        keys |= {"model": "gemma4", "merges": ["h e", "he l"], "tokens": [*keys["tokens"], "hel"]}
        keys["token_type"] = [*keys["token_type"], 1]
        keys["scores"] = None
    names = {"general_name": "phi-3"} if kind == "phi3" else {}
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    path = write(tmp_path / "tiny.gguf", keys, tokenizer_chat_template=template, **names)
    first = tokenizer_of(path)
    first.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llama", "transformers_version": "5.17.0"}')
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    texts = [*TEXTS, *map(with_special, TEXTS), *AROUND]
    for other in (again, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        for text in texts:
            ids = first(text).input_ids
            assert other(text).input_ids == ids
            for skip in (True, False):
                assert other.decode(ids, skip_special_tokens=skip) == first.decode(ids, skip_special_tokens=skip)
        for role in ("bos", "eos", "unk", "pad"):
            assert getattr(other, f"{role}_token_id") == getattr(first, f"{role}_token_id")
        chat = [{"role": "user", "content": "hello"}]
        assert other.apply_chat_template(chat, tokenize=False) == first.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("text", ["a\ud800b", ["fine", "\udfff"], "\ud83d"])
def test_half_a_surrogate_pair_is_refused_in_words(tmp_path: Path, text: Any) -> None:
    tokenizer = tokenizer_of(write(tmp_path / "tiny.gguf", byte_pairs("gpt-2", [("a", "b")])))
    with pytest.raises(DataError, match=r"half a surrogate pair \(U\+D[0-9A-F]{3}\), expected Unicode text"):
        tokenizer(text)
    with pytest.raises(DataError, match="half a surrogate pair"):
        tokenizer.encode(text)


BPE, SPM = byte_pairs("gpt-2", [("a", "b")]), sentencepiece(PIECES)
REFUSED: dict[str, tuple[dict[str, Any], type[QgraftError], str]] = {
    "model": ({**BPE, "model": "rwkv"}, UnsupportedError, "tokenizer.ggml.model 'rwkv'; supported: gpt2, llama, gemma4"),
    "no model": ({**BPE, "model": None}, UnsupportedError, "tokenizer.ggml.model ''; supported: gpt2"),
    "no merges": ({**BPE, "merges": None}, CheckpointError, "tokenizer.ggml.merges is missing"),
    "merge of one": ({**BPE, "merges": ["ab"]}, CheckpointError, "number 0 is 'ab', expected two tokens"),
    "merge of strangers": ({**BPE, "merges": ["a b", "zz qq"]}, CheckpointError, "number 1 is 'zz qq'"),
    "merge to no token": ({**BPE, "merges": ["b a"]}, CheckpointError, "together are a third"),
    "flag of text": ({**SPM, "add_space_prefix": "yes"}, CheckpointError, "got 'yes', expected true or false"),
    "pre of numbers": ({**BPE, "pre": [1, 2]}, CheckpointError, r"tokenizer.ggml.pre: got \[1, 2\], expected text"),
    "model of numbers": ({**BPE, "model": [1, 2]}, UnsupportedError, r"tokenizer.ggml.model \[1, 2\]; supported"),
    "score that is no number": (
        {**SPM, "scores": [float("nan"), *SPM["scores"][1:]]}, CheckpointError, "expected finite numbers"
    ),
    "infinite score": ({**SPM, "scores": [float("inf"), *SPM["scores"][1:]]}, CheckpointError, "expected finite numbers"),
    "no bos": ({**BPE, "add_bos_token": True, "bos_token_id": None}, CheckpointError, "are to get a bos token"),
    "no eos": ({**BPE, "add_eos_token": True, "eos_token_id": None}, CheckpointError, "tokenizer.ggml.eos_token_id names no"),
    "no sep": ({**BPE, "add_sep_token": True}, CheckpointError, "tokenizer.ggml.seperator_token_id names no token"),
    "lone newlines": (
        {**SPM, "model": "gemma4", "merges": ["h e"], "tokens": [*SPM["tokens"][:-1], "\n\n\n"]},
        UnsupportedError, "a run of 3 newlines is a token, expected tokens for two shorter runs",
    ),
    "bos a word": ({**BPE, "add_bos_token": True, "bos_token_id": 50}, CheckpointError, "names no token apart from words"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    keys, kind, message = REFUSED[case]
    path = write(tmp_path / "tiny.gguf", keys)
    with pytest.raises(kind, match=message) as caught:
        tokenizer_of(path)
    assert str(path) in str(caught.value)
