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

Who reads a hint has either given flags or written Python, and is told what to give in those words: `option` names an
option of both, `worded` is for what the two call by different names. Which of them is spoken is a matter of the process:
`flags_spoken` surrounds the command line, everywhere else it is Python.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_flags = False


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


@contextmanager
def flags_spoken() -> Iterator[None]:
    """Within the block messages name options as the command line takes them."""
    global _flags
    before, _flags = _flags, True
    try:
        yield
    finally:
        _flags = before


def worded(*, flags: str, python: str) -> str:
    """What to tell the caller: `flags` on the command line, `python` elsewhere."""
    return flags if _flags else python


def option(name: str, value: object = True) -> str:
    """An option as the caller would write it: `--max_length 512` or `max_length=512`, `--force` or `force=True`."""
    flag = f"--{name}" if value is True else f"--{name} {str(value).lower() if isinstance(value, bool) else value}"
    return worded(flags=flag, python=f"{name}={value!r}")


def near_match(name: object, known: Iterable[str]) -> str | None:
    """The hint for an unknown `name`: the closest known names, by their letters in any case; None when nothing is close."""
    names = list(known)
    own = {each.lower(): each for each in names}
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
    close = close or [own[each] for each in difflib.get_close_matches(str(name).lower(), own, n=3, cutoff=0.6)]
    return f"did you mean {' or '.join(close)}?" if close else None
