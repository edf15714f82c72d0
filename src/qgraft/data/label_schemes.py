"""What the labels of rows are to a model: ids, several of them, or a number.

    single_label_classification    "positive", 1, true      -> id of the name
    multi_label_classification     ["spam", "advert"]       -> a 0 or 1 for each label
    regression                     3.5                      -> the number

The names are those of the rows, in the order of transformers' examples: numbers by their size, texts by their letters. A
number is also a name, its text; so 0 and "0" are one label. What can be read in two ways is refused.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qgraft.data.labelled import Label
from qgraft.data.messages import Conversation
from qgraft.data.tokenizing import IGNORED
from qgraft.errors import DataError, near_match, option, worded

SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"
MOST_SHOWN = 12
FEW_ROWS = 20  # of which each may have a label of its own


@dataclass(frozen=True)
class LabelScheme:
    """Names of labels by their ids, and what a row has of them: problem_type, as in transformers; of tokens always one."""

    names: tuple[str, ...]
    problem_type: str = SINGLE

    def target(self, label: Label) -> list[float]:
        """What a text's label is to the model: [id], a 0 or 1 for each, or [number]. Raises DataError for an unknown one."""
        if self.problem_type == NUMBER:
            return [_number(label)]
        if self.problem_type == SEVERAL:
            chosen = {self.id_of(name) for name in names_of(label)}
            return [float(number in chosen) for number in range(len(self.names))]
        names = names_of(label)
        if len(names) != 1:
            raise DataError(f"problem_type {SINGLE}: a row has {len(names)} labels",
                            hint=f"a model loaded with {option('problem_type', SEVERAL)} learns them all")  # fmt: skip
        return [self.id_of(names[0])]

    def id_of(self, name: str) -> int:
        """The id of a label."""
        self.check([name])
        return self.names.index(self._own(name))

    def _own(self, name: str) -> str:
        """The name as the model has it: LABEL_0, LABEL_1, ... are what transformers calls labels without names."""
        return name if name in self.names or not name.isdecimal() else f"LABEL_{name}"

    def check(self, names: Iterable[str]) -> None:
        """Raise DataError for labels that the model does not tell apart."""
        if unknown := sorted({name for name in names if self._own(name) not in self.names}):
            known = ", ".join(self.names[:MOST_SHOWN]) + (", ..." if len(self.names) > MOST_SHOWN else "")
            raise DataError(
                f"labels that the model does not know: {', '.join(unknown[:MOST_SHOWN])}; it tells apart: {known}",
                hint=near_match(unknown[0], list(self.names))
                or "take these rows out; all labels are named "
                + worded(
                    flags="when an adapter is trained: qgraft train --labels a,b,c",
                    python="when the model is loaded: load(..., labels=['a', 'b', 'c'])",
                ),
            )


def names_of(label: Label) -> list[str]:
    """The names that a label of one text stands for."""
    if isinstance(label, dict):
        return [name for name, chosen in label.items() if chosen]
    if isinstance(label, list):
        return [_name(each) for each in label]
    return [_name(label)]


def has_label(label: Label) -> bool:
    """Whether a word has a label: -100 says that it has none, as everywhere in transformers and torch."""
    return _name(label) != str(IGNORED)


def _name(label: Label) -> str:
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():  # as tables write whole numbers beside missing ones
        return str(int(label))
    return str(label)


def scheme_of(
    rows: Sequence[Conversation], *, tokens: bool, problem_type: str | None = None, names: Sequence[str] | None = None
) -> LabelScheme:
    """The labels of these rows, or those that are given as `names`.

    Raises DataError for what can be read in two ways, or is no label of that kind.
    """
    labels = [row.label for row in rows]
    if tokens:
        found = {_name(each) for label in labels for each in _listed(label) if has_label(each)}
        if not found:
            raise DataError("no word has a label")
        return LabelScheme(tuple(names or _sorted(found)))
    kind = problem_type or _kind(labels, named=names is not None)
    if kind == NUMBER:
        for row in rows:
            _number(row.label)
        return LabelScheme(tuple(names or ("LABEL_0",)), NUMBER)
    if kind == SINGLE and any(isinstance(label, list | dict) and len(names_of(label)) != 1 for label in labels):
        raise DataError(f"problem_type {SINGLE}: rows have several labels, or none",
                        hint=f"{option('problem_type', SEVERAL)} learns them all")  # fmt: skip
    found = {name for label in labels for name in ([*label] if isinstance(label, dict) else names_of(label))}
    if names is None:
        _check(labels, found, kind)
    return LabelScheme(tuple(names or _sorted(found)), kind)


def _kind(labels: Sequence[Label], *, named: bool) -> str:
    """What the labels are; `named` says whether somebody told their names."""
    if any(isinstance(label, list | dict) for label in labels):
        return SEVERAL
    whole = {label for label in labels if isinstance(label, float) and label.is_integer()}
    if (
        not named
        and len(whole) > 2
        and all(isinstance(label, float) for label in labels)
        and len(set(labels)) == len(whole)
    ):
        raise DataError(f"labels are {', '.join(map(str, sorted(whole)[:3]))} ...: names of {len(whole)} kinds, or amounts",
                        hint=f"{option('problem_type', SINGLE)} tells them apart, {option('problem_type', NUMBER)} comes "
                        "close to them, as transformers' examples do with such columns")  # fmt: skip
    numbers = [label for label in labels if isinstance(label, float) and not label.is_integer()]
    if numbers and all(isinstance(label, int | float) for label in labels):
        return NUMBER
    if numbers or any(isinstance(label, str) and _is_fraction(label) for label in labels):
        raise DataError("labels are numbers with fractions in some rows, and texts",
                        hint=f"{option('problem_type', NUMBER)} learns numbers, {option('problem_type', SINGLE)} takes "
                        "each for a name")  # fmt: skip
    return SINGLE


def _check(labels: Sequence[Label], names: set[str], kind: str) -> None:
    if kind == SEVERAL:
        lists = [label for label in labels if isinstance(label, list)]
        if lists and len(lists) == len(labels) and len({len(label) for label in lists}) == 1 and names <= {"0", "1"}:
            raise DataError("labels are lists of 0 and 1, which may be ids, or say yes and no of each label",
                            hint='write the names of those that hold, or {"name": 0 or 1, ...}')  # fmt: skip
        if not names:
            raise DataError("no row has a label")
        return
    if len(names) < 2:
        raise DataError(f"all rows have the same label, {', '.join(names)}: there is nothing to tell apart",
                        hint=f"name all labels: {option('labels', 'a,b')}")  # fmt: skip
    if len(names) == len(labels) >= FEW_ROWS:
        raise DataError(f"each of the {len(labels)} rows has a label of its own: is this the column of the label?",
                        hint=f"{option('label_column', 'NAME')} names it")  # fmt: skip


def label_note(rows: Sequence[Conversation], scheme: LabelScheme, *, tokens: bool) -> str:
    """How often each label is there, most frequent first: what a reader of an accuracy must know."""
    if scheme.problem_type == NUMBER:
        values = [_number(row.label) for row in rows]
        return f"labels: numbers from {min(values):g} to {max(values):g}, {sum(values) / len(values):.3g} in the mean"
    each = (
        [_name(tag) for tag in _listed(row.label) if has_label(tag)] if tokens else names_of(row.label) for row in rows
    )
    counts = Counter(name for names in each for name in names)
    shown = ", ".join(f"{name} {count}" for name, count in counts.most_common(MOST_SHOWN))
    return f"{len(scheme.names)} labels: {shown}" + (", ..." if len(counts) > MOST_SHOWN else "")


def _sorted(names: set[str]) -> tuple[str, ...]:
    """By size where all are whole numbers, else by letters."""
    whole = all(name.removeprefix("-").isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name)) if whole else sorted(names))


def _listed(label: Label) -> list[Label]:
    assert isinstance(label, list)  # data.labelled.read_tagged
    return label


def _number(label: Label) -> float:
    """A number, also of a text that is one. Raises DataError."""
    try:
        value = float(label) if isinstance(label, str | int | float) and not isinstance(label, bool) else math.nan
    except (ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"problem_type {NUMBER}: the label {str(label)[:40]!r} is no number")
    return value


def _is_fraction(text: str) -> bool:
    try:
        return not float(text).is_integer()
    except (ValueError, OverflowError):
        return False
