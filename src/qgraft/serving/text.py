"""The text of an answer while it is written: what can be shown of it already, and whether it has come to a stop string.

What an id means depends on those before it: a character may be several ids, sentencepiece drops the blank at the beginning,
and some tokenizers take blanks before punctuation out again. So all ids are decoded, and what is shown is what further ids
cannot change: nothing that ends in a part of a character; with such a tokenizer, nothing behind the last blank; nothing that
may be the beginning of a stop string; of an answer that is cleaned (ChatGLM's), nothing that this may still change. What
has been shown is the answer: in a stream and in one piece it is the same text.
"""

import re
from collections.abc import Callable, Sequence

_LAST_WORD = re.compile(r"\s+\S*\Z")
LOCAL = 16  # characters at the end of a text that cleaning may change when more comes
MOST, KEPT = 64, 8  # ids that are decoded each time; so many of them stay where others are forgotten


class AnswerText:
    """One answer.

    Args:
        decode: ids -> text, of all of them.
        stop: texts that end the answer; they are not shown.
        rewrites: whether the tokenizer may change blanks that it has written (clean_up_tokenization_spaces).
        clean: what becomes of the whole text of an answer; it looks no farther than LOCAL characters.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), rewrites: bool = False,
        clean: Callable[[str], str] | None = None,
    ) -> None:  # fmt: skip
        self._clean, self._raw, self._cleaned = clean, "", 0
        self._text_of, self._stop, self._rewrites = decode, tuple(stop), rewrites
        self._ids: list[int] = []
        self._settled = 0  # characters of what self._ids decodes to that are in `text`
        self._pending = ""  # settled, and held back
        self.text = ""  # shown
        self.stopped: str | None = None

    def push(self, token: int) -> str:
        """What one more id lets be shown."""
        self._ids.append(token)
        decoded = self._text_of(self._ids)
        whole = decoded.rstrip("\ufffd") if decoded.endswith("\ufffd") else decoded
        if self._rewrites and (word := _LAST_WORD.search(whole)):
            whole = whole[: word.start()]
        elif self._rewrites:
            whole = ""
        shown = self._take(whole)
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
        """Forget the first ids: what they decode to is settled, and the last ones are beginning enough for those to come."""
        self._ids = self._ids[-KEPT:]
        self._settled = len(self._text_of(self._ids))


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
