"""The options of a training run as `qgraft train --help` shows them."""

import argparse
import dataclasses
import textwrap
from collections.abc import Collection, Mapping
from typing import Any

from qgraft.training.arguments import TrainArguments, option_parser
from qgraft.training.classification_options import ClassificationOptions
from qgraft.training.trainer_options import HONOURED, MOST_USED, inherited_options


def option_help(everything: bool = False) -> str:
    """The options for `qgraft train --help`: ours and the most used of transformers', or all with their full texts."""
    return full_help(TrainArguments) if everything else short_help(TrainArguments, _own_options(), MOST_USED)


def full_help(kind: type[TrainArguments], left_out: Collection[str] = ()) -> str:
    """All options of a kind with their full texts, but for those without effect and those left out."""
    parser = option_parser(kind)
    for action in parser._actions:
        if action.dest in {*(inherited_options(TrainArguments).keys() - HONOURED), *left_out}:
            action.help = argparse.SUPPRESS
            continue
        action.option_strings = action.option_strings[:1]  # dashes are understood as well
        if action.choices is not None:
            action.help = f"{action.help} One of {', '.join(map(str, action.choices))}."
        action.metavar = None if action.nargs == 0 else "WORD" if action.choices is not None else "VALUE"
        if action.option_strings[0].startswith("--no_"):  # its own default says nothing
            action.help, action.default = f"Switches {action.dest} off, which is on by default.", argparse.SUPPRESS
    return parser.format_help().partition("\n\n")[2]


def short_help(kind: type[TrainArguments], own: Collection[str], inherited: Mapping[str, str]) -> str:
    """These options of a kind, and those of transformers' that are used most, with these texts."""
    fields = dataclasses.fields(kind)
    defaults = {f.name: getattr(f.default, "value", f.default) for f in fields}
    lines = [_help_line(f.name, defaults[f.name], f.metadata["help"]) for f in fields if f.name in own]
    lines += ["", "From transformers' TrainingArguments, the most used (--help_all: the others):", ""]
    lines += [_help_line(name, defaults[name], text) for name, text in inherited.items()]
    return "\n".join(lines) + "\n"


def _own_options() -> set[str]:
    """Names of the options that TrainArguments adds, or gives another default."""
    own = {*TrainArguments.__annotations__, *ClassificationOptions.__annotations__}
    return own - {"remove_unused_columns"}


def _help_line(name: str, default: Any, text: str) -> str:
    shown = "" if default in (None, False, "") else f" {default}"
    column = 36
    head, lines = f"  --{name}{shown}".ljust(column), textwrap.wrap(text, 80 - column, break_on_hyphens=False)
    if not head.endswith(" "):
        head += "\n" + " " * column
    return head + ("\n" + " " * column).join(lines)
