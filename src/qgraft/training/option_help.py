"""The options of a training run as `qgraft train --help` shows them."""

import argparse
import dataclasses
import textwrap
from typing import Any

from qgraft.training.arguments import TrainArguments, option_parser
from qgraft.training.classification_options import ClassificationOptions
from qgraft.training.trainer_options import HONOURED, MOST_USED, inherited_options


def option_help(everything: bool = False) -> str:
    """The options for `qgraft train --help`: ours and the most used of transformers', or all with their full texts."""
    if everything:
        parser = option_parser()
        for action in parser._actions:
            if action.dest in inherited_options(TrainArguments).keys() - HONOURED:
                action.help = argparse.SUPPRESS
                continue
            action.option_strings = action.option_strings[:1]  # dashes are understood as well
            if action.choices is not None:
                action.help = f"{action.help} One of {', '.join(map(str, action.choices))}."
            action.metavar = None if action.nargs == 0 else "WORD" if action.choices is not None else "VALUE"
            if action.option_strings[0].startswith("--no_"):  # its own default says nothing
                action.help, action.default = f"Switches {action.dest} off, which is on by default.", argparse.SUPPRESS
        return parser.format_help().partition("\n\n")[2]
    defaults = {f.name: getattr(f.default, "value", f.default) for f in dataclasses.fields(TrainArguments)}
    own = {f.name: f.metadata["help"] for f in dataclasses.fields(TrainArguments) if f.name in _own_options()}
    lines = [_help_line(name, defaults[name], text) for name, text in own.items()]
    lines += ["", "From transformers' TrainingArguments, the most used (--help_all: the others):", ""]
    lines += [_help_line(name, defaults[name], text) for name, text in MOST_USED.items()]
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
