"""A folder's tokenizer as the keys of a GGUF file: gguf_tokenizer.py backwards, and read again to see that it is right.

    byte-level BPE        tokenizer.ggml.model gpt2    tokens, merges; `pre` is the name under which our table
                          (pretokenizers.py) has exactly the expressions, normalizer and options that this tokenizer has
    sentencepiece as BPE  tokenizer.ggml.model llama   tokens, scores: a token that an earlier merge makes has the better one
    unigrams              tokenizer.ggml.model t5      tokens, scores, sentencepiece's table of normalizations

A tokenizer has more switches than a file has keys. So the keys are read again, as any GGUF's are, and the tokenizer that
they make must give the same ids for odd texts (PROBES) and for each added token between words; if it does not, the
tokenizer is refused. What alone may differ is a blank behind a special token, and in front of a text that begins with one,
which llama.cpp puts there for all sentencepiece models and transformers for some, and of unigrams in which order marks are
put together (gguf_unigram.py): that is said.
"""

import json
from base64 import b64decode
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from qgraft.checkpoints.gguf_file import GgufFile
from qgraft.checkpoints.gguf_tokenizer import TEMPLATE, WITH_TOOLS, gguf_tokenizer
from qgraft.checkpoints.gguf_unigram import IN_FRONT, SEVERAL
from qgraft.checkpoints.gguf_vocabulary import BYTE, CONTROL, NORMAL, ROLES, UNKNOWN, UNUSED, USER_DEFINED
from qgraft.checkpoints.pretokenizers import GPT2, PRE_TOKENIZERS
from qgraft.data.templates import tokenizers_own
from qgraft.errors import CheckpointError, UnsupportedError

PROBES = (
    "Hello, world! It's 12345.67 o'clock, we'LL see: 3+4=7; don't, they'd,I'm",
    "   leading, trailing   \n\n\n  and\tmixed \r\n blanks \u00a0\u3000 end  ",
    "你好，世界！我是人工智能助手。 日本語のテキスト、한국어 문장입니다.",
    "Élan naïve cafe\u0301 Straße ŒUVRE ﬁn ½ ² Ⅷ — “quotes” … ¿qué?",
    "Привет, мир! مرحبا بالعالم שלום नमस्ते สวัสดี",
    "def f(x):\n    return {'a': [x**2, 0xFF]}  # CamelCaseWord snake_case_word\n\t\tpass;;;",
    "👍🏽 👨‍👩‍👧 🇩🇪 \ufeff\u200b zero\u200dwidth \x00\x07 a\u0300\u0301",
    "https://example.org/a?b=c&d=%20#frag user@mail.com $1,234.50 10^-3 <tag/> ~~~ ###",
    "", " ", "\n", "a", "  a", "1", "12", "123", "1234", "aaaaaaaaaaaaaaaaaaaaaaaa", "!!!???...", "'s 'S 'Re",
)  # fmt: skip
UNUSED_SCORE = -10000.0  # what llama.cpp's converter gives rows of the embedding that no token has
_LLAMACPP_NAMES = {"llama3": "llama-bpe", "gpt-2": "gpt-2", "starcoder": "smollm"}  # of entries with several names


def tokenizer_keys(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Any]:
    """The keys `tokenizer.*` for a model whose embedding has so many rows.

    Raises UnsupportedError where no file can say what this tokenizer does.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(f"a {type(tokenizer).__name__}, which is none of the tokenizers package's")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise UnsupportedError(f"a tokenizer of the kind {model['type']}, where a GGUF file has BPE or Unigram")
    tokens, kinds = _tokens(parts, rows)
    keys: dict[str, Any] = {"tokens": tokens, "token_type": kinds}
    if model["type"] == "Unigram":
        keys |= _unigram_keys(parts, len(tokens))
    elif model.get("byte_fallback"):
        keys |= {"model": "llama", "scores": _scores(model, tokens), "add_space_prefix": _prefixes_space(parts)}
    else:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        keys |= {"model": "gpt2", "pre": _pre(parts), "merges": merges}
    keys |= _roles(tokenizer)
    keys |= dict(zip(("add_bos_token", "add_eos_token"), _ends(tokenizer), strict=True))
    found = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    own, with_tools = tokenizers_own(tokenizer)
    named = {f"{TEMPLATE}.{WITH_TOOLS}": with_tools, f"{TEMPLATE}s": [WITH_TOOLS]} if with_tools else {}
    return found | ({TEMPLATE: own} if own else {}) | named


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, draft: GgufFile) -> list[str]:
    """Compare the tokenizer with what the keys of `draft` are read as; notes on what differs and may.

    Raises UnsupportedError where ids differ.
    """
    try:
        read: Any = gguf_tokenizer(draft)
    except CheckpointError as error:
        raise UnsupportedError(f"its tokenizer is not one that a GGUF file can hold: {error.message}") from error
    exact, read.exact = read.exact, None  # the order of normalizations is told below
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    blanks = draft.metadata["tokenizer.ggml.model"] == "llama"  # where only blanks at the beginning may differ
    other = []
    for text in PROBES:
        for special in (True, False):
            ours, theirs = (_ids(each, text, special) for each in (tokenizer, read))
            if ours != theirs and blanks and text.startswith(" "):
                other.append(text)
            elif ours != theirs:
                raise UnsupportedError(
                    f"its tokenizer gives other ids than llama.cpp would: {text[:40]!r} is {ours[:12]} and would be "
                    f"{theirs[:12]}"
                )
    texts = [text for token in added for text in (f"cat{token}cat", f"cat {token} cat", f"{token}{token}\n")]
    around = [text for text in texts if _ids(tokenizer, text, False) != _ids(read, text, False)]
    if around and not blanks:
        raise UnsupportedError(f"its tokenizer gives other ids than llama.cpp would: {around[0][:60]!r}")
    notes = [f"around special tokens ({text[:30]!r}) llama.cpp puts blanks otherwise than this tokenizer"
             for text in around[:1]]  # fmt: skip
    read.exact = exact
    odd = [text for text in PROBES if _ids(tokenizer, text, False) != _ids(read, text, False)] if exact else []
    if odd:
        notes.append(f"characters with marks ({odd[0][:20]!r}) llama.cpp normalizes otherwise than this tokenizer")
    return (
        notes + ["in front of a text that begins with a blank llama.cpp puts another than this tokenizer"][: len(other)]
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _tokens(parts: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """(tokens by id, the kind of each); rows of the embedding that no token has are filled up, as converters do."""
    tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    fallback, unknown = parts["model"].get("byte_fallback"), parts["model"].get("unk_token")
    knows = fallback or parts["model"]["type"] == "Unigram"  # a token for what is unknown
    vocabulary = parts["model"]["vocab"]
    if isinstance(vocabulary, list):  # of unigrams, with their scores
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        unknown = next((token for token, number in vocabulary.items() if number == parts["model"]["unk_id"]), None)
    entries = [(token, number, NORMAL) for token, number in vocabulary.items()]
    entries += [
        (each["content"], each["id"], CONTROL if each["special"] else USER_DEFINED) for each in parts["added_tokens"]
    ]
    for token, number, kind in entries:
        if number >= rows:
            raise UnsupportedError(
                f"its tokenizer has the token {token!r} with the id {number}, its embedding {rows} rows"
            )
        if fallback and kind == NORMAL and len(token) == 6 and token.startswith("<0x"):
            kind = BYTE
        tokens[number], kinds[number] = token, UNKNOWN if knows and token == unknown else kind
    return tokens, kinds


def _unigram_keys(parts: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Scores, normalizations and what becomes of blanks. Raises UnsupportedError for bytes of unknown characters."""
    model = parts["model"]
    if model.get("byte_fallback") or model.get("unk_id") is None:
        raise UnsupportedError("its tokenizer spells unknown characters in bytes, and llama.cpp's unigrams do not")
    steps = [*_flat(parts["normalizer"], "normalizers"), *_flat(parts["pre_tokenizer"], "pretokenizers")]
    merged = any(step["type"] == "WhitespaceSplit" or step.get("pattern") == {"Regex": SEVERAL} for step in steps)
    in_front = any(step.get("pattern") == {"Regex": IN_FRONT} for step in steps)
    tables = [step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled"]
    if len(tables) > 1 or len(model["vocab"]) > rows:
        raise UnsupportedError(
            "its tokenizer has several tables of normalizations, or more tokens than the embedding rows"
        )
    scores = [float(score) for _, score in model["vocab"]]
    more = [0.0 if number in {each["id"] for each in parts["added_tokens"]} else UNUSED_SCORE
            for number in range(len(scores), rows)]  # fmt: skip
    keys = {"model": "t5", "pre": "default", "scores": scores + more, "remove_extra_whitespaces": merged,
            "add_space_prefix": in_front or _prefixes_space(parts)}  # fmt: skip
    return keys | ({"precompiled_charsmap": b64decode(tables[0])} if tables else {})


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """For each token how early a merge makes it: -1, -2, ...; 0 for those that are there from the beginning.

    Raises UnsupportedError where the merges to a token do not follow one another: one score could not say that.
    """
    made = ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1) for merge in model["merges"]]
    order = [token for token, _ in groupby(made)]
    if len(set(order)) < len(order):
        raise UnsupportedError("its tokenizer's merges are in an order that no scores of tokens can state")
    rank = {token: -float(number) for number, token in enumerate(order, 1)}
    return [rank.get(token, 0.0) for token in tokens]


def _prefixes_space(parts: Mapping[str, Any]) -> bool:
    """Whether a blank is put before a text: by the normalizer, or by the Metaspace that newer folders have."""
    steps = [*_flat(parts["normalizer"], "normalizers"), *_flat(parts["pre_tokenizer"], "pretokenizers")]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _pre(parts: Mapping[str, Any]) -> str:
    """The name for how this tokenizer cuts text. Raises UnsupportedError where the table has none."""
    normalizers = [step["type"] for step in _flat(parts["normalizer"], "normalizers")]
    splits = _splits(_flat(parts["pre_tokenizer"], "pretokenizers"))
    nfc, ignores = normalizers == ["NFC"], bool(parts["model"].get("ignore_merges"))
    if splits is not None and (nfc or not normalizers):
        for name, entry in PRE_TOKENIZERS.items():
            if (entry.splits, entry.nfc, entry.ignore_merges, entry.raw) == (splits, nfc, ignores, False):
                return _LLAMACPP_NAMES.get(name, name)
    raise UnsupportedError(
        f"its tokenizer cuts text as none of llama.cpp's names for that (tokenizer.ggml.pre) says: {splits!r:.200}"
    )


def _flat(step: Mapping[str, Any] | None, key: str) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer, sequences opened up."""
    if step is None:
        return []
    return [inner for each in step[key] for inner in _flat(each, key)] if step["type"] == "Sequence" else [step]


def _splits(steps: list[Any]) -> tuple[str, ...] | None:
    """The expressions that text is cut by before the bytes are spelled in letters; None where it is done otherwise."""
    found: list[str] = []
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    for step in steps[:-1]:
        plain = step.get("behavior") == "Isolated" and not step.get("invert")
        inverted = step.get("behavior") == "Removed" and step.get(
            "invert"
        )  # keeps the matches, which are all of a text
        if step["type"] == "Digits" and step.get("individual_digits"):
            found.append(r"\p{N}")
        elif step["type"] == "Split" and (plain or inverted) and "Regex" in step["pattern"]:
            found.append(step["pattern"]["Regex"])
        else:
            return None
    return (*found, *([GPT2] if steps[-1].get("use_regex", True) else []))


def _roles(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids of tokens with a role; also where a turn ends, if a template's end token is another than the text's."""
    ids = {key: getattr(tokenizer, f"{role}_token_id", None) for role, key in ROLES.items()}
    return {f"{key}_token_id": number for key, number in ids.items() if isinstance(number, int)}


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """(whether a text gets the bos token before it, the eos token behind it). Raises UnsupportedError for other tokens."""
    plain, whole = _ids(tokenizer, "a", False), _ids(tokenizer, "a", True)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    begins = whole[:1] == [bos] and whole[: len(plain)] != plain
    rest = whole[1:] if begins else whole
    ends = rest[-1:] == [eos] and len(rest) == len(plain) + 1
    if (rest[:-1] if ends else rest) != plain:
        raise UnsupportedError(f"its tokenizer puts {whole} around {plain}, where a GGUF file can say bos and eos")
    return begins, ends
