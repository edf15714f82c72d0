"""A tiny model to talk to, and a server of it."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qgraft
from qgraft.data.tokenizing import encode_prompt

sys.path.insert(0, str(Path(__file__).parent))

from talkers import generated, with_adapters

from qgraft.serving.prompting import Prompting
from qgraft.serving.sampling import Sampler, Token

Maker = Callable[..., Any]


@pytest.fixture
def talker(tiny_gguf: Maker) -> Any:
    """(model, tokenizer) of a tiny Llama with adapters."""
    model, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    return with_adapters(model), tokenizer


@pytest.fixture(scope="session")
def adapters(tiny_gguf: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters; one beside it that no request may reach; one of another base."""
    from served import save_random

    root = tmp_path_factory.mktemp("served")
    folder = root / "adapters"
    model, _ = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    for seed, name in enumerate(("law", "med", "tax")):
        save_random(model, folder / name, name, seed)
    save_random(model, root / "secret", "secret", 9)
    save_random(model, folder / "nans", "nans", 7, 1e25)  # finite in its file, NaN in an answer
    other, _ = qgraft.load(str(tiny_gguf("llama", seed=5).path), device="cpu")
    save_random(other, folder / "foreign", "foreign", 1)
    (folder / "link").symlink_to(root / "secret")
    return folder


@pytest.fixture(scope="session")
def running(tiny_gguf: Maker, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with keys."""
    from served import ADMIN, ALL, BASE_ONLY, LAW_ONLY, serving

    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    some = {LAW_ONLY: {"adapters": ["law"]}, BASE_ONLY: {"adapters": ["base"]}}
    keys.write_text(json.dumps({**some, ADMIN: {"admin": True}, ALL: {}}))
    server = serving(
        "--model", str(tiny_gguf("llama").path), "--adapters", str(adapters), "--keys", str(keys), "--name", "base",
        "--max_body", "20000", "--max_adapters", "2", "--max_batch", "4",
    )  # fmt: skip
    yield server
    server.stop()


@pytest.fixture(scope="session")
def expected(tiny_gguf: Maker, adapters: Path) -> Callable[[dict[str, float]], str]:
    """What transformers' generate() says to HELLO with a mix."""
    model, tokenizer = qgraft.load(str(tiny_gguf("llama").path), device="cpu")
    for name in ("law", "med", "tax"):
        qgraft.load_adapter(model, adapters / name, name)
    prompt = encode_prompt(tokenizer, [("user", "hello world")])

    def said(mix: dict[str, float]) -> str:
        return str(tokenizer.decode(generated(model, prompt, mix, 6, [2]), skip_special_tokens=True))

    return said


@pytest.fixture
def agent(running: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets the model write a text, which a tiny one never would; prompted by Qwen3's template."""
    said: list[int] = []

    def take(self: Any, logits: Any, allowed: Any = None) -> Any:
        return Token(said.pop(0) if said else 2)

    template = Path(__file__).parents[1] / "data/originals/qwen3.jinja"
    monkeypatch.setattr(Sampler, "draw", take)
    monkeypatch.setattr(running.service.prompter, "prompting", Prompting(template=str(template)))
    monkeypatch.setattr(running.service.engine, "context", None)

    def writes(text: str) -> None:
        said[:] = running.tokenizer(text, add_special_tokens=False)["input_ids"]

    return writes
