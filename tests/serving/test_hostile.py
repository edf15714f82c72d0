# ruff: noqa: E402 (what is imported below needs the extra)
"""What must not work: wrong types, keys that are not for it, paths that leave the folder, clients that stall."""

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("fastapi", reason="needs qgraft[serve]")
pytest.importorskip("sse_starlette", reason="needs qgraft[serve]")
pytest.importorskip("uvicorn", reason="needs qgraft[serve]")
httpx = pytest.importorskip("httpx")

from served import ADMIN, ALL, BASE_ONLY, HELLO, LAW_ONLY, TRAVERSALS, Running, ask, told

from qgraft.serving.fields import ApiError
from qgraft.serving.protocol import _CHAT, _COMPLETION, _IGNORED, _SAMPLING, _SHARED, read_chat, read_completion

WRONG = (
    "", "x", -3, 0, 1.5, 10**30, 1e308, True, False, [], ["x"], [[]], [1.5], {}, {"x": {}}, [{}], [{"role": []}], [None],
    {"type": "x"}, "\ud800", [{"role": "user", "content": {}}], [{"id": []}], {"law": []},
)  # fmt: skip


def test_no_type_of_any_field_is_a_fault_of_ours() -> None:
    """Each field with each of these is read, or refused with a 400 in OpenAI's form."""
    refused = []
    for read, fields, body in (
        (read_chat, _CHAT, {"messages": HELLO}), (read_completion, _COMPLETION, {"prompt": "x"}),
    ):  # fmt: skip
        for name in sorted(fields | _SAMPLING | _SHARED | _IGNORED.keys()):
            for value in WRONG:
                try:
                    read({"model": "base", **body, name: value})
                except ApiError as error:
                    refused.append((error.status, bool(error.message)))
    assert set(refused) == {(400, True)} and len(refused) > 500


def test_the_same_over_http(running: Running) -> None:
    fields = ("model", "messages", "lora", "tools", "stop", "response_format", "logit_bias", "n", "seed")
    with running.client() as client:
        for name in fields:
            for value in WRONG[:-5:2]:
                assert ask(client, **{name: value}).status_code in (200, 400, 404), (name, value)
        for content in (b'{"model": "base", "prompt": "\\ud800"}', b'{"model": "\xed\xa0\x80"}', b"\xff", b"null", b""):
            response = client.post("/v1/completions", content=content)
            assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"
        for path, body in (
            ("/tokenize", {"content": 1}), ("/tokenize", []), ("/tokenize", {"content": "x", "add_special": "no"}),
            ("/tokenize", {"content": "x", "with_piece": True}), ("/detokenize", {"tokens": [True]}),
            ("/detokenize", {"tokens": [-1]}), ("/detokenize", {}),
        ):  # fmt: skip
            assert client.post(path, json=body).status_code == 400, (path, body)
        many = {"model": "base", "prompt": [[5]] * 200, "n": 16}
        assert "answers are asked for at once" in client.post("/v1/completions", json=many).json()["error"]["message"]
    with running.client(ADMIN) as admin:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/lora-adapters"):
            for body in ([1], {}, "x", {"lora_name": 1, "lora_path": []}, [{"id": -1}], {"lora_path": {}}):
                assert admin.post(path, json=body).status_code == 400, (path, body)


def test_a_key_is_for_its_adapters_however_they_are_named(running: Running) -> None:
    with running.client(LAW_ONLY) as client:
        listed = [each["name"] for each in client.get("/lora-adapters").json()]
        assert set(listed) <= {"law"}
        for options in (
            {"model": "med"}, {"model": "law=0.5+med=0.5"}, {"model": "law+med=0"}, {"model": "law=0"},
            {"lora": {"law": 1, "med": 0.1}}, {"lora": [{"name": "med"}]}, {"lora": {"law": 0}}, {"lora": []}, {},
            {"model": "secret"},
        ):  # fmt: skip
            assert ask(client, **options).status_code == 403, options
        assert ask(client, lora={"law": 1}).status_code == ask(client, model="law").status_code == 200
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/lora-adapters"):
            assert client.post(path, json={"lora_name": "law", "lora_path": "law"}).status_code == 403
    with running.client(BASE_ONLY) as client:
        assert told(ask(client)) and ask(client, model="law").status_code == 403
        assert ask(client, lora={"law": 1}).status_code == 403 and ask(client, lora={"law": 0}).status_code == 403
        with running.client(ADMIN) as admin:
            number = [each["name"] for each in admin.get("/lora-adapters").json()].index("law")
            assert admin.post("/lora-adapters", json=[{"id": number, "scale": 0.5}]).status_code == 200
            assert ask(client).status_code == 403 and ask(client, lora=[]).status_code == 200
            assert admin.post("/lora-adapters", json=[]).status_code == 200
    with running.client() as client:
        assert ask(client, lora={"nobody": 0}).status_code == ask(client, model="nobody=0").status_code == 404
        assert ask(client, model="base=0.5+law=1").status_code == 400


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_no_name_leaves_the_folder(running: Running, every: int) -> None:
    before = set(running.service.catalogue.available())
    with running.client(ADMIN) as admin:
        for text in TRAVERSALS[::every]:
            for name in (quote(text, safe=""), quote(quote(text, safe=""), safe=""), "law%2f.." + quote(text, safe="")):
                response = admin.get(f"/v1/models/{name}")
                assert response.status_code in (404, 405) or response.json()["object"] == "list", name
            assert ask(admin, model=quote(text)).status_code in (400, 404), text
            assert ask(admin, lora={text: 1}).status_code in (400, 404), text
            assert ask(admin, lora=[{"name": text, "scale": 0}]).status_code in (400, 404), text
            assert admin.post("/v1/unload_lora_adapter", json={"lora_name": text}).status_code in (400, 404), text
    assert set(running.service.catalogue.available()) == before and "secret" not in before


@contextmanager
def limits(running: Running, **changes: Any) -> Iterator[None]:
    """Within the block the server has other limits."""
    before = running.service.limits
    running.service.limits = replace(before, **changes)
    try:
        yield
    finally:
        running.service.limits = before


def idle(running: Running) -> bool:
    """Whether the engine is without work, soon."""
    deadline = time.monotonic() + 60
    while (running.service.engine.running or running.service.engine.waiting) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not running.service.engine.running


def test_a_body_that_does_not_come(running: Running) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALL}\r\n"
    head += "Content-Type: application/json\r\n"
    with limits(running, body_seconds=0.2):
        for rest in ("Content-Length: 100\r\n\r\n{", "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n"):
            with socket.create_connection((host, int(port)), timeout=60) as plain:
                plain.sendall((head + rest).encode())
                assert b" 408 " in plain.recv(4096).partition(b"\r\n")[0]
    with socket.create_connection((host, int(port)), timeout=60) as plain:  # goes away in the middle
        plain.sendall((head + "Content-Length: 100\r\n\r\n{").encode())


def test_a_client_that_sends_too_much_sees_the_answer(running: Running) -> None:
    """urllib, as most, reads nothing before it has sent everything."""
    headers = {"Authorization": f"Bearer {ALL}", "Content-Type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/nothing"):
        request = urllib.request.Request(f"{running.url}{path}", data=b"x" * (6 << 20), headers=headers)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=60)
        assert caught.value.code == 413 and b"larger than" in caught.value.read()


def test_an_answer_that_takes_too_long(running: Running) -> None:
    long = {"max_tokens": 100, "ignore_eos": True}
    with limits(running, seconds=0.001), running.client() as client:
        whole = ask(client, **long)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
        lines = [line[6:] for line in ask(client, **long, stream=True).text.splitlines() if line.startswith("data: {")]
        assert json.loads(lines[-1])["error"]["code"] == "timeout"
    assert idle(running)


def test_a_broken_adapter_fails_alone(running: Running, expected: Callable[[dict[str, float]], str]) -> None:
    with running.client() as client:
        for _ in range(2):
            answer = ask(client, model="nans")
            assert answer.status_code == 500 and "not finite" in answer.json()["error"]["message"]
            lines = [line[6:] for line in ask(client, model="nans", stream=True).text.splitlines() if "{" in line]
            assert "not finite" in json.loads(lines[-1])["error"]["message"]
            assert told(ask(client, model="law")) == expected({"law": 1.0})


def test_who_goes_away_before_the_first_token(running: Running) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    body = json.dumps(
        {"model": "base", "messages": HELLO, "max_tokens": 110, "stream": True, "ignore_eos": True, "n": 4}
    )
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALL}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    before = running.service.engine.counts["finished_cancelled"]
    with running.service.engine.paused():
        for _ in range(3):
            with socket.create_connection((host, int(port))) as plain:
                plain.sendall((head + body).encode())
                time.sleep(0.1)
        time.sleep(0.3)
    assert idle(running) and running.service.engine.counts["finished_cancelled"] - before == 12
