"""The command: what it refuses before it loads, and a server as people start and stop it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qgraft.cli.main import main

pytest.importorskip("fastapi")
pytest.importorskip("sse_starlette")
pytest.importorskip("llguidance")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

Maker = Callable[..., Any]


@pytest.mark.parametrize(
    "words,said",
    [
        (["--host", "0.0.0.0"], "lets other machines ask, and no key is needed"),
        (["--host", "example.org"], "lets other machines ask"),
        (["--adapters", "nowhere"], "--adapters nowhere: no such folder"),
        (["--adapter", "law=nowhere"], "--adapter nowhere: no such file or folder"),
        (["--port", "99999"], "--port"), (["--max_batch", "0"], "--max_batch"), (["--adaptors", "x"], "did you mean"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_said_before_loading(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("QGRAFT_API_KEY", raising=False)
    assert main(["serve", "--model", "nothing.gguf", *words]) == 2
    assert said in capsys.readouterr().err


def test_no_word_opens_a_server_to_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--api_key "$UNSET" is an empty key, which is that of requests without any; an admin's key is asked of nobody else."""
    monkeypatch.delenv("QGRAFT_API_KEY", raising=False)
    path = tmp_path / "keys.json"
    path.write_text('{"sk-admin": {"admin": true}}', encoding="utf-8")
    for words, said in (
        (["--api_key", ""], "--api_key: got '', expected a key"), (["--admin_key", ""], "--admin_key: got ''"),
        (["--api_key", "sk-\u043a"], "expected a key of printable ASCII"), (["--api_key", "a "], "--api_key: got 'a '"),
        (["--keys", str(path)], "no key is needed"), (["--admin_key", "sk-admin"], "no key is needed"),
    ):  # fmt: skip
        assert main(["serve", "--model", "nothing.gguf", "--host", "0.0.0.0", *words]) == 2
        assert said in capsys.readouterr().err
    for words in (["--api_key", "sk-a"], ["--keys", str(path), "--api_key", "sk-a"]):
        assert main(["serve", "--model", "nothing.gguf", "--host", "0.0.0.0", *words]) == 2
        assert "nothing.gguf" in capsys.readouterr().err  # which is looked for next


def test_wrong_key_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.json"
    for wrong in (
        "[]",
        '{"": {}}',
        '{" k": {}}',
        '{"k": {"adapters": "law"}}',
        '{"k": {"admin": 1}}',
        '{"k": {"more": 1}}',
        '{"k": 1}',
    ):
        path.write_text(wrong, encoding="utf-8")
        assert main(["serve", "--model", "nothing.gguf", "--keys", str(path)]) == 2
        assert "keys.json" in capsys.readouterr().err


@pytest.mark.parametrize("grace", [30.0, pytest.param(0.001, marks=pytest.mark.slow)])
def test_a_stop_finishes_streams_and_the_log_has_no_prompt(tiny_gguf: Maker, grace: float) -> None:
    """Or, where the time for that is over, says so in them."""
    environment = {**os.environ, "QGRAFT_API_KEY": "sk-secret"}
    words = ["serve", "--model", str(tiny_gguf("llama").path), "--port", "0", "--device", "cpu", "--grace", str(grace)]
    server = subprocess.Popen(
        [sys.executable, "-m", "qgraft", *words], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert server.stderr is not None
    try:
        lines = []
        while not (lines and "http://" in lines[-1]):
            lines.append(server.stderr.readline())
            assert lines[-1], "".join(lines)
        url = re.findall(r"http://\S+", lines[-1])[0]
        body = {"model": "tiny", "prompt": "confidential", "max_tokens": 90, "ignore_eos": True, "stream": True}
        with (
            httpx.Client(headers={"Authorization": "Bearer sk-secret"}, timeout=300) as client,
            client.stream("POST", f"{url}/completions", json=body) as response,
        ):
            stream = response.iter_lines()
            chunks = [next(stream)]
            server.send_signal(signal.SIGTERM)
            chunks += list(stream)
        told = [json.loads(line[6:]) for line in chunks if line.startswith("data: {")]
        if "error" in told[-1]:
            assert grace < 1 and "being stopped" in told[-1]["error"]["message"]
        else:
            assert "data: [DONE]" in chunks and told[-1]["choices"][0]["finish_reason"] == "length"
        rest = server.communicate(timeout=120)[1]
        assert server.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM), rest
        assert "POST /v1/completions 200 model='tiny'" in rest and "Traceback" not in rest
        assert "confidential" not in rest and "sk-secret" not in rest
    finally:
        server.kill()
