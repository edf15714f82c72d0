"""The only place that writes files, so that a save is whole or absent.

    one file     write_file      temporary file beside it -> flush -> fsync -> rename -> fsync of the folder
                 write_chunks    the same for a file too large for memory, after asking whether the disk has room for it
    some files   publish_files   all of them are written and synced in a staging folder, then renamed one after another
    a folder     publish_folder  a staging folder is filled by anyone, then: fsync of every file, a manifest with the size
                                 and SHA-256 of each, and one rename; two where it replaces a folder
                 recover_folder  undoes the first of the two after a kill between them
    while a run  scratch_file    room for intermediate results, taken at once; it has no name, so nothing is ever left of it
    reading      check_folder    what in a folder differs from its manifest

rename() replaces a name in one step, but without fsync a power cut may leave the new name with none of the bytes; the
folder's own fsync makes the rename itself last. A process killed at any moment leaves either the old state or the new one,
and temporary names (`.name.tmp-<pid>`) that nothing reads. No portable call replaces a folder that is not empty, so the old
one is first renamed to `.name.old-<pid>`; killed right then, it is whole under that name, and recover_folder puts it back.
"""

import errno
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

from qgraft.errors import StorageError
from qgraft.json_files import OWN, covered_text, is_covered, json_text, read_object

MANIFEST = "manifest.json"
LOCK = ".lock"  # in a folder, while a process holds it (locks.py)
_FILES = "files"  # the staging folder of those that publish_files writes


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all. Raises StorageError."""
    with named_errors(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(path, [data])


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview], nbytes: int) -> None:
    """Write `chunks`, `nbytes` in all, one after another to `path`, whole or not at all, in a folder that exists.

    Temporary files that killed processes left of earlier attempts are removed, so two processes must not write the same
    path at once. Raises StorageError; where the disk has no room, before the first chunk is asked for.
    """
    with named_errors(path, nbytes):
        for abandoned in _beside(path, "tmp"):
            abandoned.unlink()
        require_room(path, nbytes)
        _write_whole(path, chunks)


def require_room(path: Path, nbytes: int) -> None:
    """Raise StorageError when the disk of `path`, whose folder exists, has no room for `nbytes`."""
    with named_errors(path, nbytes):
        if nbytes > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def free_bytes(path: Path) -> int:
    """Free bytes of the disk of `path`, or of the nearest folder above it that is there."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            if folder.exists():
                return shutil.disk_usage(folder).free
    return 0


def write_json(path: Path, value: Any) -> None:
    """Write `value` as json_text has it, in UTF-8, whole or not at all."""
    write_file(path, json_text(value).encode())


def append_line(path: Path, line: str) -> None:
    """Append one line to a log; a torn last line is the worst that a kill leaves."""
    with named_errors(path, len(line)), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Yield an empty staging folder beside `target`; when the block ends well, seal it and rename it to `target`.

    A `target` that exists is replaced. On an error nothing is left behind and `target` stays as it was. What killed
    processes left of earlier attempts is removed, so two processes must not publish the same target at once.
    """
    staging = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    with named_errors(target):
        recover_folder(target)
        for abandoned in _beside(target, "tmp", folders=True):
            shutil.rmtree(abandoned, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            yield staging
            _seal(staging)
            _replace_folder(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def publish_files(folder: Path, first: str) -> Iterator[Path]:
    """Yield an empty staging folder; when the block ends well, its files take their names in `folder`, `first` before all.

    On an error nothing in `folder` has changed. What killed processes left of earlier attempts is removed, so two processes
    must not write to the same folder at once. A kill between two of the renames leaves some files of now and some of
    before; when `first` holds checksums of the others, whoever reads them finds that out.
    """
    made = make_folder(folder)
    staging = folder / f".{_FILES}.tmp-{os.getpid()}"
    with named_errors(folder):
        for abandoned in _beside(folder / _FILES, "tmp", folders=True):
            shutil.rmtree(abandoned, ignore_errors=True)
        try:
            staging.mkdir()
            yield staging
            for name in sorted(os.listdir(staging), key=lambda name: name != first):
                os.replace(staging / name, folder / name)
            _sync_folder(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if made:
                remove_if_empty(folder)


class ScratchFile:
    """A file of intermediate results: any place of it can be written and read."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self.path, self._file = path, file

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write `data`, contiguous bytes, at `offset`. Raises StorageError."""
        with named_errors(self.path, data.nbytes):
            self._file.seek(offset)
            while data:
                data = data[self._file.write(data) :]

    def read_at(self, offset: int, into: memoryview) -> None:
        """Fill `into`, contiguous bytes, from `offset` on. Raises StorageError."""
        with named_errors(self.path):
            self._file.seek(offset)
            while into:
                count = self._file.readinto(into)
                if not count:
                    raise OSError(errno.EIO, "the file ends too early")
                into = into[count:]


@contextmanager
def scratch_file(path: Path, nbytes: int) -> Iterator[ScratchFile]:
    """Within the block there are `nbytes` of the disk of `path` to write and read; afterwards nothing is left of them.

    The room is taken before the block, so that a disk without it is found out now and not hours later. The file loses its
    name as soon as it is open, so a killed process leaves nothing; where an open file cannot (Windows), the next call
    removes what it left. Not mapped into memory: pages that are mapped count as memory of the process.

    Raises StorageError.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with named_errors(path, nbytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        for abandoned in _beside(path, "tmp"):
            abandoned.unlink()
        require_room(path, nbytes)
        file = FileIO(temporary, "w+")
    try:
        with file:
            with named_errors(path, nbytes):
                if os.name == "posix":
                    temporary.unlink()
                _take_room(file, nbytes)
            yield ScratchFile(path, file)
    finally:
        temporary.unlink(missing_ok=True)


def _take_room(file: FileIO, nbytes: int) -> None:
    """Make the file `nbytes` long, with room for all of them on the disk: a sparse file would run out of it later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return
    chunk = bytes(min(nbytes, 1 << 20))
    for start in range(0, nbytes, len(chunk)):
        file.write(chunk[: nbytes - start])


def recover_folder(target: Path) -> bool:
    """Whether `target` exists, once what publish_folder had moved away when its process was killed is put back."""
    retired = _beside(target, "old", folders=True)
    if retired and not target.exists():
        os.replace(retired.pop(), target)
        _sync_folder(target.parent)
    for folder in retired:
        shutil.rmtree(folder, ignore_errors=True)
    return target.exists()


def check_folder(folder: Path) -> list[str]:
    """What differs from the folder's manifest: missing files, other sizes or contents. An empty list means whole."""
    path = folder / MANIFEST
    if not path.is_file():
        return [f"{MANIFEST}: missing"]
    try:
        manifest = read_object(path, StorageError)
    except StorageError as error:
        return [error.message]
    listed, own = manifest.get("files"), manifest.get(OWN)
    if not isinstance(listed, dict):
        return [f"{MANIFEST}: `files` is not an object"]
    if len(manifest) > 1 and not is_covered(path.read_bytes().decode(), own):  # an earlier qgraft wrote `files` alone
        return [f"{MANIFEST}: changed since it was written"]
    return check_files(folder, listed)


def check_files(folder: Path, listed: dict[str, dict[str, Any]]) -> list[str]:
    """What differs from `listed` ({name: {"bytes": n, "sha256": hex}}) in `folder`."""
    problems = []
    for name, entry in listed.items():
        path = folder / name
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            problems.append(f"{name}: listed without its size and SHA-256")
        elif not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name}: got {path.stat().st_size} bytes, expected {entry['bytes']}")
        elif sha256(path) != entry["sha256"]:
            problems.append(f"{name}: SHA-256 differs from the one it was saved with")
    return problems


def describe_file(path: Path) -> dict[str, Any]:
    """The manifest entry of one file."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unlisted_files(folder: Path) -> list[str]:
    """The files in `folder` that its manifest does not list, all of them where it has none; relative names, sorted.

    A lock is none of them: nobody but who holds it goes on.
    """
    listed = {LOCK}
    with suppress(StorageError, KeyError, TypeError):
        listed |= {*read_object(folder / MANIFEST, StorageError)["files"], MANIFEST}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return sorted(found - listed)


def remove_folder(folder: Path) -> None:
    """Delete a folder: renamed first, so that a kill in the middle leaves no half of it under its name."""
    doomed = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    with named_errors(folder):
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def _write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _seal(folder: Path) -> None:
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    for path in paths:
        if path.is_dir():
            _sync_folder(path)
    entries = {path.relative_to(folder).as_posix(): describe_file(path) for path in files}
    write_file(folder / MANIFEST, covered_text({"files": entries}).encode())


def _replace_folder(staging: Path, target: Path) -> None:
    retired = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.replace(target, retired)
    try:
        os.replace(staging, target)
    except OSError:
        recover_folder(target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def _beside(target: Path, kind: str, *, folders: bool = False) -> list[Path]:
    """The files or folders of this kind ("tmp", "old") that some process put beside `target`, the oldest first."""
    found = target.parent.glob(f".{glob.escape(target.name)}.{kind}-*")
    return sorted((path for path in found if path.is_dir() == folders), key=lambda path: path.lstat().st_mtime)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows cannot open a folder; its rename is journaled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def named_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an OSError into a StorageError that says where, and where it is about room, what was needed and what is free.

    A path that no system takes, with a zero in it, is a ValueError, and said likewise.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        room = "" if needed is None else f", {needed} bytes to write"
        room += f", {free_bytes(path)} bytes free" if full else ""
        hint = "free some space or choose another folder" if full else None
        if error.errno == errno.EFBIG:
            hint = "a limit on the size of files: see ulimit -f, or choose a folder of another file system"
        no_folder = isinstance(error, FileExistsError)  # of mkdir()
        why = f"{error.filename} is a file, expected a folder" if no_folder else error.strerror or str(error)
        raise StorageError(f"cannot write {_without_staging(path)}: {why}{room}", hint=hint) from error
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise StorageError(f"cannot write {str(path)!r}: {error}", hint="choose another name") from error


def _without_staging(path: Path) -> Path:
    """The path under the names that its parts will have."""
    parts = [re.sub(r"^\.(.+)\.tmp-\d+$", r"\1", part) for part in path.parts if not part.startswith(f".{_FILES}.tmp-")]
    return Path(*parts)


def check_name(path: Path) -> None:
    """Raise StorageError for a name that is no UTF-8: what is written under it, safetensors and others could not read."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise StorageError(f"cannot write {path}: its name is no UTF-8", hint="choose another name") from error


def make_folder(folder: Path) -> bool:
    """Make `folder` and those above it; whether it was not there. Raises StorageError where it cannot be written to."""
    check_name(folder)
    with named_errors(folder):
        made = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return made


def remove_if_empty(folder: Path) -> None:
    """Take a folder away in which nothing is."""
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def child_log(path: Path) -> Iterator[IO[bytes]]:
    """A new log that a child process is given to write its output to; the only file of ours that comes piece by piece."""
    with named_errors(path), open(path, "wb") as file:
        yield file


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name, in one step. Raises StorageError where something has that name."""
    with named_errors(target):
        if target.exists():
            raise StorageError(f"{target} is there already", hint="choose another name")
        os.rename(source, target)
        _sync_folder(target.parent)
