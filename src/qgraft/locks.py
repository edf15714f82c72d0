"""One process at a time writes to a place: a run's folder, the target of a merge.

A lock is a file beside the place (`.name.lock`), or `.lock` within a folder of a run or an adapter, that the kernel lets
one process hold (flock). It is gone with the process, however that ends, so a lock that nobody holds is taken over without
a word; pid and host in it are for the message alone. Within a process a thread holds it, as often as it asks. Where the
file system knows no locks, that is an error: two runs in one folder would delete each other's checkpoints. Not chosen: a
file that exists or not, which a kill leaves behind.
"""

import errno
import fcntl
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from qgraft import storage
from qgraft.errors import StorageError

_Owner = tuple[int, int]  # process and thread: a fork has all of its parent's variables and none of its locks
_held: dict[
    Path, tuple[_Owner, int]
] = {}  # by whom, and how often: a command holds what the function that it calls asks for


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Make `folder` if it is not there, and hold it within the block. It is taken away again where nothing came into it.

    What killed processes left of files that they were writing in it is removed.

    Raises StorageError where it cannot be made or another process holds it.
    """
    made = storage.make_folder(folder)
    try:
        with _locked(folder, folder / storage.LOCK):
            _remove_abandoned(folder)
            yield
    finally:
        if made:
            storage.remove_if_empty(folder)


@contextmanager
def file_locked(path: Path) -> Iterator[None]:
    """Hold `path`, a file or folder that is to be written whole, within the block. Raises StorageError."""
    storage.check_name(path)
    with _locked(path, path.with_name(f".{path.name}.lock")):
        yield


@contextmanager
def output_locked(path: Path) -> Iterator[None]:
    """Hold `path`, a file or folder that a command writes, within the block: no other command writes it, nor does a run.

    Where the folder above is missing, who writes there makes it or says so. Raises StorageError.
    """
    with (
        file_locked(path) if path.parent.is_dir() else nullcontext(),
        folder_locked(path) if path.is_dir() else nullcontext(),
    ):
        yield


@contextmanager
def _locked(place: Path, lock: Path) -> Iterator[None]:
    key, me = lock.resolve(), (os.getpid(), threading.get_ident())
    owner, times = _held.get(key, (me, 0))
    if owner[0] != me[0]:
        owner, times = me, 0
    if owner != me:
        raise _in_use(place, "another thread of this process")
    descriptor = None if times else _take(place, lock)
    _held[key] = me, times + 1
    try:
        yield
    finally:
        if descriptor is None:
            _held[key] = me, times
        else:
            del _held[key]
            with suppress(OSError):  # left behind it does no harm
                lock.unlink()  # while it is held: who opens it now finds it gone, and makes another
            os.close(descriptor)


def _take(place: Path, lock: Path) -> int:
    here = socket.gethostname()
    while True:
        with storage.named_errors(place):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").strip().partition(" ")
            os.close(descriptor)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise StorageError(
                    f"{place} cannot be locked: {error.strerror}", hint="choose a folder on a local disk"
                ) from error
            which = f", pid {pid}" + (f" on {host}" if host != here else "") if pid else ""
            raise _in_use(place, f"another process{which}") from error
        if _is_named(descriptor, lock):
            with suppress(OSError):  # on a full disk the lock holds, only nobody reads whose it is
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {here}\n".encode(), 0)
            return descriptor
        os.close(descriptor)  # its holder has just ended and removed it


def _in_use(place: Path, whom: str) -> StorageError:
    return StorageError(f"{place} is in use by {whom}", hint="wait until it has ended, or choose another name")


def _is_named(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except FileNotFoundError:
        return False


def _remove_abandoned(folder: Path) -> None:
    """Delete the temporary files and folders in `folder` that processes of this machine left which are no more."""
    for path in folder.glob(".*.tmp-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not _lives(int(pid)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        return True
    return True
