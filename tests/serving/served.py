"""A server in a thread, its keys and its adapters, for tests of what it answers over HTTP."""

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn

import qgraft
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.base import find_adapter
from qgraft.cli.serve import _parser, bound, make_service
from qgraft.serving.app import make_app
from qgraft.serving.connections import OPTIONS, BoundedProtocol

ADMIN, LAW_ONLY, BASE_ONLY, ALL = "sk-admin", "sk-law", "sk-base", "sk-all"
HELLO = [{"role": "user", "content": "hello world"}]
TRAVERSALS = [
    "../secret", "..", ".", "/etc/passwd", "law/../../secret", "./../secret", "link", "link/adapter_config.json", "~",
    "~root", "..\\secret", "%2e%2e/secret", "..%2fsecret", "law\x00", "....//secret", "//etc", "/", "", " ", "secret",
    "law/../..", "../adapters/../secret", "\\\\host\\share", "C:\\x", "file:///etc/passwd", "http://x/y", "../" * 30,
    "a" * 5000, "law/../../../../../../etc/passwd", "..;/secret", "..\u2215secret", "\u202e../secret", "${HOME}", "`id`",
    "law\n../secret", "/proc/self/environ", "/dev/zero", "../secret/.", "./link", "link/", "law/\x00/../../secret",
]  # fmt: skip


def serving(*words: str) -> "Running":
    """A server as `qgraft serve` with these words makes it."""
    return Running(make_service(_parser().parse_args([*words, "--device", "cpu"])))


class Running:
    """A server in a thread, and the model behind it."""

    def __init__(self, service: Any) -> None:
        self.service, self.model, self.tokenizer = service, service.engine.model, service.tokenizer
        config = uvicorn.Config(
            make_app(service),
            host="127.0.0.1",
            port=0,
            log_level="error",
            access_log=False,
            http=BoundedProtocol,
            **OPTIONS,
        )
        self.server = uvicorn.Server(config)
        listener = bound(config)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        service.engine.start()
        self.thread.start()
        while not self.server.started and self.thread.is_alive():
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        self.service.engine.stop()

    def client(self, key: str = ALL, **options: Any) -> Any:
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {key}"}, timeout=300, **options)


def save_random(model: Any, folder: Path, name: str, seed: int, scale: float = 0.3) -> None:
    attach_lora(model, r=4, lora_alpha=8, name=name)
    draw = torch.Generator().manual_seed(seed)
    for lora in find_adapter(model, name).parts.values():
        lora.lora_B.data.normal_(0, 1, generator=draw).mul_(scale)
    qgraft.save_adapter(model, folder, name)
    detach_adapter(model, name)


def ask(client: Any, **options: Any) -> Any:
    body = {"model": "base", "messages": HELLO, "temperature": 0, "max_tokens": 6, **options}
    return client.post("/v1/chat/completions", json=body)


def told(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])
