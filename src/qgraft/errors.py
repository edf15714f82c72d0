"""The exceptions qgraft raises on purpose.

    QgraftError
    ├── CheckpointError      a model file is broken, hostile or not what it claims to be
    ├── UnsupportedError     a real file, but of an architecture, format or option that qgraft cannot serve
    ├── AdapterError         an adapter that does not fit: wrong base, missing tensors, other shapes, NaN
    ├── DataError            a dataset that cannot be read or holds nothing to learn from
    ├── OptionError          an option with an unknown name or an impossible value
    ├── InstallationError    parts of the installation that do not fit together: to be built or installed again
    ├── StorageError         a file that could not be written (disk full, no permission, folder not empty)
    ├── TrainingError        a run that must not go on (loss is NaN, no gradient anywhere)
    └── MergeError           a merge that would keep too little of what the adapter learned; nothing was changed

Every message names the thing, says what was got and what was expected, and may end in a `hint:`. The command line
prints these without a traceback; anything else that escapes is a bug of ours.
"""

import difflib
from collections.abc import Iterable


class QgraftError(Exception):
    """Base of all errors raised on purpose. `hint` is what the user can do about it, in one sentence."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(f"{message}\nhint: {hint}" if hint else message)


class CheckpointError(QgraftError):
    """A model file is broken, hostile or not what it claims to be."""


class UnsupportedError(QgraftError):
    """A real file, but of an architecture, format or option that qgraft cannot serve."""


class AdapterError(QgraftError):
    """An adapter that does not fit its base."""


class DataError(QgraftError):
    """A dataset that cannot be read or holds nothing to learn from."""


class OptionError(QgraftError):
    """An option with an unknown name or an impossible value."""


class InstallationError(QgraftError):
    """Parts of the installation that do not fit together."""


class StorageError(QgraftError):
    """A file that could not be written."""


class TrainingError(QgraftError):
    """A training run that must not go on."""


class MergeError(QgraftError):
    """A merge that would keep too little. `report` is what it measured (a MergeReport)."""

    def __init__(self, message: str, *, hint: str | None = None, report: object = None) -> None:
        super().__init__(message, hint=hint)
        self.report = report


def near_match(name: str, known: Iterable[str]) -> str | None:
    """The hint for an unknown `name`: the closest known names, or None when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else None
