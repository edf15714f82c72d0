"""Answers on their way from the engine's thread to a client: as one, and as the chunks of a stream."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from qgraft.serving import answers
from qgraft.serving.answers import Choice
from qgraft.serving.fields import ApiError
from qgraft.serving.protocol import Ask
from qgraft.serving.requests import Delta, Finish, Listener
from qgraft.serving.running import Running
from qgraft.serving.service import Prepared, Reading, Service, as_api_error

Event = tuple[int, Delta | Finish]


class Answering:
    """The answers to one Ask, while the engine writes them.

    Args:
        loop: that of the client's connection.
    """

    def __init__(
        self, service: Service, prepared: Prepared, loop: asyncio.AbstractEventLoop, one_call: bool = False
    ) -> None:
        self.service, self.prepared = service, prepared
        self.created = int(time.time())
        self.readings = [
            Reading(Choice(index, formed=prepared.formed), reader, one_call)
            for index, reader in enumerate(prepared.readers)
        ]
        self._loop, self._queue = loop, asyncio.Queue[Event]()
        self._running: list[Running] = []
        self._identity = ""

    def identity(self, kind: str) -> str:
        """What the answer is called."""
        self._identity = self._identity or answers.new_id(kind)
        return self._identity

    def begin(self) -> None:
        """Hand the requests to the engine. Raises ApiError."""
        self._running = self.service.submit(
            self.prepared, [self._listener(index) for index in range(len(self.readings))]
        )

    def leave(self) -> None:
        """Nobody waits any more: what is not finished is cancelled."""
        for each in self._running:
            if not each.finished:
                self.service.engine.cancel(each)

    def prompt_text(self, prompt: int) -> str:
        """The text of a prompt, for `echo`."""
        ids = self.prepared.requests[prompt * (len(self.readings) // self.prepared.prompts)].prompt
        return str(self.service.tokenizer.decode(list(ids), skip_special_tokens=True))

    async def events(self) -> AsyncIterator[Event]:
        """What the engine tells, until all of the answers are complete."""
        left = len(self.readings)
        while left:
            index, event = await self._queue.get()
            left -= isinstance(event, Finish)
            yield index, event

    async def complete(self) -> None:
        """Until all of the answers are complete."""
        async for index, event in self.events():
            self.readings[index].take(event)

    def _listener(self, index: int) -> Listener:
        def listen(event: Delta | Finish) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return listen


def _data(value: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(value, ensure_ascii=False)}


_DONE = {"data": "[DONE]"}


def problem_of(finish: Finish) -> ApiError | None:
    """What is said of an answer that failed; None of one that did not."""
    if finish.error is not None:
        return as_api_error(finish.error)
    if finish.reason == "cancelled":
        return ApiError(503, "the server is being stopped", kind="server_error")
    return None


async def _timed(answering: Answering) -> AsyncIterator[Event | ApiError]:
    """The events; at last an error, in the place of what comes too late or has failed: the status was sent long ago."""
    seconds, events = answering.service.limits.seconds, answering.events()
    end = time.monotonic() + seconds
    while True:
        try:
            index, event = await asyncio.wait_for(anext(events), max(end - time.monotonic(), 0))
        except StopAsyncIteration:
            return
        except TimeoutError:
            yield ApiError(504, f"the answer took longer than {seconds:g} seconds", kind="timeout", code="timeout")
            return
        if isinstance(event, Finish) and (problem := problem_of(event)) is not None:
            yield problem
            return
        yield index, event


async def pieces(answering: Answering) -> AsyncIterator[tuple[str, str] | ApiError]:
    """("reasoning" or "text", more of it) of one answer while it is written; at last an error, where it fails."""
    (reading,) = answering.readings
    async for told in _timed(answering):
        if isinstance(told, ApiError):
            yield told
            return
        reasoning, content = reading.take(told[1])
        if reasoning:
            yield "reasoning", reasoning
        if content:
            yield "text", content


async def chat_stream(answering: Answering, ask: Ask) -> AsyncIterator[dict[str, str]]:
    """The chunks of a chat completion."""
    head = (answering.identity("chatcmpl"), answering.created, ask.model)
    spell, with_logprobs = answering.service.spell, ask.sampling.logprobs is not None
    for reading in answering.readings:
        yield _data(answers.chat_chunk(*head, reading.choice.index, {"role": "assistant", "content": ""}))
    async for told in _timed(answering):
        if isinstance(told, ApiError):
            yield _data(told.body())
            return
        index, event = told
        reading = answering.readings[index]
        reasoning, content = reading.take(event)
        if reasoning:
            yield _data(answers.chat_chunk(*head, index, {"reasoning_content": reasoning}))
        tokens = event.tokens if isinstance(event, Delta) and with_logprobs else ()
        if content or tokens:
            logprobs = answers.chat_logprobs(tokens, spell) if with_logprobs else None
            yield _data(answers.chat_chunk(*head, index, {"content": content}, logprobs=logprobs))
        if isinstance(event, Finish):
            for number, call in enumerate(reading.choice.calls):
                delta = {"tool_calls": [{"index": number, **answers.call_body(call)}]}
                yield _data(answers.chat_chunk(*head, index, delta))
            yield _data(answers.chat_chunk(*head, index, {}, reading.choice.reason))
    if ask.include_usage:
        chunk = answers.chat_chunk(*head, 0, {})
        yield _data(answers.usage_chunk(chunk, _finishes(answering)))
    yield _DONE


async def completion_stream(answering: Answering, ask: Ask) -> AsyncIterator[dict[str, str]]:
    """The chunks of a completion."""
    head = (answering.identity("cmpl"), answering.created, ask.model)
    spell, with_logprobs = answering.service.spell, ask.sampling.logprobs is not None
    if ask.echo:
        for reading in answering.readings:
            text = answering.prompt_text(reading.choice.index // ask.count)
            yield _data(answers.completion_chunk(*head, reading.choice.index, text))
    async for told in _timed(answering):
        if isinstance(told, ApiError):
            yield _data(told.body())
            return
        index, event = told
        reading = answering.readings[index]
        _, content = reading.take(event)
        if isinstance(event, Finish):
            yield _data(answers.completion_chunk(*head, index, content, reading.choice.reason))
        elif content or with_logprobs:
            logprobs = None
            if with_logprobs:
                logprobs = answers.completion_logprobs(event.tokens, spell, reading.choice.spelt)
                reading.choice.spelt += sum(map(len, logprobs["tokens"]))
            yield _data(answers.completion_chunk(*head, index, content, logprobs=logprobs))
    if ask.include_usage:
        chunk = answers.completion_chunk(*head, 0, "")
        yield _data(answers.usage_chunk(chunk, _finishes(answering), answering.prepared.prompts))
    yield _DONE


def _finishes(answering: Answering) -> list[Finish]:
    return [reading.choice.finish for reading in answering.readings if reading.choice.finish is not None]
