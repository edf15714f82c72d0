"""What a conversation is: messages, the tools they may call, and how much each answer counts.

A message is a value. Its fields are what chat templates read, under the names that transformers' documentation gives them
(`apply_chat_template`); rows of other formats are brought into them by rows.py. `weight` is the only field that no template
sees: it says how much the loss of this answer counts, 0 for an answer that is read and not learned.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qgraft.errors import DataError

Pair = tuple[str, str]  # (role, content), all that most messages have
Tool = dict[str, Any]  # {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}


class ConversationError(DataError):
    """Why one conversation gives no sample. Whoever reads many counts it and goes on."""


@dataclass(frozen=True)
class Call:
    """A function that an answer calls; `arguments` is JSON text of an object, however the row wrote it."""

    name: str
    arguments: str = "{}"
    id: str | None = None

    def as_dict(self, *, as_text: bool = False) -> dict[str, Any]:
        """As chat templates read it, the arguments as an object, or `as_text`."""
        arguments = self.arguments if as_text else json.loads(self.arguments)
        call = {"type": "function", "function": {"name": self.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id, **call}


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: system, user, assistant or tool.
        content: its text; "" where an answer is nothing but calls.
        reasoning: what an answer thought before, if the row keeps it apart from the content.
        calls: functions that an answer calls.
        call_id, name: of a tool's turn, which call it answers and of which function; `name` also of other turns.
        images: of a question, in their order; its content has pictures.MARK in their places. Or a recording (sounds.py).
        weight: of an answer, what its loss is multiplied by.
    """

    role: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    name: str | None = None
    weight: float = 1.0
    images: tuple[Any, ...] = ()

    def __getitem__(self, index: int) -> str:
        """As a (role, content) pair: `role, content = message`."""
        return (self.role, self.content)[index]

    @property
    def is_plain(self) -> bool:
        """Whether a role and a text are all there is to it."""
        return not (self.reasoning or self.calls or self.images)


@dataclass(frozen=True)
class Conversation:
    """Messages, ending in an answer; where they stand in a file; the tools that their answers may call.

    `desirable` says whether the answer is wanted, where the row says so of a single answer; `label` is that of texts for a
    classifier, which are the messages then.
    """

    messages: tuple[Message, ...]
    source: str
    tools: tuple[Tool, ...] = ()
    desirable: bool | None = None
    label: Any = None

    @classmethod
    def of(cls, source: str, *pairs: Pair) -> "Conversation":
        """A conversation of (role, content) turns."""
        return cls(as_messages(pairs), source)


def as_messages(turns: Sequence[Message | Pair]) -> tuple[Message, ...]:
    """Messages from messages, or (role, content) pairs. Raises ConversationError for dicts, whose keys would be taken."""
    if any(isinstance(turn, dict) for turn in turns):
        raise ConversationError("a turn is a dict, expected a (role, content) pair")
    return tuple(turn if isinstance(turn, Message) else Message(*turn) for turn in turns)


def as_pairs(messages: Sequence[Message]) -> list[Pair]:
    """(role, content) turns for who knows nothing else; raises ConversationError where a message says more."""
    for message in messages:
        if message.calls:
            raise ConversationError("tool_calls: the tokenizer writes the model's own prompts, without tools")
        if message.images:
            raise ConversationError("images: the tokenizer writes the model's own prompts, of text alone")
        if message.reasoning:
            raise ConversationError(
                "reasoning_content: the tokenizer writes the model's own prompts, without reasoning"
            )
    return [(message.role, message.content) for message in messages]
