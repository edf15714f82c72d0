"""A hint that is followed to the letter leads on."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import qgraft
from qgraft.cli import main as cli
from qgraft.errors import OptionError, flags_spoken

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3}"} for i in range(8)]


@pytest.fixture
def place(tiny_gguf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows.jsonl and run.yaml, in which commands run."""
    monkeypatch.chdir(tmp_path)
    for name in ("GOMP_SPINCOUNT", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "20000" if name == "GOMP_SPINCOUNT" else "false")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = f"model_name_or_path: {tiny_gguf('llama').path}\ndataset: rows.jsonl\nmax_steps: 1\nuse_cpu: true\n"
    (tmp_path / "run.yaml").write_text(common + "output_dir: out\n")
    return tmp_path


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(words) == 2
    return capsys.readouterr().err


def test_hints_behind_a_configuration_file_can_be_followed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "run.yaml"]) == 0
    capsys.readouterr()
    hint = refusal(["train", "run.yaml"], capsys).partition("hint: ")[2]
    flags = re.findall(r"--[a-z_]+(?: auto)?", hint)
    assert flags == ["--resume_from_checkpoint auto", "--overwrite_output_dir"]
    for flag in flags:
        assert cli.main(["train", "run.yaml", *flag.split()]) == 0, flag
    assert "already finished" in capsys.readouterr().err


def test_options_of_an_adapter_that_is_loaded_are_left_out_or_it_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "run.yaml", "output_dir=first"]) == 0
    capsys.readouterr()
    told = refusal(["train", "run.yaml", "--adapter_name_or_path", "first", "--r", "99"], capsys)
    assert "r=99, the adapter has 8" in told and "hint: leave them out" in told
    assert "leave --adapter_name_or_path out for a new one" in told and "second" not in told
    assert cli.main(["train", "run.yaml", "--adapter_name_or_path", "first"]) == 0
    assert cli.main(["train", "run.yaml", "--r", "9", "--overwrite_output_dir"]) == 0


def test_the_same_in_python_names_another_adapter(place: Path) -> None:
    model, tokenizer = qgraft.load(re.findall(r"path: (.*)", (place / "run.yaml").read_text())[0])
    qgraft.attach_lora(model, r=2)
    options: dict[str, Any] = {"output_dir": "py", "max_steps": 1, "use_cpu": True, "r": 3}
    with pytest.raises(OptionError, match=r"another name for a new one: adapter_name='second'"):
        qgraft.train(model, tokenizer, ROWS, qgraft.TrainArguments(**options))
    assert qgraft.train(model, tokenizer, ROWS, qgraft.TrainArguments(**options, adapter_name="second")).finished


def test_early_stopping_names_the_option_and_how_it_is_measured(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "run.yaml", "val_size=2", "early_stopping_patience=1", "eval_strategy=no"]
    told = refusal(words, capsys)
    assert "early_stopping_patience: the held-out loss is never measured" in told
    assert "hint: --eval_strategy epoch, or --eval_strategy steps with eval_steps" in told
    assert cli.main([*words, "--eval_strategy", "epoch"]) == 0


@pytest.mark.parametrize("word", ["max_steps=2", "r=4", "-r 4", "lora_rank=4", "system=a b"])
def test_a_word_among_flags_is_answered_with_the_flag(
    word: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dict(line.split(": ") for line in (place / "run.yaml").read_text().splitlines())
    flags = [part for name, value in config.items() if name != "max_steps" for part in (f"--{name}", value)]
    split = word.split() if word.startswith("-") else [word]
    hint = refusal(["train", *flags, *split], capsys).partition("hint: ")[2].strip()
    assert hint.startswith("--") and hint.endswith(("2", "4", "'a b'"))
    assert cli.main(["train", *flags, *shlex.split(hint), "--max_steps", "1"]) == 0


def test_other_words_among_flags(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "hint: qgraft train run.yaml ...: a configuration file comes first" in refusal(
        ["train", "--r", "4", "run.yaml"], capsys
    )
    assert "'something': expected a flag" in refusal(["train", "--r", "4", "something"], capsys)
    assert "did you mean lora_rank" in refusal(["train", "--lora_rnak", "4"], capsys)


def test_python_is_not_told_of_a_command(place: Path) -> None:
    with pytest.raises(
        OptionError, match=r"unknown option 'foo'\nhint: help\(qgraft.TrainArguments\) lists the options"
    ):
        qgraft.TrainArguments(foo=3)  # type: ignore[call-arg]
    with flags_spoken(), pytest.raises(OptionError, match="hint: `qgraft train --help` lists the options"):
        qgraft.TrainArguments(foo=3)  # type: ignore[call-arg]


def test_commands_are_not_told_of_functions(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = re.findall(r"path: (.*)", (place / "run.yaml").read_text())[0]
    assert cli.main(["train", "run.yaml", "--pre_seq_len", "2", "output_dir=prefix"]) == 0
    (place / "empty").mkdir()
    capsys.readouterr()
    for words in (
        ["merge", "--adapter", "prefix", "--output", "m.gguf"],
        ["chat", "--adapter", "empty", "--prompt", "x"],
    ):
        told = refusal([words[0], "--model", model, *words[1:]], capsys)
        assert "hint: give " in told and "use_adapter" not in told and "save_adapter" not in told
