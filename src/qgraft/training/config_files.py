"""Configuration files and the words behind them: what they say. option_types.py says what kind of value an option takes."""

import dataclasses
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml

from qgraft.errors import OptionError, near_match, worded
from qgraft.json_files import parse_json
from qgraft.training.option_names import ALIASES, NOT_THERE, WITHOUT_EFFECT
from qgraft.training.option_types import NAMES

CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
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


def overrides(words: Sequence[str], kinds: Mapping[str, frozenset[Any]]) -> dict[str, Any]:
    """{option: value} of option=value words and of flags. `kinds` are the types that the options' values may have.

    Both are taken behind a configuration file: --flag=value, --flag value, and --flag alone for true. A word behind a flag is
    its value, but for another flag, and for option=value of an option that there is.
    """
    options: dict[str, Any] = {}
    waiting: str | None = None  # a flag whose value may come
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_") if word.startswith("--") else name
        known = ALIASES.get(name, name) in kinds or name in WITHOUT_EFFECT
        if waiting is not None and not word.startswith("--") and not (equals and known):
            options[waiting] = _override(word, waiting, kinds)
            waiting = None
            continue
        waiting = None
        if equals:
            options[name] = _override(value, name, kinds)
        elif not word.startswith("--"):
            raise OptionError(f"{word!r}: expected option=value, or a flag, after a configuration file")
        elif (
            (plain := name.removeprefix("no_")) != name
            and not known
            and bool in kinds.get(ALIASES.get(plain, plain), ())
        ):
            options[plain] = False
        else:
            options[name], waiting = True, name
    return options


def _override(text: str, option: str, kinds: Mapping[str, frozenset[Any]]) -> Any:
    """The value of option=text: what stands there, but for numbers, true and false, null and lists.

    `system=You are: a bot` is text, whatever YAML makes of a colon; so is everything that is given for an option of text.
    """
    name = ALIASES.get(option, option)
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if name in NAMES and isinstance(value, list):
        return value
    if value is not None and kinds.get(name, frozenset({Any})) <= {str, type(None)}:
        quoted = isinstance(value, str) and text[0] == text[-1] and text[0] in "'\""
        return value if quoted else text
    plain = value is None or isinstance(value, bool | int | float | list) or text.lstrip().startswith("{")
    return value if plain else text


class Named(type):
    """Answers an option that there is not with the closest ones, in Python as on the command line."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        known = {f.name for f in dataclasses.fields(cast(Any, cls)) if f.init}
        for name in options:
            if name not in known:
                unknown_option(cls, name, translated=False)
        return super().__call__(*args, **options)


def unknown_option(kind: Any, name: str, *, translated: bool = True) -> NoReturn:
    """Raise OptionError for an option that `kind`, a dataclass, does not have, with what it is called here or the closest.

    Args:
        translated: whether names of other tools would have been: those of files and flags are (option_names.py), Python's
            keywords are not.
    """
    if name in ALIASES:
        raise OptionError(f"unknown option {name!r}", hint=f"it is called {ALIASES[name]} here")
    if name in WITHOUT_EFFECT:
        raise OptionError(f"unknown option {name!r}", hint=f"leave it out: {WITHOUT_EFFECT[name]}")
    if name in NOT_THERE:
        raise OptionError(f"unknown option {name!r}", hint=NOT_THERE[name])
    known = [field.name for field in dataclasses.fields(kind)] + [*ALIASES, *WITHOUT_EFFECT] * translated
    listed = worded(flags=f"`qgraft {kind.command} --help`", python=f"help({kind.public_name})") + " lists the options"
    raise OptionError(f"unknown option {name!r}", hint=near_match(name, known) or listed)


def stray_word(kind: Any, words: Sequence[str]) -> NoReturn:
    """Raise OptionError for the first of these words among flags, which is neither one nor the value of one."""
    word = words[0]
    name, _, value = word.lstrip("-").partition("=")
    if word.startswith("--"):
        unknown_option(kind, name)
    own = {ALIASES.get(each, each) for each in (name, name.replace("-", "_"))} & {
        f.name for f in dataclasses.fields(kind)
    }
    if own:
        value = value or next(iter(words[1:]), "VALUE")
        raise OptionError(f"{word!r}: expected a flag", hint=f"--{own.pop()} {shlex.quote(value)}")
    if Path(word).suffix in CONFIG_SUFFIXES:
        raise OptionError(
            f"{word!r} stands behind flags", hint=f"qgraft train {word} ...: a configuration file comes first"
        )
    raise OptionError(f"{word!r}: expected a flag, or the value of one", hint="a value with blanks needs quotes")
