"""From one row of a dataset to the turns of a conversation, whichever of the known layouts the row has.

A row tells its layout by its own keys (reading.py lists them), unless somebody told: `Layout`. What fits none, or holds
no answer to learn, raises RowError with the reason that the accounting counts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number

Turns = list[tuple[str, str]]

COLUMNS = {  # part of a row: the columns that may hold it; the first one that is filled counts
    "prompt": ("instruction", "prompt", "query", "question", "content"),
    "query": ("input", "context"),
    "response": ("output", "response", "answer", "completion", "target", "summary"),
    "history": ("history",),
    "system": ("system",),
    "messages": ("messages", "conversations"),
}
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
}
_TAGS = {"user_tag": "user", "assistant_tag": "assistant", "function_tag": "assistant", "observation_tag": "tool"}
_FOLLOWS = {"system": {""}, "user": {"", "system", "assistant"}, "assistant": {"user", "tool"}}
_FOLLOWS["tool"] = {"assistant", "tool"}
SCHEMAS = (
    "rows hold instruction + output (alpaca), a prompt and a response, conversations (sharegpt) or messages (OpenAI); "
    'other column names are told with columns={"prompt": ..., "response": ...}'
)
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can hold one as \ud800; no tokenizer takes it


class RowError(Exception):
    """Why one row is dropped; never leaves this module."""


@dataclass(frozen=True)
class Layout:
    """What somebody told about rows: "alpaca" or "sharegpt", the column of each part, the names of keys and roles."""

    formatting: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def find(self, row: Mapping[str, object], part: str) -> str | None:
        """The column of `row` that holds this part, or None."""
        told = self.columns.get(part)
        if told is None and "prompt" in self.columns and part in ("query", "history", "system"):
            return None  # as in LLaMA-Factory: who names the columns names all of them
        present = [key for key in ([told] if told else COLUMNS[part]) if key in row]
        if told and not present and part in ("prompt", "response", "messages"):
            raise RowError(f"no column {told!r}")
        # A table of mixed rows has all columns in each row: the present ones may be empty.
        return next((key for key in present if not _is_empty(row[key])), present[0] if present else None)

    def text(self, row: Mapping[str, object], part: str, called: str) -> str:
        """The text of this part, "" when the row has none."""
        key = self.find(row, part)
        return "" if key is None else text_of(row[key], called)


def turns_of_row(row: object, layout: Layout) -> Turns:
    """The (role, text) turns of a row, ending in an answer; RowError says why there are none."""
    if not isinstance(row, Mapping):
        raise RowError(f"row is a {type(row).__name__}, not an object")
    if None in row:
        raise RowError("more cells than the header")
    key = None if layout.formatting == "alpaca" else layout.find(row, "messages")
    if layout.formatting in ("sharegpt", "openai") or (key and not _is_empty(row[key])):
        turns = _turns_of_messages(row[key] if key else [], layout.tags)
    else:
        turns = _turns_of_pair(row, layout)
    system = layout.text(row, "system", "system")
    if system and turns[:1] and turns[0][0] != "system":
        turns.insert(0, ("system", system))
    return _checked([(role, text) for role, text in turns if role != "system" or text.strip()])


def _turns_of_pair(row: Mapping[str, object], layout: Layout) -> Turns:
    if not any(layout.find(row, part) for part in ("prompt", "query", "response")):
        raise RowError(f"unknown keys: {', '.join(sorted(str(key)[:40] for key in row)[:6]) or 'none'}")
    asked = [layout.text(row, part, "question") for part in ("prompt", "query")]
    key = layout.find(row, "history")
    turns: Turns = []
    for pair in _list(row[key], "history") if key else []:
        said = _list(pair, "history entry")
        if len(said) != 2:
            raise RowError("history is not a list of [question, answer]")
        turns += [("user", text_of(said[0], "history question")), ("assistant", text_of(said[1], "history answer"))]
    turns.append(("user", "\n".join(text for text in asked if text.strip())))
    return [*turns, ("assistant", layout.text(row, "response", "answer"))]


def _turns_of_messages(messages: object, tags: Mapping[str, str]) -> Turns:
    roles = _ROLES | {tags[tag]: role for tag, role in {**_TAGS, "system_tag": "system"}.items() if tag in tags}
    turns = []
    for message in _list(messages, "messages"):
        if not isinstance(message, Mapping):
            raise RowError(f"message is a {type(message).__name__}, not an object")
        role = message.get(tags.get("role_tag") or ("from" if "from" in message else "role"))
        content = message.get(tags.get("content_tag") or ("value" if "value" in message else "content"))
        if not isinstance(role, str) or role not in roles:
            raise RowError(f"unknown role {str(role)[:40]!r}")
        if _is_empty(content) and message.get("tool_calls"):
            raise RowError("tool_calls without content are not read")
        parts = content if isinstance(content, list) else [content]
        turns.append((roles[role], "".join(_part(part) for part in parts)))
    return turns


def _part(part: object) -> str:
    """Text of one part of a content: a string or {"type": "text", "text": "..."}."""
    if isinstance(part, Mapping) and part.get("type", "text") != "text":
        raise RowError(f"content of type {str(part.get('type'))[:40]!r}")
    return text_of(part.get("text") if isinstance(part, Mapping) else part, "content")


def _checked(turns: Turns) -> Turns:
    before = ""
    for role, text in turns:
        if before not in _FOLLOWS[role]:
            raise RowError(f"roles do not alternate: {role} after {before or 'the start'}")
        if role != "tool" and not text.strip():
            raise RowError("no answer" if role == "assistant" else "empty question")
        before = role
    if before != "assistant":
        raise RowError("does not end in an assistant turn" if turns else "no messages")
    return turns


def _is_empty(value: object) -> bool:
    """Whether a cell holds nothing: None, NaN (as tables write it, never equal to itself) or blank text."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, Number) and value != value)


def text_of(value: object, called: str) -> str:
    if value is not None and not isinstance(value, (str, Number)):
        raise RowError(f"{called} is a {type(value).__name__}")
    text = "" if _is_empty(value) else str(value)
    if _HALF_PAIR.search(text):
        raise RowError(f"{called} holds half a surrogate pair")
    return text


def _list(value: object, called: str) -> Sequence[object]:
    if not isinstance(value, (list, tuple)) and not _is_empty(value):
        raise RowError(f"{called} is a {type(value).__name__}, not a list")
    return value if isinstance(value, (list, tuple)) else []
