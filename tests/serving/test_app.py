# ruff: noqa: E402 (what is imported below needs the extra)
"""The server by its HTTP: OpenAI's client, vLLM's and llama-server's bodies, keys, limits, and who goes away."""

import asyncio
import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sse_starlette")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")

import torch
from talkers import generated

import qgraft
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.base import find_adapter
from qgraft.cli.serve import _parser, make_service
from qgraft.data.tokenizing import encode_prompt
from qgraft.serving.app import make_app
from qgraft.serving.prompting import Prompting
from qgraft.serving.sampling import Sampler, Token
from qgraft.sizes import memory_now

Maker = Callable[..., Any]
ADMIN, LAW_ONLY, ALL = "sk-admin", "sk-law", "sk-all"
HELLO = [{"role": "user", "content": "hello world"}]


class Running:
    """A server in a thread, and the model behind it."""

    def __init__(self, service: Any) -> None:
        self.service, self.model, self.tokenizer = service, service.engine.model, service.tokenizer
        config = uvicorn.Config(make_app(service), host="127.0.0.1", port=0, log_level="error", access_log=False)
        self.server = uvicorn.Server(config)
        socket = config.bind_socket()
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, args=([socket],), daemon=True)
        service.engine.start()
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        self.service.engine.stop()

    def client(self, key: str = ALL, **options: Any) -> Any:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=300, **options)


def save_random(model: Any, folder: Path, name: str, seed: int) -> None:
    attach_lora(model, r=4, lora_alpha=8, name=name)
    draw = torch.Generator().manual_seed(seed)
    for lora in find_adapter(model, name).parts.values():
        lora.lora_B.data.normal_(0, 0.3, generator=draw)
    qgraft.save_adapter(model, folder, name)
    detach_adapter(model, name)


@pytest.fixture(scope="module")
def adapters(tiny_gguf: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters; one beside it that no request may reach; one of another base."""
    root = tmp_path_factory.mktemp("served")
    folder = root / "adapters"
    model, _ = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    for seed, name in enumerate(("law", "med", "tax")):
        save_random(model, folder / name, name, seed)
    save_random(model, root / "secret", "secret", 9)
    other, _ = qgraft.load(str(tiny_gguf("llama", seed=5).path), device="cpu")
    save_random(other, folder / "foreign", "foreign", 1)
    (folder / "link").symlink_to(root / "secret")
    return folder


@pytest.fixture(scope="module")
def running(tiny_gguf: Maker, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps({LAW_ONLY: {"adapters": ["law"]}, ADMIN: {"admin": True}, ALL: {}}))
    words = [
        "--model",
        str(tiny_gguf("llama").path),
        "--adapters",
        str(adapters),
        "--keys",
        str(keys),
        "--name",
        "base",
    ]
    options = _parser().parse_args(
        [*words, "--max_body", "20000", "--max_adapters", "2", "--max_batch", "4", "--device", "cpu"]
    )
    server = Running(make_service(options))
    yield server
    server.stop()


def ask(client: Any, **options: Any) -> Any:
    body = {"model": "base", "messages": HELLO, "temperature": 0, "max_tokens": 6, **options}
    return client.post("/v1/chat/completions", json=body)


def told(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def expected(tiny_gguf: Maker, adapters: Path) -> Callable[[dict[str, float]], str]:
    """What transformers' generate() says to HELLO with a mix."""
    model, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    for name in ("law", "med", "tax"):
        qgraft.load_adapter(model, adapters / name, name)
    prompt = encode_prompt(tokenizer, [("user", "hello world")])

    def said(mix: dict[str, float]) -> str:
        return str(tokenizer.decode(generated(model, prompt, mix, 6, [2]), skip_special_tokens=True))

    return said


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
        ):
            assert response.status_code == status, response.text
            assert response.json()["error"]["code"] == code and response.json()["error"]["message"]
        assert "does not fit this model" in ask(client, model="foreign").json()["error"]["message"]
        assert told(ask(client))


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


TRAVERSALS = [
    "../secret", "..", ".", "/etc/passwd", "law/../../secret", "./../secret", "link", "link/adapter_config.json", "~",
    "~root", "..\\secret", "%2e%2e/secret", "..%2fsecret", "law\x00", "....//secret", "//etc", "/", "", " ", "secret",
    "law/../..", "../adapters/../secret", "\\\\host\\share", "C:\\x", "file:///etc/passwd", "http://x/y", "../" * 30,
    "a" * 5000, "law/../../../../../../etc/passwd", "..;/secret", "..\u2215secret", "\u202e../secret", "${HOME}", "`id`",
    "law\n../secret", "/proc/self/environ", "/dev/zero", "../secret/.", "./link", "link/", "law/\x00/../../secret",
]  # fmt: skip


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
        alone = client.post("/v1/completions", json={**body, "prompt": ids, "echo": True}).json()["choices"][0]
        assert alone["text"] == "hello world" + both["choices"][1]["text"]
        assert len(alone["logprobs"]["tokens"]) == len(alone["logprobs"]["token_logprobs"])
        assert client.get("/props").json()["total_slots"] == 4
        metrics = client.get("/metrics").text
        assert "qgraft_requests_running 0" in metrics and 'qgraft_requests_total{reason="error"} 0' in metrics


def test_who_goes_away_frees_a_place(running: Running) -> None:
    engine = running.service.engine
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
    words = ["--model", str(tiny_gguf("llama").path), "--adapters", str(adapters), "--device", "cpu", "--name", "base"]
    other = Running(make_service(_parser().parse_args([*words, "--adapter", f"pinned={adapters / 'law'}"])))
    with other.client("any") as client:  # without keys anyone on this machine may ask, and nobody may load
        assert client.get("/v1/models", headers={"Host": "evil.example:80"}).status_code == 403
        assert client.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200
        assert told(ask(client, model="kept")) == expected({"tax": 1.0})
        assert told(ask(client, model="pinned")) == expected({"law": 1.0})
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "kept"}).status_code == 403
    other.stop()
    assert other.service.engine.is_alive is False
    with running.client(ADMIN) as admin:
        assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "kept"}).status_code == 200


def test_a_full_queue_says_when_to_come_again(running: Running) -> None:
    engine = running.service.engine
    before, engine.max_queue = engine.max_queue, 0
    try:
        with running.client() as client:
            response = ask(client, n=9)
    finally:
        engine.max_queue = before
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


@pytest.mark.slow
def test_sixteen_clients_with_loads_unloads_and_kills(
    tiny_gguf: Maker, adapters: Path, tmp_path: Path, expected: Any
) -> None:
    """SOAK_SECONDS (120) of what a day brings: no wrong answer, no crash, memory that stays."""
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({ADMIN: {"admin": True}, ALL: {}}))
    words = [
        "--model",
        str(tiny_gguf("llama").path),
        "--adapters",
        str(adapters),
        "--keys",
        str(keys),
        "--name",
        "base",
    ]
    server = Running(make_service(_parser().parse_args([*words, "--max_body", "20000", "--device", "cpu"])))
    names = {
        "base": {},
        "law": {"law": 1.0},
        "med": {"med": 1.0},
        "tax": {"tax": 1.0},
        "law=0.7+med=0.3": {"law": 0.7, "med": 0.3},
    }
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

    def stranger(client: Any, draw: random.Random) -> bool:
        return bool(ask(client, model=draw.choice(TRAVERSALS)).status_code in (400, 404))

    def load(client: Any, draw: random.Random) -> bool:
        name, of = f"mine-{draw.randrange(10**9)}", draw.choice(["law", "med", "tax"])
        admin = {"Authorization": f"Bearer {ADMIN}"}
        made = client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": of}, headers=admin)
        good = made.status_code == 200 and told(ask(client, model=name)) == right[of]
        gone = client.post("/v1/unload_lora_adapter", json={"lora_name": name}, headers=admin)
        return good and gone.status_code == 200 and ask(client, model=name).status_code == 404

    def one(number: int) -> None:
        draw = random.Random(number)
        with server.client() as client:
            while time.monotonic() < end:
                what = draw.choices([whole, stream, vanish, too_long, stranger, load], [8, 8, 2, 1, 1, 1])[0]
                asked[number] += 1
                if not what(client, draw):
                    wrong.append((number, what.__name__))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 3)
    early = memory_now()
    for thread in threads:
        thread.join()
    late, engine = memory_now(), server.service.engine
    time.sleep(0.5)
    assert not wrong and min(asked) > 0
    assert not engine.running and not engine.waiting and engine.is_alive and engine.passes.used < 0.2
    assert late - early < 40 * 2**20
    server.stop()
