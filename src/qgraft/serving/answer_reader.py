"""An answer while it is written: what of it is reasoning, what is content, and which calls of tools it has.

Reasoning is what stands between <think> and </think> at its beginning, or what other families write for these; some templates
write the first of them themselves.
Calls are read as the chat template writes them (tool_calls.py).
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from qgraft.data.messages import Call
from qgraft.serving.tool_calls import CLOSE, OPEN, CallFormat, overlap

AROUND = (  # reasoning, by the family that writes it
    (OPEN, CLOSE), ("[THINK]", "[/THINK]"), ("<|channel>thought\n", "<channel|>"), ("<seed:think>", "</seed:think>"),
)  # fmt: skip


@dataclass
class AnswerReader:
    """An answer that is being written: what of it is reasoning, what is content, which calls it has.

    Attributes:
        thinking: whether the prompt ended in <think>.
        reasons: whether the template knows reasoning at all.
        open, close: what stands around it.
        special: whether these are special tokens, which no text shows.
        format, names: how calls are written, and the request's tools, maybe with the schemas of their parameters.
        must_call: whether it is nothing but calls.
        unfinished: whether its end, maybe its last call, was cut off.
    """

    thinking: bool = False
    reasons: bool = False
    open: str = OPEN
    close: str = CLOSE
    special: bool = False
    format: CallFormat | None = None
    names: Collection[str] = ()
    must_call: bool = False
    calls: tuple[Call, ...] = ()
    unfinished: bool = False
    _state: str = field(default="beginning", init=False)
    _held: str = field(default="", init=False)
    _thought: bool = field(default=False, init=False)
    _is_text: bool = field(default=False, init=False)  # calls without a mark can only be at the beginning

    @property
    def keeps_special(self) -> bool:
        """Whether it reads special tokens, too: those around calls and around reasoning."""
        return bool(self.names) or (self.special and self.reasons)

    def push(self, text: str, last: bool = False, cut: bool = False) -> tuple[str, str]:
        """(more reasoning, more content) that can be shown now.

        Args:
            last: whether nothing follows.
            cut: whether the model would have gone on.
        """
        self._held += text
        reasoning = ""
        if self._state == "beginning":
            self._begin(last)
        if self._state == "reasoning":
            reasoning = self._reason(last)
        return reasoning, self._content(last, cut) if self._state == "content" else ""

    def _begin(self, last: bool) -> None:
        start = self._held.lstrip()
        if self.thinking:
            self._state = "reasoning"
        elif not self.reasons or not (self.open.startswith(start) or start.startswith(self.open)):
            self._state = "content"
        elif start.startswith(self.open):
            self._state, self._held = "reasoning", start[len(self.open) :]
        elif last:
            self._state = "content"

    def _reason(self, last: bool) -> str:
        thought, found, rest = self._held.partition(self.close)
        if found:
            self._state, self._held, self._thought = "content", rest, True
            return thought
        kept = 0 if last else overlap(self._held, self.close)
        thought, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return thought

    def _content(self, last: bool, cut: bool) -> str:
        if self._thought:  # the empty line behind reasoning
            self._held = self._held.lstrip("\n")
            self._thought = not self._held
        if self.format is None or not self.names or self._is_text:
            shown, self._held = self._held, ""
            return shown
        if last:
            shown, calls, self.unfinished = self.format.read(self._held, self.names, cut)
            self.calls = tuple(replace(call, id=self.format.new_id()) for call in calls)
            self._held = ""
            if cut and self.must_call and not self.unfinished:
                return ""
            return shown.replace(self.format.turn, "") if self.format.turn else shown
        at = self.format.may_begin(self._held)
        shown, self._held = self._held[:at], self._held[at:]
        self._is_text = not self.format.mark and bool(shown.strip())
        return shown
