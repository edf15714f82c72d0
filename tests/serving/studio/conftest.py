"""A folder of runs of a tiny model, and the server that works in it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sse_starlette")
pytest.importorskip("httpx")

import torch
from fastapi.testclient import TestClient

import qgraft
from qgraft.adapters.attach import attach_lora, detach_adapter
from qgraft.adapters.base import find_adapter
from qgraft.cli.serve import _parser, make_page_app, make_service, make_work

ADMIN, OTHER = "sk-admin", "sk-law"
ROWS = [(f"hello {n} world", f"the cat sat on mat {n}") for n in range(12)]


@dataclass
class Studio:
    """A server with its folder; `client(key)` asks it."""

    app: Any
    service: Any
    work: Any
    root: Path

    def client(self, key: str | None = ADMIN, **headers: str) -> TestClient:
        given = {} if key is None else {"Authorization": f"Bearer {key}"}
        return TestClient(self.app, base_url="http://127.0.0.1:8080", headers={**given, **headers})


def save_random(model: Any, folder: Path, seed: int) -> None:
    attach_lora(model, r=4, lora_alpha=8, name="made")
    draw = torch.Generator().manual_seed(seed)
    for lora in find_adapter(model, "made").parts.values():
        lora.lora_B.data.normal_(0, 0.3, generator=draw)
    qgraft.save_adapter(model, folder, "made")
    detach_adapter(model, "made")


def write_run(folder: Path, **run: Any) -> None:
    """What `qgraft train` leaves beside an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = [{"step": step, "loss": 5.0 / step, "tokens_per_second": 100.0, "epoch": step / 4} for step in range(1, 9)]
    lines = [{"step": 0, "eval_loss": 6.0}, *steps, {"step": 8, "eval_loss": 2.0, "epoch": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps({"finished": True, "steps": 8, "planned_steps": 8, **run}))


def write_csv(path: Path, rows: list[tuple[str, str]] = ROWS) -> None:
    path.write_text("question,answer\n" + "".join(f"{question},{answer}\n" for question, answer in rows))


@pytest.fixture(scope="module")
def studio(tiny_gguf: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    root = tmp_path_factory.mktemp("studio") / "work"
    model, _ = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    for seed, name in enumerate(("law", "med", "group/tax")):
        save_random(model, root / name, seed)
        write_run(root / name)
    save_random(model, root.parent / "secret", 9)
    write_run(root.parent / "secret")
    save_random(model, root / "half" / "checkpoint-4", 4)
    (root / "half" / "checkpoint-4" / "manifest.json").write_text("{}")
    write_run(root / "half", finished=False)
    other, _ = qgraft.load(str(tiny_gguf("llama", seed=5).path), device="cpu")
    save_random(other, root / "foreign", 1)
    (root / "link").symlink_to(root.parent / "secret")
    keys = root.parent / "keys.json"
    keys.write_text(json.dumps({OTHER: {"adapters": ["law"], "name": "lawyer"}, ADMIN: {"admin": True}}))
    words = ["--model", str(tiny_gguf("llama").path), "--folder", str(root), "--adapters", str(root), "--device", "cpu"]
    options = _parser().parse_args([*words, "--keys", str(keys), "--name", "base", "--max_body", "20000"])
    service = make_service(options)
    work = make_work(service, options)
    service.engine.start()
    yield Studio(make_page_app(service, work), service, work, work.place.root)
    work.close(5)
    service.engine.stop()
