"""What somebody asks of the engine, and what it tells them: values, without a model.

Request   prompt ids, adapters with weights, how tokens are chosen, where the answer ends
Delta     text that can be shown of the answer now, and the tokens that were added since the last one
Finish    why the answer ended:  stop    an end token, or a stop string
                                 length  max_tokens, or the model's context is full
                                 error   what went wrong with this request; others go on
                                 cancelled
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qgraft.errors import DataError, QgraftError
from qgraft.serving.sampling import Sampling, Token

if TYPE_CHECKING:
    from qgraft.serving.grammars import Grammar


@dataclass(frozen=True)
class Thinking:
    """What an answer may think.

    Attributes:
        budget: tokens, behind which it is closed.
        begun: whether the prompt has opened it; else the answer may, with its first token.
        open, close: the tokens around it.
    """

    budget: int
    begun: bool
    open: int | None
    close: int


@dataclass(frozen=True)
class Request:
    """One answer that is asked for.

    Attributes:
        adapters: the adapters with their weights; empty for the base.
        max_tokens: the longest answer; None for as long as the context lasts. With 0 the prompt is read, which others that
            begin alike are spared, and nothing is written.
        stop: texts that end it.
        ignore_ends: whether end tokens do not end it.
        keep_special: whether special tokens are a part of its text, for who reads calls of tools out of it.
        grammar: the form that it must have; it ends where that is complete.
        thinking: how long it may think; None for as long as it likes.
        cleaned: whether its text is as the tokenizer's own chat shows it (data/scripted.py), where it has one.
    """

    prompt: tuple[int, ...]
    adapters: Mapping[str, float] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_ends: bool = False
    keep_special: bool = False
    grammar: "Grammar | None" = None
    cleaned: bool = False
    thinking: Thinking | None = None


@dataclass(frozen=True)
class Delta:
    """A piece of an answer; the texts of all of them, one after another, are the answer."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Finish:
    """The end of an answer.

    Attributes:
        reason: stop, length, error or cancelled.
        stop: the stop string that ended it.
        error: what went wrong.
        prompt_tokens, tokens: how many there were; `cached` of the prompt's were known from another request.
    """

    reason: str
    prompt_tokens: int
    tokens: int
    cached: int = 0
    stop: str | None = None
    error: QgraftError | None = None


Listener = Callable[[Delta | Finish], None]


class ContextError(DataError):
    """A prompt that leaves no room for an answer."""


class BusyError(QgraftError):
    """The queue is full."""


class StoppedError(BusyError):
    """The engine takes no more requests, or has ended."""
