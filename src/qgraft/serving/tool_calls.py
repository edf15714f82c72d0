"""Calls of tools and reasoning, read back out of what a model wrote.

How a model writes calls is in its chat template, the one that asked it: it is rendered once with a call of our own, and
around the call stands what the model writes around its calls.

    Qwen, Hermes     <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>        object
    Llama 3          {"name": "f", "parameters": {...}}                                   object, nothing before it
    Mistral          [TOOL_CALLS] [{"name": "f", "arguments": {...}}]                     list of objects
    GLM-4            f\\n{...}                                                             name, then arguments
    ChatGLM3         f\\n ```python\\ntool_call(key='value')\\n```                          name, then Python's keywords

A call counts only if it names one of the request's tools and its arguments are a JSON object; else it is text like any
other. One that max_tokens or a stop string cuts is a call with as much of its arguments as there is, as OpenAI tells it;
where not even its name is whole, it is left out. The same text with a function's name and its arguments' schema is the form
of an answer that must be a call (grammars.py). Reasoning is what stands between <think> and </think> at the beginning of an
answer; some templates write the first of these themselves.
"""

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qgraft.data.ends import ENDS
from qgraft.data.messages import Call, ConversationError, Message, Tool
from qgraft.data.rendering import Writer
from qgraft.data.templates import ChatTemplate
from qgraft.errors import OptionError, UnsupportedError
from qgraft.serving.call_arguments import begun_keywords, json_at, keywords_at, named_call, object_call
from qgraft.serving.fields import shown
from qgraft.serving.grammars import CallText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME, _KEY, _VALUE, _TEXT = "probe_function", "probe_key", "probe value", "A probe that says something."
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME, "description": "A probe.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}, "required": [_KEY]},
    },
}  # fmt: skip
_ID = "a1B2c3D4e"  # Mistral wants nine letters and digits
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
        turn: what stands between a text and a call, or between calls, where that is a token of its own: GLM's <|assistant|>.
    """

    before: str
    after: str
    separate: bool = False
    between: str = ""
    written: tuple[str, str, str] | None = None
    repeats: bool = False
    keywords: bool = False
    turn: str = ""

    @property
    def mark(self) -> str:
        """What tells where calls begin; "" where they begin like any JSON."""
        return self.before.strip()

    @property
    def _named(self) -> str:
        """A name that stands alone, and what is between it and its arguments, with whatever blanks."""
        return r"([\w.-]+)\s*" + r"\s*".join(map(re.escape, self.between.split())) + r"\s*"

    def may_begin(self, text: str) -> int:
        """Where in the text calls may begin, so that what follows is not shown as text; its length for nowhere."""
        if self.mark:
            at = text.find(self.mark)
            return at if at >= 0 else len(text) - _overlap(text, self.mark)
        return 0 if not text.strip() or text.lstrip()[0] in "{[" or self.separate else len(text)

    def read(self, text: str, names: Collection[str]) -> tuple[str, tuple[Call, ...]]:
        """(the text without its calls, the calls). What is none stays text."""
        if self.turn:
            return self._of_turns(text.split(self.turn), names)
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
        if not calls:
            return text, ()
        shown = "".join(each for each in (*said, text[place:]) if each.strip())
        return (shown if text[place:].strip() else shown.rstrip()), tuple(calls)

    def _of_turns(self, parts: list[str], names: Collection[str]) -> tuple[str, tuple[Call, ...]]:
        said, calls = list[str](), list[Call]()
        for part in parts:
            found = self._one(part, names)
            if found is not None and not part[found[1] :].strip():
                calls += found[0]
            else:
                said.append(part)
        return self.turn.join(said).rstrip() if calls else self.turn.join(said), tuple(calls)

    def cut(self, text: str, names: Collection[str]) -> tuple[str, Call | None] | None:
        """(the text before it, the call) where the text ends in the middle of a call; None where it does not.

        No call where its name is not whole.
        """
        at = text.rfind(self.mark) if self.mark else max(text.rfind(self.turn), 0) if self.turn else 0
        if at < 0:
            return None
        if self.turn:
            text = text[:at] + text[at:].removeprefix(self.turn)
        lead, rest = text[:at].rstrip(), text[at + len(self.mark) :].lstrip()
        named = self._named + ("" if self.keywords else r"(?=\{)")
        found = re.match(named, rest) if self.separate else _BEGUN.match(rest)
        if found is None:
            return (lead, None) if self.mark and _is_beginning(rest, self.separate) else None
        if found[1] not in names:
            return None
        arguments = rest[found.end() :]
        if self.keywords:
            return lead, Call(found[1], begun_keywords(arguments))
        whole = json_at(arguments, 0)
        return lead, Call(found[1], arguments if whole is None else arguments[: whole[1]])

    def _one(self, text: str, names: Collection[str]) -> tuple[list[Call], int] | None:
        """The calls at the beginning of the text, and where they end."""
        start = len(text) - len(text.lstrip())
        if self.mark:
            if not text.startswith(self.mark, start):
                return None
            start += len(self.mark)
        if self.separate:
            found = re.compile(r"\s*" + self._named).match(text, start)
            value = None if found is None else (keywords_at if self.keywords else json_at)(text, found.end())
            calls = [named_call(found[1], value[0], names)] if found is not None and value is not None else [None]
        else:
            value = json_at(text, start)
            each = value[0] if value is not None and isinstance(value[0], list) else [value and value[0]]
            calls = [object_call(one, names) for one in each]
        if value is None or not calls or None in calls:
            return None
        stop = value[1]
        tail = self.after.strip()
        blanks = len(text[stop:]) - len(text[stop:].lstrip())
        if tail and text.startswith(tail, stop + blanks):
            stop += blanks + len(tail)
        elif tail.startswith(text[stop + blanks :].rstrip()):  # the answer ends in the middle of it
            stop = len(text)
        return [call for call in calls if call is not None], stop


def call_format(tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate) -> CallFormat | None:
    """How the template writes calls; None where it writes none, or in a way that is not known here."""
    asked = Message("user", "probe question")
    called = Message("assistant", calls=(Call(_NAME, json.dumps({_KEY: _VALUE}), _ID),))
    writer = Writer(tokenizer, template)
    try:
        prompt, whole = writer.prompt([asked], [_TOOL]), writer.answered([asked, called], [_TOOL]).text
    except ConversationError:
        return None
    said = whole[_header(prompt, whole) :]
    at = said.find(_NAME)
    value = None if at < 0 else _json_around(said, at)
    if value is not None:
        start, stop = value
        before, after = _own(said[:start]).rstrip(), _until_end(said[stop:], tokenizer)
        repeats = bool(before and after.strip()) and said[start] == "{"
        return CallFormat(before, after.strip(), written=_written(said, start, stop, after), repeats=repeats)
    if at < 0:
        return None
    turn = "" if _own(said[:at]).strip() else _turn(writer)
    given = said.find(f"{_KEY}={_VALUE!r})", at)
    if given >= 0:
        before, between = _own(said[:at]).rstrip(), said[at + len(_NAME) : given]
        after = _until_end(said[said.find(")", given) + 1 :], tokenizer).strip()
        return CallFormat(before, after, True, between, keywords=True, turn=turn)
    if (brace := said.find("{", at)) < 0 or (arguments := json_at(said, brace)) is None:
        return None
    if arguments[0] != {_KEY: _VALUE}:
        return None
    between, before, after = said[at + len(_NAME) : brace], _own(said[:at]), _until_end(said[arguments[1] :], tokenizer)
    return CallFormat(before.rstrip(), after.strip(), True, between, (before, between, after), turn=turn)


def _turn(writer: Writer) -> str:
    """What the template writes between a text and a call behind it, beside blanks."""
    called = Message("assistant", _TEXT, calls=(Call(_NAME, "{}", _ID),))
    try:
        said = writer.answered([Message("user", "probe question"), called], [_TOOL]).text
    except ConversationError:
        return ""
    between = said[said.find(_TEXT) + len(_TEXT) :]
    return between[: max(between.find(_NAME), 0)].strip()


def _header(prompt: str, whole: str) -> int:
    """Where the answer begins in the whole text: behind what the prompt has of it; that may end in a <think> of its own."""
    if whole.startswith(prompt):
        return len(prompt)
    common = next((at for at, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    return len(re.sub(r"<[^<>]*\Z", "", whole[:common]))


def _own(before: str) -> str:
    """What is written before a call, without reasoning that is empty."""
    return re.sub(rf"^\s*{OPEN}\s*{CLOSE}", "", before).lstrip()


def _written(said: str, start: int, stop: int, after: str) -> tuple[str, str, str] | None:
    """See CallFormat: of the call that stands there as JSON, up to its arguments; brackets that are open then are closed."""
    name, brace = said.find(_NAME, start), said.rfind("{", start, said.find(_KEY, start))
    arguments = json_at(said, brace)
    if name > brace or arguments is None or arguments[1] > stop:
        return None
    closers: list[str] = []
    for bracket in re.sub(r'"(\\.|[^"\\])*"', "", said[start:brace]):
        if bracket in "{[":
            closers.insert(0, "}" if bracket == "{" else "]")
        elif bracket in "}]":
            closers.pop(0)
    return _own(said[:name]), said[name + len(_NAME) : brace], "".join(closers) + after


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


def _until_end(after: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What is written after a call, up to the first token that ends the turn: that one the model's answer is without."""
    ends = {str(tokenizer.eos_token or ENDS[0]), *ENDS}
    cut = min((at for end in ends if (at := after.find(end)) >= 0), default=len(after))
    return after[:cut].rstrip()


def _json_around(text: str, at: int) -> tuple[int, int] | None:
    """The JSON list or object that the place is in, with the name and the arguments of the probe."""
    for start in range(at):
        if text[start] in "[{" and (value := json_at(text, start)) is not None and value[1] > at:
            each = value[0] if isinstance(value[0], list) else [value[0]]
            if len(each) == 1 and object_call(each[0], [_NAME]) is not None:
                return start, value[1]
    return None


def _is_beginning(text: str, separate: bool) -> bool:
    """Whether a call may begin so, whose name is not whole."""
    return (re.compile(r"[\w.-]*\s*") if separate else _PART).fullmatch(text) is not None


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


@dataclass
class AnswerReader:
    """An answer that is being written: what of it is reasoning, what is content, which calls it has.

    Attributes:
        thinking: whether the prompt ended in <think>.
        reasons: whether the template knows reasoning at all.
        format, names: how calls are written, and the request's tools; None without tools.
        must_call: whether it is nothing but calls.
        unfinished: whether its end, maybe its last call, was cut off.
    """

    thinking: bool = False
    reasons: bool = False
    format: CallFormat | None = None
    names: Sequence[str] = ()
    must_call: bool = False
    calls: tuple[Call, ...] = ()
    unfinished: bool = False
    _state: str = field(default="beginning", init=False)
    _held: str = field(default="", init=False)
    _thought: bool = field(default=False, init=False)
    _is_text: bool = field(default=False, init=False)  # calls without a mark can only be at the beginning

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
        elif not self.reasons or not (OPEN.startswith(start) or start.startswith(OPEN)):
            self._state = "content"
        elif start.startswith(OPEN):
            self._state, self._held = "reasoning", start[len(OPEN) :]
        elif last:
            self._state = "content"

    def _reason(self, last: bool) -> str:
        thought, found, rest = self._held.partition(CLOSE)
        if found:
            self._state, self._held, self._thought = "content", rest, True
            return thought
        kept = 0 if last else _overlap(self._held, CLOSE)
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
            shown, self.calls = self.format.read(self._held, self.names)
            self._held = ""
            shown = self._without_cut(shown) if cut else shown
            return shown.replace(self.format.turn, "") if self.format.turn else shown
        at = self.format.may_begin(self._held)
        shown, self._held = self._held[:at], self._held[at:]
        self._is_text = not self.format.mark and bool(shown.strip())
        return shown

    def _without_cut(self, shown: str) -> str:
        """The text without a call in the middle of which it ends; that call is told with what there is of it."""
        assert self.format is not None
        found = self.format.cut(shown, self.names)
        if found is None:
            return "" if self.must_call else shown
        self.unfinished = True
        shown, call = found
        self.calls += () if call is None else (call,)
        return shown
