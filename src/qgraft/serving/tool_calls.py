"""Calls of tools and reasoning, read back out of what a model wrote.

How a model writes calls is in its chat template, the one that asked it: it is rendered once with a call of our own, and
around the call stands what the model writes around its calls.

    Qwen, Hermes     <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>        object
    Llama 3          {"name": "f", "parameters": {...}}                                   object, nothing before it
    Mistral          [TOOL_CALLS] [{"name": "f", "arguments": {...}}]                     list of objects
    GLM-4            f\\n{...}                                                             name, then arguments
    Qwen 3.5         <tool_call>\\n<function=f>\\n<parameter=key>\\nvalue\\n</parameter>\\n</function>\\n</tool_call>     tags
    GLM-4.5          <tool_call>f\\n<arg_key>key</arg_key>\\n<arg_value>value</arg_value>\\n</tool_call>              tags
    Gemma 4          <|tool_call>call:f{key:<|"|>value<|"|>}<tool_call|>                    braces
    ChatGLM3         f\\n ```python\\ntool_call(key='value')\\n```                          name, then Python's keywords

A call counts only if it names one of the request's tools and its arguments are a JSON object; else it is text like any
other. One that max_tokens or a stop string cuts is a call with as much of its arguments as there is, as OpenAI tells it;
where not even its name is whole, it is left out. The same text with a function's name and its arguments' schema is the form
of an answer that must be a call (grammars.py). Reasoning is what stands between <think> and </think> at the beginning of an
answer; some templates write the first of these themselves.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qgraft.data.messages import Call, Message, Tool
from qgraft.errors import OptionError, UnsupportedError
from qgraft.serving.call_arguments import begun_keywords, json_at, keywords_at, named_call, object_call
from qgraft.serving.fields import shown
from qgraft.serving.grammars import CallText
from qgraft.serving.tagged_arguments import Braces, Tags

if TYPE_CHECKING:
    pass

OPEN, CLOSE = "<think>", "</think>"
_BEGUN = re.compile(  # of a call as an object, alone or in a list: its name, up to its arguments
    r'\[?\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?(?:"function"\s*:\s*\{\s*)?"name"\s*:\s*"([^"\\]+)"\s*'
    r'(?:\Z|,\s*(?:\Z|"\w*\Z|"(?:arguments|parameters)"\s*(?:\Z|:\s*(?=\{|\Z))))'
)
_PART = re.compile(r'\[?\s*(?:\{\s*("[^"]*("(\s*:\s*("[^"]*)?)?)?)?)?')  # of a call whose name is not whole


@dataclass(frozen=True)
class CallFormat:
    """How a template writes calls.

    Attributes:
        before, after: what stands around a call, or around the list of them.
        separate: whether the name stands alone, `between` it and the arguments.
        written: a call letter for letter: what stands before the name, between it and the arguments, and behind them;
            None where the name comes last.
        repeats: whether calls may follow one another.
        keywords: whether arguments are Python's keywords.
        tags: of arguments that stand between some, or in Gemma's braces (tagged_arguments.py).
        turn: what stands between a text and a call, or between calls, where that is a token of its own: GLM's <|assistant|>.
        joint: what stands between one call and the next, from the end of arguments to the beginning of a call.
        ids: how many letters and digits an id of a call has; 0 for any id.
    """

    before: str
    after: str
    separate: bool = False
    between: str = ""
    written: tuple[str, str, str] | None = None
    repeats: bool = False
    keywords: bool = False
    turn: str = ""
    joint: str = ""
    ids: int = 0
    tags: Tags | Braces | None = None

    @property
    def mark(self) -> str:
        """What tells where calls begin; "" where they begin like any JSON."""
        return self.before.strip()

    @property
    def _named(self) -> str:
        """A name that stands alone, and what is between it and its arguments, with whatever blanks."""
        return r"([\w.-]+)\s*" + _blanks_aside(self.between)

    def may_begin(self, text: str) -> int:
        """Where in the text calls may begin, so that what follows is not shown as text; its length for nowhere."""
        if self.mark:
            at = text.find(self.mark)
            return at if at >= 0 else len(text) - overlap(text, self.mark)
        return 0 if not text.strip() or text.lstrip()[0] in "{[" or self.separate else len(text)

    def read(self, text: str, names: Collection[str], cut: bool = False) -> tuple[str, tuple[Call, ...], bool]:
        """(the text without its calls, the calls, whether the last one is cut off). What is none stays text.

        Args:
            cut: whether the text may end in the middle of a call.
        """
        if self.turn:
            shown, calls = self._of_turns(text.split(self.turn), names)
            begun = self._cut(shown, names) if cut else None
        else:
            said, calls, tail = self._around(text, names)
            begun = self._cut(tail, names, behind=bool(calls)) if cut else None
            tail = tail if begun is None else begun[0]
            shown = "".join(each for each in (*said, tail) if each.strip()) if calls else text
            shown = shown.rstrip() if calls and not tail.strip() else shown
        if begun is None:
            return shown, tuple(calls), False
        shown = shown if calls and not self.turn else begun[0]
        return shown, (*calls, *([] if begun[1] is None else [begun[1]])), True

    def _around(self, text: str, names: Collection[str]) -> tuple[list[str], list[Call], str]:
        """(the texts before calls, the calls, the text behind them)."""
        said, calls, place, at = list[str](), list[Call](), 0, 0
        while at < len(text) and (at := text.find(self.mark, at)) >= 0:
            found = self._one(text[at:], names)
            if found is not None:
                said.append(text[place:at])
                calls += found[0]
                place = at = at + found[1]
            elif not self.mark:
                break
            else:
                at += len(self.mark)
        return said, calls, text[place:]

    def _of_turns(self, parts: list[str], names: Collection[str]) -> tuple[str, list[Call]]:
        said, calls = list[str](), list[Call]()
        for part in parts:
            found = self._one(part, names)
            if found is not None and not part[found[1] :].strip():
                calls += found[0]
            else:
                said.append(part)
        return self.turn.join(said).rstrip() if calls else self.turn.join(said), calls

    def _cut(self, text: str, names: Collection[str], behind: bool = False) -> tuple[str, Call | None] | None:
        """(the text before it, the call) where the text ends in the middle of a call; None where it does not.

        No call where its name is not whole.

        Args:
            behind: whether the text stands behind a call, so that the next one may begin as such do.
        """
        if behind and self.joint and (joint := re.match(r"\s*" + _blanks_aside(self.joint), text)):
            return self._begun("", text[joint.end() :].lstrip(), names, marked=True)
        if behind and self.joint and text.strip() and "".join(self.joint.split()).startswith("".join(text.split())):
            return "", None
        at = text.rfind(self.mark) if self.mark else max(text.rfind(self.turn), 0) if self.turn else 0
        if at < 0:
            return None
        if self.turn:
            text = text[:at] + text[at:].removeprefix(self.turn)
        return self._begun(text[:at].rstrip(), text[at + len(self.mark) :].lstrip(), names, marked=bool(self.mark))

    def _begun(self, lead: str, rest: str, names: Collection[str], *, marked: bool) -> tuple[str, Call | None] | None:
        """As _cut: of the text before a call, and what there is of the call."""
        named = self._named + ("" if self.keywords or self.tags else r"(?=\{)")
        found = re.match(named, rest) if self.separate else _BEGUN.match(rest)
        if found is None or (found[1] not in names and found.end() == len(rest)):
            return (lead, None) if marked and self._is_beginning(rest, names) else None
        if found[1] not in names:
            return None
        arguments = rest[found.end() :]
        if self.tags is not None:
            return lead, Call(found[1], self.tags.begun(arguments, _schema(names, found[1])))
        if self.keywords:
            return lead, Call(found[1], begun_keywords(arguments))
        whole = json_at(arguments, 0)
        return lead, Call(found[1], arguments if whole is None else arguments[: whole[1]])

    def _is_beginning(self, text: str, names: Collection[str]) -> bool:
        """Whether a call may begin so, whose name is not whole, or its arguments not begun."""
        if not self.separate:
            return _PART.fullmatch(text) is not None
        name, between = re.match(r"([\w.-]*)\s*(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        begun = any(each.startswith(name) for each in names) if not between else name in names
        return begun and "".join(self.between.split()).startswith("".join(between.split()))

    def _one(self, text: str, names: Collection[str]) -> tuple[list[Call], int] | None:
        """The calls at the beginning of the text, and where they end."""
        start = len(text) - len(text.lstrip())
        if self.mark:
            if not text.startswith(self.mark, start):
                return None
            start += len(self.mark)
        found = self.call_at(text, start, names)
        if found is None:
            return None
        calls, stop = found
        while self.joint and (joint := re.compile(r"\s*" + _blanks_aside(self.joint)).match(text, stop)):
            more = self.call_at(text, joint.end(), names)
            if more is None:
                if self.joint.strip() == ",":  # of a list, which counts whole or not at all
                    return None
                break
            calls, stop = calls + more[0], more[1]
        tail = self.after.strip()
        blanks = len(text[stop:]) - len(text[stop:].lstrip())
        if tail and text.startswith(tail, stop + blanks):
            stop += blanks + len(tail)
        elif tail.startswith(text[stop + blanks :].rstrip()):  # the answer ends in the middle of it
            stop = len(text)
        return calls, stop

    def call_at(self, text: str, start: int, names: Collection[str]) -> tuple[list[Call], int] | None:
        """The call that begins there, or the list of them, and where its arguments end."""
        if self.separate:
            found = re.compile(r"\s*" + self._named).match(text, start)
            if found is None:
                return None
            if self.tags is not None:
                return self._tagged_at(text, found, names)
            value = (keywords_at if self.keywords else json_at)(text, found.end())
            calls = [named_call(found[1], value[0], names)] if value is not None else [None]
        else:
            value = json_at(text, start)
            each = value[0] if value is not None and isinstance(value[0], list) else [value and value[0]]
            calls = [object_call(one, names) for one in each]
        known = [call for call in calls if call is not None]
        return None if value is None or not known or len(known) < len(calls) else (known, value[1])

    def _tagged_at(self, text: str, found: re.Match[str], names: Collection[str]) -> tuple[list[Call], int] | None:
        """As call_at: of a call whose arguments stand between tags, up to the tag that closes it."""
        assert self.tags is not None
        values, stop = self.tags.at(text, found.end(), _schema(names, found[1]))
        call = named_call(found[1], values, names)
        closes = re.compile(r"\s*" + re.escape(self.after.split()[0] if self.after.strip() else "")).match(text, stop)
        return None if call is None or closes is None else ([call], stop)

    def with_ids(self, turns: Sequence[Message]) -> Sequence[Message]:
        """The turns with ids of calls that the template takes, where it takes some alone: other servers have longer ones."""
        if not self.ids:
            return turns
        return [
            replace(turn, call_id=turn.call_id and self._id(turn.call_id),
                    calls=tuple(replace(call, id=call.id and self._id(call.id)) for call in turn.calls))
            for turn in turns
        ]  # fmt: skip

    def _id(self, given: str) -> str:
        if re.fullmatch(rf"[a-zA-Z0-9]{{{self.ids}}}", given):
            return given
        return hashlib.sha256(given.encode()).hexdigest()[: self.ids]

    def new_id(self) -> str | None:
        """An id for a call that the template takes; None where it takes any."""
        return secrets.token_hex(self.ids)[: self.ids] if self.ids else None


def _blanks_aside(text: str) -> str:
    """A pattern of this text, with any blanks or none where it has some, and behind it."""
    return "".join(re.escape(word) + r"\s*" for word in text.split())


def _schema(names: Collection[str], name: str) -> object:
    """Of the parameters of a function, where the names come with them."""
    return names.get(name) if isinstance(names, Mapping) else None


def call_texts(
    form: CallFormat | None, tools: Sequence[Tool], names: Collection[str] = (), *, strict: bool = False
) -> tuple[CallText, ...]:
    """Calls of these tools as answers must write them; of those with these names, where there are any.

    Args:
        strict: arguments of tools that are not `strict` may be any object.

    Raises UnsupportedError where it is not known how a call is written, OptionError for arguments that are no object.
    """
    found = []
    for number, function in enumerate(tool["function"] for tool in tools):
        if names and function["name"] not in names:
            continue
        if form is not None and form.keywords:
            raise UnsupportedError(
                "the chat template writes arguments as Python's keywords, which no answer is held to"
            )
        if form is None or form.written is None:
            raise UnsupportedError("how the chat template writes calls is not known here")
        where = f"tools[{number}].function.parameters"
        schema = function.get("parameters") if function.get("strict") or not strict else None
        schema = {} if schema is None else schema
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            kind = shown(schema.get("type") if isinstance(schema, dict) else schema)
            raise OptionError(f"{where}: got {kind}, expected the schema of an object, as arguments are one")
        before, between, after = form.written
        name = function["name"] if form.separate else json.dumps(function["name"], ensure_ascii=False)[1:-1]
        found.append(CallText(before + name + between, {"type": "object", **schema}, after, where))
    return tuple(found)


def overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
