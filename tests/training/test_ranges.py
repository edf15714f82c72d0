"""Numbers that options may be: each option with a number has a range, or a reason why it has none."""

import dataclasses
import math
from typing import Any, get_args, get_type_hints

import pytest

import qgraft
from qgraft.errors import OptionError
from qgraft.ranges import FINITE, TEMPERATURE, Range
from qgraft.training.ranges import RANGES

WITHOUT = {
    "save_total_limit": "any number: none and less than one keep all",
    "quantization_bit": "4 or 8, checked by name",
    "local_rank": "put back, a launcher says it", "dataloader_num_workers": "put back", "use_cache": "put back",
    "dataloader_prefetch_factor": "put back", "eval_accumulation_steps": "put back", "torch_empty_cache_steps": "put back",
    "ddp_bucket_cap_mb": "put back",
}  # fmt: skip
BESIDES = {"eval_steps": {"eval_strategy": "steps"}, "prefix_dropout": {"pre_seq_len": 3},
           "early_stopping_threshold": {"early_stopping_patience": 1}}  # fmt: skip


def arguments(**options: Any) -> qgraft.TrainArguments:
    return qgraft.TrainArguments(output_dir="none", use_cpu=True, val_size=options.pop("val_size", 2), **options)


def test_every_number_has_a_range() -> None:
    hints = get_type_hints(qgraft.TrainArguments)
    numbers = {
        field.name
        for field in dataclasses.fields(qgraft.TrainArguments)
        if field.init and {int, float} & {hints[field.name], *get_args(hints[field.name])}
    }
    assert numbers == {*RANGES, *WITHOUT} & numbers
    assert RANGES.keys() <= numbers


@pytest.mark.parametrize("name", RANGES)
def test_what_is_out_of_range_is_named(name: str) -> None:
    allowed = RANGES[name]
    outside = [allowed.least - 1, math.nan, math.inf, True]
    outside += [allowed.least] if "least" in allowed.open else []
    outside += [allowed.most] if "most" in allowed.open else []
    outside += [] if allowed.most == math.inf else [allowed.most + 1]
    outside += [allowed.least + 0.5] if allowed.whole else []
    for value in outside:
        with pytest.raises(OptionError, match=rf"{name}={value}: expected (0, or )?an? (whole )?number"):
            arguments(**{**BESIDES.get(name, {}), name: value})


@pytest.mark.parametrize(
    "options",
    [{"save_steps": 0}, {"num_train_epochs": 0}, {"val_size": 2.5}, {"adapter_name": "a.b"}, {"target_modules": ""}],
)
def test_what_makes_no_sense_with_the_others_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options)).replace("adapter_", "adapter ")):
        arguments(**options)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(OptionError, match=r"learning_rate=-1: .*; adam_beta1=2: .*; r=0: "):
        arguments(learning_rate=-1, adam_beta1=2, r=0)


def test_edges_belong_to_a_range() -> None:
    assert 0 in Range() and 0 not in Range(open="least") and 1e300 in Range()
    assert 0 in TEMPERATURE and 1e-300 not in TEMPERATURE and -1 not in TEMPERATURE
    assert str(TEMPERATURE) == "0, or a number from 1e-05 to 100000" and -math.inf not in FINITE and -1e300 in FINITE
    assert 1 not in Range(0, 1, open="most") and 1 in Range(0, 1) and 10**400 not in Range(most=5)
    arguments(learning_rate=0, max_grad_norm=0.0, warmup_steps=0.1, logging_steps=0.5, max_steps=0, lora_alpha=1e-3)
