"""OpenAI's answers as JSON: whole ones, and the chunks of a stream."""

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qgraft.data.messages import Call
from qgraft.serving.requests import Finish
from qgraft.serving.sampling import Token

Spell = Callable[[int], str]  # a token's id -> its text


@dataclass
class Choice:
    """One answer, as far as it is known.

    Attributes:
        formed: whether it must be JSON, or calls.
        unfinished: whether a call at its end was cut, which may be the last of `calls`.
    """

    index: int
    text: str = ""
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    formed: bool = False
    unfinished: bool = False
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    spelt: int = 0  # characters of the tokens that a stream has told

    @property
    def reason(self) -> str:
        """OpenAI's finish_reason: of what a stop string has cut in the middle of its form it is "length" as well.

        Clients take "stop" for a word that all is there; no other word but this one says that it is not.
        """
        assert self.finish is not None
        if self.unfinished or (self.formed and self.finish.stop is not None):
            return "length"
        return "tool_calls" if self.calls and self.finish.reason == "stop" else self.finish.reason


def new_id(kind: str) -> str:
    """A name for an answer, or a call: `chatcmpl-`, and all newer kinds with `_`, as clients find them at OpenAI's."""
    return f"{kind}{'-' if kind in ('chatcmpl', 'cmpl') else '_'}{uuid.uuid4().hex[:24]}"


def usage(finishes: Sequence[Finish], prompts: int = 1) -> dict[str, Any]:
    """OpenAI's usage; a prompt with several answers counts once.

    Args:
        prompts: how many prompts the finishes are of, each with as many answers.
    """
    each = max(len(finishes) // max(prompts, 1), 1)
    asked = finishes[::each]
    prompt, completion = sum(f.prompt_tokens for f in asked), sum(f.tokens for f in finishes)
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(f.cached for f in asked)},
    }  # fmt: skip


def chat_body(
    identity: str, created: int, model: str, choices: Sequence[Choice], spell: Spell, with_logprobs: bool
) -> dict[str, Any]:
    """A whole chat completion."""
    told = [
        {
            "index": choice.index, "message": _message(choice), "finish_reason": choice.reason,
            "logprobs": {"content": chat_logprobs(choice.tokens, spell), "refusal": None} if with_logprobs else None,
        }
        for choice in choices
    ]  # fmt: skip
    head = {"id": identity, "object": "chat.completion", "created": created, "model": model, "choices": told}
    return {**head, "usage": usage([c.finish for c in choices if c.finish])}


def _message(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text or (None if choice.calls else "")}
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.calls:
        message["tool_calls"] = [call_body(call) for call in choice.calls]
    return {**message, "refusal": None}


def is_whole(call: Call) -> bool:
    """Whether all of the call's arguments are there."""
    try:
        json.loads(call.arguments)
    except ValueError:
        return False
    return True


def call_body(call: Call) -> dict[str, Any]:
    """A call as OpenAI writes it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id or new_id("call"), "type": "function", "function": function}


def chat_chunk(
    identity: str, created: int, model: str, index: int, delta: dict[str, Any], reason: str | None = None,
    logprobs: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A piece of a stream."""
    choice = {
        "index": index, "delta": delta, "finish_reason": reason,
        "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
    }  # fmt: skip
    return {"id": identity, "object": "chat.completion.chunk", "created": created, "model": model, "choices": [choice]}


def chat_logprobs(tokens: Sequence[Token], spell: Spell) -> list[dict[str, Any]]:
    """OpenAI's logprobs of a chat."""
    return [
        {**_spelt(token.id, token.logprob, spell), "top_logprobs": [_spelt(*pair, spell) for pair in token.top]}
        for token in tokens
    ]


def _spelt(token: int, logprob: float | None, spell: Spell) -> dict[str, Any]:
    text = spell(token)
    partly = "\ufffd" in text  # which bytes of a character these are its text does not say
    return {"token": text, "logprob": logprob, "bytes": None if partly else list(text.encode("utf-8"))}


def completion_body(
    identity: str, created: int, model: str, choices: Sequence[Choice], spell: Spell, with_logprobs: bool, prompts: int
) -> dict[str, Any]:
    """A whole completion."""
    told = [
        {"index": c.index, "text": c.text, "finish_reason": c.reason,
         "logprobs": completion_logprobs(c.tokens, spell) if with_logprobs else None}
        for c in choices
    ]  # fmt: skip
    head = {"id": identity, "object": "text_completion", "created": created, "model": model, "choices": told}
    return {**head, "usage": usage([c.finish for c in choices if c.finish], prompts)}


def completion_chunk(
    identity: str, created: int, model: str, index: int, text: str, reason: str | None = None,
    logprobs: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A piece of a stream."""
    choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}
    return {"id": identity, "object": "text_completion", "created": created, "model": model, "choices": [choice]}


def completion_logprobs(tokens: Sequence[Token], spell: Spell, start: int = 0) -> dict[str, Any]:
    """OpenAI's logprobs of a completion, from this place of its text on."""
    texts = [spell(token.id) for token in tokens]
    offsets = [start + sum(map(len, texts[:at])) for at in range(len(texts))]
    return {
        "tokens": texts, "token_logprobs": [token.logprob for token in tokens], "text_offset": offsets,
        "top_logprobs": [{spell(id_): logprob for id_, logprob in token.top} for token in tokens],
    }  # fmt: skip


def usage_chunk(head: dict[str, Any], finishes: Sequence[Finish], prompts: int = 1) -> dict[str, Any]:
    """The last piece of a stream, where include_usage was asked for."""
    return {**head, "choices": [], "usage": usage(finishes, prompts)}
