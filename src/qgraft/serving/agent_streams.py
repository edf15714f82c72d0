"""Streams of the two APIs that coding agents speak: Anthropic's messages, and OpenAI's responses."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from qgraft.data.messages import Call
from qgraft.serving import messages_protocol as messages
from qgraft.serving import responses_protocol as responses
from qgraft.serving.answers import is_whole, new_id
from qgraft.serving.fields import ApiError
from qgraft.serving.protocol import Ask
from qgraft.serving.streams import Answering, pieces

Sent = dict[str, str]
_BLOCKS: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""}, "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
}  # fmt: skip


async def message_stream(answering: Answering, ask: Ask) -> AsyncIterator[Sent]:
    """message_start, the content blocks, message_delta, message_stop."""
    head = messages.message_head(answering.identity("msg"), ask.model, len(answering.prepared.requests[0].prompt))
    yield _event("message_start", message=head)
    index, open_kind = -1, ""
    async for piece in pieces(answering):
        if isinstance(piece, ApiError):
            yield {"event": "error", "data": json.dumps(messages.error_body(piece))}
            return
        kind, text = piece
        if kind != open_kind:
            if open_kind:
                yield _event("content_block_stop", index=index)
            index, open_kind = index + 1, kind
            yield _event("content_block_start", index=index, content_block=_BLOCKS[kind])
        delta = {"type": "text_delta", "text": text}
        if kind == "reasoning":
            delta = {"type": "thinking_delta", "thinking": text}
        yield _event("content_block_delta", index=index, delta=delta)
    if open_kind:
        yield _event("content_block_stop", index=index)
    for event in _message_end(answering, index + 1):
        yield event


def _message_end(answering: Answering, index: int) -> Iterator[Sent]:
    """The calls, and how it ended."""
    choice = answering.readings[0].choice
    assert choice.finish is not None
    blocks = [(messages.tool_use(call, {}), call.arguments) for call in choice.calls]
    if not index and not blocks:
        blocks = [(_BLOCKS["text"], "")]
    for at, (block, arguments) in enumerate(blocks, start=index):
        yield _event("content_block_start", index=at, content_block=block)
        if arguments:
            yield _event("content_block_delta", index=at, delta={"type": "input_json_delta", "partial_json": arguments})
        yield _event("content_block_stop", index=at)
    delta = {"stop_reason": messages.stop_reason(choice), "stop_sequence": choice.finish.stop}
    yield _event("message_delta", delta=delta, usage=messages.usage(choice.finish))
    yield _event("message_stop")


def _event(kind: str, **values: Any) -> Sent:
    return {"event": kind, "data": json.dumps({"type": kind, **values}, ensure_ascii=False)}


class _Numbered:
    """Events of a response: each has its number."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, kind: str, **values: Any) -> Sent:
        self.count += 1
        return _event(kind, **values, sequence_number=self.count - 1)


async def response_stream(answering: Answering, ask: Ask) -> AsyncIterator[Sent]:
    """response.created, the output items with their deltas, response.completed or what it came to."""
    body, numbered = responses.ResponseBody(ask), _Numbered()
    yield numbered("response.created", response=body.told("in_progress", []))
    yield numbered("response.in_progress", response=body.told("in_progress", []))
    output: list[dict[str, Any]] = []
    item: _Item | None = None
    async for piece in pieces(answering):
        if isinstance(piece, ApiError):
            yield numbered("error", code=piece.code or piece.kind, message=str(piece), param=piece.param)
            failed = {**body.told("failed", output), "error": {"code": "server_error", "message": str(piece)}}
            yield numbered("response.failed", response=failed)
            return
        kind, text = piece
        if item is None or item.kind != kind:
            for event in item.closed("completed") if item is not None else ():
                yield event
            item = _Item(kind, numbered, output)
            for event in item.opened():
                yield event
        yield item.more(text)
    choice = answering.readings[0].choice
    assert choice.finish is not None
    status = responses.status_of(choice.finish)
    for event in item.closed(status) if item is not None else ():
        yield event
    for call in choice.calls:
        for event in _called(call, numbered, output):
            yield event
    if not output:
        output.append(responses.message_item(new_id("msg"), "", status))
    yield numbered(f"response.{status}", response=body.told(status, output, choice.finish))


class _Item:
    """A message, or reasoning, that is being written."""

    def __init__(self, kind: str, numbered: _Numbered, output: list[dict[str, Any]]) -> None:
        self.kind, self._numbered, self._output, self._text = kind, numbered, output, ""
        self._id = new_id("rs" if kind == "reasoning" else "msg")
        self._name = "response.reasoning_text" if kind == "reasoning" else "response.output_text"
        self._place = {"item_id": self._id, "output_index": len(output), "content_index": 0}

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
        if self.kind == "text":
            return responses.message_item(self._id, text, status)
        item = responses.reasoning_item(self._id, text or "")
        return item if text is not None else {**item, "content": []}

    def _part(self) -> dict[str, Any]:
        return (
            responses.text_part(self._text) if self.kind == "text" else {"type": "reasoning_text", "text": self._text}
        )

    def opened(self) -> Iterator[Sent]:
        """Its beginning."""
        at = self._place["output_index"]
        yield self._numbered("response.output_item.added", output_index=at, item=self._item(None, "in_progress"))
        yield self._numbered("response.content_part.added", **self._place, part=self._part())

    def more(self, text: str) -> Sent:
        """More of its text."""
        self._text += text
        return self._numbered(f"{self._name}.delta", **self._place, delta=text, **self._logprobs())

    def closed(self, status: str) -> Iterator[Sent]:
        """Its end."""
        item = self._item(self._text, status)
        self._output.append(item)
        yield self._numbered(f"{self._name}.done", **self._place, text=self._text, **self._logprobs())
        yield self._numbered("response.content_part.done", **self._place, part=self._part())
        yield self._numbered("response.output_item.done", output_index=self._place["output_index"], item=item)

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": []} if self.kind == "text" else {}


def _called(call: Call, numbered: _Numbered, output: list[dict[str, Any]]) -> Iterator[Sent]:
    """The events of a call, which is known as far as it goes."""
    status = "completed" if is_whole(call) else "incomplete"
    at, item = len(output), responses.call_item(new_id("fc"), call, status)
    place = {"item_id": item["id"], "output_index": at}
    output.append(item)
    begun = {**item, "arguments": "", "status": "in_progress"}
    yield numbered("response.output_item.added", output_index=at, item=begun)
    yield numbered("response.function_call_arguments.delta", **place, delta=call.arguments)
    yield numbered("response.function_call_arguments.done", **place, arguments=call.arguments, name=call.name)
    yield numbered("response.output_item.done", output_index=at, item=item)
