"""Connections to the server: how many there are, and how long one may take to say what it asks.

uvicorn waits for the first request of a connection, and for the rest of one that has begun, as long as the client likes. Here
a request's head must be complete within HEAD_SECONDS of the connection, or of the head's first byte; bodies have a time of
their own (guard.py), as have streams that nobody reads (exchange.py). Beyond CONNECTIONS, requests are answered with 503.
"""

from asyncio import Transport
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 1000
IDLE_SECONDS = 30  # between two requests
HEAD_SECONDS, HEAD_BYTES = 20.0, 1 << 16

OPTIONS: dict[str, Any] = {  # of uvicorn's
    "limit_concurrency": CONNECTIONS, "timeout_keep_alive": IDLE_SECONDS, "h11_max_incomplete_event_size": HEAD_BYTES,
    "ws": "none",
}  # fmt: skip


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol for HTTP/1.1, which does not wait for ever; give it as `http`, beside OPTIONS."""

    _limit: Any = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """See asyncio's Protocol."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """See asyncio's Protocol."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio's Protocol."""
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """The time runs while no request is complete enough to be answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        elif self._limit is None:
            self._limit = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None
