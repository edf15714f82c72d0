"""What a caller gave that is of another kind than is asked for, in words: Python hands over anything."""

import os
from pathlib import Path
from typing import Any

from qgraft.errors import OptionError


def described(value: Any) -> str:
    """A value for a message: its kind, and what it is where that is short."""
    if value is None or isinstance(value, bool):
        return repr(value)
    text = repr(value) if isinstance(value, str | bytes | int | float | os.PathLike) else ""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeioAEIO' else 'a'} {kind}" + (f" ({text})" if 0 < len(text) <= 60 else "")


def path_given(name: str, value: Any) -> Path:
    """The path that a text or a Path is. Raises OptionError, which names the parameter, for anything else."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str) or not os.fspath(value):
        raise OptionError(f"{name}: got {described(value)}, expected a path", hint="a text or a pathlib.Path")
    return Path(value)
