"""storage: killed at any operation, a save leaves the old state or the new one, and nothing that anything would read."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qgraft import storage
from qgraft.errors import StorageError
from qgraft.locks import file_locked
from qgraft.storage import (
    MANIFEST,
    check_files,
    check_folder,
    publish_files,
    publish_folder,
    remove_folder,
    unlisted_files,
    write_chunks,
    write_file,
    write_json,
)

OLD, NEW = {"a.bin": b"old " * 3000, "sub/b.txt": b"old"}, {"a.bin": b"new!" * 3000, "c.txt": b"new"}


def publish(target: Path, contents: dict[str, bytes]) -> None:
    with publish_folder(target) as staging:
        for name, data in contents.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but its manifest."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Failing:
    """Operations of `os` and `open` that work `left` times, all together, and then raise `error` for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int, error: OSError) -> None:
        self.left, self.error = left, error
        for name in ("replace", "fsync"):
            monkeypatch.setattr(os, name, self.guard(getattr(os, name)))
        monkeypatch.setattr(storage, "open", self.guard(open), raising=False)

    def guard(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise self.error
            return function(*args, **options)

        return guarded


def test_errors_name_what_the_file_would_be_called(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError, match=r"cannot write .*/file/x: .*/file is a file, expected a folder, 3 bytes to write"
    ):
        write_file(tmp_path / "file" / "x", b"abc")
    with (
        pytest.raises(StorageError, match=rf"^cannot write {tmp_path}/out/inner/a: File name too long"),
        publish_folder(tmp_path / "out") as staging,
        publish_files(staging / "inner", first="b") as files,
        storage.named_errors(files / "a"),
    ):
        raise OSError(errno.ENAMETOOLONG, "File name too long")
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("left", range(4))
def test_publish_files_changes_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    def publish_both(text: str) -> None:
        with publish_files(tmp_path / "out", first="b") as staging:
            for name in "ab":
                write_file(staging / name, f"{text} {name}".encode())

    publish_both("old")
    dead = tmp_path / "out" / ".files.tmp-999999999"
    dead.mkdir()
    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
        Failing(patch, left, OSError(errno.ENOSPC, "No space left on device"))
        publish_both("new")
    assert contents(tmp_path / "out") == {"a": b"old a", "b": b"old b"} and not dead.exists()
    publish_both("new")
    assert contents(tmp_path / "out") == {"a": b"new a", "b": b"new b"}
    with pytest.raises(ValueError, match="oh"), publish_files(tmp_path / "none", first="b"):
        raise ValueError("oh")
    assert names(tmp_path) == {"out"}


def test_write_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.bin"
    write_file(path, b"one")
    write_file(path, b"two")
    write_file(path, b"")
    assert path.read_bytes() == b""
    assert names(path.parent) == {"file.bin"}
    write_json(path, {"数": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"数": [1, None]}
    assert "数" in path.read_text(encoding="utf-8")


def test_append_line(tmp_path: Path) -> None:
    for line in ("one", "数"):
        storage.append_line(tmp_path / "log.jsonl", line)
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == "one\n数\n"
    with pytest.raises(StorageError, match=r"cannot write .*no-folder"):
        storage.append_line(tmp_path / "no-folder" / "log.jsonl", "x")


def test_write_file_that_fails_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    outcomes = []
    for calls in range(10):
        write_file(path, b"old")
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, calls, OSError(errno.EIO, "Input/output error"))
            message = None
            try:
                write_file(path, b"new")
            except StorageError as error:
                message = error.message
        failed = message is not None
        assert message is None or message.startswith(f"cannot write {path}: Input/output error")
        outcomes.append((path.read_bytes(), failed))
        assert names(tmp_path) == {"file.bin"}
        if not failed:
            break
    # open, fsync and replace come before the new name is there; a failing fsync of the folder comes after
    assert outcomes == [(b"old", True)] * 3 + [(b"new", True), (b"new", False)]


def test_write_that_stops_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.bin"
    write_file(path, b"old")

    class FullDisk:
        def __init__(self, path: Path, mode: str) -> None:
            self.file = open(path, mode)  # noqa: SIM115

        def __enter__(self) -> "FullDisk":
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "open", FullDisk, raising=False)
    with pytest.raises(StorageError) as caught:
        write_file(path, b"x" * 1000)
    free = shutil.disk_usage(tmp_path).free
    assert f"cannot write {path}: No space left on device, 1000 bytes to write, " in caught.value.message
    said = int(caught.value.message.rsplit(", ", 1)[1].removesuffix(" bytes free"))
    assert abs(said - free) < 2**30
    assert caught.value.hint == "free some space or choose another folder"
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file.bin"}


def test_write_chunks(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    for name in (".large.bin.tmp-1", ".large.bin.tmp-99999999", ".larger.bin.tmp-1", "large.bin"):
        (tmp_path / name).write_bytes(b"left by a killed process")
    write_chunks(path, (bytes([i]) * 3 for i in range(3)), 9)
    assert path.read_bytes() == b"\0\0\0\1\1\1\2\2\2"
    assert names(tmp_path) == {"large.bin", ".larger.bin.tmp-1"}
    write_chunks(path, [memoryview(b"view"), b""], 4)
    assert path.read_bytes() == b"view"
    with pytest.raises(StorageError, match=r"cannot write .*no-folder.*, 4 bytes to write"):
        write_chunks(tmp_path / "no-folder" / "x", [b"view"], 4)
    assert not (tmp_path / "no-folder").exists()


def test_a_limit_on_the_size_of_files_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="File too large") as caught, storage.named_errors(tmp_path / "file.bin"):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    assert "ulimit -f" in str(caught.value.hint)


def test_chunks_that_fail_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(b"old")

    def chunks() -> Iterator[bytes]:
        yield b"new"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_chunks(path, chunks(), 6)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"large.bin"}


def test_room_is_asked_for_before_the_first_chunk(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    storage.require_room(tmp_path / "large.bin", free // 2)
    needed = 2 * free + 1

    def chunks() -> Iterator[bytes]:
        pytest.fail("asked for a chunk")
        yield b""

    for write in (lambda path: write_chunks(path, chunks(), needed), lambda path: storage.require_room(path, needed)):
        with pytest.raises(StorageError, match=rf"No space left on device, {needed} bytes to write, \d+ bytes free"):
            write(tmp_path / "large.bin")
    assert names(tmp_path) == set()


def test_unlisted_files(tmp_path: Path) -> None:
    assert unlisted_files(tmp_path / "absent") == []
    publish(tmp_path / "run", OLD)
    assert unlisted_files(tmp_path / "run") == []
    (tmp_path / "run" / "sub" / "mine").write_text("")
    assert unlisted_files(tmp_path / "run") == ["sub/mine"]
    (tmp_path / "run" / MANIFEST).write_text("{")
    assert unlisted_files(tmp_path / "run") == ["a.bin", "manifest.json", "sub/b.txt", "sub/mine"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_while_publishing(tmp_path: Path, number: int) -> None:
    target = tmp_path / "run"
    publish(target, OLD)
    with pytest.raises(StorageError) as caught, publish_folder(target) as staging:
        (staging / "a.bin").write_bytes(b"new")
        raise OSError(number, "full")
    assert str(target) in caught.value.message
    assert "bytes free" in caught.value.message
    assert caught.value.hint is not None
    assert contents(target) == OLD
    assert names(tmp_path) == {"run"}


def test_full_disk_in_a_folder_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, 0, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(StorageError, match=r"3 bytes to write, \d+ bytes free"):
        write_file(tmp_path / "deep" / "er" / "file", b"abc")


def test_published_folder_is_sealed(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"
    publish(target, OLD)
    assert contents(target) == OLD
    assert check_folder(target) == []
    manifest = json.loads((target / MANIFEST).read_text())
    assert set(manifest["files"]) == set(OLD)
    publish(target, NEW)
    assert contents(target) == NEW
    assert check_folder(target) == []
    assert names(target.parent) == {"run"}


@pytest.mark.parametrize("bits", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_every_bit_that_flips_in_a_manifest_is_seen(tmp_path: Path, bits: int) -> None:
    """One bit of each byte, another one in each, or all of them."""
    publish(tmp_path / "run", OLD)
    manifest = tmp_path / "run" / MANIFEST
    whole = manifest.read_bytes()
    for at, bit in [(at, (at + more) % 8) for at in range(len(whole)) for more in range(bits)]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << bit
        manifest.write_bytes(flipped)
        assert check_folder(tmp_path / "run"), f"byte {at}, bit {bit}"


def test_a_manifest_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    publish(tmp_path / "run", OLD)
    manifest = tmp_path / "run" / MANIFEST
    manifest.write_text(json.dumps({"files": json.loads(manifest.read_text())["files"]}))
    assert check_folder(tmp_path / "run") == []


def test_an_error_in_the_block_is_passed_on(tmp_path: Path) -> None:
    target = tmp_path / "run"
    publish(target, OLD)
    with pytest.raises(ZeroDivisionError), publish_folder(target) as staging:
        (staging / "a.bin").write_bytes(b"new")
        _ = 1 / 0
    assert contents(target) == OLD
    assert names(tmp_path) == {"run"}


@pytest.mark.parametrize("before", [True, False])
def test_publishing_that_fails_leaves_old_or_new(tmp_path: Path, before: bool) -> None:
    outcomes = []
    for calls in range(40):
        target = tmp_path / f"{calls}" / "run"
        if before:
            publish(target, OLD)
        with pytest.MonkeyPatch.context() as patch:
            Failing(patch, calls, OSError(errno.EIO, "Input/output error"))
            try:
                publish(target, NEW)
                failed = False
            except StorageError:
                failed = True
        state = contents(target) if storage.recover_folder(target) else None
        assert state in ((OLD, NEW) if before else (None, NEW))
        assert state is None or check_folder(target) == []
        assert names(target.parent) == ({"run"} if state else set())
        outcomes.append(state)
        if not failed:
            break
    assert not failed
    assert outcomes[0] == (OLD if before else None)
    assert outcomes[-1] == NEW


KILLED = textwrap.dedent("""
    import os, shutil, sys
    from pathlib import Path
    from qgraft import storage

    left, what, target = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])

    def guard(function):
        def guarded(*args, **options):
            global left
            left -= 1
            if left < 0:
                os._exit(9)
            return function(*args, **options)
        return guarded

    for name in ("replace", "rename", "fsync", "open", "unlink", "rmdir", "mkdir", "write"):
        setattr(os, name, guard(getattr(os, name)))
    storage.open = guard(open)
    if what == "file":
        storage.write_file(target, b"new")
    elif what == "remove":
        storage.remove_folder(target)
    else:
        with storage.publish_folder(target) as staging:
            (staging / "a.bin").write_bytes(b"new!" * 3000)
            (staging / "c.txt").write_bytes(b"new")
""")


def killed_after(calls: int, what: str, target: Path, script: Path) -> bool:
    """Whether the process was killed before it was done."""
    command = [sys.executable, "-S", str(script), str(calls), what, str(target)]
    source = Path(storage.__file__).parents[1]
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(source)}, check=False).returncode
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("what", ["file", "folder", "remove"])
def test_killed_at_any_operation(tmp_path: Path, what: str) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    seen = []
    for calls in range(60):
        target = tmp_path / f"{calls}" / "target"
        if what == "file":
            write_file(target, b"old")
        else:
            publish(target, OLD)
        killed = killed_after(calls, what, target, script)
        state: Any = None
        if target.exists():
            state = target.read_bytes() if what == "file" else contents(target)
        allowed = {"file": [b"old", b"new"], "folder": [OLD, NEW], "remove": [OLD, None]}[what]
        if state is None and what == "folder":  # between two renames: the old state is whole under a name that is kept
            recovered = storage.recover_folder(target)
            assert recovered
            state = contents(target)
        assert state in allowed, f"neither old nor new after {calls} operations"
        assert what == "file" or state is None or check_folder(target) == []
        others = names(target.parent) - {"target"}
        assert all(name.startswith((".target.tmp-", ".target.old-")) for name in others)
        seen.append(state)
        if not killed:
            break
    assert not killed
    assert len(seen) > 3
    assert seen[0] == allowed[0]
    assert seen[-1] == allowed[1]
    assert others == set()


def test_a_killed_save_is_cleaned_by_the_next(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    target = tmp_path / "runs" / "target"
    publish(target, OLD)
    calls = 0
    while target.exists():  # until the kill falls between the two renames
        assert killed_after(calls, "folder", target, script)
        calls += 1
    assert any(name.startswith(".target.old-") for name in names(target.parent))
    assert any(name.startswith(".target.tmp-") for name in names(target.parent))
    publish(target, NEW)
    assert names(target.parent) == {"target"}
    assert contents(target) == NEW


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda f: (f / "a.bin").write_bytes(b"old!" * 3000), "a.bin: SHA-256 differs from the one it was saved with"),
        (lambda f: (f / "a.bin").write_bytes(b"old"), "a.bin: got 3 bytes, expected 12000"),
        (lambda f: (f / "sub" / "b.txt").unlink(), "sub/b.txt: missing"),
        (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST}: missing"),
        (lambda f: (f / MANIFEST).write_text("{"), f"{MANIFEST} is not JSON"),
        (lambda f: (f / MANIFEST).write_text("[]"), f"{MANIFEST}: got a JSON list"),
        (lambda f: (f / MANIFEST).write_text('{"files": [1]}'), f"{MANIFEST}: `files` is not an object"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"a.bin": {}}}'), "a.bin: listed without"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"a.bin": 1}}'), "a.bin: listed without"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"../x": {"bytes": 1, "sha256": ""}}}'), "../x: "),
        (shutil.rmtree, f"{MANIFEST}: missing"),
    ],
)
def test_tampering_is_noticed(tmp_path: Path, spoil: Callable[[Path], Any], problem: str) -> None:
    target = tmp_path / "run"
    publish(target, OLD)
    spoil(target)
    (found,) = check_folder(target)
    assert found.removeprefix(f"{target}/").startswith(problem)


def test_every_difference_is_listed(tmp_path: Path) -> None:
    publish(tmp_path / "run", OLD)
    (tmp_path / "run" / "a.bin").unlink()
    (tmp_path / "run" / "sub" / "b.txt").write_bytes(b"ODD")
    assert [line.split(":")[0] for line in check_folder(tmp_path / "run")] == ["a.bin", "sub/b.txt"]
    assert check_files(tmp_path, {}) == []


def test_remove_folder(tmp_path: Path) -> None:
    publish(tmp_path / "run", OLD)
    remove_folder(tmp_path / "run")
    assert names(tmp_path) == set()
    with pytest.raises(StorageError, match=r"cannot write .*run: No such file"):
        remove_folder(tmp_path / "run")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_permission_denied(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        write_file(tmp_path / "mine" / "file", b"x")


def test_permission_denied_by_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, 0, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(StorageError) as caught:
        write_file(tmp_path / "file", b"x")
    assert caught.value.message.startswith(f"cannot write {tmp_path / 'file'}: Permission denied, 1 bytes to write")
    assert caught.value.hint is None
    assert names(tmp_path) == set()


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(StorageError, match="cannot write"):
        write_file(tmp_path / "file" / "below", b"x")
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_free_bytes_are_asked_of_a_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or SimpleNamespace(free=7))
    Failing(monkeypatch, 0, OSError(errno.ENOSPC, "full"))
    with pytest.raises(StorageError, match="7 bytes free"):
        write_file(tmp_path / "a" / "b", b"")
    assert asked[0].exists()


@pytest.mark.parametrize("fallocate", [True, False])
def test_a_scratch_file_is_written_and_read_anywhere_and_never_seen(tmp_path, monkeypatch, fallocate):
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    for name in (".states.tmp-1", ".states.tmp-99999999", ".states2.tmp-1"):
        (tmp_path / name).write_bytes(b"left by a killed process")
    with storage.scratch_file(tmp_path / "states", 3 << 20) as file:
        assert names(tmp_path) == {".states2.tmp-1"}
        file.write_at((3 << 20) - 3, memoryview(b"end"))
        file.write_at(5, memoryview(b"begin"))
        into = bytearray(8)
        file.read_at((3 << 20) - 8, memoryview(into))
        assert into == b"\0\0\0\0\0end"
        file.read_at(4, memoryview(into))
        assert into == b"\0begin\0\0"
        with pytest.raises(StorageError, match="states: the file ends too early"):
            file.read_at((3 << 20) - 4, memoryview(into))
    assert names(tmp_path) == {".states2.tmp-1"}


def test_a_scratch_file_takes_its_room_at_once(tmp_path):
    with storage.scratch_file(tmp_path / "states", 1 << 20) as file:
        assert os.fstat(file._file.fileno()).st_blocks * 512 >= 1 << 20


def test_a_scratch_file_without_room_leaves_nothing(tmp_path, monkeypatch):
    needed = 2 * shutil.disk_usage(tmp_path).free
    with pytest.raises(StorageError, match="No space left"), storage.scratch_file(tmp_path / "states", needed):
        pytest.fail("the block began")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left"), storage.scratch_file(tmp_path / "states", 10):
        pytest.fail("the block began")
    assert names(tmp_path) == set()


def test_an_error_within_the_block_is_not_the_disks(tmp_path):
    with pytest.raises(FileNotFoundError), storage.scratch_file(tmp_path / "states", 10):
        (tmp_path / "absent").read_bytes()


def test_a_name_that_is_taken_stays_whose_it_is(tmp_path):
    for name in ("law", "med"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(StorageError, match="is there already"):
        storage.move(tmp_path / "law", tmp_path / "med")
    assert (tmp_path / "med" / "file").read_text() == "med"
    storage.move(tmp_path / "law", tmp_path / "lex")
    assert (tmp_path / "lex" / "file").read_text() == "law" and not (tmp_path / "law").exists()
    with pytest.raises(StorageError, match="No such file"):
        storage.move(tmp_path / "law", tmp_path / "lux")


def test_a_log_that_cannot_be_opened_says_where(tmp_path):
    with pytest.raises(StorageError, match="missing"), storage.child_log(tmp_path / "missing" / "x.log"):
        raise AssertionError("there is no folder")


def test_a_name_that_is_no_utf8_is_not_written_under(tmp_path):
    for write in (storage.make_folder, lambda path: file_locked(path).__enter__()):
        with pytest.raises(StorageError, match="its name is no UTF-8"):
            write(tmp_path / "a\udcff")
    assert not list(tmp_path.iterdir())
