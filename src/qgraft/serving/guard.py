"""What stands in front of every request: its key, the size of its body, the time it may take to arrive, the pages of other
sites that may ask, and the log.

A body is counted while it comes, whatever its header says; a file of rows, which is PUT, may be larger and take longer. A
server without keys listens on its machine alone, where a web page in a browser can reach it, too: requests by another name
than the machine's own are refused, those of pages from elsewhere, and bodies that a page may send anywhere without being
asked (forms, plain text). The log has a line for each request: who, what, how it ended, how long it took; no prompt, no
answer, no key, and no path that is not one of ours.
"""

import asyncio
import ipaddress
import logging
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qgraft.serving import messages_protocol
from qgraft.serving.fields import ApiError
from qgraft.serving.origins import Origins, preflight
from qgraft.serving.service import Service

DRAIN_BYTES, DRAIN_SECONDS = 16 << 20, 5.0  # of a body that nobody wants, before the answer that says so
PUBLIC = ("/health", "/")
PUBLIC_BELOW = ("/page/", "/studio/download/")  # the page itself; addresses that hold a key of their own


class Guard:
    """A layer of ASGI around the application."""

    def __init__(self, app: ASGIApp, service: Service, log: logging.Logger) -> None:
        self.app, self.service, self.log = app, service, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the module."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, body = time.monotonic(), 0, _Body(receive, scope, self.service)
        asked = (
            {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        )  # its answer is GET's; uvicorn sends no body
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        cross = self.service.origins.headers(headers)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-content-type-options", b"nosniff"), *cross]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
                if status >= 400 and status != 408:  # which is for who sends nothing
                    await body.drain()
            await send(message)

        try:
            if cross and scope["method"] == "OPTIONS":
                await Response(status_code=204, headers=preflight(headers))(scope, receive, sending)
                return
            self._admit(asked, headers)
            await self.app(asked, body, sending)
        except ApiError as error:
            if not status:
                await _send_error(sending, error, scope["path"])
        finally:
            self._log({**asked, "method": scope["method"]}, status, time.monotonic() - began)

    def _admit(self, scope: Scope, headers: Mapping[bytes, str]) -> None:
        """Look at the key, and at the size that the header says. Raises ApiError."""
        kind = headers.get(b"content-type", "application/json").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise ApiError(415, f"Content-Type: got {kind[:100]}, expected application/json")
        if (coding := headers.get(b"content-encoding", "identity").strip().lower()) != "identity":
            raise ApiError(415, f"Content-Encoding: got {coding[:100]}, expected none: bodies are read as they come")
        if not self.service.keys.are_needed:
            _check_caller(headers, self.service.origins)
        key = headers.get(b"x-api-key")  # Anthropic's clients
        given = headers.get(b"authorization") or (None if key is None else f"Bearer {key}")
        permission = self.service.keys.of(given)
        if permission is None and scope["path"] not in PUBLIC and not scope["path"].startswith(PUBLIC_BELOW):
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key", kind="authentication_error")
        scope["qgraft_permission"] = permission
        length = headers.get(b"content-length", "0")
        most, _ = self.service.limits.of(scope["method"])
        if length.isascii() and length.isdigit() and int(length[:18]) > most:
            raise _too_large(most)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        permission = scope.get("qgraft_permission")
        route = getattr(scope.get("route"), "path", "-")
        asked = str(scope.get("qgraft_asked", "-"))[:100]
        self.log.info(
            "%s %s %s %s model=%r %.3fs", "-" if permission is None else permission.name, scope["method"], route,
            status or (500 if isinstance(sys.exception(), Exception) else 499), asked, seconds,
        )  # fmt: skip


class _Body:
    """A receive() that counts, and does not wait for ever."""

    def __init__(self, receive: Receive, scope: Scope, service: Service) -> None:
        self._receive = receive
        self._size, self._complete = 0, False
        self._most, seconds = service.limits.of(scope["method"])
        self._end = time.monotonic() + seconds

    async def __call__(self) -> Any:
        if self._complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(self._end - time.monotonic(), 0.01))
        except TimeoutError:
            raise ApiError(408, "the body took too long", kind="timeout") from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self._size > self._most:
                raise _too_large(self._most)
        return message

    async def drain(self) -> None:
        """Take in what still comes, within bounds: a client that is sending does not see an answer before its end."""
        end, left = time.monotonic() + DRAIN_SECONDS, DRAIN_BYTES
        with suppress(TimeoutError):
            while not self._complete and left > 0:
                message = await asyncio.wait_for(self._receive(), max(end - time.monotonic(), 0.01))
                left -= len(message.get("body", b""))
                self._complete = not message.get("more_body", False)


def _check_caller(headers: Mapping[bytes, str], origins: Origins) -> None:
    """Raise ApiError for a page of somebody else's in a browser on this machine."""
    host, origin = headers.get(b"host", ""), headers.get(b"origin")
    if not _is_local(host):
        raise ApiError(403, "Host: expected this machine's own name: the server has no keys", kind="permission_error")
    if origin is not None and origin.partition("://")[2] != host and not origins.allow(origin):
        raise ApiError(403, "Origin: expected a page of this server: it has no keys", kind="permission_error")


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="request_too_large")


async def _send_error(send: Send, error: ApiError, path: str) -> None:
    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    await error_response(error, path)({"type": "http", "method": "GET", "headers": []}, nothing, send)


def error_response(error: ApiError, path: str) -> Response:
    """The JSON of an error, with its status, in the form of the API that the path is of."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = messages_protocol.error_body(error) if path.startswith("/v1/messages") else error.body()
    return JSONResponse(body, error.status, headers)
