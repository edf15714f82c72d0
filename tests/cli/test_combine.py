"""`qgraft combine` as a user types it, and the conversations with two adapters that it is for."""

import json
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qgraft.adapter_files.calibration import CALIBRATION
from qgraft.adapter_files.folder import load_adapter, save_adapter
from qgraft.adapters.attach import attach_lora
from qgraft.adapters.base import find_adapter, selection_of
from qgraft.adapters.choose import active_adapters
from qgraft.adapters.kept_rows import KeptRow, KeptRows
from qgraft.checkpoints.gguf_model import load_gguf
from qgraft.cli import chat
from qgraft.cli import main as cli
from qgraft.cli.combine import parse_weights
from qgraft.cli.options import free_name
from qgraft.errors import OptionError

Maker = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_environment_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line sets defaults of libraries; tests of other files must not inherit them."""
    for name in ("GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "20000" if name == "GOMP_SPINCOUNT" else "false"))


@pytest.fixture
def adapters(tiny_gguf: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the adapters `law` and `lr=1` in it."""
    model = load_gguf(tiny_gguf("llama").path, torch.float32)[0]
    for name, folder, r in (("law", "law", 2), ("med", "lr=1", 3)):
        attach_lora(model, r=r, name=name, target_modules="q_proj,up_proj")
        for lora in find_adapter(model, name).parts.values():
            torch.nn.init.normal_(lora.lora_B, 0, 0.1)
        save_adapter(model, tmp_path / folder, name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_combine_prints_what_it_made(adapters: Path, tiny_gguf: Maker, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["combine", "--adapter", "law=0.7", "--adapter", "lr=1=-0.3", "--output", "both"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[:6] == [
        "both: linear of 2 adapters",
        "  adapter  weight  rank  layers",
        "  law         0.7     2       4",
        "  lr=1       -0.3     3       4",
        "  both                5       4",
        "truncation error: none, the sum is exact",
    ]
    report = load_adapter(load_gguf(tiny_gguf("llama").path, torch.float32)[0], adapters / "both")
    assert str(report) == "adapter default: applied to 4/4 layers"


@pytest.mark.parametrize("keeping", [(), ("law",), ("law", "med")])
def test_combine_says_whether_the_result_brings_rows_to_be_merged_with(
    adapters: Path, tiny_gguf: Maker, capsys: pytest.CaptureFixture[str], keeping: tuple[str, ...]
) -> None:
    model = load_gguf(tiny_gguf("llama").path, torch.float32)[0]
    kept = KeptRows((KeptRow(array("i", [1, 2, 3]), array("f", [0, 1, 1]), False, 7),), 1)
    for name, folder in (("law", "law"), ("med", "lr=1")):
        load_adapter(model, adapters / folder, name)
        selection_of(model).change(name, kept=kept if name in keeping else None)
        save_adapter(model, adapters / folder, name, save_calibration=True)
    assert cli.main(["combine", "--adapter", "law", "--adapter", "lr=1=0.5", "--output", "both"]) == 0
    said = "".join(capsys.readouterr())
    assert (adapters / "both" / CALIBRATION).exists() == (len(keeping) == 2)
    assert ("holds rows of all of their data" in said) == (len(keeping) == 2)
    assert ("since there is none in lr=1: " in said) == (len(keeping) == 1)


def test_combine_with_every_option(adapters: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--adapter law --method dare --rank 4 --density 0.5 --seed 3 --dtype float16 --force --json"
    assert cli.main(["combine", "--output", "both", *words.split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["weights"], set(found["ranks"].values())) == ("dare", {"law": 1.0}, {4})
    assert 0 < found["truncation_error"] < 1
    seal = json.loads((adapters / "both" / "qgraft.json").read_text())
    assert (seal["seed"], seal["density"]) == (3, 0.5)
    assert (adapters / "both" / "adapter_model.safetensors").stat().st_size < 4 * 2 * seal["parameters"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--output both", "required: --adapter"),
        ("--adapter law", "required: --output"),
        (
            "--adapter law --output both --method ties --density nan",
            "--density: got nan, expected a number above 0, at most 1",
        ),
        ("--adapter law --output both --method ties --density 2", "--density: got 2, expected a number above 0"),
        ("--adapter law --output both --rank -1", "--rank: got -1, expected a whole number from 1"),
        ("--adapter law --output both --seed -1", "--seed: got -1, expected a whole number from 0"),
        ("--adapter law=-inf --output both", "got -inf, expected a finite number"),
        ("--adapter law=much --output both", "--adapter law=much: expected FOLDER or FOLDER=NUMBER"),
        (
            "--adapter law=nan --output both",
            "--adapter law=nan: expected FOLDER or FOLDER=NUMBER; got nan, expected a finite number",
        ),
        ("--adapter law=1 --adapter law=2 --output both", "law is given twice"),
        ("--adapter nowhere --output both", "nowhere holds no adapter_config.json"),
        ("--adapter law --output law --overwrite", "law is what is read"),
        ("--adapter law --output lr=1", "lr=1 exists already"),
        ("--adapter law --output both --method tie", "did you mean ties"),
        ("--adapter law --output both --rank 3", "method svd cuts the sum to rank 3"),
        ("--adapter law --output both --densty 3", "did you mean --density"),
        ("--adapter law --output both --density 0.3", "--density 0.3: linear prunes nothing"),
        ("--adapter law/qgraft.json --output both", "qgraft.json is a file, and combining takes folders"),
    ],
)
def test_mistakes(adapters: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert cli.main(["combine", *words.split()]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (adapters / "both").exists()


def test_weights_of_folders() -> None:
    words = ["law=0.7", "a/b=c=-2", "med", "x=1e-3"]
    assert parse_weights(words) == {"law": 0.7, "a/b=c": -2.0, "med": 1.0, "x": 0.001}
    with pytest.raises(OptionError, match="--adapter law is given twice"):
        parse_weights(["law=0.7", "law"])


def test_chat_switches_between_two_adapters_and_mixes_them(
    adapters: Path, tiny_gguf: Maker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer is given with the adapters that were asked for; a mistake changes nothing."""
    states: list[dict[str, float]] = []
    real = chat._answer

    def answer(model: Any, *arguments: Any) -> str:
        states.append(active_adapters(model))
        return real(model, *arguments)

    lines = iter([
        "hello", "/adapter law", "hello", "/adapter law=0.5 lr-1=0.5", "hello", "/base", "hello", "/adapter law lr-1",
        "hello", "/adapter nosuch", "hello", "/adapters", "/quit",
    ])  # fmt: skip
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(chat, "_answer", answer)
    model = str(tiny_gguf("llama").path)
    words = [
        "chat",
        "--model",
        model,
        "--adapter",
        "law",
        "--adapter",
        "lr=1",
        "--device",
        "cpu",
        "--max_new_tokens",
        "2",
    ]
    assert cli.main(words) == 0
    both = {"law": 1.0, "lr-1": 1.0}
    assert states == [{"lr-1": 1.0}, {"law": 1.0}, {"law": 0.5, "lr-1": 0.5}, {}, both, both]
    told = capsys.readouterr().err
    assert "adapters: law, lr-1;" in told
    assert "active: law=0.5, lr-1=0.5; attached: law, lr-1" in told
    assert "active: the base; attached: law, lr-1" in told
    assert "no adapter named 'nosuch'; attached: law, lr-1" in told


def test_names_from_folders() -> None:
    """Two folders of one name, a name with other characters, and words that a model has for itself."""
    taken: list[str] = []
    for folder in ("law", "law", "a.b c", "train", "half"):
        taken.append(free_name(folder, taken))
    assert taken == ["law", "law-2", "a-b-c", "train-4", "half-5"]
