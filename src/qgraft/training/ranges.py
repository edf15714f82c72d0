"""Which numbers the options of a run may be (ranges.py says why); all that are wrong are named at once.

Some that torch takes teach nothing, or NaN: an epsilon of 0 divides 0 by 0 where a gradient is 0, as that of a LoRA's A is
in the first step.
"""

from collections.abc import Sequence
from typing import Any

from qgraft.errors import OptionError, option
from qgraft.ranges import ABOVE_0, AMOUNT, COUNT, LENGTH, RANK, SEED, SHARE, SHARE_ABOVE_0, TEMPERATURE, Range

RANGES = {
    "learning_rate": AMOUNT, "weight_decay": AMOUNT, "max_grad_norm": AMOUNT, "warmup_steps": AMOUNT,
    "adam_beta1": SHARE, "adam_beta2": SHARE, "adam_epsilon": ABOVE_0, "label_smoothing_factor": SHARE,
    "num_train_epochs": Range(-1, 1e9), "max_steps": Range(-1, 1e15, whole=True),  # of the two one counts, see below
    "per_device_train_batch_size": COUNT, "per_device_eval_batch_size": COUNT, "gradient_accumulation_steps": COUNT,
    "seed": SEED, "data_seed": SEED,
    "logging_steps": AMOUNT, "save_steps": AMOUNT, "eval_steps": AMOUNT, "eval_delay": AMOUNT,
    "early_stopping_patience": COUNT, "early_stopping_threshold": AMOUNT, "ddp_timeout": COUNT,
    "beta": AMOUNT, "label_smoothing": SHARE, "simpo_gamma": AMOUNT, "rpo_alpha": AMOUNT,
    "desirable_weight": AMOUNT, "undesirable_weight": AMOUNT,
    "kd_ratio": SHARE_ABOVE_0, "kd_temperature": Range(1e-2, 1e3), "loss_top_k": COUNT,
    "lmbda": Range(0, 1),
    "neftune_noise_alpha": AMOUNT, "loraplus_lr_ratio": ABOVE_0, "loraplus_lr_embedding": AMOUNT,
    "r": RANK, "lora_alpha": ABOVE_0, "lora_dropout": SHARE,
    "pre_seq_len": COUNT, "prefix_dropout": SHARE,
    "max_length": LENGTH, "max_tokens_per_pass": Range(0, 2**31 - 1, whole=True),
    **dict.fromkeys(("max_source_length", "max_target_length", "val_max_target_length"), Range(3, 2**31 - 1, whole=True)),
    **dict.fromkeys(("max_samples", "max_train_samples", "max_eval_samples", "max_predict_samples"), COUNT),
    "val_size": AMOUNT,
    "max_new_tokens": COUNT, "num_beams": COUNT, "temperature": TEMPERATURE, "top_p": SHARE_ABOVE_0,
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
            hint=f"{option(f'{zero[0]}_strategy', 'no')} asks for none",
        )
