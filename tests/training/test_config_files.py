"""Configuration files that stand for more than anybody can hold, and options that there are not."""

import copy
import pickle
from pathlib import Path

import pytest

from qgraft.errors import OptionError
from qgraft.training.arguments import TrainArguments
from qgraft.training.config_files import read_config


@pytest.mark.parametrize("last", ["*h", "&x [*x]"])
def test_anchors_that_multiply_are_refused(last: str, tmp_path: Path) -> None:
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True)]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join([*(lines if last == "*h" else []), f"lora_alpha: {last}"]))
    with pytest.raises(OptionError, match="more than 10,000 values"):
        read_config(path)


def test_an_anchor_is_as_good_as_any(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("dataset: &d rows.jsonl\neval_dataset: *d\n")
    assert read_config(tmp_path / "run.yaml") == {"dataset": "rows.jsonl", "eval_dataset": "rows.jsonl"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lora_rank", "it is called r here"),
        ("learning_rat", "did you mean learning_rate"),
        ("packing", "leave it out: "),
        ("pissa_init", "init_lora_weights=pissa"),
        ("pref_ftx", "it is rpo_alpha here"),
    ],
)
def test_an_option_that_python_gives_is_answered_as_on_the_command_line(name: str, hint: str) -> None:
    with pytest.raises(OptionError, match=f"(?s)unknown option '{name}'.*{hint}"):
        TrainArguments(output_dir="out", **{name: 8})


def test_copies_and_pickles_of_arguments_are_made_as_ever() -> None:
    arguments = TrainArguments(output_dir="out", r=3)
    for other in (copy.deepcopy(arguments), pickle.loads(pickle.dumps(arguments))):
        assert (other.r, other.output_dir) == (3, "out")
