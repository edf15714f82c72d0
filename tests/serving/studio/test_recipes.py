"""Presets, and the options that a request may set: what comes of them is a configuration that `qgraft train` takes."""

import json
from pathlib import Path
from typing import Any

import pytest

from qgraft.serving.fields import ApiError
from qgraft.serving.studio.recipes import OPTIONS, PRESETS, checked, configuration
from qgraft.training.arguments import TrainArguments, parse_arguments


@pytest.mark.parametrize("preset", PRESETS)
def test_train_takes_what_comes_of_a_preset(tmp_path: Path, preset: str) -> None:
    given = {
        "num_train_epochs": 2,
        "system": "--force",
        "val_size": 0.1,
        "max_steps": 5,
        "mask_history": True,
        "seed": 1,
    }
    options = checked({**given, "name": "", "author": None})
    made = configuration("m.gguf", "q4_1", tmp_path / "x.csv", tmp_path / "out", preset, options)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(made))
    arguments = parse_arguments([str(file)])
    assert (arguments.system, arguments.num_train_epochs, arguments.max_steps) == ("--force", 2, 5)
    assert arguments.quantize == "q4_1" and arguments.exact == (preset == "exact") and arguments.mask_history
    assert (arguments.finetuning_type, arguments.pre_seq_len) == (
        ("p_tuning", 64) if preset == "prefix" else ("lora", None)
    )
    assert str(arguments.resume_from_checkpoint) == "auto" and arguments.output_dir == str(tmp_path / "out")


def test_options_are_those_of_train() -> None:
    assert OPTIONS.keys() <= TrainArguments.__dataclass_fields__.keys()
    assert all(options.keys() <= OPTIONS.keys() for options in PRESETS.values())


@pytest.mark.parametrize(
    "given", [
        3, [], {"output_dir": "/etc"}, {"r": "8"}, {"r": 0}, {"r": 1.5}, {"num_train_epochs": float("inf")}, {"exact": 1},
        {"learning_rate": -1}, {"learning_rate": True}, {"system": ["x"]}, {"system": "x" * 5000}, {"val_size": 1.0},
        {"dataset": "x"}, {"model_name_or_path": "x"}, {"push_to_hub": True}, {"seed": -1}, {"max_length": 1},
        {"pre_seq_len": 0},
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(given: Any) -> None:
    with pytest.raises(ApiError):
        checked(given)
    with pytest.raises(ApiError):
        configuration("m", None, Path("x"), Path("y"), given, {})
