"""The keys of one GGUF file, sorted by what the table of its architecture (gguf_keys.py) says of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

from qgraft.checkpoints.gguf_header import Header
from qgraft.checkpoints.gguf_key_parts import IGNORED, MUSTS, OTHER_GROUPS
from qgraft.checkpoints.gguf_keys import TABLE

Meaning = TypeVar("Meaning")


@dataclass(frozen=True)
class KeyReport:
    """The keys of one file: used; without effect, with the reason; refused, with what was expected; unknown."""

    used: dict[str, str] = field(default_factory=dict)
    without_effect: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def key_report(header: Header) -> KeyReport:
    """Sort the keys of a file whose architecture is in the table."""
    keys, report = TABLE[header.architecture], KeyReport()
    fields = keys.fields_of(header)
    for name, value in header.metadata.items():
        key = name.removeprefix(f"{header.architecture}.")
        if key == name:
            group = next((group for group in OTHER_GROUPS if name.startswith(group)), None)
            if group is None:
                report.unknown.append(name)
            else:
                report.without_effect[name] = OTHER_GROUPS[group]
        elif key in fields or key in keys.used:
            report.used[name] = fields.get(key) or keys.used[key]
        elif (must := _find(keys.musts, key)) or (not _find(keys.ignored, key) and (must := _find(MUSTS, key))):
            if must.holds(header, value):
                report.without_effect[name] = "says what is computed anyway"
            else:
                report.refused[name] = must.expected
        elif reason := _find(keys.ignored, key) or IGNORED.get(key):
            report.without_effect[name] = reason
        else:
            report.unknown.append(name)
    return report


def _find(table: Mapping[str, Meaning], key: str) -> Meaning | None:
    """What the table says of the key, by its name or by a name that ends in *."""
    if key in table:
        return table[key]
    return next((meaning for name, meaning in table.items() if name.endswith("*") and fnmatchcase(key, name)), None)
