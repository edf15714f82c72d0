"""locks: one process at a time, whatever became of the one before."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import qgraft
from qgraft.cli.main import main
from qgraft.errors import StorageError
from qgraft.locks import file_locked, folder_locked

RUNS = """
import sys
from pathlib import Path
from qgraft.locks import folder_locked
with folder_locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
HOLD = """
import sys, time
from pathlib import Path
from qgraft.locks import file_locked, folder_locked
with (folder_locked if sys.argv[1] == "folder" else file_locked)(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_second_process_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path, kind):
    lock, place = (folder_locked, tmp_path / "out") if kind == "folder" else (file_locked, tmp_path / "m.gguf")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, kind, str(place)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(StorageError, match=f"in use by another process, pid {holder.pid}"), lock(place):
            pass
    finally:
        holder.kill()
        holder.wait()
    with lock(place), lock(place):
        pass
    assert list(tmp_path.iterdir()) == ([place] if kind == "folder" else [])  # the dead one could not remove its folder


def test_no_command_writes_into_the_folder_of_a_run(tmp_path, tiny_gguf, capsys, monkeypatch):
    """Whatever is in it: the adapter of an earlier end, nothing yet, or what another command wrote there before."""
    monkeypatch.chdir(tmp_path)
    model, _ = qgraft.load(tiny_gguf("llama").path)
    qgraft.attach_lora(model, r=2)
    qgraft.save_adapter(model, "a")
    qgraft.save_adapter(model, "run")
    base = str(tiny_gguf("llama").path)
    commands = [
        ["combine", "--adapter", "a", "--output"], ["export", "--model", base, "--adapter", "a", "--to", "peft", "--output"],
        ["export", "--model", base, "--adapter", "a", "--to", "ollama", "--output"],
        ["merge", "--model", base, "--adapter", "a", "--output"],
    ]  # fmt: skip
    assert main([*commands[2], "ollama"]) == 0
    for place in ("run", "new", "ollama"):
        held = subprocess.Popen([sys.executable, "-c", RUNS, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert held.stdout is not None and held.stdout.readline() == b"held\n"
            before = {path.name: path.read_bytes() for path in (tmp_path / place).iterdir()}
            for command in commands:
                assert main([*command, place, "--overwrite"]) == 2
                assert f"{place} is in use by another process, pid {held.pid}" in capsys.readouterr().err
                assert {path.name: path.read_bytes() for path in (tmp_path / place).iterdir()} == before
        finally:
            held.communicate()
    for command in (commands[0], commands[1]):
        assert main([*command, "run", "--overwrite"]) == 0
        assert main([*command, f"{command[0]}-new"]) == 0
        assert (tmp_path / f"{command[0]}-new" / "qgraft.json").exists()
    assert main([*commands[2], "ollama", "--overwrite"]) == 0
    assert not [*tmp_path.rglob("*.lock")] and not (tmp_path / "new").exists()


def test_another_thread_and_a_fork_are_other_ones(tmp_path):
    with folder_locked(tmp_path / "out"), folder_locked(tmp_path / "out"), ThreadPoolExecutor(1) as pool:
        error = pool.submit(folder_locked(tmp_path / "out").__enter__).exception()
        assert isinstance(error, StorageError) and "in use by another thread of this process" in str(error)
        told = subprocess.run(
            [sys.executable, "-c", FORK, str(tmp_path / "forked")], capture_output=True, text=True, check=True
        )
        parent, said = told.stdout.split("\n", 1)
        assert f"in use by another process, pid {parent}" in said
    assert not (tmp_path / "out").exists()


FORK = """
import os, sys
from pathlib import Path
from qgraft.errors import StorageError
from qgraft.locks import folder_locked
print(os.getpid(), flush=True)
with folder_locked(Path(sys.argv[1])):
    if os.fork() == 0:
        try:
            folder_locked(Path(sys.argv[1])).__enter__()
        except StorageError as error:
            print(error, flush=True)
        os._exit(0)
    os.wait()
"""


def test_a_model_is_saved_where_no_other_process_saves(tmp_path, tiny_gguf):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    place = tmp_path / "m.gguf"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, "file", str(place)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(StorageError, match=f"m.gguf is in use by another process, pid {holder.pid}"):
            qgraft.save(model, place)
        assert not place.exists()
    finally:
        holder.kill()
        holder.wait()
    qgraft.save(model, place)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_the_command_is_refused_before_the_model_is_looked_for(tmp_path, capsys):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, "folder", str(tmp_path / "out")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        words = ["--model_name_or_path", str(tmp_path / "no.gguf"), "--dataset", "identity", "--name=a", "--author=b"]
        assert main(["train", *words, "--output_dir", str(tmp_path / "out")]) == 2
        assert f"pid {holder.pid}" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
