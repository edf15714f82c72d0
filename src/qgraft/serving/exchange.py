"""What all endpoints that answer have in common: a body is read, the engine is asked, somebody waits, and lets go.

Preparing a prompt, and loading an adapter for it, is done in a worker thread; the engine tells its events into the event
loop. Who goes away frees its place: a stream that is closed, and a client that does not wait for the whole answer.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi import Request
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from qgraft.serving.fields import ApiError, json_of
from qgraft.serving.keys import Permission
from qgraft.serving.protocol import Ask
from qgraft.serving.service import Service, errors_as_answers
from qgraft.serving.streams import Answering, problem_of

T = TypeVar("T")

log = logging.getLogger("qgraft.access")
LARGE = 1 << 16  # bytes of a body that takes so long to read that others notice
SLOWEST = 60.0  # seconds in which a client takes nothing of its stream


async def body_of(request: Request) -> Any:
    """The JSON that was sent. Raises ApiError."""
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise ApiError(499, "the client has gone", kind="closed") from error
    return json_of(body) if len(body) < LARGE else await run_in_threadpool(json_of, body)


def permission_of(request: Request) -> Permission:
    """What the key of the request is good for; Guard has looked at it."""
    permission = request.scope["qgraft_permission"]
    assert isinstance(permission, Permission)
    return permission


def require_admin(request: Request) -> None:
    """Raise ApiError for a request without an admin's key."""
    if not permission_of(request).admin:
        raise ApiError(403, "this needs an admin's key", kind="permission_error")


async def told(function: Callable[..., T], *args: Any) -> T:
    """What a function says, run beside the event loop; its errors are answers."""

    def call() -> T:
        with errors_as_answers():
            return function(*args)

    return await run_in_threadpool(call)


async def begin(service: Service, request: Request, ask: Ask) -> Answering:
    """Ask the engine. Raises ApiError."""
    prepared = await run_in_threadpool(service.prepare, ask, permission_of(request))
    request.scope["qgraft_asked"] = ask.model
    answering = Answering(service, prepared, asyncio.get_running_loop(), ask.one_call)
    await run_in_threadpool(answering.begin)
    return answering


async def complete(answering: Answering, request: Request) -> None:
    """Wait for all of the answers. Raises ApiError where one fails, it takes too long, or nobody waits any more."""
    try:
        await _wait(answering, request, answering.service.limits.seconds)
    finally:
        answering.leave()
    for reading in answering.readings:
        finish = reading.choice.finish
        if finish is not None and (problem := problem_of(finish)) is not None:
            raise problem


async def _wait(answering: Answering, request: Request, seconds: float) -> None:
    whole = asyncio.ensure_future(answering.complete())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        done, _ = await asyncio.wait({whole, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (whole, gone):
            task.cancel()
    if not done:
        raise ApiError(504, f"the answer took longer than {seconds:g} seconds", kind="timeout", code="timeout")
    if whole not in done:
        raise ApiError(499, "the client has gone", kind="closed")
    whole.result()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(EventSourceResponse):
    """A stream of events; whoever ends it, and whenever, the engine's place is free."""

    def __init__(self, answering: Answering, events: AsyncIterator[dict[str, str]]) -> None:
        super().__init__(events, ping=15, sep="\n", send_timeout=SLOWEST)
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("a client took nothing for %g seconds: its stream is closed", SLOWEST)
        finally:
            self._answering.leave()
