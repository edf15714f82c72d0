"""The tokenizer of a GGUF file, from the file's own keys: llama.cpp's ids, or refused.

    tokenizer.ggml.model   gpt2    byte-level BPE: `merges` in their order, cut as `pre` says (pretokenizers.py)
                           llama   sentencepiece: `scores` instead of merges (sentencepiece_merges.py)
                           gemma4  BPE over UTF-8 with a low line for a blank, as sentencepiece writes its pieces
                           t5      sentencepiece's unigram model: the best sum of `scores` (gguf_unigram.py)
    tokens, token_type     texts and kinds (gguf_vocabulary.py)
    *_token_id             which of them begins a text, ends it, fills it up
    add_bos_token, ...     whether a text alone gets them
    add_space_prefix       sentencepiece: a blank in front of each stretch of text, also of one behind a special token
    tokenizer.chat_template, and .tool_use for conversations with tools; of others by name llama.cpp makes no use either

What comes out is a plain PreTrainedTokenizerFast: `save_pretrained` writes a folder that needs none of this. transformers'
own reader of GGUF files was not chosen: it goes by the architecture instead of `pre`, passes over `add_space_prefix`, and
makes up special tokens, all without a word.

Texts that mean a special token are always read as that token, as a chat template needs them; llama.cpp can also be told
not to (`parse_special = false`).
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qgraft.checkpoints.gguf_file import GgufFile
from qgraft.checkpoints.gguf_unigram import LOW_LINE, Exact, unigram
from qgraft.checkpoints.gguf_vocabulary import CUT_OUT, ROLES, SPECIAL, Vocabulary, read_vocabulary
from qgraft.checkpoints.pretokenizers import LINES, PRE_TOKENIZERS, UNREAD, PreTokenizer
from qgraft.checkpoints.sentencepiece_merges import Pair, merges_by_score
from qgraft.errors import CheckpointError, DataError, UnsupportedError, near_match

TEMPLATE, WITH_TOOLS = "tokenizer.chat_template", "tool_use"
MODELS = ("gpt2", "llama", "gemma4", "t5")
_TEXTS = ("text_pair", "text_target", "text_pair_target")  # options that hold texts too
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")


class GgufTokenizer(PreTrainedTokenizerFast):
    """transformers' class, which says of half a surrogate pair only that it is not a str.

    Attributes:
        exact: what a text goes through before transformers reads it; None for nothing.
    """

    exact: Exact | None = None

    def __call__(self, text: Any = None, *args: Any, **options: Any) -> Any:
        options |= {name: self._prepared(options[name], options) for name in _TEXTS if name in options}
        return super().__call__(self._prepared(text, options), *args, **options)

    def encode(self, text: Any, *args: Any, **options: Any) -> list[int]:
        return list(super().encode(self._prepared(text, options), *args, **options))

    def _prepared(self, text: Any, options: Mapping[str, Any]) -> Any:
        _check_unicode(text)
        if self.exact is None or text is None:
            return text
        if isinstance(text, list | tuple):
            return [self._prepared(each, options) for each in text]
        prepared = self.exact.prepare(text)
        if prepared != text and options.get("return_offsets_mapping"):
            raise DataError(
                f"{text[:40]!r}: no places of its tokens can be told, as it is normalized before it is read",
                hint="leave return_offsets_mapping out, or normalize the text beforehand",
            )
        return prepared


GgufTokenizer.__name__ = PreTrainedTokenizerFast.__name__  # what save_pretrained writes; anybody can read that


def _check_unicode(text: Any) -> None:
    for part in text if isinstance(text, list | tuple) else [text]:
        try:
            if isinstance(part, str):
                part.encode()
        except UnicodeEncodeError as error:
            got = f"character {error.start} of the text is half a surrogate pair (U+{ord(part[error.start]):04X})"
            raise DataError(f"{got}, expected Unicode text", hint="decode the text's source as UTF-8 again") from error


class _Handed:
    """Gives transformers the tokenizer itself where it would copy it: a second for the largest vocabularies."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Tokenizer:
        return self.tokenizer


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """The tokenizer in `file`, with its chat template.

    Raises CheckpointError where its parts do not fit together, UnsupportedError where it is of a kind not read here.
    """
    vocabulary = read_vocabulary(file)
    if _text(file, "tokenizer.ggml.pre") == "chatglm-spm":
        vocabulary = _with_brackets(vocabulary)
    if vocabulary.model not in MODELS:
        raise UnsupportedError(
            f"{file.path}: tokenizer.ggml.model {vocabulary.model!r}; supported: {', '.join(MODELS)}"
        )
    pre, exact = None if vocabulary.model in ("llama", "t5") else _pre_tokenizer(file), None
    if vocabulary.model == "t5":
        tokenizer, exact = unigram(file, vocabulary)
    else:
        tokenizer = _sentencepiece(file, vocabulary) if pre is None else _byte_pairs(file, vocabulary, pre)
    added, roles = _added_tokens(file, vocabulary), _roles(tokenizer, vocabulary)
    for token in roles.values():  # transformers makes them special in any case, at the latest when it loads them again
        added.setdefault(token, AddedToken(token, normalized=False)).special = True
    tokenizer.add_tokens(list(added.values()))
    flags = _begins_and_ends(file, roles, pre)
    made = GgufTokenizer(
        tokenizer_object=_Handed(tokenizer),
        clean_up_tokenization_spaces=False,  # llama.cpp's server and chat print what was written, too
        chat_template=_templates(file),
        **flags,
        **{f"{role}_token": added[token] for role, token in roles.items()},
    )
    made.exact = exact
    return made


def _with_brackets(vocabulary: Vocabulary) -> Vocabulary:
    """ChatGLM3's special tokens "sop" and "eop" as <sop> and <eop>: cut out of a text they would take "people" apart."""
    named = {number for number, kind in enumerate(vocabulary.kinds) if kind in SPECIAL}
    ids = {
        f"<{token}>" if token in ("sop", "eop") and number in named else token: number
        for token, number in vocabulary.ids.items()
    }
    return replace(vocabulary, tokens=list(ids), ids=ids)


def _roles(tokenizer: Tokenizer, vocabulary: Vocabulary) -> dict[str, str]:
    """The tokens with a role, but words that a text may hold: some files fill up with "!".

    transformers cuts every token with a role out of a text, so such a word would be cut out of all texts.
    """
    roles = {}
    for role, number in vocabulary.roles.items():
        token = vocabulary.tokens[number]
        if vocabulary.kinds[number] in CUT_OUT or [each.id for each in tokenizer.model.tokenize(token)] != [number]:
            roles[role] = token
    return roles


def _begins_and_ends(file: GgufFile, roles: dict[str, str], pre: PreTokenizer | None) -> dict[str, bool]:
    """Whether a text gets the bos token before it and the eos token behind it, as transformers' options say it."""
    unigrams = file.metadata.get("tokenizer.ggml.model") == "t5"
    flags = {
        "bos": _flag(file, "add_bos_token", not unigrams and (pre is None or pre.add_bos)),
        "eos": _flag(file, "add_eos_token", unigrams),
        "sep": _flag(file, "add_sep_token", False),  # what llama.cpp puts between two texts, never behind one
    }
    if pre is PRE_TOKENIZERS["gemma4"]:
        flags["bos"] = True  # whatever the file says: the first ones said false
    for role, wanted in flags.items():
        if wanted and role not in roles:
            raise CheckpointError(
                f"{file.path}: texts are to get a {role} token (tokenizer.ggml.add_{role}_token), but "
                f"tokenizer.ggml.{ROLES[role]}_token_id names no token apart from words",
                hint="convert the model again, or correct the key with gguf-set-metadata",
            )
    return {"add_bos_token": flags["bos"], "add_eos_token": flags["eos"]}


def _pre_tokenizer(file: GgufFile) -> PreTokenizer:
    """What `tokenizer.ggml.pre` says; llama.cpp takes "default" where it is missing or empty."""
    name = _text(file, "tokenizer.ggml.pre") or "default"
    if file.metadata["tokenizer.ggml.model"] == "gemma4":
        name = "gemma4"
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    if name in UNREAD:
        raise UnsupportedError(f"{file.path}: tokenizer.ggml.pre {name!r} is not read: {UNREAD[name]}")
    raise UnsupportedError(
        f"{file.path}: tokenizer.ggml.pre {reprlib.repr(name)}; supported: {', '.join(sorted(PRE_TOKENIZERS))}",
        hint=near_match(name, PRE_TOKENIZERS) or "it says how text is cut; with another one the ids would be wrong",
    )


def _byte_pairs(file: GgufFile, vocabulary: Vocabulary, pre: PreTokenizer) -> Tokenizer:
    merges, cuts = _merges(file, vocabulary), pre.splits
    if pre is PRE_TOKENIZERS["gemma4"]:
        merges, cuts = _with_newlines(vocabulary, merges)
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, ignore_merges=pre.ignore_merges, byte_fallback=pre.raw))
    splits: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(each), "isolated") for each in cuts]
    if pre.raw:
        tokenizer.normalizer = normalizers.Replace(" ", LOW_LINE)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(LOW_LINE, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        tokenizer.decoder = decoders.ByteLevel()
        if pre.nfc:
            tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    return tokenizer


def _merges(file: GgufFile, vocabulary: Vocabulary) -> list[Pair]:
    """The file's merges, "left right" each; of equal ones the first counts. Both tokens and their union must be tokens."""
    stated: list[str] | None = file.metadata.get("tokenizer.ggml.merges")
    if stated is None and file.metadata.get("tokenizer.ggml.pre") != "kimi-k2":  # which llama.cpp lets go without
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges is missing", hint="convert the model again")
    known, pairs = vocabulary.ids, dict[Pair, None]()
    for number, merge in enumerate(stated or ()):
        at = merge.find(" ", 1)
        left, right = merge[:at], merge[at + 1 :]
        if at < 0 or left not in known or right not in known or left + right not in known:
            raise CheckpointError(
                f"{file.path}: cannot build the tokenizer: tokenizer.ggml.merges: number {number} is {merge[:60]!r}, "
                "expected two tokens of the vocabulary that together are a third"
            )
        pairs[left, right] = None
    return list(pairs)


def _with_newlines(vocabulary: Vocabulary, merges: list[Pair]) -> tuple[list[Pair], tuple[str, ...]]:
    """The merges and cuts that make a run of newlines one token where it is one, as llama.cpp does it for Gemma 4.

    Its files have such tokens but no merges to them. Here shorter runs are joined to longer ones; a run that is no token as
    a whole is cut into single newlines, or that would join it in part.
    """
    lengths = {len(token) for token in vocabulary.tokens if not token.strip("\n")}
    more = [("\n" * a, "\n" * b) for total in sorted(lengths) for a in range(1, total) for b in [total - a]
            if {a, b} <= lengths]  # fmt: skip
    made = sorted({len(left + right) for left, right in more}, reverse=True)
    if any("\n" in left for left, _ in merges) or lengths <= {1}:
        return merges, (LINES,)
    if lone := lengths - {1, *made}:
        got = f"{vocabulary.path}: tokenizer.ggml.tokens: a run of {min(lone)} newlines is a token"
        raise UnsupportedError(f"{got}, expected tokens for two shorter runs that make it")
    runs = "|".join(rf"\n{{{length}}}" for length in made)
    return [*merges, *more], (rf"(?<!\n)(?:{runs})(?!\n)|\n|[^\n]+",)


def _sentencepiece(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    scores: list[float] | None = file.metadata.get("tokenizer.ggml.scores")
    if scores is None:
        scores = [0.0] * len(vocabulary.tokens)  # llama.cpp's reading
    if not all(map(math.isfinite, scores)):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.scores: got one that is no number, expected finite numbers")
    merges = merges_by_score(vocabulary, scores)
    unknown = vocabulary.text("unk")
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    blanks: list[normalizers.Normalizer] = [normalizers.Replace(" ", LOW_LINE)]
    back: list[decoders.Decoder] = [decoders.Replace(LOW_LINE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if _flag(file, "add_space_prefix", True):
        blanks.insert(0, normalizers.Prepend(LOW_LINE))
        back.append(decoders.Strip(" ", left=1, right=0))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(blanks), decoders.Sequence(back)
    return tokenizer


def _added_tokens(file: GgufFile, vocabulary: Vocabulary) -> dict[str, AddedToken]:
    """The tokens that are cut out of a text, with the blanks that they take with them."""
    name = _text(file, "general.name").lower()
    before = _takes_blanks_before(_text(file, "tokenizer.ggml.pre"), name)
    phi3 = "phi-3" in name or "phi3" in name
    return {
        token: AddedToken(
            token,
            special=kind in SPECIAL,
            normalized=False,
            lstrip=token == before,
            rstrip=phi3 and token not in _PHI3_KEEPS,
        )
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in CUT_OUT
    }


def _takes_blanks_before(pre: str, name: str) -> str | None:
    """The token that takes the blanks before it; no key says so, llama.cpp knows these models by name."""
    if any(part in pre for part in ("jina-v2-de", "jina-v2-es", "jina-v2-code")):
        return "<mask>"
    return "[MASK]" if "modern-bert" in name else None


def _templates(file: GgufFile) -> str | dict[str, str] | None:
    """The chat template; with the one for conversations with tools, where the file has another for them, by names."""
    own, with_tools = _text(file, TEMPLATE), _text(file, f"{TEMPLATE}.{WITH_TOOLS}")
    return {"default": own or with_tools, WITH_TOOLS: with_tools} if with_tools else own or None


def _flag(file: GgufFile, name: str, default: bool) -> bool:
    value = file.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{name}: got {value!r}, expected true or false")
    return value


def _text(file: GgufFile, key: str) -> str:
    value = file.metadata.get(key, "")
    if not isinstance(value, str):
        raise CheckpointError(f"{file.path}: {key}: got {reprlib.repr(value)}, expected text")
    return value
