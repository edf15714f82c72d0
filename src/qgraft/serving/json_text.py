"""Whether a text can still become a JSON object: character by character, for answers that are to be one.

A state is what is open and what may come next:

    ("{", "[")  "value"      within a list within an object, at the beginning of a value
    ()          "end"        the object is complete

Numbers and words (true, false, null) are followed through their letters, strings through their escapes. What may be between
values is blank, and not much of it: a model that has nothing to say would write blanks for ever.
"""

from dataclasses import dataclass

_BLANK, BLANKS = " \t\n\r", 24  # of these, one after another
_WORDS = {"t": "rue", "f": "alse", "n": "ull"}
_HEX = set("0123456789abcdefABCDEF")
_DIGITS = set("0123456789")
# mode within a number -> what each kind of character leads to; those in _ENDS may be its end
_NUMBER = {
    "minus": {"0": "zero", "digit": "whole"}, "zero": {".": "point", "e": "exponent"},
    "whole": {"0": "whole", "digit": "whole", ".": "point", "e": "exponent"}, "point": {"0": "part", "digit": "part"},
    "part": {"0": "part", "digit": "part", "e": "exponent"},
    "exponent": {"0": "power", "digit": "power", "sign": "signed"}, "signed": {"0": "power", "digit": "power"},
    "power": {"0": "power", "digit": "power"},
}  # fmt: skip
_ENDS = {"zero", "whole", "part", "power"}


@dataclass(frozen=True)
class JsonText:
    """The state behind some text.

    Attributes:
        open: the brackets that are open, the innermost last.
        mode: what may come next.
        rest: letters of a word, or hexadecimal digits of an escape, that are missing.
        is_key: whether the string is a key.
        blanks: how many there are, one after another.
        mark: what ends the text before the object; it begins with a character that is not in it again.
    """

    open: tuple[str, ...] = ()
    mode: str = "object"
    rest: str = ""
    is_key: bool = False
    blanks: int = 0
    mark: str = ""

    @classmethod
    def behind(cls, mark: str) -> "JsonText":
        """The state before an object that comes after other text, behind this mark, such as </think>."""
        return cls((), "before", mark, mark=mark)

    @property
    def complete(self) -> bool:
        """Whether the text is an object."""
        return self.mode == "end" and not self.open

    @property
    def in_string(self) -> bool:
        """Whether any character may come next, so that a part of one may."""
        return self.mode in ("string", "before")

    def after(self, text: str) -> "JsonText | None":
        """The state behind more text; None where that is the beginning of no object."""
        state: JsonText | None = self
        for character in text:
            if state is None:
                return None
            state = state._next(character)
        return state

    def _next(self, c: str) -> "JsonText | None":
        if self.mode == "before":
            rest = self.rest[1:] if c == self.rest[0] else self.mark[1:] if c == self.mark[0] else self.mark
            return JsonText((), "before", rest, mark=self.mark) if rest else JsonText()
        if self.mode in ("string", "escape", "hex"):
            return self._in_string(c)
        if self.mode == "word":
            if c != self.rest[0]:
                return None
            return JsonText(self.open, "word", self.rest[1:]) if self.rest[1:] else JsonText(self.open, "end")
        if self.mode in _NUMBER:
            kind = "0" if c == "0" else "digit" if c in _DIGITS else "e" if c in "eE" else "sign" if c in "+-" else c
            if (mode := _NUMBER[self.mode].get(kind)) is not None:
                return JsonText(self.open, mode)
            return JsonText(self.open, "end")._next(c) if self.mode in _ENDS else None
        if c in _BLANK:
            return JsonText(self.open, self.mode, blanks=self.blanks + 1) if self.blanks < BLANKS else None
        return self._between(c)

    def _in_string(self, c: str) -> "JsonText | None":
        if self.mode == "hex":
            rest = self.rest[1:]
            return JsonText(self.open, "hex" if rest else "string", rest, self.is_key) if c in _HEX else None
        if self.mode == "escape":
            if c == "u":
                return JsonText(self.open, "hex", "xxxx", self.is_key)
            return JsonText(self.open, "string", "", self.is_key) if c in '"\\/bfnrt' else None
        if c == '"':
            return JsonText(self.open, "colon" if self.is_key else "end")
        if c == "\\":
            return JsonText(self.open, "escape", "", self.is_key)
        return None if c < " " else self

    def _between(self, c: str) -> "JsonText | None":
        """Behind a bracket, a comma, a colon or a value."""
        inner = self.open[-1:] or ("",)
        if self.mode == "object":
            return JsonText(("{",), "first key") if c == "{" else None
        if self.mode in ("first key", "key"):
            if c == '"':
                return JsonText(self.open, "string", "", True)
            return JsonText(self.open[:-1], "end") if c == "}" and self.mode == "first key" else None
        if self.mode == "colon":
            return JsonText(self.open, "value") if c == ":" else None
        if self.mode == "end":
            if c == "," and inner[0]:
                return JsonText(self.open, "key" if inner[0] == "{" else "value")
            closes = {"{": "}", "[": "]"}.get(inner[0])
            return JsonText(self.open[:-1], "end") if c == closes else None
        if self.mode == "first value" and c == "]":
            return JsonText(self.open[:-1], "end")
        return self._value(c)

    def _value(self, c: str) -> "JsonText | None":
        if c in "{[":
            return JsonText((*self.open, c), "first key" if c == "{" else "first value")
        if c == '"':
            return JsonText(self.open, "string")
        if c in _WORDS:
            return JsonText(self.open, "word", _WORDS[c])
        mode = "minus" if c == "-" else "zero" if c == "0" else "whole" if c in _DIGITS else None
        return None if mode is None else JsonText(self.open, mode)
