"""What commands print, where it may not be read: nothing that is told is a reason to end a run or a merge.

A reader may go away (`qgraft train ... 2>&1 | head`, a terminal that hangs up), a log's disk may be full, a stream may be
closed, and an encoding may not have a character: rows and names of files hold any. So from the first error on a stream
leads nowhere, the command goes on to its end, and what an encoding does not have is written as \\u4f60. Results that could
not be written are an error then; that nobody wanted to read them is none.
"""

import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast


class Stream:
    """A standard stream that can always be written to; `lost` is the first error there was."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As in TextIO."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lead_nowhere(error)
        return len(text)

    def flush(self) -> None:
        """As in TextIO."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lead_nowhere(error)

    def _lead_nowhere(self, error: OSError) -> None:
        """Let what is buffered, and what comes, go to the null device."""
        self.lost = self.lost or error
        with suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


def make_lasting() -> None:
    """Put Streams in the places of this process's. Those that are closed lead nowhere: a file that is opened later must not
    get their numbers, under which libraries write."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (as long as the process)
        if stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, cast(TextIO, Stream(stream)))
    if sys.stdin is not None:  # what is no text in its encoding is said where it is read
        cast(Any, sys.stdin).reconfigure(errors="surrogateescape")


def finish(code: int) -> int:
    """The exit code of a command that ended with `code`: 2 where its results could not be written."""
    sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", None)
    if lost is None or lost.errno == errno.EPIPE or code:
        return code
    print(f"error: what was printed could not be written: {lost.strerror}", file=sys.stderr)
    return 2
