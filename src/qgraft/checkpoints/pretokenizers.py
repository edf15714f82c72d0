r"""How text is cut before its pieces are merged: the table behind a GGUF file's `tokenizer.ggml.pre`.

A byte-level BPE never merges across a cut, so two models with the same vocabulary and other cuts have other ids. A file
does not hold its cuts: it names them, and whoever reads it must know the name. A name that is not here is refused;
guessing gives ids that the model has not seen, and nobody notices.

An entry lists regular expressions, applied one after another. Each cuts what the former ones left into its matches and
what lies between them, all of which are kept:

    smollm    \p{N}, then GPT-2's      " a1234, b"  ->  " a" "1" "2" "3" "4" "," " b"
    llama-bpe \p{N}{1,3} among others  " a1234, b"  ->  " a" "123" "4" "," " b"

Source of the names and of what they mean: `llama_vocab::impl::load` and `llm_tokenizer_bpe` in llama.cpp's
src/llama-vocab.cpp (2026-10). Its expressions are rewritten for std::regex, which has no Unicode: letters become one class
whatever their case, marks are left out where they cost time, `(?i:'s)` knows ASCII only. Where the tokenizer.json that a
model was published with is known (llama.cpp quotes it beside its own expression, or transformers has it in code), its
expression stands here; docs/formats.md lists where ids then differ from llama.cpp's. The same goes for `nfc`: Qwen,
Cohere and GPT-NeoX compose characters first (`é` written as e and an accent becomes one character), llama.cpp never does.
"""

from dataclasses import dataclass, replace

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _like_gpt4(numbers: str, *, short: str = _SHORT + "|", word: str = _WORD, blanks: str = _BLANKS) -> str:
    """The expression of cl100k and its many descendants, which differ in how long a number may be."""
    return rf"{short}{word}|{numbers}|{_SIGNS}[\r\n]*|{blanks}"


def _like_gpt4o(
    numbers: str, short: str = _SHORT + "?", upper: str = _UPPER, lower: str = _LOWER, end: str = "/"
) -> str:
    """That of o200k: words also end where small letters are followed by capitals."""
    front = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{front}[{upper}]*[{lower}]+{short}|{front}[{upper}]+[{lower}]*{short}"
    return rf"{words}|{numbers}|{_SIGNS}[\r\n{end}]*|{_BLANKS}"


_LETTERS_OF_DEEPSEEK = (  # \p{Lu}, \p{Ll} and \p{Lt} as its tokenizer.json spells them out
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK, _KANA = "\u4e00-\u9fa5", "\u3040-\u309f\u30a0-\u30ff"
_CJK_KOREAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_ASCII_SIGN_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_DEEPSEEK3 = rf"{_ASCII_SIGN_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"
_SPARK = rf"{_ASCII_SIGN_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
_ASIAN_OF_AFMOE = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff"
    "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_OF_YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    f"|[\u3105-\u312f]+|[{_CJK}{_KANA}]+"
)
_NOT_HAN = r"&&[^\p{Han}]"
LINES = r"[^\n]+|[\n]+"


@dataclass(frozen=True)
class PreTokenizer:
    """What a name in `tokenizer.ggml.pre` says.

    Attributes:
        splits: regular expressions in the syntax of Oniguruma, which the tokenizers package uses, in their order.
        ignore_merges: a stretch of text that is a token as a whole is that token, whatever the merges would make of it.
        add_bos: whether a text begins with the bos token, where the file has no key `add_bos_token`.
        nfc: characters are composed first.
        raw: tokens are written in UTF-8 with a low line for a blank and <0x0A> for a byte, not in GPT-2's letters for bytes.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False
    raw: bool = False


_DIGITS_GPT2 = PreTokenizer((r"\p{N}", GPT2))
_GPT2 = PreTokenizer((GPT2,))
_LLAMA3 = PreTokenizer((_like_gpt4(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer((_like_gpt4(r"\p{N}"),))
_DEEPSEEK_V3 = PreTokenizer((r"\p{N}{1,3}", f"[{_CJK}{_KANA}]+", _DEEPSEEK3))
_GPT4O = PreTokenizer((_like_gpt4o(r"\p{N}{1,3}"),))
_BLOOM = PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",))
_GEMMA4 = PreTokenizer((LINES,), add_bos=True, raw=True)
_JAIS2_BLANKS = (
    r"\s*[\r\n]+|" + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")) + r"|\s{1}"
)

_ENTRIES: dict[str, PreTokenizer] = {  # names that mean the same, separated by blanks
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe gigachat a.x-4.0 mellum "
    "modern-bert exaone4 jais trillion granite-docling": _GPT2,
    "mpt olmo": replace(_GPT2, nfc=True),
    "starcoder refact smollm codeshell exaone minerva-7b mellum2": _DIGITS_GPT2,
    "command-r": replace(_DIGITS_GPT2, nfc=True),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": replace(
        _LLAMA3, ignore_merges=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": _LLAMA3,
    "glm4": replace(_LLAMA3, ignore_merges=True),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _like_gpt4(r"\p{N}+")), ignore_merges=True),
    "jais-2": PreTokenizer((_like_gpt4(r"\p{N}{1,3}", blanks=_JAIS2_BLANKS),)),
    "qwen2": replace(_QWEN2, nfc=True),
    "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": _QWEN2,
    "qwen35": PreTokenizer(
        (
            rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}",
        ),
        nfc=True,
    ),
    "ufakzeka": PreTokenizer((_like_gpt4(r"\p{N}", short=""),)),
    "laguna": PreTokenizer((LINES, _like_gpt4(r"\p{N}"))),
    "seed-coder": PreTokenizer((rf"{_SHORT}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}",)),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer(
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
            r"|\s+(?!\S)|\s+",
        )
    ),
    "exaone-moe": PreTokenizer(
        (
            rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|{_SIGNS}[\r\n/]?"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]", rf"\s?[{_LETTERS_OF_DEEPSEEK}]+", "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$", _CJK_KOREAN, r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_KOREAN, r"\p{N}")),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": _DEEPSEEK_V3,
    "spark2_5": PreTokenizer((r"\p{N}{1,3}", f"[{_CJK}{_KANA}]+", _SPARK, r"\p{N}")),
    "afmoe": PreTokenizer((r"\p{N}+", r"(?=(?:\p{N}{3})+(?!\p{N}))", _ASIAN_OF_AFMOE, _DEEPSEEK3)),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "youtu": PreTokenizer((_OF_YOUTU, _like_gpt4o(r"\p{N}")), ignore_merges=True),
    "tekken": PreTokenizer((_like_gpt4o(r"\p{N}", short=""),), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": _GPT4O,
    "granite-embed-multi-97m": replace(_GPT4O, ignore_merges=True),
    "tiny_aya cohere2moe": PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _like_gpt4o(r"\p{N}{1,3}"))),
    "kimi-k2": PreTokenizer(
        (
            r"[\p{Han}]+|"
            + _like_gpt4o(r"\p{N}{1,3}", upper=_UPPER + _NOT_HAN, lower=_LOWER + _NOT_HAN, end=""),
        )
    ),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]", GPT2,
        ),
        add_bos=True,
    ),
    "bloom gpt3-finnish": _BLOOM,
    "poro-chat": _BLOOM,
    "viking": replace(_BLOOM, splits=(*_BLOOM.splits, r"\p{N}")),
    "gemma4 granite-embed-multi-311m": _GEMMA4,
    "sarvam-moe": PreTokenizer((LINES,), raw=True),
}  # fmt: skip

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: entry for names, entry in _ENTRIES.items() for name in names.split()}

UNREAD = {"whitespace": "its tokens are whole words between blanks, as only models for embeddings have them"}
