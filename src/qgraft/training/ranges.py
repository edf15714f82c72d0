"""Which numbers an option may be. Looked at before anything is loaded; all that are wrong are named at once.

torch refuses some of them, each in its own words and after minutes; others it takes, and learns nothing or NaN: an epsilon of
0 divides 0 by 0 where a gradient is 0, as that of a LoRA's A is in the first step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from qgraft.errors import OptionError


@dataclass(frozen=True)
class Range:
    """From `least` to `most`; without them where they are `open`. Whole numbers only, if so."""

    least: float = 0
    most: float = math.inf
    open: str = ""  # "least", "most" or both
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number: Any = value  # compared as it is: no float holds every int
        above = number > self.least if "least" in self.open else number >= self.least
        below = number < self.most if "most" in self.open else number <= self.most
        return above and below and number < math.inf

    def __str__(self) -> str:
        number = "a whole number" if self.whole else "a number"
        least = f"above {self.least:g}" if "least" in self.open else f"from {self.least:g} on"
        if self.most == math.inf:
            return f"{number} {least}"
        if not self.open:
            return f"{number} from {self.least:g} to {self.most:.15g}"
        return f"{number} {least}, {'below' if 'most' in self.open else 'at most'} {self.most:.15g}"


_COUNT = Range(1, 2**31 - 1, whole=True)
_SEED = Range(0, 2**32 - 1, whole=True)
_SHARE = Range(0, 1, open="most")
_AMOUNT = Range()
_ABOVE_0 = Range(open="least")
RANGES = {
    "learning_rate": _AMOUNT, "weight_decay": _AMOUNT, "max_grad_norm": _AMOUNT, "warmup_steps": _AMOUNT,
    "adam_beta1": _SHARE, "adam_beta2": _SHARE, "adam_epsilon": _ABOVE_0, "label_smoothing_factor": _SHARE,
    "num_train_epochs": Range(-1, 1e9), "max_steps": Range(-1, 1e15, whole=True),  # of the two one counts, see below
    "per_device_train_batch_size": _COUNT, "per_device_eval_batch_size": _COUNT, "gradient_accumulation_steps": _COUNT,
    "seed": _SEED, "data_seed": _SEED,
    "logging_steps": _AMOUNT, "save_steps": _AMOUNT, "eval_steps": _AMOUNT, "eval_delay": _AMOUNT,
    "early_stopping_patience": _COUNT, "early_stopping_threshold": _AMOUNT, "ddp_timeout": _COUNT,
    "r": Range(1, 32768, whole=True), "lora_alpha": _ABOVE_0, "lora_dropout": _SHARE,
    "pre_seq_len": _COUNT, "prefix_dropout": _SHARE,
    "max_length": Range(2, 2**31 - 1, whole=True), "max_tokens_per_pass": Range(0, 2**31 - 1, whole=True),
    **dict.fromkeys(("max_source_length", "max_target_length", "val_max_target_length"), Range(3, 2**31 - 1, whole=True)),
    **dict.fromkeys(("max_samples", "max_train_samples", "max_eval_samples", "max_predict_samples"), _COUNT),
    "val_size": _AMOUNT,
    "max_new_tokens": _COUNT, "num_beams": _COUNT, "temperature": _AMOUNT, "top_p": Range(0, 1, open="least"),
}  # fmt: skip


def out_of_range(args: Any) -> list[str]:
    """A line for each option of `args` that is no number it may be; None stands for what is not given."""
    given = {name: getattr(args, name) for name in RANGES if getattr(args, name) is not None}
    wrong = [f"{name}={value}: expected {RANGES[name]}" for name, value in given.items() if value not in RANGES[name]]
    if wrong:
        return wrong
    if args.max_steps <= 0 and not args.num_train_epochs > 0:
        wrong.append(
            f"num_train_epochs={args.num_train_epochs}: expected a number above 0, where max_steps says nothing"
        )
    if args.val_size > 1 and args.val_size % 1:
        wrong.append(f"val_size={args.val_size}: expected a share below 1, or a whole number of rows")
    return wrong


def check_intervals(args: Any) -> None:
    """Raise OptionError for an interval of 0 steps that is to be counted."""
    kinds: Sequence[str] = ("logging", "save", "eval")
    zero = [kind for kind in kinds if getattr(args, f"{kind}_steps") == 0
            and getattr(getattr(args, f"{kind}_strategy"), "value", None) == "steps"]  # fmt: skip
    if zero:
        raise OptionError(
            "; ".join(f"{kind}_steps=0: expected a number above 0" for kind in zero),
            hint=f"{zero[0]}_strategy=no asks for none",
        )
