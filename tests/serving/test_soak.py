# ruff: noqa: E402 (what is imported below needs the extra)
"""What a day brings, in two minutes: clients that come, go, load, unload, send too much, read slowly."""

import contextlib
import json
import os
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs qgraft[serve]")
pytest.importorskip("sse_starlette", reason="needs qgraft[serve]")
pytest.importorskip("uvicorn", reason="needs qgraft[serve]")
pytest.importorskip("llguidance", reason="needs qgraft[serve]")
httpx = pytest.importorskip("httpx")

from served import ADMIN, ALL, HELLO, TRAVERSALS, ask, serving, told

from qgraft.sizes import memory_now

Maker = Callable[..., Any]


@pytest.mark.slow
def test_sixteen_clients_with_loads_unloads_and_kills(
    tiny_gguf: Maker, adapters: Path, tmp_path: Path, expected: Any
) -> None:
    """SOAK_SECONDS (120) of what a day brings: no wrong answer, no crash, memory that stays."""
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({ADMIN: {"admin": True}, ALL: {}}))
    server = serving(
        "--model", str(tiny_gguf("llama").path), "--adapters", str(adapters), "--keys", str(keys), "--name", "base",
        "--max_body", "20000", "--max_adapters", "8",
    )  # fmt: skip
    names = {
        "base": {}, "law": {"law": 1.0}, "med": {"med": 1.0}, "tax": {"tax": 1.0},
        "law=0.7+med=0.3": {"law": 0.7, "med": 0.3},
    }  # fmt: skip
    right = {name: expected(mix) for name, mix in names.items()}
    seconds = float(os.environ.get("SOAK_SECONDS", "120"))
    end, wrong, asked = time.monotonic() + seconds, list[Any](), [0] * 16

    def whole(client: Any, draw: random.Random) -> bool:
        name = draw.choice(list(right))
        return told(ask(client, model=name)) == right[name]

    def stream(client: Any, draw: random.Random) -> bool:
        name = draw.choice(list(right))
        lines = [
            line[6:] for line in ask(client, model=name, stream=True).text.splitlines() if line.startswith("data: {")
        ]
        return "".join(json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines) == right[name]

    def vanish(client: Any, draw: random.Random) -> bool:
        given: Any = {"base_url": server.url, "headers": client.headers, "timeout": 0.05}
        with httpx.Client(**given) as other, contextlib.suppress(httpx.TimeoutException):
            ask(other, max_tokens=60, n=2)
        return True

    def too_long(client: Any, draw: random.Random) -> bool:
        return bool(ask(client, messages=[{"role": "user", "content": "x" * 30000}]).status_code == 413)

    def slow(client: Any, draw: random.Random) -> bool:
        """Takes a byte now and then, and goes away with most of it unread."""
        body = json.dumps({"model": "law", "messages": HELLO, "max_tokens": 90, "stream": True, "ignore_eos": True})
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALL}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            plain.sendall((head + body).encode())
            for _ in range(draw.randrange(8)):
                time.sleep(0.1)
                plain.recv(1)
        return True

    def wrong_key(client: Any, draw: random.Random) -> bool:
        header = {"Authorization": f"Bearer {ALL[: draw.randrange(1, 6)]}"}
        return bool(client.get("/v1/models", headers=header).status_code == 401)

    def broken(client: Any, draw: random.Random) -> bool:
        return bool(ask(client, model="nans").status_code == 500)

    def stranger(client: Any, draw: random.Random) -> bool:
        return bool(ask(client, model=draw.choice(TRAVERSALS)).status_code in (400, 404))

    def load(client: Any, draw: random.Random) -> bool:
        name, of = f"mine-{draw.randrange(10**9)}", draw.choice(["law", "med", "tax"])
        admin = {"Authorization": f"Bearer {ADMIN}"}
        made = client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": of}, headers=admin)
        good = made.status_code == 200 and told(ask(client, model=name)) == right[of]
        gone = client.post("/v1/unload_lora_adapter", json={"lora_name": name}, headers=admin)
        return good and gone.status_code == 200 and ask(client, model=name).status_code == 404

    def formed(client: Any, draw: random.Random) -> bool:
        values = [{"n": draw.randrange(100)}, [draw.randrange(10**6) / 100, None], draw.choice("xyz")]
        form = {"type": "json_schema", "json_schema": {"name": "one", "schema": {"enum": values}}}
        model = draw.choice(list(right))
        answer = ask(client, model=model, response_format=form, max_tokens=100, temperature=1)
        if answer.status_code == 429:  # others' schemas are being read
            return True
        choice = answer.json()["choices"][0]
        return choice["finish_reason"] == "length" or json.loads(choice["message"]["content"]) in values

    def one(number: int) -> None:
        draw = random.Random(number)
        with server.client() as client:
            while time.monotonic() < end:
                what = draw.choices(ways, [8, 8, 4, 2, 1, 1, 1, 1, 1, 1])[0]
                asked[number] += 1
                if not what(client, draw):
                    wrong.append((number, what.__name__))

    ways = [whole, stream, formed, vanish, too_long, stranger, load, slow, wrong_key, broken]
    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(one, number) for number in range(16)]
        time.sleep(seconds / 3)
        early = memory_now()
    for client in clients:
        client.result()  # none of them has ended by an error
    late, engine = memory_now(), server.service.engine
    while (engine.running or engine.waiting) and time.monotonic() < end + 60:
        time.sleep(0.1)
    assert not wrong and min(asked) > 0
    assert not engine.running and not engine.waiting and engine.is_alive and engine.passes.used < 0.2
    print(f"{sum(asked)} requests, memory {early / 2**20:.0f} -> {late / 2**20:.0f} MiB", dict(engine.counts))
    assert late - early < 40 * 2**20
    server.stop()
