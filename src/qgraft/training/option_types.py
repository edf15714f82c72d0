"""What kind of value each option takes: looked at before anything else is, wherever the value came from.

A command line gives texts, and argparse makes numbers of them; YAML and JSON have kinds of their own, of which some are
read otherwise than meant (2e-4 is a text, `no` is false, 2024-01-01 a date); Python gives anything. All come through here:

    a number     also as a text that is one          a text     also as a path
    true, false  also as these two words             {...}      also as JSON
    names        a comma list, or a list of them     null       where it stands for "not said"

Anything else is refused, with all that is wrong at once. What transformers and torch do with a value of another kind is
their affair: `plot_loss: "off"` counts as true in Python, and a tuple in output_dir is an error of os.path.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from numbers import Integral, Real
from typing import Any, get_args, get_origin, get_type_hints

from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from qgraft.errors import OptionError, worded
from qgraft.json_files import parse_json
from qgraft.training.ranges import RANGES

NAMES = (  # comma lists
    *("dataset", "eval_dataset", "test_dataset"),
    *("target_modules", "target_parameters", "layers_to_transform", "trainable_token_indices", "labels"),
)
NUMBERS = ("layers_to_transform", "trainable_token_indices")  # of these, those of numbers
TEXTS = ("add_tokens", "add_special_tokens")  # lists of any texts, of which one may stand alone
_WORDS = {"true": True, "false": False}
_CHOICES = {"eval_strategy": IntervalStrategy}  # where the type says str alone


def settle_types(args: Any, refused: Iterable[str] = ()) -> None:
    """Give every option of `args`, a dataclass, a value of its type. Raises OptionError for all that have none.

    Args:
        refused: options that are an error whatever they are, said elsewhere.
    """
    wrong, kinds_of = {}, option_kinds(args.__class__)
    for field in dataclasses.fields(args):
        value = getattr(args, field.name, None)
        if not field.init or field.name in refused or value is field.default:
            continue
        kinds = kinds_of[field.name]
        try:
            setattr(args, field.name, _typed(field.name, value, kinds))
        except ValueError:
            wrong[field.name] = f"{field.name}={_shown(value)}: expected {_expected(field.name, kinds)}"
    if wrong:
        raise OptionError("; ".join(wrong.values()), hint=_hint(args, list(wrong)))


@cache
def option_kinds(options: Any) -> dict[str, frozenset[Any]]:
    """{option: the types that its value may have}; of list[str] it is list."""
    hints = get_type_hints(options)
    return {name: frozenset(_kind(each) for each in get_args(hint) or (hint,)) if get_origin(hint) not in (list, dict)
            else frozenset({get_origin(hint)}) for name, hint in hints.items()}  # fmt: skip


def _kind(hint: Any) -> Any:
    """The type of a value that one member of a Union allows."""
    origin = get_origin(hint)
    return hint if origin is None else origin if origin in (list, dict) else type(get_args(hint)[0])


def _typed(name: str, value: Any, kinds: frozenset[Any]) -> Any:
    """`value` as one of its kinds. Raises ValueError where it is none."""
    if value is False and name.endswith("_strategy"):
        return "no"  # which YAML takes for false
    if name in ("cuda_graphs", "keep_unpacked") and isinstance(value, bool):
        return ("yes" if name == "cuda_graphs" else "auto") if value else "no"  # likewise
    if name == "resume_from_checkpoint" and isinstance(value, bool):
        return str(value).lower()
    if name == "init_lora_weights" and value is True:
        return "true"
    if name in TEXTS and isinstance(value, str):
        return [value]
    if name in NAMES:
        value = _joined(name, value)
    if (value is None and type(None) in kinds) or Any in kinds:
        return value
    if bool in kinds and isinstance(value, bool):
        return value
    if isinstance(value, os.PathLike) and str in kinds:
        value = os.fspath(value)
    if isinstance(value, str):
        return _of_text(name, value, kinds)
    if isinstance(value, Mapping) and dict in kinds and all(isinstance(key, str) for key in value):
        return value
    if isinstance(value, list | tuple) and list in kinds and all(isinstance(each, str) for each in value):
        return list(value)
    if not isinstance(value, bool) and isinstance(value, Real) and kinds & {int, float}:
        return _number(value, kinds)
    raise ValueError


def _of_text(name: str, text: str, kinds: frozenset[Any]) -> Any:
    """What a text stands for."""
    for choice in _choices(name, kinds):
        choice(text)  # or a ValueError
    if dict in kinds and (name not in NAMES or text.lstrip().startswith("{")):
        value = parse_json(text)
        if not isinstance(value, dict):
            raise ValueError
        return value
    if str in kinds:
        return text
    if bool in kinds and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if not kinds & {int, float}:
        raise ValueError
    return float(text) if float in kinds else int(text)


def _choices(name: str, kinds: frozenset[Any]) -> list[type[Enum]]:
    """The lists of values of which a text must be one. Optimizers have more names, see settle_options."""
    known = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum) and kind is not OptimizerNames]
    return [*known, *([_CHOICES[name]] if name in _CHOICES else [])]


def _number(value: Real, kinds: frozenset[Any]) -> Any:
    """A number as Python's own, numpy's too. Raises ValueError for a fraction where whole ones are expected."""
    if isinstance(value, Integral):
        return int(value)
    if float not in kinds:
        raise ValueError
    return float(value)


def _joined(name: str, value: Any) -> Any:
    """A list of names as a comma list; one number as such a list, of layers."""
    if name in NUMBERS and isinstance(value, Integral) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, list | tuple | range):
        return value
    kinds = Integral if name in NUMBERS else str | os.PathLike
    parts = [str(os.fspath(each) if isinstance(each, os.PathLike) else each) for each in value
             if isinstance(each, kinds) and not isinstance(each, bool)]  # fmt: skip
    if len(parts) < len(value) or any("," in part for part in parts):
        raise ValueError
    return ",".join(parts)


def _expected(name: str, kinds: frozenset[Any]) -> str:
    named = [str(each.value) for choice in _choices(name, kinds) for each in choice]
    if named:
        return ", ".join(named[:-1]) + f" or {named[-1]}"
    if name == "layers_to_transform":
        return 'numbers of layers, such as "15-29" or [15, 16]'
    if name == "trainable_token_indices":
        return 'ids of tokens, such as "5,6" or [5, 6], or such lists by names of layers'
    if name in NAMES:
        return "names, as a comma list or a list of texts"
    if name in RANGES:
        return str(RANGES[name])
    said = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list of texts",
            dict: "{key: value}"}  # fmt: skip
    return " or ".join(text for kind, text in said.items() if kind in kinds)


def _shown(value: Any) -> str:
    """What was got, as the caller would write it."""
    if value is None or isinstance(value, bool):
        return worded(flags={None: "null", True: "true", False: "false"}[value], python=repr(value))
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def _hint(args: Any, wrong: list[str]) -> str | None:
    """What can be done about the first of them."""
    name, value = wrong[0], getattr(args, wrong[0])
    kinds = option_kinds(args.__class__)[name]
    if value is None:
        return f"leave {name} out: it has its default then"
    if name in NAMES[:3] and isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
        return f"{name} names files; rows themselves are given to train(model, tokenizer, rows, args)"
    if str in kinds and not isinstance(value, list | tuple | Mapping | bytes) and name != "layers_to_transform":
        return f"in quotes it is a text: {worded(flags=f'{name}: ', python=f'{name}=')}{str(value)[:80]!r}"
    return None
