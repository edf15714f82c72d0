"""From one row of a dataset to what it says of answers: one is preferred to another, or one is wanted or not.

Pairs, for stage dpo, ipo, orpo and simpo; `prompt` may have the other names of rows.py, and system, history and tools too:

    texts      {"prompt": "...", "chosen": "...", "rejected": "..."}
    messages   {"prompt": [{"role": "user", ...}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}
    whole      {"chosen": [{"role": "user", ...}, {"role": "assistant", ...}], "rejected": [...]}    beside a prompt or not
    sharegpt   {"conversations": [..., {"from": "human", ...}], "chosen": {"from": "gpt", ...}, "rejected": {...}}
    dialogues  {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "..."}                     as in hh-rlhf

Single answers, for stage kto: any row of rows.py that holds an answer, and `label` or `kto_tag`, true or false beside it;
`prompt` and `completion` may be lists of messages too.

What two conversations begin with alike is their prompt: its answers are read, not learned. Behind it all answers are judged,
and nothing of what else stands there.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qgraft.data.calls import RowError, same_tools, tools_of
from qgraft.data.messages import Message, Tool
from qgraft.data.rows import (
    BESIDE_SYSTEM,
    Read,
    RowLayout,
    checked,
    is_empty,
    messages_of,
    questions_of,
    read_row,
    text_of,
    unread,
)

PREFERENCES = (
    "rows hold a prompt with chosen and rejected (stage dpo, ipo, orpo, simpo), or an answer with a label, true or false "
    "(stage kto)"
)
_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_LABELS = {"true": True, "1": True, "false": False, "0": False}
_PROMPT = ("prompt", "query", "history", "system", "tools", "messages")


def read_pair(row: object, layout: RowLayout) -> list[Read]:
    """[chosen, rejected] of a row; RowError says why there are none."""
    row = _mapping(row)
    columns = {part: layout.find(row, part) for part in ("chosen", "rejected")}
    if missing := [part for part, column in columns.items() if column is None or is_empty(row[column])]:
        if len(missing) == 2 and layout.find(row, "label"):
            raise RowError("holds an answer and a label, which stage kto learns; expected chosen and rejected")
        raise RowError(f"holds no {missing[0]}, expected chosen and rejected")
    found = [_ending(row[str(column)], part, layout) for part, column in columns.items()]
    ends = [messages for messages, _, _ in found]
    whole = [bool(end) and end[0].role != "assistant" for end in ends]
    if whole[0] != whole[1]:
        raise RowError("one of chosen and rejected is a whole conversation, the other an answer")
    front, tools, ignored = _front(row, layout, whole=whole[0])
    if whole[0]:
        _check_beginning(front, ends)
        front = [each for each in front if each.role == "system"]
        if front and ends[0][0].role == "system":
            ignored, front = {*ignored, *([BESIDE_SYSTEM] if front[0].content != ends[0][0].content else [])}, []
    tools = same_tools(tools, *(own for _, own, _ in found))
    both = [checked([*front, *end]) for end in ends]
    shared = _shared(*both)
    if len(both[0]) == shared == len(both[1]):
        raise RowError("chosen and rejected are the same")
    if not all(any(each.role == "assistant" for each in messages[shared:]) for messages in both):
        raise RowError("chosen and rejected have no answers of their own: one is the beginning of the other")
    used = [*columns.values(), *(layout.find(row, part) for part in _PROMPT)]
    unused = frozenset([*ignored, *(key for *_, keys in found for key in keys), *unread(row, used)])
    return [Read(_read_only(messages, shared), tools, unused) for messages in both]


def read_judged(row: object, layout: RowLayout) -> list[Read]:
    """[the answer of a row], with its label; RowError says why there is none."""
    row = _mapping(row)
    column = layout.find(row, "label")
    if column is None or is_empty(row[column]):
        if layout.find(row, "chosen") and layout.find(row, "rejected"):
            raise RowError("holds a pair (chosen, rejected), which stage dpo learns; expected an answer and a label")
        raise RowError("holds no label, expected true or false")
    label = _LABELS.get(str(row[column]).strip().lower().removesuffix(".0"))
    if label is None:
        raise RowError(f"label is {str(row[column])[:20]!r}, expected true or false")
    prompt, answer = layout.find(row, "prompt"), layout.find(row, "response")
    if prompt is not None and isinstance(row[prompt], list | tuple) and answer is not None:
        front, tools, ignored = _front(row, layout)
        said, own, keys = _ending(row[answer], "completion", layout)
        messages, tools = checked([*front, *said]), same_tools(tools, own)
        used = [column, answer, *(layout.find(row, part) for part in _PROMPT)]
        unused = frozenset([*ignored, *keys, *unread(row, used)])
        return [Read(_read_only(messages, len(front)), tools, unused, label)]
    read = read_row(row, layout)
    return [replace(read, messages=_read_only(read.messages, len(read.messages) - 1),
                    ignored=read.ignored - {column}, desirable=label)]  # fmt: skip


def _mapping(row: object) -> Mapping[str, object]:
    if not isinstance(row, Mapping):
        raise RowError(f"row is a {type(row).__name__}, not an object")
    if None in row:
        raise RowError("more cells than the header")
    return row


def _ending(value: object, part: str, layout: RowLayout) -> tuple[list[Message], tuple[Tool, ...], set[str]]:
    """What stands under chosen, rejected or completion: an answer, or the messages of a whole conversation.

    With the tools that one of these brings, and keys that change nothing.
    """
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list | tuple):
        found = messages_of(value, layout.tags)
        if not found[0]:
            raise RowError(f"{part} holds no messages")
        return found
    text = text_of(value, part)
    if not text.startswith("\n\nHuman:"):
        return [Message("assistant", text)], (), set()
    pieces = _TURN.split(text)[1:]
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [Message(_SPEAKERS[who], said.strip()) for who, said in turns], (), set()


def _front(
    row: Mapping[str, object], layout: RowLayout, *, whole: bool = False
) -> tuple[list[Message], tuple[Tool, ...], set[str]]:
    """The messages in front of an answer, the tools of the row, and keys that change nothing.

    Args:
        whole: the answers stand in conversations of their own, so there may be nothing in front of them.
    """
    column, listed, prompt = (layout.find(row, part) for part in ("tools", "messages", "prompt"))
    tools = () if column is None else tools_of(row[column])
    ignored, own = set[str](), tuple[Tool, ...]()
    if listed and not is_empty(row[listed]) and row[listed] and not whole:
        messages, own, ignored = messages_of(row[listed], layout.tags)
    elif prompt and isinstance(row[prompt], list | tuple):
        messages, own, ignored = messages_of(row[prompt], layout.tags)
    elif prompt and not is_empty(row[prompt]):
        messages = questions_of(row, layout)
    elif whole:
        messages = []
    else:
        raise RowError("no prompt: chosen and rejected are answers, expected the question in front of them")
    system = layout.text(row, "system", "system")
    if system and not (messages and messages[0].role == "system"):
        messages = [Message("system", system), *messages]
    elif system and messages[0].content != system:
        ignored = {*ignored, BESIDE_SYSTEM}
    return messages, same_tools(tools, own), ignored


def _check_beginning(front: Sequence[Message], ends: Sequence[Sequence[Message]]) -> None:
    """Raise RowError where a row's prompt is not what its whole conversations begin with."""
    said = [each.content.strip() for each in front if each.role == "user"]
    for end in ends:
        asked = [each.content.strip() for each in end if each.role == "user"]
        if said and asked[: len(said)] != said and said != asked[-1:]:
            raise RowError("the prompt is not what chosen and rejected begin with")


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many messages both begin with."""
    alike = [one == other for one, other in zip(chosen, rejected, strict=False)]
    return alike.index(False) if False in alike else len(alike)


def _read_only(messages: Sequence[Message], count: int) -> list[Message]:
    """The messages, whose first `count` are not learned."""
    return [replace(each, weight=0.0) if index < count and each.role == "assistant" else each
            for index, each in enumerate(messages)]  # fmt: skip
