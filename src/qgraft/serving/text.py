"""The text of an answer while it is written: what can be shown of it already, and whether it has come to a stop string.

What an id means depends on those before it: a character may be several ids, sentencepiece drops the blank at the beginning,
and some tokenizers take blanks before punctuation out again. So all ids are decoded, and what is shown is what further ids
cannot change: nothing that ends in a part of a character; of a vocabulary whose bytes are text only together, none of those
at the end; with such a tokenizer, nothing of the last word; nothing that may be the beginning of a stop string; of an answer
that is cleaned (ChatGLM's), nothing that this may still change. What has been shown is the answer: in a stream and in one
piece it is the same text.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LAST_WORD = re.compile(r"\s+\S*\Z")
_WIDE = re.compile(r".*[\n\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]", re.DOTALL)
LOCAL = 16  # characters at the end of a text that cleaning may change when more comes
MOST, KEPT = 64, 8  # ids that are decoded each time; so many of them stay where others are forgotten


def until_word(text: str) -> int:
    """Where the last word of a text begins, with the blanks before it; line ends, Chinese and Japanese are no words."""
    word, wide = _LAST_WORD.search(text), _WIDE.match(text)
    return max(word.start() if word else 0, wide.end() if wide else 0)


def joined_ids(tokenizer: "PreTrainedTokenizerBase", skip_special_tokens: bool = True) -> frozenset[int]:
    """Ids of single bytes where a run of them is text only as a whole; and those that are left out of such a run.

    A vocabulary of sentencepiece has a piece for each byte, for what no other piece is. In the libraries' decoder one byte
    that belongs to no character makes \ufffd of all bytes of the run, those of the characters before it included.
    """
    ids: Any = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    letter, other = ids[0x41], ids[0xFF]
    if {letter, other} & {None, tokenizer.unk_token_id} or str(tokenizer.decode([letter, other])).endswith("A\ufffd"):
        return frozenset()
    return frozenset(ids) | frozenset(tokenizer.all_special_ids if skip_special_tokens else ())


class AnswerText:
    """One answer.

    Args:
        decode: ids -> text, of all of them.
        stop: texts that end the answer; they are not shown.
        rewrites: whether the tokenizer may change blanks that it has written (clean_up_tokenization_spaces).
        clean: what becomes of the whole text of an answer; it looks no farther than LOCAL characters.
        joined: ids of which those at the end may come to mean something else, all of them; see joined_ids.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), rewrites: bool = False,
        clean: Callable[[str], str] | None = None, joined: Collection[int] = (),
    ) -> None:  # fmt: skip
        self._joined, self._run = joined, 0  # how many ids at the end are such ones
        self._clean, self._raw, self._cleaned = clean, "", 0
        self._text_of, self._stop, self.rewrites = decode, tuple(stop), rewrites
        self._ids: list[int] = []
        self._settled = 0  # characters of what self._ids decodes to that are in `text`
        self._pending = ""  # settled, and held back
        self.text = ""  # shown
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """What one more id lets be shown."""
        self._ids.append(token)
        self._run = self._run + 1 if token in self._joined else 0
        decoded = self._text_of(self._ids)
        sure = self._text_of(self._ids[: -self._run]) if self._run and not self._stops(decoded) else decoded
        whole = sure.rstrip("\ufffd") if sure.endswith("\ufffd") else sure
        shown = self._take(whole[: until_word(whole)] if self.rewrites else whole)
        if len(self._ids) > MOST and self._settled == len(decoded):
            self._begin_again()
        return shown

    def end(self) -> str:
        """The answer is complete: what is left of it."""
        if self.stopped is not None:
            return ""
        shown = self._take(self._text_of(self._ids), last=True)
        if self.stopped is None:
            shown += self._pending
            self.text += self._pending
        self._pending = ""
        return shown

    def _stops(self, decoded: str) -> bool:
        """Whether the answer ends here by a stop string, with nothing more to come that could change it."""
        return self._clean is None and any(text in self._pending + decoded[self._settled :] for text in self._stop)

    def _take(self, whole: str, last: bool = False) -> str:
        """What may be shown when `whole` is known of what the ids decode to."""
        if self.stopped is not None:
            return ""
        self._pending += self._new(whole[self._settled :], last)
        self._settled = max(len(whole), self._settled)
        found = [(at, text) for text in self._stop if (at := self._pending.find(text)) >= 0]
        if found:
            at, self.stopped = min(found)
            shown, self._pending = self._pending[:at], ""
        else:
            held = max((_overlap(self._pending, text) for text in self._stop), default=0)
            shown = self._pending[: len(self._pending) - held]
            self._pending = self._pending[len(shown) :]
        self.text += shown
        return shown

    def _new(self, text: str, last: bool) -> str:
        """What more text comes to, of which nothing changes any more."""
        if self._clean is None:
            return text
        self._raw += text
        clean = self._clean(self._raw)
        start, self._cleaned = self._cleaned, len(clean) if last else max(len(clean) - LOCAL, self._cleaned)
        return clean[start : self._cleaned]

    def _begin_again(self) -> None:
        """Forget the first ids: what they decode to is settled, and the last ones are beginning enough for those to come.

        Not where they have no text: the blank of the next one would be that of a beginning.
        """
        if kept := self._text_of(self._ids[-KEPT:]):
            self._ids, self._settled = self._ids[-KEPT:], len(kept)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
