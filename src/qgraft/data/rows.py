"""From one row of a dataset to the messages of a conversation, whichever of the known layouts the row has.

A row tells its layout by its own keys (reading.py lists them), unless somebody told: `RowLayout`. What fits none, or holds
no answer to learn, raises RowError with the reason that the accounting counts.

Keys of a message beside its role and content, under the names that other tools read:

    weight                                0: the answer is read, not learned; other numbers multiply its loss
    train, loss, trainable                false: the answer is read, not learned
    reasoning_content, reasoning, thinking   what an answer thought before
    tool_calls, function_call             what an answer calls, with or without content (calls.py)
    tool_call_id, name                    of a tool's result
    tools, functions                      of any message, as the column of the row

Any other key is named in the end, with the number of rows that have it: it changes nothing.
"""

import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Number
from pathlib import Path
from typing import Any

from qgraft.data.calls import RowError, calls_of, same_tools, tools_of, written_calls
from qgraft.data.messages import Message, Tool
from qgraft.data.pictures import MARK, PLACEHOLDER, Picture, located, part_picture, picture_of, pictures_of
from qgraft.data.tables import same_name
from qgraft.errors import DataError, worded

COLUMNS = {  # part of a row: the columns that may hold it; the first one that is filled counts
    "prompt": ("instruction", "prompt", "query", "question", "content"),
    "query": ("input", "context"),
    "response": ("output", "response", "answer", "completion", "target", "summary"),
    "history": ("history",),
    "system": ("system",),
    "messages": ("messages", "conversations"),
    "tools": ("tools", "functions"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "label": ("label", "kto_tag"),
    "images": ("images", "image"),
}
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
}
_OTHER_KINDS = ("videos", "audios")  # columns of LLaMA-Factory's for what no model here is given
_BESIDE = ("system", "tools", "images")  # parts of rows of both kinds
BESIDE_SYSTEM = "system (beside a system message)"  # what of it has no effect
_TAGS = {
    "user_tag": "user", "assistant_tag": "assistant", "function_tag": "assistant", "observation_tag": "tool",
    "system_tag": "system",
}  # fmt: skip
MOST_WEIGHT = 1_000_000  # of an answer; losses are summed in float32
_SWITCHES = ("train", "loss", "trainable")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_EFFECTIVE = {
    "weight", *_SWITCHES, *_REASONING, "tool_calls", "function_call", "tool_call_id", "name", *COLUMNS["tools"],
}  # fmt: skip
_FOLLOWS = {"system": {""}, "user": {"", "system", "assistant"}, "assistant": {"user", "tool"}}
_FOLLOWS["tool"] = {"assistant", "tool"}
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can hold one as \ud800; no tokenizer takes it


@dataclass(frozen=True)
class Read:
    """What a row holds: messages that end in an answer, tools, the keys that change nothing; whether the answer is wanted; of
    texts for a classifier their label (labelled.py)."""

    messages: list[Message]
    tools: tuple[Tool, ...] = ()
    ignored: frozenset[str] = frozenset()
    desirable: bool | None = None
    label: Any = None


@dataclass(frozen=True)
class RowLayout:
    """What somebody told about rows: "alpaca" or "sharegpt", the column of each part, the names of keys and roles."""

    formatting: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def find(self, row: Mapping[str, object], part: str) -> str | None:
        """The column of `row` that holds this part, or None."""
        told = self.columns.get(part)
        if told is None and "prompt" in self.columns and part in ("query", "history", "system", "tools"):
            return None  # as in LLaMA-Factory: who names the columns names all of them
        names = [told] if told else COLUMNS[part]
        present = [key for name in names if (key := column_called(row, name)) is not None]
        if told and not present and part in ("prompt", "response", "messages"):
            raise RowError(f"no column {told!r}")
        # A table of mixed rows has all columns in each row: the present ones may be empty.
        return next((key for key in present if not is_empty(row[key])), present[0] if present else None)

    def text(self, row: Mapping[str, object], part: str, called: str) -> str:
        """The text of this part, "" when the row has none."""
        key = self.find(row, part)
        return "" if key is None else text_of(row[key], called)


def read_row(row: object, layout: RowLayout) -> Read:
    """The messages of a row, ending in an answer; RowError says why there are none."""
    if not isinstance(row, Mapping):
        raise RowError(f"row is a {type(row).__name__}, not an object")
    if None in row:
        raise RowError("more cells than the header")
    key = None if layout.formatting == "alpaca" else layout.find(row, "messages")
    listed = layout.formatting in ("sharegpt", "openai") or bool(key and not is_empty(row[key]))
    column = layout.find(row, "tools")
    tools = () if column is None else tools_of(row[column])
    if listed:
        messages, own_tools, ignored = messages_of(row[key] if key else [], layout.tags)
        tools = same_tools(tools, own_tools)
    else:
        messages, ignored = _of_pair(row, layout), set()
    pictures = layout.find(row, "images")
    messages = _placed(messages, [] if pictures is None else pictures_of(row[pictures]))
    system = layout.text(row, "system", "system")
    if system and messages[:1] and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    elif system and messages[:1] and messages[0].content != system:
        ignored = {*ignored, BESIDE_SYSTEM}
    messages = checked(messages)
    parts = ("messages",) if listed else ("prompt", "query", "response", "history")
    return Read(
        messages, tools, frozenset([*ignored, *unread(row, (layout.find(row, part) for part in (*parts, *_BESIDE)))])
    )


def with_images(
    given: Sequence[Read], row: object, layout: RowLayout, home: Path | None, outside: bool | None
) -> Sequence[Read]:
    """What a row says, with its images found.

    Args:
        home: the folder of the row's file; None for rows that come from none.
        outside: whether images may lie elsewhere; None where none are read.

    Raises RowError for images that are not there, or that are not read.
    """
    columns: Mapping[str, object] = row if isinstance(row, Mapping) else {}
    if other := next((name for name in _OTHER_KINDS if _holds(columns.get(name))), None):
        raise RowError(f"holds {other}, which are not read")
    column = layout.find(columns, "images")
    told = column is not None and _holds(columns[column])
    if not told and not any(message.images for each in given for message in each.messages):
        marks = sum(each.content.count(PLACEHOLDER) for each in given[0].messages if each.role == "user")
        if marks and outside is not None:
            raise RowError(f"a row with 0 images, and {PLACEHOLDER} stands in its texts {marks} times")
        return given
    if outside is None:
        raise RowError("holds images, which the model, or what is done here, does not read")
    if len(filled := [name for name in COLUMNS["images"] if _holds(columns.get(name))]) > 1:
        raise RowError(f"images in two columns, {' and '.join(filled)}")
    return [replace(each, messages=[
                replace(message, images=tuple(located(image, home, outside) for image in message.images))
                for message in each.messages]) for each in given]  # fmt: skip


def _holds(value: object) -> bool:
    """Whether a column of images holds some."""
    return not is_empty(value) and not (isinstance(value, Sequence) and not value)


def with_pictures(messages: Sequence[Message], images: Sequence[Any]) -> list[Message]:
    """The messages with images, named as in rows, in front of the first question. Raises DataError for what is none."""
    try:
        found = [located(picture_of(image), None, True) for image in images]
        return _placed(list(messages), found)
    except RowError as error:
        raise DataError(str(error)) from error


def column_called(row: Mapping[str, object], name: str) -> str | None:
    """The column of this name, or else the first that differs from it in case, blanks or dashes only."""
    if name in row:
        return name
    wanted = same_name(name)
    return next((key for key in row if isinstance(key, str) and same_name(key) == wanted), None)


def column_flags(row: object, layout: RowLayout) -> str | None:
    """The options that name the columns of a row that holds texts under names that are not known; None where it does not.

    None of a pair, too: no column of it is the answer, and the rejected one the least.
    """
    if not isinstance(row, Mapping) or any(column_called(row, part) for part in ("chosen", "rejected")):
        return None
    texts = [key for key in row if isinstance(key, str) and isinstance(row[key], str)]
    try:
        found = {part: layout.find(row, part) for part in ("prompt", "response")}
    except RowError:  # a column was named that is not there
        found = {"prompt": None, "response": None}
    others = iter([key for key in texts if key not in found.values()])
    named = {part: key or next(others, None) for part, key in found.items()}
    if None in named.values() or all(found.values()):
        return None
    flags = " ".join(f"--{part}_column {shlex.quote(str(key))}" for part, key in named.items())
    told = worded(flags=flags, python=f"columns={named}")
    return f"the columns are {', '.join(map(str, texts[:12]))}; name those to learn: {told}"


def schemas() -> str:
    """What rows can look like, and how other column names are told."""
    other = worded(
        flags="--prompt_column NAME --response_column NAME", python='columns={"prompt": ..., "response": ...}'
    )
    return (
        "rows hold instruction + output (alpaca), a prompt and a response, conversations (sharegpt) or messages "
        f"(OpenAI); other column names are told with {other}"
    )


def unread(row: Mapping[str, object], read: Iterable[str | None]) -> list[str]:
    """The filled columns that are none of these."""
    known = set(read)
    return [str(key)[:40] for key in row if key not in known and not is_empty(row[key]) and row[key] != []]


def _of_pair(row: Mapping[str, object], layout: RowLayout) -> list[Message]:
    if column_called(row, "chosen") and column_called(row, "rejected") and not layout.find(row, "response"):
        raise RowError("holds preferences (chosen, rejected), which stage dpo learns; stage sft learns answers")
    if not any(layout.find(row, part) for part in ("prompt", "query", "response")):
        raise RowError(f"unknown keys: {', '.join(sorted(str(key)[:40] for key in row)[:6]) or 'none'}")
    return [*questions_of(row, layout), Message("assistant", layout.text(row, "response", "answer"))]


def questions_of(row: Mapping[str, object], layout: RowLayout) -> list[Message]:
    """The history of a row and its question, of texts."""
    asked = [layout.text(row, part, "question") for part in ("prompt", "query")]
    key = layout.find(row, "history")
    messages: list[Message] = []
    for pair in _list(row[key], "history") if key else []:
        said = _list(pair, "history entry")
        if len(said) != 2:
            raise RowError("history is not a list of [question, answer]")
        messages += [Message("user", text_of(said[0], "history question")),
                     Message("assistant", text_of(said[1], "history answer"))]  # fmt: skip
    return [*messages, Message("user", "\n".join(text for text in asked if text.strip()))]


def messages_of(messages: object, tags: Mapping[str, str]) -> tuple[list[Message], tuple[Tool, ...], set[str]]:
    """Messages, the tools that one of them brings, and keys that change nothing."""
    roles = _ROLES | {tags[tag]: role for tag, role in _TAGS.items() if tag in tags}
    found: list[Message] = []
    tools: tuple[Tool, ...] = ()
    ignored: set[str] = set()
    for message in _list(messages, "messages"):
        if not isinstance(message, Mapping):
            raise RowError(f"message is a {type(message).__name__}, not an object")
        role_key = tags.get("role_tag") or ("from" if "from" in message else "role")
        content_key = tags.get("content_tag") or ("value" if "value" in message else "content")
        role = message.get(role_key)
        if not isinstance(role, str) or role not in roles:
            raise RowError(f"unknown role {str(role)[:40]!r}")
        tools = same_tools(tools, *(tools_of(message[key]) for key in COLUMNS["tools"] if message.get(key)))
        written = role == tags.get("function_tag", "function_call")
        found.append(_message(roles[role], message.get(content_key), message, written))
        ignored |= {
            f"messages[].{key}"
            for key in unread(message, {role_key, content_key, *_effective(found[-1].role, message)})
        }
    return found, tools, ignored


def _effective(role: str, message: Mapping[str, object]) -> set[str]:
    """The keys of a message that mean something here; what is no answer is not learned, as `train: false` says of it."""
    if role == "assistant":
        return _EFFECTIVE - {"tool_call_id"}
    masks = {key for key in ("weight", *_SWITCHES) if message.get(key) == 0}
    return {"tool_call_id", "name", *COLUMNS["tools"], *masks}


def _message(role: str, content: object, keys: Mapping[str, object], written_call: bool) -> Message:
    """One message with what its keys say; a `written_call` is JSON in its content, if it is a call."""
    parts = content if isinstance(content, (list, tuple)) else [content]
    said = [_part(part) for part in parts]
    pictures = tuple(part for part in said if not isinstance(part, str))
    message = Message(role, "".join(part if isinstance(part, str) else MARK for part in said), images=pictures)
    name, call_id = (text_of(keys.get(key), key) or None for key in ("name", "tool_call_id"))
    if role != "assistant":
        return replace(message, name=name, call_id=call_id)
    calls = (*calls_of(keys.get("tool_calls")), *calls_of(keys.get("function_call")))
    if written_call and not calls and (written := written_calls(message.content)):
        calls, message = written, replace(message, content="")
    reasoning = next((text for key in _REASONING if (text := text_of(keys.get(key), key)).strip()), "")
    return replace(message, name=name, calls=calls, reasoning=reasoning, weight=_weight(keys))


def _weight(keys: Mapping[str, object]) -> float:
    """What an answer's loss is multiplied by."""
    for switch in _SWITCHES:
        value = keys.get(switch)
        if not is_empty(value) and (not isinstance(value, Number) or value not in (0, 1)):
            raise RowError(f"{switch} is {str(value)[:20]!r}, expected true or false")
        if value is not None and value == 0:
            return 0.0
    weight = keys.get("weight")
    if weight is None or weight == "":
        return 1.0
    if not isinstance(weight, (int, float)) or not 0 <= weight <= MOST_WEIGHT:
        raise RowError(f"weight is {str(weight)[:20]!r}, expected a number from 0 to {MOST_WEIGHT:,}")
    return float(weight)


def _part(part: object) -> str | Picture:
    """One part of a content: the text of a string or of {"type": "text", "text": "..."}, or an image (pictures.py)."""
    if isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
        return part_picture(part) or Picture(None)  # which stands in a column of the row
    if isinstance(part, Mapping) and part.get("type", "text") != "text":
        raise RowError(f"content of type {str(part.get('type'))[:40]!r}")
    if isinstance(part, Mapping) and "text" not in part:
        raise RowError("content is an object without text")
    return text_of(part.get("text") if isinstance(part, Mapping) else part, "content")


def _placed(messages: list[Message], pictures: Sequence[Picture]) -> list[Message]:
    """The messages with the images of a row's column in their places.

    Those are parts of a content that name none; else PLACEHOLDER in texts; else in front of the first question.
    """
    left = list(pictures)
    if any(message.content.count(MARK) != len(message.images) for message in messages):
        raise RowError(f"a message holds a noncharacter of Unicode, U+{ord(MARK):04X}")
    unnamed = sum(each.data is None for message in messages for each in message.images)
    texts = sum(message.content.count(PLACEHOLDER) for message in messages) if left and not unnamed else 0
    if left and not unnamed and not texts and any(message.images for message in messages):
        raise RowError(f"contents name all their images, and a column holds {len(left)} more, whose place nothing says")
    if left and not unnamed and not texts:
        first = next((index for index, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise RowError("images, and no question")
        asked = replace(messages[first], content=MARK * len(left) + messages[first].content,
                        images=(*left, *messages[first].images))  # fmt: skip
        left, messages = [], [*messages[:first], asked, *messages[first + 1 :]]
    elif (texts or unnamed) != len(left):
        where = f"{PLACEHOLDER} stands in its texts" if texts else "contents ask for one"
        raise RowError(f"a row with {len(left)} images, and {where} {texts or unnamed} times")
    placed = [_with_images(message, left, bool(texts)) for message in messages]
    if any(message.images and message.role != "user" for message in placed):
        raise RowError("an image stands elsewhere than in a question")
    return placed


def _with_images(message: Message, left: list[Picture], by_text: bool) -> Message:
    """A message with images for the places that name none, taken from the front of `left`."""
    own, images, content = list(message.images), list[Picture](), message.content
    for piece in re.findall(f"{MARK}|{PLACEHOLDER}" if by_text else MARK, content) if own or by_text else ():
        given = own.pop(0) if piece == MARK and own else Picture(None)
        images.append(left.pop(0) if given.data is None else given)
    return replace(message, images=tuple(images), content=content.replace(PLACEHOLDER, MARK) if by_text else content)


def checked(messages: Sequence[Message]) -> list[Message]:
    """The messages without empty system texts. Raises RowError where their roles do not alternate up to an answer."""
    messages = [each for each in messages if each.role != "system" or each.content.strip()]
    before = ""
    for message in messages:
        if before not in _FOLLOWS[message.role]:
            raise RowError(f"roles do not alternate: {message.role} after {before or 'the start'}")
        if message.role != "tool" and not message.content.strip() and not message.calls:
            raise RowError("no answer" if message.role == "assistant" else "empty question")
        before = message.role
    if before != "assistant":
        raise RowError("does not end in an assistant turn" if messages else "no messages")
    return messages


def is_empty(value: object) -> bool:
    """Whether a cell holds nothing: None, NaN (as tables write it, never equal to itself) or blank text."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, Number) and value != value)


def text_of(value: object, called: str) -> str:
    if value is not None and not isinstance(value, (str, Number)):
        raise RowError(f"{called} is a {type(value).__name__}")
    if isinstance(value, float) and math.isinf(value):
        raise RowError(f"{called} is a number that no float holds")
    text = "" if is_empty(value) else str(value).lower() if isinstance(value, bool) else str(value)  # as JSON has it
    if _HALF_PAIR.search(text):
        raise RowError(f"{called} holds half a surrogate pair")
    return text


def _list(value: object, called: str) -> Sequence[object]:
    if not isinstance(value, (list, tuple)) and not is_empty(value):
        raise RowError(f"{called} is a {type(value).__name__}, not a list")
    return value if isinstance(value, (list, tuple)) else []
