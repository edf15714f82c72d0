"""The tokenizer of a T5's GGUF file (tokenizer.ggml.model t5): sentencepiece's unigram model, with llama.cpp's ids.

    normalize   the longest key of `precompiled_charsmap` at each place becomes its text: Unicode's NFKC and more (`Charsmap`)
    blanks      become low lines; with remove_extra_whitespaces one for several, none at the ends, one in front;
                with add_space_prefix one in front
    cut         into the tokens whose scores have the largest sum; a character that is no token is unknown, and costs 10
                more than the rarest token

The `tokenizers` package does the last two alike. Its normalizer does not: it looks up what a reader sees as one character,
or single ones, and takes the shortest key, where sentencepiece and llama.cpp take the longest; so かﾞ stays two there. Where
the two differ, a text goes in that its normalizer makes the right one of (`Exact`); a folder that save_pretrained writes
reads such texts as transformers' own T5 tokenizer does.

What llama.cpp never makes of a text that does not spell it beforehand (control tokens, unused ones with the lowest of all
scores) has a place in the table of the package too. A text that would be normalized to one is refused.

Source: llm_tokenizer_ugm in llama.cpp's src/llama-vocab.cpp (2026-10), there after sentencepiece's normalizer.cc.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers

from qgraft.checkpoints.gguf_file import GgufFile
from qgraft.checkpoints.gguf_vocabulary import CUT_OUT, NORMAL, UNUSED, USER_DEFINED, Vocabulary
from qgraft.errors import CheckpointError, DataError

CHARSMAP = "tokenizer.ggml.precompiled_charsmap"
LOW_LINE = "\u2581"  # sentencepiece's blank
SEVERAL, IN_FRONT = " {2,}", r"\A(?= *[^ ])"  # blanks that become one; where one is put in front
_VALUE = 1 << 31  # of an entry that holds a value and not a byte's place


@dataclass(frozen=True, eq=False)
class Charsmap:
    """Keys and the texts that they become: a double array (darts-clone) over UTF-8 bytes, and texts that end in zero bytes.

    An entry of 32 bits: the byte that leads to it (bits 0-7), whether a key ends there (8), where its children are (from 9
    on); or, with bit 31, where in `texts` the value of a key begins.
    """

    raw: bytes = field(repr=False)
    entries: memoryview = field(repr=False)  # of uint32
    texts: bytes = field(repr=False)
    known: dict[str, str | None] = field(default_factory=dict, repr=False)  # a character -> its text; None: keys go on

    def __reduce__(self) -> tuple[Any, tuple[str, bytes]]:
        return read_charsmap, ("", self.raw)

    @cached_property
    def leaves_ascii(self) -> bool:
        """Whether a text of printable ASCII stays as it is."""
        printable = [chr(code) for code in range(32, 127)]
        return all(self._longest(one + other, 0) == (0, "") for one in printable for other in ("", *printable))

    def leaves(self, text: str) -> bool:
        """Whether a text is of characters that are seen at a glance to stay."""
        return text.isascii() and text.isprintable() and self.leaves_ascii

    def normalize(self, text: str) -> str:
        """The text with the longest key at each place, from left to right, replaced."""
        if self.leaves(text):
            return text
        parts, at = list[str](), 0
        while at < len(text):
            found = self.known[text[at]] if text[at] in self.known else self._learn(text[at])
            if found is not None:
                parts.append(found)
                at += 1
                continue
            length, replacement = self._longest(text, at)
            parts.append(replacement if length else text[at])
            at += length or 1
        return "".join(parts)

    def _learn(self, character: str) -> str | None:
        """What a character becomes whatever follows; None where that matters."""
        place = self._walk(self._children(0), character.encode())[0]
        goes_on = place is not None and any(
            self.entries[place ^ byte] & (_VALUE | 255) == byte for byte in range(1, 256)
        )
        if not goes_on:
            length, replacement = self._longest(character, 0)
            self.known[character] = replacement if length else character
        else:
            self.known[character] = None
        return self.known[character]

    def _longest(self, text: str, at: int) -> tuple[int, str]:
        """(Characters of the longest key at `at`, its text); (0, "") where none begins there."""
        place, found = self._children(0), (0, "")
        for end in range(at, len(text)):
            behind, value = self._walk(place, text[end].encode())
            if behind is None:
                break
            place = behind
            if value is not None:
                found = (end + 1 - at, self.texts[value : self.texts.index(0, value)].decode())
        return found

    def _walk(self, place: int, character: bytes) -> tuple[int | None, int | None]:
        """(Where the children are behind these bytes; None where no key goes on so, the value of a key that ends here)."""
        value = None
        for byte in character:
            place ^= byte
            entry = self.entries[place]
            if not byte or entry & (_VALUE | 255) != byte:
                return None, None
            place ^= self._children(place)
            value = self.entries[place] & ~_VALUE if entry & 256 else None
        return place, value

    def _children(self, place: int) -> int:
        entry = self.entries[place]
        return (entry >> 10) << ((entry & 512) >> 6)


def read_charsmap(path: object, raw: bytes) -> Charsmap | None:
    """The table in the bytes of a file's key; None for none. Raises CheckpointError where a walk could leave it."""
    if not raw:
        return None
    nbytes = int.from_bytes(raw[:4], "little")
    body, texts = raw[4 : 4 + nbytes], raw[4 + nbytes :]
    sound = len(raw) > 4 and nbytes > 0 and nbytes % 4 == 0 and len(body) == nbytes and texts[-1:] == b"\0"
    if sound:
        entries = torch.frombuffer(bytearray(body), dtype=torch.int32).to(torch.int64) & 0xFFFFFFFF
        is_value, values = entries >= _VALUE, entries & ~_VALUE
        children = torch.arange(len(entries)) ^ ((entries >> 10) << ((entries & 512) >> 6))
        sound = bool(((children | 255) < len(entries))[~is_value].all()) and not bool(is_value[0])
        sound = sound and bool(is_value[children[~is_value & (entries & 256 > 0)]].all())
        sound = sound and bool((values[is_value] < len(texts)).all())
        if sound:
            starts = torch.frombuffer(bytearray(texts), dtype=torch.uint8)[values[is_value]]
            sound = not bool(((starts & 0xC0) == 0x80).any())
    try:
        texts.decode()
    except UnicodeDecodeError:
        sound = False
    if not sound:
        raise CheckpointError(
            f"{path}: {CHARSMAP}: got {len(raw)} bytes that are no table of normalizations",
            hint="convert the model again",
        )
    return Charsmap(raw, memoryview(body).cast("I"), texts)


@dataclass(frozen=True, eq=False)
class Exact:
    """Makes of a text the one that the tokenizer of the `tokenizers` package gives llama.cpp's ids for.

    Attributes:
        cut_out: finds the tokens that are cut out of a text before it is normalized.
        hidden: finds the texts of tokens that no text is made of; None where there are none.
    """

    charsmap: Charsmap | None
    cut_out: re.Pattern[str] | None
    hidden: re.Pattern[str] | None

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Exact, (self.charsmap, self.cut_out, self.hidden)

    @cached_property
    def _there(self) -> Any:
        assert self.charsmap is not None
        return normalizers.Precompiled(self.charsmap.raw)

    def prepare(self, text: str) -> str:
        """Raises DataError for a text that becomes another one there, whatever goes in."""
        parts = [text] if self.cut_out is None else self.cut_out.split(text)
        return "".join(part if number % 2 else self._prepare(part) for number, part in enumerate(parts))

    def _prepare(self, part: str) -> str:
        exact = part if self.charsmap is None else self.charsmap.normalize(part)
        if self.hidden is not None and (found := self.hidden.search(exact)):
            raise DataError(
                f"the text holds {found[0]!r}, or what is normalized to it: a token that this vocabulary makes of no text",
                hint="leave it out of the text",
            )
        if self.charsmap is None or self.charsmap.leaves(part) or self._there.normalize_str(part) == exact:
            return part
        words = [(word, self.charsmap.normalize(word)) for word in part.split(" ")]
        mixed = " ".join(word if self._there.normalize_str(word) == right else right for word, right in words)
        for candidate in (mixed, exact):
            whole = self.cut_out is None or not self.cut_out.search(candidate)
            if whole and self._there.normalize_str(candidate) == exact:
                return candidate
        raise DataError(
            f"{part[:40]!r}: what its characters are normalized to would be normalized once more",
            hint="normalize the text beforehand: unicodedata.normalize('NFKC', text)",
        )


def unigram(file: GgufFile, vocabulary: Vocabulary) -> tuple[Tokenizer, Exact]:
    """The tokenizer, and what texts go through on their way into it.

    Raises CheckpointError where its parts are none, or do not fit together.
    """
    scores: list[float] = file.metadata.get("tokenizer.ggml.scores") or [0.0] * len(vocabulary.tokens)
    if not all(map(math.isfinite, scores)):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.scores: got one that is no number, expected finite numbers")
    normal = [score for score, kind in zip(scores, vocabulary.kinds, strict=True) if kind == NORMAL]
    if not normal or "unk" not in vocabulary.roles:
        raise CheckpointError(f"{file.path}: expected tokens that texts are made of, and one for what is unknown")
    rarest, pieces, hidden = min(normal), list[tuple[str, float]](), list[str]()
    for token, score, kind in zip(vocabulary.tokens, scores, vocabulary.kinds, strict=True):
        matched = kind in (NORMAL, USER_DEFINED) or (kind == UNUSED and score >= rarest)
        pieces.append((token, 0.0 if kind == USER_DEFINED else score if matched else rarest))
        hidden += [] if matched else [token]
    charsmap = read_charsmap(file.path, bytes(each & 255 for each in file.metadata.get(CHARSMAP, ())))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=vocabulary.roles["unk"]))
    merged, prefixed = (_flag(file, name) for name in ("remove_extra_whitespaces", "add_space_prefix"))
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(charsmap.raw)] if charsmap else []
    if merged:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(SEVERAL), " ")]
    if merged or prefixed:
        steps.append(normalizers.Replace(Regex(IN_FRONT), " "))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", LOW_LINE)])
    back: list[decoders.Decoder] = [decoders.Replace(LOW_LINE, " "), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(back + ([decoders.Strip(" ", left=1, right=0)] if merged or prefixed else []))
    cut = [token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind in CUT_OUT]
    return tokenizer, Exact(charsmap, _any_of(cut), _any_of(hidden))


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    """Finds the longest of these texts, in a group."""
    longest = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest))})") if longest else None


def _flag(file: GgufFile, name: str) -> bool:
    value = file.metadata.get(f"tokenizer.ggml.{name}", False)
    if not isinstance(value, bool):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{name}: got {value!r}, expected true or false")
    return value
