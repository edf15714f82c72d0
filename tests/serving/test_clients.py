# ruff: noqa: E402 (what is imported below needs the extra)
"""What clients send that says nothing of an answer, and what they ask for that is not here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

for module in ("fastapi", "sse_starlette", "uvicorn", "httpx"):
    pytest.importorskip(module, reason="needs qgraft[serve]")

from served import ALL, Running, ask, told

from qgraft.data.tokenizing import encode_prompt
from qgraft.errors import OptionError
from qgraft.serving.engine import Engine, answer_all
from qgraft.serving.origins import Origins
from qgraft.serving.requests import Request, Thinking
from qgraft.serving.sampling import Sampling

SITE = "https://chat.example.org"


def test_a_head_is_an_answer_without_its_body(running: Running) -> None:
    with running.client() as client:
        for path in ("/health", "/v1/models", "/props"):
            head, whole = client.head(path), client.get(path)
            assert (head.status_code, head.text) == (200, "") and whole.text
            assert head.headers["content-type"] == whole.headers["content-type"]
        assert client.head("/v1/chat/completions").status_code == 405


def test_a_prompt_is_read_and_nothing_written(running: Running, expected: Callable[[dict[str, float]], str]) -> None:
    """max_tokens: 0, as Anthropic's API warms its cache; those that begin alike are spared the passes."""
    long = [{"role": "user", "content": "hello world " * 20}]
    with running.client() as client:
        for path, more in (
            ("/v1/chat/completions", {"messages": long, "max_tokens": 0}),
            ("/v1/messages", {"messages": long, "max_tokens": 0}),
            ("/v1/completions", {"prompt": "hello world", "max_tokens": 0}),
            ("/v1/responses", {"input": "hello world", "max_output_tokens": 0}),
        ):  # fmt: skip
            body = client.post(path, json={"model": "law", **more}).json()
            used = body["usage"]
            assert used.get("completion_tokens", used.get("output_tokens")) == 0, path
        assert (
            client.post("/v1/messages", json={"model": "law", "messages": long, "max_tokens": 0}).json()["content"]
            == []
        )
        warm = ask(client, model="law", messages=long, max_tokens=1).json()["usage"]
        assert warm["prompt_tokens_details"]["cached_tokens"] >= warm["prompt_tokens"] - 16
        echoed = client.post("/v1/completions", json={"model": "law", "prompt": "hello", "max_tokens": 0, "echo": True})
        assert echoed.json()["choices"][0]["text"].strip() == "hello"
        assert told(ask(client, model="law")) == expected({"law": 1.0})


def test_embeddings_and_bodies_with_a_coding_are_refused_as_such(running: Running) -> None:
    with running.client() as client:
        coded = client.post("/v1/completions", content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
        assert coded.status_code == 415 and "Content-Encoding: got gzip" in coded.text
        answer = client.post("/v1/embeddings", json={"model": "base", "input": "x"})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_endpoint"


def test_pages_of_other_sites(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = {"Origin": SITE, "Access-Control-Request-Method": "POST",
              "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    with running.client() as client:
        assert client.options("/v1/chat/completions", headers=asking).status_code == 405
        assert "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": SITE}).headers
        monkeypatch.setattr(running.service, "origins", Origins([SITE]))
        allowed = client.options("/v1/chat/completions", headers={**asking, "Authorization": ""})
        assert (
            allowed.status_code == 204
            and allowed.headers["access-control-allow-headers"] == "authorization,content-type"
        )
        for response in (ask(client, max_tokens=1), client.get("/v1/models/nobody"), client.get("/health")):
            assert "access-control-allow-origin" not in response.headers
        for key, status in ((ALL, 200), ("wrong", 401)):
            headers = {"Origin": SITE, "Authorization": f"Bearer {key}"}
            response = client.get("/v1/models", headers=headers)
            assert (response.status_code, response.headers["access-control-allow-origin"]) == (status, SITE)
        other = client.options("/v1/chat/completions", headers={**asking, "Origin": "https://evil.example.org"})
        assert other.status_code == 405 and "access-control-allow-origin" not in other.headers
    assert Origins(["*"]).allow("https://x.example") and not Origins().allow(SITE)
    for odd in ("chat.example.org", f"{SITE}/", "https://"):
        with pytest.raises(OptionError, match="allowed_origins: got"):
            Origins([odd])


def test_an_answer_thinks_no_longer_than_it_may(talker: Any) -> None:
    """Behind its budget stands the token that closes it, and what the model says behind that."""
    model, tokenizer = talker
    prompt, close = encode_prompt(tokenizer, [("user", "hello world")]), 77

    def said(ids: list[int], count: int) -> list[int]:
        with torch.no_grad():
            given = torch.tensor([ids])
            return model.generate(given, do_sample=False, max_new_tokens=count, eos_token_id=None)[
                0, len(ids) :
            ].tolist()

    plain = said(prompt, 9)
    right = [*plain[:3], close, *said([*prompt, *plain[:3], close], 5)]
    engine, greedy = Engine(model, tokenizer), Sampling(temperature=0)
    cases = (
        (Thinking(3, True, None, close), right), (Thinking(3, False, plain[0], close), right),
        (Thinking(3, False, 99, close), plain), (Thinking(9, True, None, close), plain),
        (Thinking(3, True, None, plain[1]), plain),
    )  # fmt: skip
    requests = [Request(tuple(prompt), {}, greedy, 9, ignore_ends=True, thinking=each) for each, _ in cases]
    for answer, (_, expected) in zip(answer_all(engine, requests), cases, strict=True):
        assert [token.id for token in answer["tokens"]] == expected
    engine.stop()
