# ruff: noqa: E402 (what is imported below needs the extra)
"""Clients that connect and say nothing, or little and slowly; and too many of them."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="needs qgraft[serve]")

from qgraft.serving import connections
from qgraft.serving.connections import OPTIONS, BoundedProtocol

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers after longer than a head may take."""
    import asyncio

    await asyncio.sleep(0.6)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.4)
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="critical", lifespan="off", http=BoundedProtocol,
        **{**OPTIONS, "limit_concurrency": 4},
    )  # fmt: skip
    server, listening = uvicorn.Server(config), config.bind_socket()
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def connected(port: int) -> socket.socket:
    found = socket.create_connection(("127.0.0.1", port))
    found.settimeout(10)
    return found


def closed_after(connection: socket.socket, trickle: bytes = b"") -> float:
    """Seconds until the server closes it, while bytes of a head trickle in."""
    began = time.monotonic()
    connection.settimeout(0.05)
    while True:
        try:
            if connection.recv(100) == b"":
                return time.monotonic() - began
        except TimeoutError:
            if trickle:
                connection.sendall(trickle)
        except ConnectionError:
            return time.monotonic() - began
        assert time.monotonic() - began < 8, "never"


def test_a_head_that_does_not_end_is_not_waited_for(port: int) -> None:
    for sent, trickle in ((b"", b""), (GET, b""), (GET, b"A: b\r\n"), (b"G", b"")):
        with connected(port) as connection:
            connection.sendall(sent)
            assert closed_after(connection, trickle) < 3


def test_what_is_asked_in_time_is_answered_however_long_that_takes(port: int) -> None:
    """Also a second time on the same connection, whose head may be slow, but not for ever."""
    with connected(port) as connection:
        for _ in range(2):
            connection.sendall(GET)
            time.sleep(0.1)
            connection.sendall(b"\r\n")
            answer = b""
            while not answer.endswith(b"ok"):
                answer += connection.recv(1000)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.6)  # nothing is asked: that is no head
        connection.sendall(GET)
        assert closed_after(connection, b"A: b\r\n") < 3


def test_too_many_are_told(port: int) -> None:
    held = [connected(port) for _ in range(5)]
    held[-1].sendall(GET + b"\r\n")
    assert held[-1].recv(1000).startswith(b"HTTP/1.1 503")
    for each in held:
        each.close()
    time.sleep(0.3)
    with connected(port) as connection:
        connection.sendall(GET + b"\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_head_has_a_size(port: int) -> None:
    with connected(port) as connection:
        connection.sendall(GET + b"A: " + b"x" * (connections.HEAD_BYTES + 100))
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
