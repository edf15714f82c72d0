"""Options that only something reads which is not asked for: none is dropped without a word, so each has a note."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qgraft.training.stages import distill_options, preference_options

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments


def unread(args: "TrainArguments") -> list[str]:
    """A note for each option that is given beside none of those that it goes with."""
    beside = {"early_stopping_patience": "early_stopping_threshold", "loraplus_lr_ratio": "loraplus_lr_embedding"}
    alone = {f"{name} is not given": [other] for name, other in beside.items() if getattr(args, name) is None}
    paired = preference_options(args)
    if paired is not None and not paired.labelled:
        alone["the answers of a pair are chosen and rejected"] = ["response_column"]
    return list(_without_effect(args, alone))


def unasked(args: "TrainArguments") -> list[str]:
    """The same of answers where these options ask for none; in Python another call may, with the same arguments."""
    taught, answers = distill_options(args), ["max_new_tokens", "num_beams", "do_sample", "temperature", "top_p"]
    if args.do_predict:
        return []
    drawn = (taught is not None and taught.draws) or (args.do_eval and args.predict_with_generate)
    missing = {"do_predict is not asked for": ["test_dataset", "max_predict_samples"]}
    if not drawn:
        missing["nothing is answered; do_predict does, and do_eval with predict_with_generate"] = answers
    return list(_without_effect(args, missing))


def unread_of_held_out(args: "TrainArguments", held_out: object) -> list[str]:
    """The same of rows that are held out where none are given: those of val_size are read with the rest."""
    if held_out is not None and held_out != "":
        return []
    names = ["max_eval_samples", *([] if args.do_predict else ["val_max_target_length"])]
    return list(_without_effect(args, {"eval_dataset is not given": names}))


def _without_effect(args: "TrainArguments", why: Mapping[str, Sequence[str]]) -> Iterator[str]:
    defaults = {each.name: each.default for each in dataclasses.fields(args)}
    for reason, names in why.items():
        yield from (f"{name} has no effect: {reason}" for name in names if getattr(args, name) != defaults[name])
