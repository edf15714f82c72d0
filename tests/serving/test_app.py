# ruff: noqa: E402 (what is imported below needs the extra)
"""The server by its HTTP: OpenAI's client, vLLM's and llama-server's bodies, keys, limits, and who goes away."""

import asyncio
import json
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs qgraft[serve]")
pytest.importorskip("sse_starlette", reason="needs qgraft[serve]")
pytest.importorskip("uvicorn", reason="needs qgraft[serve]")
httpx = pytest.importorskip("httpx")

import torch
from served import ADMIN, ALL, HELLO, LAW_ONLY, TRAVERSALS, Running, ask, serving, told

import qgraft
from qgraft.data.tokenizing import decode_answer
from qgraft.errors import AdapterError
from qgraft.serving.prompting import Prompting
from qgraft.serving.requests import Request
from qgraft.serving.sampling import Sampler, Token

Maker = Callable[..., Any]


def test_adapters_by_name_by_mix_and_by_lora(running: Running, expected: Any) -> None:
    with running.client() as client:
        law, mixed = expected({"law": 1.0}), expected({"law": 0.7, "med": 0.3})
        assert len({law, mixed, expected({})}) == 3
        assert told(ask(client)) == expected({})
        assert told(ask(client, model="law")) == law
        assert told(ask(client, model="law=0.7+med=0.3")) == mixed
        assert told(ask(client, lora={"law": 0.7, "med": 0.3})) == mixed
        listed = {each["name"]: each["id"] for each in client.get("/lora-adapters").json()}
        scales = [{"id": listed["law"], "scale": 0.7}, {"id": listed["med"], "scale": 0.3}]
        assert told(ask(client, lora=scales)) == mixed
        assert ask(client, model="law", lora={"med": 1}).status_code == 400
        assert client.post("/lora-adapters", json=scales).status_code == 403
        with running.client(ADMIN) as admin:
            assert admin.post("/lora-adapters", json=scales).json() == {"success": True}
            assert told(ask(client)) == mixed and told(ask(client, lora=[])) == expected({})
            admin.post("/lora-adapters", json=[])
        assert told(ask(client)) == expected({})


def test_the_least_recently_used_goes_and_comes_back(running: Running, expected: Any) -> None:
    with running.client() as client:
        for name in ("law", "med", "tax", "law"):
            assert told(ask(client, model=name)) == expected({name: 1.0})
            assert len(running.service.catalogue.entries) <= 2
        models = client.get("/v1/models").json()["data"]
        assert [each["id"] for each in models if each["parent"] is None] == ["base"]
        assert {"law", "med", "tax"} <= {each["id"] for each in models if each["parent"] == "base"}
        assert client.get("/v1/models/law").json()["parent"] == "base" and client.get("/v1/models/x").status_code == 404


def test_an_id_stays_with_its_adapter_and_a_scale_with_the_base(running: Running, expected: Any) -> None:
    """Also where others ask for so many that it has to make room."""
    with running.client() as client, running.client(ADMIN) as admin:
        assert told(ask(client, model="law")) == expected({"law": 1.0})
        ids = {each["name"]: each["id"] for each in client.get("/lora-adapters").json()}
        assert admin.post("/lora-adapters", json=[{"id": ids["law"], "scale": 0.7}]).json() == {"success": True}
        for name in ("med", "tax", "med"):
            assert told(ask(client, model=name)) == expected({name: 1.0})
        assert "law" not in running.service.catalogue.entries
        listed = {each["name"]: (each["id"], each["scale"]) for each in client.get("/lora-adapters").json()}
        assert listed["law"] == (ids["law"], 0.7) and len({number for number, _ in listed.values()}) == len(listed)
        assert told(ask(client, lora=[{"id": ids["law"], "scale": 1.0}])) == expected({"law": 1.0})
        for name in ("med", "tax"):
            assert told(ask(client, model=name)) == expected({name: 1.0})
        assert told(ask(client)) == expected({"law": 0.7})
        admin.post("/lora-adapters", json=[])
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "law"}).status_code == 200
        assert ask(client, lora=[{"id": ids["law"], "scale": 1.0}]).status_code == 400  # nobody else's
        assert told(ask(client, model="law")) == expected({"law": 1.0})
    with running.client(LAW_ONLY) as client:  # to whom other adapters' ids say nothing
        known = {each["id"] for each in client.get("/lora-adapters").json()}
        others = set(running.service.catalogue.numbered()) - known
        assert others and {ask(client, lora=[{"id": each}]).status_code for each in others} == {400}


def test_an_adapter_that_the_server_was_started_with_stays(tiny_gguf: Maker, adapters: Path) -> None:
    server = serving("--model", str(tiny_gguf("llama").path), "--adapter", f"mine={adapters / 'law'}", "--name", "base",
                     "--admin_key", ADMIN)  # fmt: skip
    with server.client(ADMIN) as admin:
        response = admin.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
        assert response.status_code == 403 and ask(admin, model="mine").status_code == 200
    server.stop()


def test_what_a_list_says_wrongly_is_named_and_leads_nowhere(tiny_gguf: Maker, adapters: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    shutil.copytree(adapters / "law", folder / "law")
    words = ("--model", str(tiny_gguf("llama").path), "--adapters", str(folder), "--name", "base")
    for wrong, said in (({"../q": "law"}, r"served\.json: .*'\.\./q'"), ({"q": 5}, r"served\.json: q: got 5")):
        (folder / "served.json").write_text(json.dumps({"adapters": wrong}))
        with pytest.raises(AdapterError, match=said):
            serving(*words)
    (folder / "served.json").write_text(
        json.dumps({"adapters": {"evil": str(adapters / "law"), "gone": "no", "x": "law"}})
    )
    server = serving(*words)
    with server.client() as client:
        assert {each["id"] for each in client.get("/v1/models").json()["data"]} == {"base", "law", "x"}
        assert ask(client, model="x").status_code == 200
        assert {ask(client, model=name).status_code for name in ("evil", "gone")} <= {403, 404}
    server.stop()


def test_what_is_wrong_has_its_status_and_openais_body(running: Running) -> None:
    with running.client() as client:
        for response, status, code in (
            (ask(client, model="nobody"), 404, "model_not_found"),
            (ask(client, temprature=1), 400, "unknown_parameter"),
            (ask(client, messages=[{"role": "user", "content": "hello " * 300}]), 400, "context_length_exceeded"),
            (client.post("/v1/chat/completions", content=b"{"), 400, None),
            (client.post("/v1/chat/completions", content=b"[" * 15000), 400, None),
            (ask(client, messages=[{"role": "user", "content": "x" * 30000}]), 413, "request_too_large"),
            (client.post("/v1/chat/completions", content=iter([b"x" * 9000] * 9)), 413, "request_too_large"),
            (client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}), 415, None),
            (client.get("/v1/nothing"), 404, "not_found"),
            (client.get("/v1/chat/completions"), 405, "not_found"),
            (ask(client, model="foreign"), 400, None),
            (ask(client, lora={"law": 1e38}), 400, "invalid_value"),
            (ask(client, logit_bias={"5": 1e308}), 400, "invalid_value"),
            (ask(client, repetition_penalty=1e-300), 400, "invalid_value"),
            (ask(client, messages=[{"role": "user", "content": "x", "zzz": 1}]), 400, "invalid_value"),
        ):
            assert response.status_code == status, response.text
            assert response.json()["error"]["code"] == code and response.json()["error"]["message"]
        assert "does not fit this model" in ask(client, model="foreign").json()["error"]["message"]
        assert told(ask(client))


def test_what_is_too_long_is_named_as_the_api_names_it(running: Running) -> None:
    long = "hello " * 300
    with running.client() as client:
        for path, body, param in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
            ("/v1/completions", {"prompt": long}, "prompt"), ("/v1/responses", {"input": long}, "input"),
        ):  # fmt: skip
            error = client.post(path, json={"model": "base", **body}).json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", param)


def test_the_field_that_is_to_blame_is_named(running: Running) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    turns = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ]
    asked: list[tuple[str, dict[str, Any], str]] = [
        ("chat/completions", {"messages": HELLO, "tools": [tool]}, "tools"),
        ("chat/completions", {"messages": turns}, "messages"),
        ("chat/completions", {"messages": HELLO, "model": "foreign"}, "model"),
        ("chat/completions", {"messages": HELLO, "logit_bias": {"999999": 1}}, "logit_bias"),
        ("completions", {"prompt": [999999]}, "prompt"), ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": ["a"] * 999}, "prompt"), ("completions", {"prompt": ["a"] * 99, "n": 16}, "n"),
        ("responses", {"input": "a", "tools": [{"type": "function", **tool["function"]}]}, "tools"),
    ]  # fmt: skip
    with running.client() as client:
        for path, body, param in asked:
            response = client.post(f"/v1/{path}", json={"model": "base", **body})
            assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


def test_who_may_not_load_sees_no_paths(running: Running, adapters: Path) -> None:
    """Neither where adapters lie, nor where those of others were trained."""
    (adapters / "broken.gguf").write_bytes(b"GGUF??")
    shutil.copytree(adapters / "law", adapters / "cut", dirs_exist_ok=True)
    (adapters / "cut" / "adapter_config.json").write_text("{")
    try:
        with running.client() as client, running.client(ADMIN) as admin:
            assert told(ask(client, model="law"))
            answers = [ask(client, model=name) for name in ("foreign", "broken", "cut")]
            assert [each.status_code for each in answers] == [400, 400, 400]
            assert "foreign does not fit this model" in answers[0].text and "not JSON" in answers[2].text
            answers += [
                client.get(path) for path in ("/v1/models", "/v1/models/law", "/lora-adapters", "/props", "/metrics")
            ]
            for answer in answers:
                assert str(adapters.parent) not in answer.text and "tiny.gguf" not in answer.text, answer.text
            assert admin.get("/v1/models/law").json()["root"] == str(adapters / "law")
            assert {each["path"] for each in admin.get("/lora-adapters").json()} >= {str(adapters / "law")}
            loaded = admin.post("/v1/load_lora_adapter", json={"lora_name": "q", "lora_path": "foreign"})
            assert loaded.status_code == 400 and "tiny.gguf" in loaded.text
    finally:
        (adapters / "broken.gguf").unlink()
        shutil.rmtree(adapters / "cut")


def test_keys(running: Running) -> None:
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": ALL}, {"Authorization": f"Basic {ALL}"}):
        response = httpx.get(f"{running.url}/v1/models", headers=header)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
    with running.client(LAW_ONLY) as client:
        assert ask(client, model="law").status_code == 200
        for model in ("base", "med", "law=1+med=0.1"):
            assert ask(client, model=model).status_code == 403
        assert {each["id"] for each in client.get("/v1/models").json()["data"]} == {"base", "law"}
        load = {"lora_name": "mine", "lora_path": "law"}
        assert client.post("/v1/load_lora_adapter", json=load).status_code == 403


def test_no_path_leaves_the_folder(running: Running) -> None:
    before = dict(running.service.catalogue.entries)
    with running.client(ADMIN) as admin:
        for text in TRAVERSALS:
            response = admin.post("/v1/load_lora_adapter", json={"lora_name": "stolen", "lora_path": text})
            assert response.status_code in (400, 403, 404), (text, response.text)
            response = ask(admin, model=text)
            assert response.status_code in (400, 404), (text, response.text)
            response = admin.post("/v1/load_lora_adapter", json={"lora_name": text, "lora_path": "law"})
            assert response.status_code == 400 or text in ("secret", "link"), (text, response.text)
            if response.status_code == 200:
                admin.post("/v1/unload_lora_adapter", json={"lora_name": text})
    assert "stolen" not in running.service.catalogue.entries and before.keys() >= set()


def test_loading_and_unloading_as_vllm_does(running: Running, expected: Any, adapters: Path) -> None:
    body = {"lora_name": "mine", "lora_path": "med"}
    with running.client(ADMIN) as admin:
        response = admin.post("/v1/load_lora_adapter", json=body)
        assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
        assert told(ask(admin, model="mine")) == expected({"med": 1.0})
        again = admin.post("/v1/load_lora_adapter", json=body)
        assert again.status_code == 400 and "has already been loaded" in again.json()["error"]["message"]
        assert json.loads((adapters / "served.json").read_text())["adapters"] == {"mine": "med"}
        inplace = admin.post("/v1/load_lora_adapter", json={**body, "lora_path": "law", "load_inplace": True})
        assert inplace.status_code == 200 and told(ask(admin, model="mine")) == expected({"law": 1.0})
        broken = admin.post("/v1/load_lora_adapter", json={**body, "lora_path": "foreign", "load_inplace": True})
        assert broken.status_code == 400 and told(ask(admin, model="mine")) == expected({"law": 1.0})
        response = admin.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
        assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'mine' removed successfully.")
        assert ask(admin, model="mine").status_code == 404
        missing = admin.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
        assert missing.status_code == 404
        assert missing.json()["error"]["message"] == "The lora adapter 'mine' cannot be found."


def test_streams_say_what_the_whole_answer_says(running: Running) -> None:
    with running.client() as client:
        whole = ask(client, model="law", n=2, temperature=1, seed=5, logprobs=True, top_logprobs=2, max_tokens=9).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = ask(
            client, model="law", n=2, temperature=1, seed=5, logprobs=True, top_logprobs=2, max_tokens=9, **options
        )
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    for used in (chunks[-1]["usage"], whole["usage"]):
        del used["prompt_tokens_details"]  # the second of them found what the first had passed through
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [each["choices"][0] for each in chunks[:-1] if each["choices"][0]["index"] == choice["index"]]
        assert "".join(each["delta"].get("content") or "" for each in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        logprobs = [entry for each in own if each["logprobs"] for entry in each["logprobs"]["content"]]
        for entry, expected in zip(logprobs, choice["logprobs"]["content"], strict=True):
            assert entry["token"] == expected["token"] and len(entry["top_logprobs"]) == 2
            assert entry["logprob"] == pytest.approx(expected["logprob"], abs=1e-3)  # by passes of other shapes
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]


def test_completions_tokens_props_and_metrics(running: Running) -> None:
    with running.client() as client:
        ids = client.post("/tokenize", json={"content": "hello world"}).json()["tokens"]
        assert ids == running.tokenizer("hello world", add_special_tokens=False)["input_ids"]
        assert client.post("/detokenize", json={"tokens": ids}).json() == {"content": "hello world"}
        assert client.post("/detokenize", json={"tokens": [10**9]}).status_code == 400
        body = {"model": "base", "prompt": ["hello", "hello world"], "max_tokens": 4, "temperature": 0, "logprobs": 1}
        both = client.post("/v1/completions", json=body).json()
        assert [each["index"] for each in both["choices"]] == [0, 1] and both["usage"]["completion_tokens"] <= 8
        echo = {**body, "prompt": ids, "echo": True, "logprobs": None}
        text = client.post("/v1/completions", json=echo).json()["choices"][0]["text"]
        assert text == "hello world" + both["choices"][1]["text"]
        streamed = client.post("/v1/completions", json={**body, "prompt": ids, "stream": True}).text.splitlines()
        chunks = [json.loads(line[6:])["choices"][0] for line in streamed if line.startswith("data: {")]
        for key, whole in both["choices"][1]["logprobs"].items():
            pieces = [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"][key]]
            assert len(pieces) == len(whole) and (pieces == whole or "logprobs" in key)
        assert client.get("/props").json()["total_slots"] == 4
        until = time.monotonic() + 30
        while "qgraft_requests_running 0" not in (metrics := client.get("/metrics").text):
            assert time.monotonic() < until, metrics
        assert re.search(r'qgraft_requests_total\{reason="stop"\} \d', metrics), metrics


def test_who_goes_away_frees_a_place(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = running.service.engine
    pass_on = engine.passes.logits
    monkeypatch.setattr(engine.passes, "logits", lambda parts: time.sleep(0.02) or pass_on(parts))
    long = {"model": "base", "messages": HELLO, "max_tokens": 100, "ignore_eos": True}
    with running.client() as client:
        with client.stream("POST", "/v1/chat/completions", json={**long, "stream": True}) as response:
            next(response.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json={**long, "n": 4}, timeout=0.3)
    deadline = time.monotonic() + 60
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not engine.running and not engine.waiting


def test_no_answer_waits_for_the_client_to_acknowledge_the_last(running: Running) -> None:
    with running.client() as client:
        assert client.get("/health").status_code == 200
        connections = [each.transport.get_extra_info("socket") for each in running.server.server_state.connections]
        assert connections and all(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in connections)


def test_openais_own_client(running: Running, expected: Any) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=ALL, max_retries=0)
    options: Any = {"model": "law", "messages": HELLO, "temperature": 0, "max_tokens": 6}
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == expected({"law": 1.0}) and answer.usage.completion_tokens <= 6
    stream = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected({"law": 1.0})
    assert "law" in [model.id for model in client.models.list()]
    mixed = client.chat.completions.create(
        **{**options, "model": "base"}, extra_body={"lora": {"law": 0.7, "med": 0.3}}
    )
    assert mixed.choices[0].message.content == expected({"law": 0.7, "med": 0.3})
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(**{**options, "model": "nobody"})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="no", max_retries=0).models.list()
    assert client.completions.create(model="base", prompt="hello", max_tokens=3, temperature=0).choices[0].text

    async def many() -> list[str]:
        other = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=ALL, max_retries=0)
        names = ["law", "med", "base", "law=0.7+med=0.3"] * 2
        found = await asyncio.gather(*(other.chat.completions.create(**{**options, "model": each}) for each in names))
        await other.close()
        return [each.choices[0].message.content for each in found]

    mixes = [{"law": 1.0}, {"med": 1.0}, {}, {"law": 0.7, "med": 0.3}] * 2
    assert asyncio.run(many()) == [expected(mix) for mix in mixes]


def test_the_list_outlives_a_restart(running: Running, tiny_gguf: Maker, adapters: Path, expected: Any) -> None:
    with running.client(ADMIN) as admin:
        assert admin.post("/v1/load_lora_adapter", json={"lora_name": "kept", "lora_path": "tax"}).status_code == 200
    other = serving(
        "--model", str(tiny_gguf("llama").path), "--adapters", str(adapters), "--name", "base", "--adapter",
        f"pinned={adapters / 'law'}", "--admin_key", ADMIN,
    )  # fmt: skip
    with other.client("any") as client:  # without keys anyone on this machine may ask, and nobody may load
        assert client.get("/v1/models", headers={"Host": "evil.example:80"}).status_code == 403
        assert client.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200
        assert ask(client).status_code == 200
        for origin, status in (("http://evil.example", 403), ("null", 403), (other.url, 200)):
            assert client.get("/v1/models", headers={"Origin": origin}).status_code == status
        assert told(ask(client, model="kept")) == expected({"tax": 1.0})
        assert told(ask(client, model="pinned")) == expected({"law": 1.0})
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "kept"}).status_code == 403
    other.stop()
    assert other.service.engine.is_alive is False
    with running.client(ADMIN) as admin:
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "kept"}).status_code == 200


def test_servers_of_one_folder_follow_each_other(
    running: Running, tiny_gguf: Maker, adapters: Path, expected: Any
) -> None:
    other = serving(
        "--model", str(tiny_gguf("llama").path), "--adapters", str(adapters), "--name", "base", "--admin_key", ADMIN
    )
    body = {"lora_name": "ours", "lora_path": "med"}
    with running.client(ADMIN) as admin, other.client(ADMIN) as there:
        assert ask(there, model="ours").status_code == 404
        assert admin.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert told(ask(there, model="ours")) == expected({"med": 1.0}) == told(ask(admin, model="ours"))
        assert there.post("/v1/load_lora_adapter", json={**body, "lora_name": "theirs"}).status_code == 200
        assert "theirs" in [each["id"] for each in admin.get("/v1/models").json()["data"]]
        inplace = {**body, "lora_path": "tax", "load_inplace": True}
        assert there.post("/v1/load_lora_adapter", json=inplace).status_code == 200
        assert told(ask(admin, model="ours")) == expected({"tax": 1.0})
        for name in ("ours", "theirs"):
            assert there.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
            assert ask(admin, model=name).status_code == ask(there, model=name).status_code == 404
    other.stop()


def test_a_full_queue_says_when_to_come_again(running: Running) -> None:
    engine = running.service.engine
    running.service.catalogue.sweep()  # takes adapters off while nobody has the engine paused
    before, engine.max_queue = engine.max_queue, 4
    try:
        with running.client() as client, engine.paused():
            first = [engine.submit(Request((5,)), lambda event: None) for _ in range(8)]
            response = ask(client)
    finally:
        engine.max_queue = before
        for each in first:
            engine.cancel(each)
    assert response.status_code == 429 and response.headers["Retry-After"] == "1"
    assert response.json()["error"]["code"] == "rate_limit_exceeded"
    with running.client() as client:
        assert told(ask(client))


def test_tools_and_reasoning_by_openais_client(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model wrote, which a tiny one never would, comes back as OpenAI's objects, whole and in a stream."""
    openai = pytest.importorskip("openai")
    written = '<think>\nRome?</think>\n\nLook:<tool_call>\n{"name": "time", "arguments": {"at": "Rome"}}\n</tool_call>'
    tokenizer, prompter = running.tokenizer, running.service.prompter
    said = iter(())

    def take(self: Any, logits: torch.Tensor, allowed: Any = None) -> Any:
        return Token(next(said, 2))

    monkeypatch.setattr(Sampler, "draw", take)
    monkeypatch.setattr(
        prompter, "prompting", Prompting(template=str(Path(__file__).parents[1] / "data/originals/qwen3.jinja"))
    )
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=ALL, max_retries=0)
    tool = {"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": "object"}}}
    options: Any = {"model": "base", "messages": HELLO, "tools": [tool]}
    monkeypatch.setattr(running.service.engine, "context", None)
    said = iter(tokenizer(written, add_special_tokens=False)["input_ids"])
    choice = client.chat.completions.create(**options).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Look:")
    assert choice.message.reasoning_content == "\nRome?"
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("time", {"at": "Rome"}) and call.id
    said = iter(tokenizer(written, add_special_tokens=False)["input_ids"])
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    assert (
        "".join(each.delta.content or "" for each in deltas).rstrip() == "Look:"
        and deltas[-1].finish_reason == "tool_calls"
    )
    calls = [call for each in deltas for call in each.delta.tool_calls or ()]
    assert [call.function.name for call in calls] == ["time"] and calls[0].index == 0


@pytest.mark.parametrize(
    "name,call", [("chatglm3", "time\n ```python\ntool_call(at='Rome')\n```"), ("glm", 'time\n{"at": "Rome"}')]
)
def test_calls_of_glm_by_openais_client(
    running: Running, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    """What the models' own prompts have calls look like comes back as tool_calls, and goes in again with its result."""
    openai = pytest.importorskip("openai")
    said = iter(running.tokenizer("\n " + call, add_special_tokens=False)["input_ids"])
    monkeypatch.setattr(Sampler, "draw", lambda self, logits, allowed=None: Token(next(said, 2)))
    template = Path(qgraft.__file__).parent / f"data/variants/{name}.jinja"
    monkeypatch.setattr(running.service.prompter, "prompting", Prompting(template=str(template)))
    monkeypatch.setattr(running.service.engine, "context", None)
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=ALL, max_retries=0)
    tool = {"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": "object"}}}
    choice = client.chat.completions.create(model="base", messages=HELLO, tools=[tool]).choices[0]
    assert (choice.finish_reason, choice.message.content or "") == ("tool_calls", "")
    (made,) = choice.message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == ("time", {"at": "Rome"})
    turns = [
        *HELLO,
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": made.id, "content": "1"},
    ]
    said = iter(running.tokenizer("One.", add_special_tokens=False)["input_ids"])
    again = client.chat.completions.create(model="base", messages=turns, tools=[tool])
    assert again.choices[0].message.content == "One."


@pytest.mark.parametrize("generation", ["chatglm", "chatglm2"])
def test_chatglm_is_shown_as_its_chat_shows_it(
    tiny_chatglm: Callable[[str], Path], generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and in a stream; a completion is what the model wrote."""
    written = "  我在[[训练时间]]说:你好,世界! a,b 好,  "
    server, said = serving("--model", str(tiny_chatglm(generation)), "--name", "base"), iter(())
    tokenizer = server.tokenizer
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(Sampler, "draw", lambda self, logits, allowed=None: Token(next(said, tokenizer.eos_token_id)))
    shown = decode_answer(tokenizer, ids)
    assert "2023年说" in shown and shown == shown.strip() and ("你好，世界！" in shown) == (generation == "chatglm")
    with server.client() as client:
        said = iter(ids)
        assert told(ask(client, max_tokens=200)) == shown
        said = iter(ids)
        lines = [
            line[6:]
            for line in ask(client, max_tokens=200, stream=True).text.splitlines()
            if line.startswith("data: {")
        ]
        deltas = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
        assert "".join(deltas) == shown and sum(map(bool, deltas)) > 2
        said = iter(ids)
        plain = client.post("/v1/completions", json={"model": "base", "prompt": "x", "max_tokens": 200}).json()
        assert plain["choices"][0]["text"] == tokenizer.decode(ids, skip_special_tokens=True) != shown
    server.stop()
