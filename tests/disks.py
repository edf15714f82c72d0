"""What the tests of saving share: disks that fill up or break."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qgraft import storage


class FullDisk:
    """A file on a disk with room for 60 000 bytes."""

    def __init__(self, path: Path, mode: str) -> None:
        self.file, self.left = open(path, mode), 60_000  # noqa: SIM115

    def __enter__(self) -> "FullDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        self.file.write(data[: self.left])
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """`with full_disk():` every file that storage writes lies on a FullDisk of its own."""

    @contextmanager
    def full() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "open", FullDisk, raising=False)
            yield

    return full


@pytest.fixture
def failing_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], AbstractContextManager[None]]:
    """`with failing_after("fsync", 3):` os.fsync works three times and then reports a broken disk."""

    @contextmanager
    def failing(operation: str, allowed: int) -> Iterator[None]:
        real, calls = getattr(os, operation), 0

        def counted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise OSError(5, "Input/output error")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, operation, counted)
            yield

    return failing
