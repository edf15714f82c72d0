"""GGUF files that hold a vocabulary and nothing else, texts that are odd in every way we know, and llama.cpp to ask.

Merges are learned from the texts without cutting them, so that there are tokens across every place where some model cuts:
where a cut is forgotten, or is one too many, other tokens come out.
"""

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from qgraft.checkpoints.gguf_file import read_gguf
from qgraft.checkpoints.gguf_tokenizer import gguf_tokenizer

RUNNER = Path(__file__).parent.parent / "oracle" / "run_llamacpp_vocabulary.py"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")  # the last one user-defined, the others control
LETTERS = [chr(b if b in {*range(33, 127), *range(161, 173), *range(174, 256)} else 0) for b in range(256)]
_others = iter(range(256, 512))
LETTERS = [chr(next(_others)) if letter == "\0" else letter for letter in LETTERS]  # GPT-2's, one for each byte
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

TEXTS = [  # by hand
    "", " ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", " \n", "\n ", " \n \n ", "  \n\n  x",
    "x  \n", "\t x\t\ty \t", "Hello world", " hello", "hello ", "hello  world   again    x", "the.\n\nnext", "(hello the)",
    "x=1;y_2=foo(bar)[3]", "if x:\n\treturn  y\n\n\n    pass\n",
    *("123456789012"[:length] for length in range(1, 13)), "a1b22c333 4444", " 3.14 2024-01-01 $1,000.00", " 1 12 123 1234",
    "don't DON'T I'LL we've WE'RE they'd 'S 'tis it's", "rock 'n' roll ' s", "it'\u017f", "1a2b 3c", "\n1\n22\n",
    "你好，世界123", "日本語テストカタカナ", "한국어 문장 123", "ไทยภาษา ລາວ ខ្មែរ", "שלום עולם", "مرحبا بالعالم ٣٤٥",
    "हिन्दी में लिखा", "বাংলা তেলুগু", "naïve café déjà", "cafe\u0301 e\u0301a\u0300 \u0301x", "x\u0301\u0302\u0303y",
    "ÀÉÎ ß ÉCOLE École aÉb ǅ ǈa", "ＡＢＣ１２３ｶﾅ", "½ ² ① Ⅻ 3½", "½½½ 1½2",
    "😀🎉 👨‍👩‍👧‍👦 👍🏽 🇩🇪", "a\u200bb\u200cc\u200dd\ufeffe",
    "\u00a0nbsp\u2003em\u2028line\u2029para\u3000wide\u0085nel", "\u1680ogham\u202fnarrow", "nul\x00byte\x01\x1b\x7f",
    "price: $5 + €6 = ¥7 <=> ^~|`", "!!!???...,,,;;;:::", "---===///\\\\\\", "«quote» “curly” ‘single’ … — –",
    "http://example.com/a/b?c=d&e=f#g", "user@example.com #tag @me", "<html><b>x</b></html>", "/path/to//file\n//comment\n",
    "CamelCaseWord snake_case_word SCREAMING_CASE HTMLParser", "a" * 50, "ab" * 20, "。、！？「」", "𝔘𝔫𝔦𝔠 𐐀𐐨",
    "IMGIMGABCZ <sentinel:12>", "''' \"\"\" ``` '''",
]  # fmt: skip
_ALPHABET = (
    " \t\n\r'.,;!?()[]{}<>/\\|-_=+*&^%$#@~`\"0123456789abcsdlmrtvexyABSDLMRTVEXYéÉßñÜøǅΩωЖжאبह्ิあア漢字한글½²①٣１Ａ"
    "\u0301\u200d\u200b\u00a0\u3000\u2028😀👍🏽。、「»“…€"
)


def made_texts(count: int, *, anything: bool = False, number: int = 0) -> list[str]:
    """`count` texts that hypothesis makes: of characters that some model treats in its own way, or of any."""
    found: list[str] = []
    one = st.characters(exclude_categories=("Cs", "Cn")) if anything else st.sampled_from(_ALPHABET)

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.text(one, max_size=24))
    def keep(text: str) -> None:
        found.append(text)

    keep()
    return found[:count]


def with_special(text: str) -> str:
    return f"<|im_start|>{text}<|im_end|>\n<think>{text}"


def learned_merges(texts: Sequence[str], *, byte_level: bool = True) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE())
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=6000, min_frequency=1, initial_alphabet=LETTERS if byte_level else [], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def byte_pairs(pre: str | None, merges: Sequence[tuple[str, str]], **more: Any) -> dict[str, Any]:
    """The keys of a byte-level vocabulary; `more` replaces keys, None leaves one out."""
    tokens = list(dict.fromkeys([*SPECIAL, *LETTERS, *(left + right for left, right in merges)]))
    return {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": [" ".join(pair) for pair in merges],
        "token_type": [3, 3, 3, 4] + [1] * (len(tokens) - 4), "bos_token_id": 1, "eos_token_id": 2, **more,
    }  # fmt: skip


def sentencepiece(pieces: Sequence[str], scores: Sequence[float] | None = None, **more: Any) -> dict[str, Any]:
    """The keys of a sentencepiece vocabulary; without `scores`, the first of `pieces` has the best one."""
    tokens = list(dict.fromkeys(["<unk>", "<s>", "</s>", "<extra>", *BYTES, *pieces]))
    own = [-float(number) for number in range(len(tokens) - 260)] if scores is None else list(scores)
    return {
        "model": "llama", "pre": "default", "tokens": tokens, "scores": [0.0] * 260 + own,
        "token_type": [2, 3, 3, 4] + [6] * 256 + [1] * (len(tokens) - 260), "bos_token_id": 1, "eos_token_id": 2,
        "unknown_token_id": 0, **more,
    }  # fmt: skip


def nfkc_charsmap() -> bytes:
    """sentencepiece's own table of normalizations, nmt_nfkc: what T5's files hold."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b", "b a"]), model_writer=model, vocab_size=5, model_type="unigram", bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    return normalizer_of(model.getvalue())


def normalizer_of(model: bytes) -> bytes:
    """The table in a sentencepiece model file."""
    from sentencepiece import sentencepiece_model_pb2

    made = sentencepiece_model_pb2.ModelProto()
    made.ParseFromString(model)
    return made.normalizer_spec.precompiled_charsmap


def unigrams(pieces: Sequence[str], scores: Sequence[float] | None = None, **more: Any) -> dict[str, Any]:
    """The keys of T5's vocabulary as llama.cpp's converter has them; without `scores`, the first piece has the best one."""
    head, tail = ["<pad>", "</s>", "<unk>", "<extra>"], ["[PAD0]", "[PAD1]"]
    tokens = list(dict.fromkeys([*head, *pieces, *tail]))
    inner = len(tokens) - len(head) - len(tail)
    own = [-2.0 - 0.01 * number for number in range(inner)] if scores is None else list(scores)
    return {
        "model": "t5", "pre": "default", "tokens": tokens, "scores": [0.0] * 4 + own + [-10000.0] * 2,
        "token_type": [3, 3, 2, 4] + [1] * inner + [5] * 2, "add_space_prefix": True, "remove_extra_whitespaces": True,
        "eos_token_id": 1, "padding_token_id": 0, "unknown_token_id": 2, **more,
    }  # fmt: skip


def write(path: Path, keys: dict[str, Any], **metadata: Any) -> Path:
    """A file of these keys of `tokenizer.ggml` (without the prefix), and of others with underscores for points."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, size in (
        ("context_length", 512),
        ("embedding_length", 64),
        ("block_count", 1),
        ("feed_forward_length", 64),
    ):
        writer.add_uint32(f"llama.{key}", size)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    adders = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array, bytes: writer.add_array,
    }  # fmt: skip
    values = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    values |= {key.replace("_", ".", 1): value for key, value in metadata.items()}
    for key, value in values.items():
        if value is not None:
            adders[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llamacpp(jobs: Sequence[tuple[Path, Sequence[str]]], *, special: bool = False) -> list[dict[str, Any]]:
    """For each file what llama.cpp makes of the texts: {"ids": [[id], ...], "kinds": [...]} or {"error": text}."""
    asked = [{"model": str(path), "texts": list(texts), "special": special} for path, texts in jobs]
    done = subprocess.run(
        [sys.executable, str(RUNNER)], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"llama.cpp failed:\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def ours(path: Path, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    tokenizer = gguf_tokenizer(read_gguf(path))
    return [list(tokenizer(text, add_special_tokens=special)["input_ids"]) for text in texts]
