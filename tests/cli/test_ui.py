"""qgraft ui: which model it takes, and a key of its own."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sse_starlette")
pytest.importorskip("llguidance")

from qgraft.cli import serve, ui
from qgraft.errors import OptionError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("QGRAFT_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QGRAFT_ADMIN_KEY", raising=False)
    return tmp_path


def test_the_only_model_that_is_there_is_taken(elsewhere: Path) -> None:
    folder = elsewhere / "runs"
    with pytest.raises(OptionError, match="no model is named"):
        ui.find_model(folder)
    (elsewhere / "cache").mkdir()
    (elsewhere / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_text("")
    assert ui.find_model(folder) == "smollm2-135m"
    (elsewhere / "here" / "mine.gguf").write_text("")
    (elsewhere / "here" / "mine.lora.gguf").write_text("")
    assert ui.find_model(folder) == str(elsewhere / "here" / "mine.gguf")
    folder.mkdir()
    (folder / "other.gguf").write_text("")
    with pytest.raises(OptionError, match="several models"):
        ui.find_model(folder)


def test_the_address_holds_a_key_that_is_made_anew(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    keys: list[str] = []

    def served(options: Any, ready: Any) -> int:
        assert options.folder == "qgraft-runs" and options.host == "127.0.0.1"
        keys.append(options.admin_key)
        ready("http://127.0.0.1:8080")
        return 0

    class Now:
        def __init__(self, seconds: float, function: Any, args: tuple[str]) -> None:
            self.start = lambda: function(*args)

    monkeypatch.setattr(ui, "serve", served)
    monkeypatch.setattr(ui.threading, "Timer", Now)
    monkeypatch.setattr(ui.webbrowser, "open", opened.append)
    assert ui.run(["--model", "m.gguf"]) == ui.run(["--model", "m.gguf", "--no_browser"]) == 0
    assert len(set(keys)) == 2 and all(len(key) >= 20 for key in keys)
    assert opened == [f"http://127.0.0.1:8080/#key={keys[0]}"]
    assert f"#key={keys[1]}" in capsys.readouterr().err
    ui.run(["--model", "m.gguf", "--admin_key", "mine"])
    assert keys[-1] == "mine"


def test_the_folder_of_the_page_is_that_of_the_adapters() -> None:
    options = serve._parser().parse_args(["--model", "m.gguf", "--folder", "runs"])
    assert options.folder == "runs" and options.adapters is None
    assert serve.make_work(None, serve._parser().parse_args(["--model", "m.gguf"])) is None
