"""transformers' TrainingArguments: each option of the installed release is known to qgraft's tables."""

import dataclasses
import os

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from qgraft.training.trainer_options import HONOURED, REFUSED, WITHOUT_NEED

OPTIONS = {option.name: option for option in dataclasses.fields(TrainingArguments) if option.init}
RENAMED = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # new in 5.23


def test_every_option_is_in_one_of_the_tables():
    unknown = OPTIONS.keys() - HONOURED - WITHOUT_NEED.keys() - REFUSED.keys()
    assert unknown == set(), "new options of transformers: decide for each in training/trainer_options.py"


def test_every_option_in_the_tables_is_there():
    gone = (HONOURED | WITHOUT_NEED.keys() | REFUSED.keys()) - OPTIONS.keys() - RENAMED
    assert gone == set(), "options that transformers has no longer"


def test_asking_for_evaluation_by_steps_sets_do_eval(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, eval_strategy="epoch")
    assert args.do_eval is True, "do_eval is left as asked now: TrainArguments need not set it back"


def test_precision_is_taken_from_the_environment_of_accelerate(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert getattr(seen, "mixed_precision", os.environ["ACCELERATE_MIXED_PRECISION"]) == "bf16"


def test_the_parser_makes_a_flag_of_each_option_and_gives_back_what_it_does_not_know(tmp_path):
    parser = HfArgumentParser(TrainingArguments, allow_abbrev=False, add_help=False)
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--max_steps", "3", "--no_such_option", "1"]
    (args, rest) = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    assert args.max_steps == 3 and rest == ["--no_such_option", "1"]
    flags = {word[2:] for action in parser._actions for word in action.option_strings if word.startswith("--")}
    assert OPTIONS.keys() <= flags


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_a_schedule_is_made_of_a_name_an_optimizer_two_numbers_and_its_own_options(kind):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    own = {"cosine_with_min_lr": {"min_lr": 0.01}, "cosine_warmup_with_min_lr": {"min_lr": 0.01},
           "warmup_stable_decay": {"num_decay_steps": 2}}  # fmt: skip
    get_scheduler(kind, optimizer, 1, 10, scheduler_specific_kwargs=own.get(kind))
