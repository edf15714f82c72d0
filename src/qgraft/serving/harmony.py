"""Answers of gpt-oss, whose every part says what it is: OpenAI's harmony format.

    <|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>
    <|channel|>commentary to=functions.time <|constrain|>json<|message|>{"at": "Rome"}<|call|>

What stands in the channel analysis is reasoning, in final the answer; commentary is for the user, too, unless it is addressed
to a function, which makes it a call. The address may stand before the channel, as the model's own template writes it.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

from qgraft.data.messages import Call
from qgraft.serving.call_arguments import json_at, named_call
from qgraft.serving.tool_calls import CallFormat, overlap

CHANNEL, MESSAGE, END, START = "<|channel|>", "<|message|>", "<|end|>", "<|start|>"
FINAL = f"{CHANNEL}final{MESSAGE}"  # behind which an answer without reasoning begins
_CHANNEL, _ADDRESS = re.compile(re.escape(CHANNEL) + r"\s*(\w+)"), re.compile(r"to=functions\.([\w.-]+)")


def writes_harmony(tokens: Collection[str]) -> bool:
    """Whether a model with these tokens of its own writes so."""
    return {CHANNEL, MESSAGE, START} <= {*tokens}


@dataclass
class HarmonyReader:
    """An answer that is being written; as AnswerReader.

    Attributes:
        names: the request's tools, maybe with the schemas of their parameters.
        final: whether the prompt ends in FINAL.
    """

    names: Collection[str] = ()
    final: bool = False
    calls: tuple[Call, ...] = ()
    unfinished: bool = False
    thinking: ClassVar[bool] = False
    format: ClassVar[CallFormat | None] = None
    keeps_special: ClassVar[bool] = True
    reasons: ClassVar[bool] = True
    open: ClassVar[str] = ""
    close: ClassVar[str] = ""
    _held: str = field(default="", init=False)
    _kind: str = field(default="", init=False)  # of the part that is being read; "" in its header
    _said: set[str] = field(default_factory=set, init=False)

    def push(self, text: str, last: bool = False, cut: bool = False) -> tuple[str, str]:
        """(more reasoning, more content) that can be shown now; arguments as of AnswerReader."""
        self._held += text
        shown = {"reasoning": "", "content": ""}
        if self.final and not self._said:
            self._kind, self._said = "content", {"content"}
        while self._step(shown, last, cut):
            pass
        return shown["reasoning"], shown["content"]

    def _step(self, shown: dict[str, str], last: bool, cut: bool) -> bool:
        """Read to the next border; whether there may be another one."""
        if not self._kind:
            header, found, rest = self._held.partition(MESSAGE)
            if not found:
                if last and not cut and self._held.strip() and CHANNEL not in self._held:
                    shown["content"], self._held = shown["content"] + self._held, ""
                return False
            self._kind, self._held = self._kind_of(header), rest
            if self._kind in self._said and self._kind in shown:
                shown[self._kind] += "\n"
            self._said.add(self._kind)
            return True
        at = min((at for mark in (END, START) if (at := self._held.find(mark)) >= 0), default=-1)
        if self._kind in shown:
            kept = 0 if at >= 0 or last else max(overlap(self._held, mark) for mark in (END, START))
            stop = at if at >= 0 else len(self._held) - kept
            shown[self._kind] += self._held[:stop]
            self._held = self._held[stop:]
            at = 0 if at >= 0 else -1
        elif at >= 0 or last:
            shown["content"] += self._called(self._held if at < 0 else self._held[:at], cut and at < 0)
        if at < 0:
            return False
        self._held, self._kind = self._held[at:].removeprefix(END), ""
        return True

    def _kind_of(self, header: str) -> str:
        """reasoning, content, or a function's name behind a blank."""
        channel, address = _CHANNEL.search(header), _ADDRESS.search(header)
        if address:
            return f" {address[1]}"
        return "content" if channel is None or channel[1] in ("final", "commentary") else "reasoning"

    def _called(self, arguments: str, cut: bool) -> str:
        """Take a call; what is shown of it, where it is none."""
        name, whole = self._kind.strip(), json_at(arguments, 0)
        call = None if whole is None else named_call(name, whole[0], self.names)
        if call is None and cut and name in self.names:
            self.unfinished, call = True, Call(name, arguments.strip())
        self.calls += () if call is None else (call,)
        return "" if call is not None else f"to=functions.{name} {arguments}"
