# ruff: noqa: E402 (what is imported below needs the extra)
"""A client that shares no code with the server or with Python's clients: Node's own fetch, whole answers and streams."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

for _module in ("fastapi", "sse_starlette", "uvicorn"):
    pytest.importorskip(_module, reason="needs qgraft[serve]")
NODE = shutil.which("node")


def _has_fetch() -> bool:
    if NODE is None:
        return False
    told = subprocess.run([NODE, "--version"], capture_output=True, text=True).stdout
    found = re.match(r"v(\d+)", told)
    return found is not None and int(found[1]) >= 18


pytestmark = pytest.mark.skipif(not _has_fetch(), reason="no node with fetch here")

from served import ALL, HELLO, Running
from waiting import until

SCRIPT = r"""
const { url, key, path, body, leave } = JSON.parse(process.argv[1]);
const gone = new AbortController();
const response = await fetch(url + path, {
  method: "POST", body: JSON.stringify(body), signal: gone.signal,
  headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/json" },
});
const told = { status: response.status, type: response.headers.get("content-type"), events: [] };
if (!told.type.startsWith("text/event-stream")) told.body = await response.json();
else {
  let pending = "";
  try {
    for await (const piece of response.body.pipeThrough(new TextDecoderStream())) {
      pending += piece;
      const blocks = pending.split("\n\n");
      pending = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => !line.startsWith(":")).map((line) => /^(\w+): (.*)$/.exec(line));
        const event = Object.fromEntries(lines.map(([, name, value]) => [name, value]));
        if (event.data === undefined) continue;
        told.events.push({ name: event.event ?? null, data: event.data === "[DONE]" ? "[DONE]" : JSON.parse(event.data) });
        if (leave && told.events.length === leave) gone.abort();
      }
    }
    told.rest = pending;
  } catch (error) { told.left = error.name; }
}
console.log(JSON.stringify(told));
"""


@pytest.fixture
def node(running: Running) -> Callable[..., Any]:
    """Ask by fetch; what came."""

    def ask(path: str, body: Any, key: str = ALL, leave: int = 0) -> Any:
        given = json.dumps({"url": running.url, "key": key, "path": path, "body": body, "leave": leave})
        words = [str(NODE), "--input-type=module", "-e", SCRIPT, "--", given]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def test_chat_whole_and_streamed(node: Callable[..., Any], expected: Callable[[dict[str, float]], str]) -> None:
    body = {"model": "law=0.7+med=0.3", "messages": HELLO, "temperature": 0, "max_tokens": 6}
    said = expected({"law": 0.7, "med": 0.3})
    whole = node("/v1/chat/completions", body)
    assert (whole["status"], whole["body"]["choices"][0]["message"]["content"]) == (200, said)
    told = node("/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    *chunks, usage, done = (event["data"] for event in told["events"])
    assert done == "[DONE]" and told["rest"] == "" and told["type"].startswith("text/event-stream")
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks) == said
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"] == whole["body"]["usage"]


def test_the_events_of_the_other_apis(node: Callable[..., Any], expected: Callable[[dict[str, float]], str]) -> None:
    said = expected({"law": 1.0})
    body = {"model": "law", "max_tokens": 6, "messages": HELLO, "temperature": 0, "stream": True}
    events = node("/v1/messages", body)["events"]
    assert all(event["name"] == event["data"]["type"] for event in events)
    assert (events[0]["name"], events[-1]["name"]) == ("message_start", "message_stop")
    deltas = [event["data"]["delta"] for event in events if event["name"] == "content_block_delta"]
    assert "".join(each["text"] for each in deltas) == said
    body = {"model": "law", "max_output_tokens": 6, "input": HELLO, "temperature": 0, "stream": True}
    events = node("/v1/responses", body)["events"]
    assert [event["data"]["sequence_number"] for event in events] == list(range(len(events)))
    deltas = [event["data"]["delta"] for event in events if event["name"] == "response.output_text.delta"]
    assert "".join(deltas) == said and events[-1]["name"] == "response.incomplete"


def test_errors_and_who_leaves_in_the_middle(node: Callable[..., Any], running: Running) -> None:
    told = node("/v1/chat/completions", {"model": "base", "messages": HELLO, "stream": "yes"})
    assert told["status"] == 400 and told["body"]["error"]["message"] == 'stream: got "yes", expected true or false'
    assert node("/v1/chat/completions", {"model": "base", "messages": HELLO}, key="wrong")["status"] == 401
    body = {"model": "base", "messages": HELLO, "max_tokens": 110, "ignore_eos": True, "stream": True, "n": 4}
    told = node("/v1/chat/completions", body, leave=6)
    assert told["left"] == "AbortError" and len(told["events"]) >= 6
    engine = running.service.engine
    until(lambda: not engine.running and not engine.waiting)
    assert node("/v1/chat/completions", {"model": "base", "messages": HELLO, "max_tokens": 2})["status"] == 200


NPM = r"""
const OpenAI = require("openai").OpenAI ?? require("openai");
const { url, key, messages } = JSON.parse(process.argv[1]);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
(async () => {
  const told = { models: [], streamed: "", events: [] };
  for await (const each of client.models.list()) told.models.push(each.id);
  const body = { model: "law", messages, temperature: 0, max_tokens: 6 };
  told.whole = (await client.chat.completions.create(body)).choices[0].message.content;
  const stream = await client.chat.completions.create({ ...body, stream: true, stream_options: { include_usage: true } });
  for await (const chunk of stream) { told.streamed += chunk.choices[0]?.delta?.content ?? ""; told.usage = chunk.usage; }
  told.helped = await client.chat.completions.stream(body).finalContent();
  const answer = await client.responses.create({ model: "law", input: messages, temperature: 0, max_output_tokens: 6 });
  told.answer = answer.output_text;
  const events = await client.responses.create({ model: "law", input: "hello", max_output_tokens: 3, stream: true });
  for await (const event of events) told.events.push(event.type);
  try { await client.chat.completions.create({ ...body, model: "nobody" }); } catch (error) {
    told.error = [error.constructor.name, error.status, error.code, error.param];
  }
  console.log(JSON.stringify(told));
})();
"""


def test_openais_client_for_node(running: Running, expected: Callable[[dict[str, float]], str]) -> None:
    """Where `npm install openai` was run, and NODE_PATH leads to its node_modules."""
    if subprocess.run([str(NODE), "-e", 'require("openai")'], capture_output=True).returncode:
        pytest.skip("no openai for node here")
    given = json.dumps({"url": running.url, "key": ALL, "messages": HELLO})
    done = subprocess.run([str(NODE), "-e", NPM, "--", given], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told, said = json.loads(done.stdout), expected({"law": 1.0})
    assert {"base", "law", "med"} <= set(told["models"])
    assert said == told["whole"] == told["streamed"] == told["helped"] == told["answer"]
    assert told["usage"]["completion_tokens"] == 6 and told["events"][-1] == "response.incomplete"
    assert told["error"] == ["NotFoundError", 404, "model_not_found", "model"]
