"""How a chat template writes calls of tools: it is asked, with calls of our own in a conversation.

Around one call stands what the model writes around its calls; between two of them, what it writes between them. An id of a
call is tried, too: Mistral's templates take nine letters and digits alone.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qgraft.data.ends import ENDS
from qgraft.data.messages import Call, ConversationError, Message
from qgraft.data.rendering import Writer
from qgraft.data.templates import ChatTemplate
from qgraft.serving.call_arguments import json_at, object_call
from qgraft.serving.tagged_arguments import QUOTE, Braces, Tags
from qgraft.serving.tool_calls import CLOSE, OPEN, CallFormat

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
_OPENS, _CLOSES = re.compile(r"<[^<>\s]+[=>]\Z"), re.compile(r"\n?</[^<>\s]+>")
_SECOND = "probe_second"
_PROBE, _ASKED = Call(_NAME, json.dumps({_KEY: _VALUE}), _ID), Message("user", "probe question")


def call_format(tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate) -> CallFormat | None:
    """How the template writes calls; None where it writes none, or in a way that is not known here."""
    form = _form_of(tokenizer, template)
    if form is None:
        return None
    writer = Writer(tokenizer, template)
    ids = len(_ID) if _written_of(writer, [replace(_PROBE, id="call_0123456789abcdef")]) is None else 0
    joint, after = _between(writer, form)
    after = _until_end(after, tokenizer).strip()  # of one call some templates leave out what closes the list of them
    return replace(form, joint=joint, after=after if after.startswith(form.after) else form.after, ids=ids)


def _written_of(writer: Writer, calls: Sequence[Call]) -> str | None:
    """What the template writes of a conversation that ends in these calls; None where it does not take them."""
    try:
        return writer.answered([_ASKED, Message("assistant", calls=tuple(calls))], [_TOOL]).text
    except ConversationError:
        return None


def _between(writer: Writer, form: CallFormat) -> tuple[str, str]:
    """(what the template writes between one call and the next, and behind that); "" where it takes one, or writes lists."""
    whole = _written_of(writer, [_PROBE, replace(_PROBE, name=_SECOND, id=_ID[::-1])])
    if whole is None or form.turn or (at := whole.rfind(_SECOND)) < 0:
        return "", ""
    begins = range(at, at - 1, -1) if form.separate else range(at, -1, -1)
    second = next(((at, found[1]) for at in begins if (found := form.call_at(whole, at, [_SECOND]))), None)
    if second is None:
        return "", ""
    first = whole.rfind(_NAME, 0, second[0])
    end = next((found[1] for at in range(first, -1, -1) if (found := form.call_at(whole, at, [_NAME]))), None)
    return ("", "") if end is None or end >= second[0] else (whole[end : second[0]], whole[second[1] :])


def _form_of(tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate) -> CallFormat | None:
    writer = Writer(tokenizer, template)
    whole = _written_of(writer, [_PROBE])
    if whole is None:
        return None
    prompt = writer.prompt([_ASKED], [_TOOL])
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
    braces = f"{{{_KEY}:{QUOTE}{_VALUE}{QUOTE}}}"
    if said.startswith(braces, at + len(_NAME)):
        after = _until_end(said[at + len(_NAME) + len(braces) :], tokenizer).strip()
        return CallFormat(_own(said[:at]).rstrip(), after, True, tags=Braces()) if after else None
    if (tags := _tags(said, at)) is not None:
        key = said.find(tags.open, at)
        between, stop = said[at + len(_NAME) : key], said.find(tags.close, said.find(_VALUE, at)) + len(tags.close)
        after = _until_end(said[stop:], tokenizer).strip()
        return CallFormat(_own(said[:at]).rstrip(), after, True, between, tags=tags) if after else None
    if (brace := said.find("{", at)) < 0 or (arguments := json_at(said, brace)) is None:
        return None
    if arguments[0] != {_KEY: _VALUE}:
        return None
    between, before, after = said[at + len(_NAME) : brace], _own(said[:at]), _until_end(said[arguments[1] :], tokenizer)
    return CallFormat(before.rstrip(), after.strip(), True, between, (before, between, after), turn=turn)


def _tags(said: str, at: int) -> Tags | None:
    """The tags around the argument of the call whose name stands there; None where there are none."""
    key, value = said.find(_KEY, at), said.find(_VALUE, at)
    open_, close = _OPENS.search(said[at:key]), _CLOSES.match(said, value + len(_VALUE))
    middle = said[key + len(_KEY) : value]
    if key < 0 or value < key or open_ is None or close is None or not re.search(r"[<>]", middle):
        return None
    return Tags(open_[0], middle, close[0])


def _turn(writer: Writer) -> str:
    """What the template writes between a text and a call behind it, beside blanks."""
    called = Message("assistant", _TEXT, calls=(Call(_NAME, "{}", _ID),))
    try:
        said = writer.answered([_ASKED, called], [_TOOL]).text
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
    """What is written before a call, without reasoning that is empty, and that the prompt may have begun."""
    return re.sub(rf"^\s*(?:{OPEN})?\s*{CLOSE}", "", before).lstrip()


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
