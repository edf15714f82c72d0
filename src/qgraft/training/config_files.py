"""Configuration files and option=value words: what they say, as values of the types that options have."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

import yaml

from qgraft.errors import OptionError, near_match
from qgraft.json_files import parse_json
from qgraft.training.option_names import ALIASES, WITHOUT_EFFECT

MOST_VALUES = 10_000  # in a configuration file


def read_config(path: Path) -> dict[str, Any]:
    """{option: value} of a YAML or JSON file. Raises OptionError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        loaded = parse_json(text) if path.suffix == ".json" else yaml.load(text, _OncePerKey)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise OptionError(f"{path} cannot be read: {why}") from error
    _check_size(path, loaded)
    if not isinstance(loaded, dict):
        raise OptionError(f"{path}: got a {type(loaded).__name__}, expected option: value lines")
    if odd := [key for key in loaded if not isinstance(key, str)]:
        raise OptionError(f"{path}: got {odd[0]!r} as an option, expected a name")
    return loaded


def _check_size(path: Path, loaded: Any) -> None:
    """Raise OptionError for more values than any configuration has: in YAML an anchor that is named twice counts twice, so
    thirty lines may stand for more than fit anywhere, as soon as they are printed."""
    waiting, seen = [loaded], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise OptionError(f"{path}: got more than {MOST_VALUES:,} values, or one within itself")
        if isinstance(value, (dict, list, set, tuple)):
            waiting.extend(value.values() if isinstance(value, dict) else value)


class _OncePerKey(yaml.SafeLoader):
    """YAML in which no key stands twice, where PyYAML takes the last; as ever nothing but plain values."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping, or an error."""
        keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
        if twice := [key for key, count in Counter(keys).items() if count > 1]:
            raise yaml.YAMLError(f"{twice[0]!r} stands twice, in line {node.start_mark.line + 1} and after")
        return super().construct_mapping(node, deep)


def overrides(words: Sequence[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """{option: value} of option=value words. `hints` are the types of the options."""
    options = {}
    for word in words:
        key, equals, value = word.lstrip("-").partition("=")
        if not equals:
            raise OptionError(f"{word!r}: expected option=value after a configuration file")
        options[key] = _override(value, hints.get(ALIASES.get(key, key), Any))
    return options


def _override(text: str, wanted: Any) -> Any:
    """The value of option=text: what stands there, but for numbers, true and false, null and lists.

    `system=You are: a bot` is text, whatever YAML makes of a colon; so is everything that is given for an option of text.
    """
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if value is not None and set(get_args(wanted) or (wanted,)) <= {str, type(None)}:
        quoted = isinstance(value, str) and text[0] == text[-1] and text[0] in "'\""
        return value if quoted else text
    plain = value is None or isinstance(value, bool | int | float | list) or text.lstrip().startswith("{")
    return value if plain else text


def as_typed(name: str, value: Any, hint: Any) -> Any:
    """`value`, but for two things that YAML reads otherwise than meant: 2e-4 is a string, `save_strategy: no` is false."""
    if value is False and name.endswith("_strategy"):
        return "no"
    wanted = {hint, *get_args(hint)}
    if isinstance(value, float) and not math.isfinite(value):
        raise OptionError(f"{name}: got {value}, expected a finite number")
    if not isinstance(value, str) or str in wanted or not wanted & {int, float}:
        return value
    try:
        return float(value) if float in wanted else int(value)
    except ValueError:
        raise OptionError(f"{name}: got {value!r}, expected a number") from None


class Named(type):
    """Answers an option that there is not with the closest ones, in Python as on the command line."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        known = {f.name for f in dataclasses.fields(cast(Any, cls)) if f.init}
        for name in options:
            if name not in known:
                unknown_option(cls, name)
        return super().__call__(*args, **options)


def unknown_option(kind: Any, name: str) -> NoReturn:
    """Raise OptionError for an option that `kind`, a dataclass, does not have, with what it is called here or the closest.

    Files and flags are translated before they come here (option_names.py); Python's keywords are not.
    """
    if name in ALIASES:
        raise OptionError(f"unknown option {name!r}", hint=f"it is called {ALIASES[name]} here")
    if name in WITHOUT_EFFECT:
        raise OptionError(f"unknown option {name!r}", hint=f"leave it out: {WITHOUT_EFFECT[name]}")
    known = [f.name for f in dataclasses.fields(kind)] + [*ALIASES, *WITHOUT_EFFECT]
    hint = near_match(name, known) or "`qgraft train --help` lists the options"
    raise OptionError(f"unknown option {name!r}", hint=hint)
