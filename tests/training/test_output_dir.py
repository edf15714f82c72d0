"""output_dir: one command that can be given again, one process at a time, and sentences for places that cannot be."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import qgraft
from qgraft.cli.main import main
from qgraft.errors import StorageError
from qgraft.locks import file_locked, folder_locked
from qgraft.storage import sha256

ROWS = [{"instruction": f"Question {n}?", "output": f"Answer {n}."} for n in range(8)]


def train(tiny_gguf: Any, out: Path, rows: list[dict[str, str]] = ROWS, **options: Any) -> Any:
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    given = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "save_steps": 2, "plot_loss": False,
             "resume_from_checkpoint": "auto"}  # fmt: skip
    return qgraft.train(model, tokenizer, rows, qgraft.TrainArguments(output_dir=str(out), **{**given, **options}))


def state(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_auto_starts_where_there_is_nothing_and_leaves_a_finished_run_as_it_is(tiny_gguf, tmp_path):
    first = train(tiny_gguf, tmp_path / "out")
    before = state(tmp_path / "out")
    assert (first.steps, first.unchanged) == (4, False) and "qgraft.json" in before and ".lock" not in before
    again = train(tiny_gguf, tmp_path / "out")
    assert again.unchanged and again.notes == ["already finished: step 4 of 4; nothing was changed"]
    assert again.metrics == json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    assert state(tmp_path / "out") == before
    more = train(tiny_gguf, tmp_path / "out", num_train_epochs=2)
    assert (more.steps, more.unchanged) == (8, False)


def test_a_finished_run_without_checkpoints_is_left_too_and_another_is_refused(tiny_gguf, tmp_path):
    train(tiny_gguf, tmp_path / "out", save_strategy="no")
    before = state(tmp_path / "out")
    assert train(tiny_gguf, tmp_path / "out", save_strategy="no").unchanged
    for change in ({"rows": ROWS[:6]}, {"num_train_epochs": 2}, {"seed": 5}):
        with pytest.raises(StorageError, match="holds another run, without a checkpoint"):
            train(tiny_gguf, tmp_path / "out", save_strategy="no", **change)
    assert state(tmp_path / "out") == before


def test_auto_starts_anew_after_a_kill_before_the_first_checkpoint(tiny_gguf, tmp_path):
    whole = train(tiny_gguf, tmp_path / "whole")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 1.0}\n')
    (tmp_path / "out" / ".checkpoint-2.tmp-999999999").mkdir()
    (tmp_path / "out" / ".qgraft.json.tmp-999999999").write_text("half")
    (tmp_path / "out" / f".x.tmp-{os.getpid()}").write_text("somebody is writing this")
    assert train(tiny_gguf, tmp_path / "out").steps == whole.steps
    name = "adapter_model.safetensors"
    assert sha256(tmp_path / "out" / name) == sha256(tmp_path / "whole" / name)
    assert [p.name for p in (tmp_path / "out").glob(".*")] == [f".x.tmp-{os.getpid()}"]


def test_auto_does_not_start_beside_what_is_no_run(tiny_gguf, tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(StorageError, match="not empty: thesis"):
        train(tiny_gguf, tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name == "thesis.txt"]


def test_what_a_run_started_from_is_remembered_when_it_goes_on(tiny_gguf, tmp_path):
    class StopAtTwo(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    options = {"eval_dataset": None, "val_size": 2, "save_steps": 1, "save_strategy": "steps"}
    options.pop("eval_dataset")
    whole = train(tiny_gguf, tmp_path / "whole", **options)
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    given = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "plot_loss": False, **options}
    args = qgraft.TrainArguments(output_dir=str(tmp_path / "out"), **given)
    qgraft.train(model, tokenizer, ROWS, args, callbacks=[StopAtTwo])
    (tmp_path / "out" / "run.json").unlink()  # as a kill leaves it
    gone_on = train(tiny_gguf, tmp_path / "out", **options)
    assert gone_on.metrics["eval_loss_before"] == whole.metrics["eval_loss_before"]


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


def test_the_command_is_refused_before_the_model_is_looked_for(tmp_path, capsys):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, "folder", str(tmp_path / "out")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        words = [
            "--model_name_or_path",
            str(tmp_path / "no.gguf"),
            "--dataset",
            "identity",
            "--name",
            "a",
            "--author",
            "b",
        ]
        assert main(["train", *words, "--output_dir", str(tmp_path / "out")]) == 2
        assert f"pid {holder.pid}" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(
    ("place", "why"),
    [("file/out", "Not a directory"), ("x" * 300, "File name too long"), ("/proc/x", "No such file"),
     ("a\0b", "null byte")],
)  # fmt: skip
def test_places_that_cannot_be_are_one_sentence_and_nothing_is_loaded(tmp_path, capsys, place, why):
    (tmp_path / "file").write_text("")
    words = ["--model_name_or_path", str(tmp_path / "no.gguf"), "--dataset", "identity", "--name", "a", "--author", "b"]
    assert main(["train", *words, "--output_dir", str(tmp_path / place)]) == 2
    told = capsys.readouterr().err
    assert why in told and "no.gguf" not in told and "Traceback" not in told and "bytes free" not in told


def test_a_folder_that_nothing_came_into_is_taken_away_again(tmp_path, capsys):
    words = ["--model_name_or_path", str(tmp_path / "no.gguf"), "--dataset", "identity", "--name", "a", "--author", "b"]
    assert main(["train", *words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
