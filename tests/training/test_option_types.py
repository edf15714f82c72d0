"""Values of every kind for every option: each is taken as what it says, or refused by name, in words of ours."""

import dataclasses
import datetime
import os
import re
from pathlib import Path
from typing import Any

import numpy
import pytest

from qgraft.errors import OptionError, QgraftError, flags_spoken
from qgraft.training.arguments import TrainArguments, arguments_from_dict, parse_arguments
from qgraft.training.option_types import option_kinds
from qgraft.training.trainer_options import REFUSED

OPTIONS = [field.name for field in dataclasses.fields(TrainArguments) if field.init]
ODD: list[Any] = [
    None, True, 3, -1, 2.5, float("nan"), float("inf"), 10**400, "", "maybe", "off", "3", "{", "[1]", '{"a": 1}', b"x",
    {}, {1: 2}, {"a": "b"}, [], ["a"], [3], [None], [["a"]], [{"a": "b"}], ("a", "b"), {"a"}, object(), int,
    datetime.date(2024, 1, 1), Path("x"), numpy.float32(2), numpy.int64(3), numpy.zeros(2), 1j, lambda: 1,
]  # fmt: skip


def arguments(**options: Any) -> TrainArguments:
    return TrainArguments(**{"output_dir": "none", "use_cpu": True, **options})


@pytest.mark.parametrize("name", OPTIONS)
def test_a_value_of_any_kind_is_taken_or_refused_by_name(name: str) -> None:
    refused = ""
    for value in ODD:
        try:
            made = arguments(**{name: value})
        except QgraftError as error:
            refused = str(error)
            named = name in refused or (name == "adapter_name" and "adapter name" in refused)
        else:
            kinds = tuple(option_kinds(TrainArguments)[name])
            named = name in ("local_rank", "use_cpu", *REFUSED) or isinstance(
                getattr(made, name), (*kinds, int) if float in kinds else kinds
            )
        assert named, (value, refused)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"r": None}, "r=None: expected a whole number from 1 to 32768\nhint: leave r out"),
        (
            {"dataset": 3},
            "dataset=3: expected names, as a comma list or a list of texts\nhint: in quotes .*dataset='3'",
        ),
        (
            {"dataset": [{"a": "b"}]},
            r"dataset=\[\{'a': 'b'\}\]: expected names.*\n.*rows themselves are given to train\(",
        ),
        ({"dataset": ["a,b"]}, r"dataset=\['a,b'\]: expected names"),
        ({"system": 12}, "system=12: expected a text\nhint: in quotes it is a text: system='12'"),
        ({"system": ["a"]}, r"system=\['a'\]: expected a text$"),
        (
            {"output_dir": datetime.date(2024, 1, 1)},
            r"output_dir=datetime.date\(2024, 1, 1\): expected a text\n.*'2024-01-01'",
        ),
        ({"output_dir": {"a": "b"}}, "output_dir={'a': 'b'}: expected a text$"),
        ({"target_modules": {"q_proj": 1}}, "target_modules={'q_proj': 1}: expected names, as a comma list or"),
        ({"plot_loss": "maybe"}, "plot_loss='maybe': expected true or false"),
        ({"plot_loss": "off"}, "plot_loss='off': expected true or false"),
        ({"plot_loss": 1}, "plot_loss=1: expected true or false"),
        ({"learning_rate": "fast"}, "learning_rate='fast': expected a number from 0 on"),
        ({"max_steps": "1e3"}, "max_steps='1e3': expected a whole number"),
        ({"layers_to_transform": ["a"]}, r"layers_to_transform=\['a'\]: expected numbers of layers"),
        ({"eval_strategy": "maybe"}, "eval_strategy='maybe': expected no, steps or epoch"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type='cosin': expected linear, cosine"),
        ({"lr_scheduler_kwargs": "{a"}, "lr_scheduler_kwargs='{a': expected .*{key: value}"),
        ({"report_to": 3}, "report_to=3: expected a text or a list of texts"),
        ({"r": "x", "system": 1, "bf16": "no"}, "bf16='no': .*; r='x': .*; system=1: "),
    ],
)
def test_what_was_got_and_what_was_expected_is_said(options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        arguments(**options)
    with pytest.raises(OptionError, match=told):
        arguments_from_dict({"output_dir": "none", "use_cpu": True, **options})


def test_what_says_the_same_in_another_kind_is_taken() -> None:
    made = arguments(
        output_dir=Path("out"), dataset=[Path("a.jsonl"), "b.jsonl"], eval_dataset=Path("c.jsonl"),
        target_modules=("q_proj", "v_proj"),
        layers_to_transform=range(2, 4), learning_rate="1e-3", r="4", lora_alpha=numpy.float32(8), seed=numpy.int64(5),
        plot_loss="False", lr_scheduler_kwargs="{}", save_strategy=False,
    )  # fmt: skip
    assert (made.output_dir, made.dataset, made.eval_dataset) == ("out", "a.jsonl,b.jsonl", "c.jsonl")
    assert (made.target_modules, made.layers_to_transform) == ("q_proj,v_proj", "2,3")
    assert (made.learning_rate, made.r, made.lora_alpha, made.seed, made.plot_loss) == (1e-3, 4, 8.0, 5, False)
    assert type(made.lora_alpha) is float and type(made.seed) is int and made.save_strategy == "no"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("r: null", r"r=null: expected a whole number from 1 to 32768.*\n.*leave r out"),
        ("r:", "r=null: expected"),
        ("system: 12", "system=12: expected a text\nhint: in quotes it is a text: system: '12'"),
        ("output_dir: 2024-01-01", "output_dir=.*expected a text\n.*output_dir: '2024-01-01'"),
        ("output_dir: 5", "output_dir=5: expected a text"),
        ("plot_loss: maybe", "plot_loss='maybe': expected true or false"),
        ("fp16: 'off'", "fp16='off': expected true or false"),
    ],
)
def test_a_configuration_file_is_answered_in_its_own_words(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("dataset: rows.jsonl\n" + text)
    with flags_spoken(), pytest.raises(OptionError, match=told):
        parse_arguments([os.fspath(tmp_path / "c.yaml")])


def test_lists_of_names_are_taken_from_files_and_words(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("output_dir: out\nuse_cpu: true\ndataset: [rows.jsonl, held.jsonl]\n")
    assert parse_arguments([str(config)]).dataset == "rows.jsonl,held.jsonl"
    words = ["target_modules=[q_proj,v_proj]", "dataset=[a.jsonl]", "system=[a]", "layers_to_transform=[1,2]"]
    made = parse_arguments([str(config), *words])
    assert (made.target_modules, made.dataset, made.system, made.layers_to_transform) == (
        "q_proj,v_proj",
        "a.jsonl",
        "[a]",
        "1,2",
    )
    assert parse_arguments([str(config), r"target_modules=.*\.[qv]_proj"]).target_modules == r".*\.[qv]_proj"
    with pytest.raises(OptionError, match=re.escape("r=None: expected")):
        parse_arguments([str(config), "r="])


@pytest.mark.parametrize(
    "words",
    [
        ["--r", "3", "--plot_loss", "false", "--overwrite_output_dir", "system=a: b", "--lora-alpha=4"],
        ["--overwrite_output_dir", "--no_plot_loss", "--lora_rank", "3", "--system", "a: b", "lora_alpha=4"],
        ["overwrite_output_dir=true", "plot_loss=false", "r=3", "lora_alpha=4", "system=a: b"],
    ],
)
def test_flags_are_taken_behind_a_file_as_words_are(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output_dir: out\nuse_cpu: true\nr: 2\n")
    made = parse_arguments([str(tmp_path / "c.yaml"), *words])
    assert (made.r, made.lora_alpha, made.plot_loss, made.overwrite_output_dir, made.system) == (
        3,
        4,
        False,
        True,
        "a: b",
    )


def test_a_word_behind_a_file_that_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output_dir: out\nuse_cpu: true\n")
    for words in (["r"], ["--r", "3", "4"], ["--rr", "3"], ["--r"]):
        with pytest.raises(OptionError, match=r"expected option=value|unknown option 'rr'|r=True: expected"):
            parse_arguments([str(tmp_path / "c.yaml"), *words])
