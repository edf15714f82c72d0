"""locks: one process at a time, whatever became of the one before."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import qgraft
from qgraft.cli.main import main
from qgraft.errors import StorageError
from qgraft.locks import file_locked, folder_locked

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
