"""output_dir: one command that can be given again, one process at a time, and sentences for places that cannot be."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import qgraft
from qgraft.cli.main import main
from qgraft.errors import StorageError
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
    other = train(tiny_gguf, tmp_path / "out", learning_rate=0.05).notes
    assert other[1:] == ["another option than before, without effect on a finished run: learning_rate default -> 0.05"]
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


def test_a_run_that_early_stopping_ended_is_not_taken_up_again(tiny_gguf, tmp_path):
    options = {"val_size": 2, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.5, "num_train_epochs": 9,
               "early_stopping_patience": 2}  # fmt: skip
    first = train(tiny_gguf, tmp_path / "out", **options)
    assert first.steps < 27
    before = state(tmp_path / "out")
    again = train(tiny_gguf, tmp_path / "out", **options)
    assert again.unchanged and f"already finished: step {first.steps} of 27, where it was" in again.notes[-1]
    assert state(tmp_path / "out") == before
    (tmp_path / "out" / "run.json").unlink()  # as a kill in its last moment leaves it
    again = train(tiny_gguf, tmp_path / "out", **options)
    assert (again.steps, again.unchanged) == (first.steps, False)
    more = train(tiny_gguf, tmp_path / "out", **{**options, "early_stopping_patience": None})
    assert (more.steps, more.unchanged) == (27, False)
    assert (tmp_path / "out" / "last").is_dir() == ("best_step" in more.metrics)


BROKEN = {
    "empty": b"", "cut": b'{"finished": true, "st', "no text": b"\xff\x00", "a list": b"[]", "nothing": b"{}",
    "steps of text": b'{"bound": {}, "arguments": {}, "steps": "4"}', "deep": b"[" * 9999,
    "metrics of text": b'{"bound": {}, "arguments": {}, "steps": 4, "metrics": {"seconds": "x"}}',
}  # fmt: skip


def test_a_broken_run_json_keeps_nobody_from_going_on(tiny_gguf, tmp_path):
    """The checkpoints say what they are of, so the result is that of a run which was never interrupted."""
    options = {"lr_scheduler_type": "constant", "num_train_epochs": 2, "max_steps": 6}
    train(tiny_gguf, tmp_path / "whole", **options)
    train(tiny_gguf, tmp_path / "half", **{**options, "max_steps": 4})
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    for number, broken in enumerate(BROKEN.values()):
        out = tmp_path / str(number)
        shutil.copytree(tmp_path / "half", out)
        (out / "run.json").write_bytes(broken)
        given = "auto" if number else str(out / "checkpoint-4")
        report = train(tiny_gguf, out, **options, resume_from_checkpoint=given)
        assert report.steps == 6 and any("run.json" in note and "nothing of the run" in note for note in report.notes)
        weights = load_file(out / "adapter_model.safetensors")
        assert all(torch.equal(weights[key], whole[key]) for key in whole)
        assert json.loads((out / "run.json").read_text())["steps"] == 6


def test_a_broken_run_json_beside_an_adapter_alone_is_said(tiny_gguf, tmp_path):
    train(tiny_gguf, tmp_path / "out", save_strategy="no")
    (tmp_path / "out" / "run.json").write_bytes(b"")
    before = state(tmp_path / "out")
    with pytest.raises(StorageError, match=r"(?s)is not empty.*run\.json is not JSON.*hint: choose another folder"):
        train(tiny_gguf, tmp_path / "out", save_strategy="no")
    assert state(tmp_path / "out") == before
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json").write_bytes(b"")  # of a run that got no further
    assert train(tiny_gguf, tmp_path / "new").steps == 4


def test_a_run_that_callbacks_ended_goes_on_from_its_very_end(tiny_gguf, tmp_path):
    """Between two saves; so that more of it is what the run would have been that nobody stopped."""
    options = {"val_size": 2, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.5, "num_train_epochs": 9,
               "save_steps": 100, "load_best_model_at_end": False}  # fmt: skip
    patient = {**options, "early_stopping_patience": 2}
    first = train(tiny_gguf, tmp_path / "out", **patient)
    assert first.steps < 27 and (tmp_path / "out" / f"checkpoint-{first.steps}").is_dir()
    more = train(tiny_gguf, tmp_path / "out", **options)
    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    measured = [entry["step"] for entry in log if "eval_loss" in entry]
    assert (more.steps, measured) == (27, list(range(28)))
    train(tiny_gguf, tmp_path / "whole", **options)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "whole")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])
    none = train(tiny_gguf, tmp_path / "none", **patient, save_strategy="no")
    assert none.steps == first.steps and not [*(tmp_path / "none").glob("checkpoint-*")]


def test_a_finished_run_gives_the_model_its_adapter(tiny_gguf, tmp_path):
    train(tiny_gguf, tmp_path / "out", learning_rate=0.1)
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    args = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "plot_loss": False,
        "learning_rate": 0.1,
    }
    options = qgraft.TrainArguments(output_dir=str(tmp_path / "out"), resume_from_checkpoint="auto", **args)
    assert qgraft.train(model, tokenizer, ROWS, options).unchanged
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], held) for name, held in qgraft.lora_state_dict(model).items())


def test_a_run_killed_while_it_wrote_its_adapter_is_known_again(tiny_gguf, tmp_path):
    """Without checkpoints, in the moment between the adapter's files and run.json."""
    out = tmp_path / "out"
    train(tiny_gguf, out, save_strategy="no")
    weights = sha256(out / "adapter_model.safetensors")
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**run, "finished": False, "steps": 0}))
    (out / "adapter_config.json").unlink()
    with pytest.raises(StorageError, match="holds another run, without a checkpoint"):
        train(tiny_gguf, out, save_strategy="no", seed=3)
    assert sha256(out / "adapter_model.safetensors") == weights
    assert not train(tiny_gguf, out, save_strategy="no").unchanged
    assert sha256(out / "adapter_model.safetensors") == weights and (out / "adapter_config.json").is_file()


def test_adapters_alone_are_not_gone_on_from_and_the_run_starts_anew(tiny_gguf, tmp_path):
    whole = train(tiny_gguf, tmp_path / "whole", save_only_model=True)
    out = tmp_path / "out"
    train(tiny_gguf, out, save_only_model=True)
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**run, "finished": False, "steps": 0}))
    again = train(tiny_gguf, out, save_only_model=True)
    assert again.steps == whole.steps and any("hold an adapter alone" in note for note in again.notes)


def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(tiny_gguf, tmp_path):
    options = {"val_size": 2, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 0.5,
               "num_train_epochs": 9, "save_total_limit": 1, "early_stopping_patience": 2}  # fmt: skip
    whole = train(tiny_gguf, tmp_path / "whole", **options)
    best = whole.metrics["best_step"]
    (tmp_path / "whole" / "run.json").unlink()
    (tmp_path / "whole").rename(tmp_path / "moved")
    again = train(tiny_gguf, tmp_path / "moved", **options)
    assert again.metrics["best_step"] == best and again.metrics["eval_loss"] == whole.metrics["eval_loss"]
    assert (tmp_path / "moved" / f"checkpoint-{best}").is_dir()


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


@pytest.mark.parametrize("free, what", [(10_000, "refused"), (250_000, "warned"), (10**9, "")])
def test_a_disk_without_room_is_known_before_the_first_step(tiny_gguf, tmp_path, monkeypatch, free, what):
    """22,528 numbers: 90,112 bytes of adapter, and 270,336 of a checkpoint with AdamW's two of each."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    options = {"r": 8, "optim": "sgd" if what == "warned" else "adamw_torch"}
    if what == "refused":
        with pytest.raises(
            StorageError, match=r"disk has 100.. bytes free, and this run writes 360448 at least: 90112 of"
        ):
            train(tiny_gguf, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        return
    report = train(tiny_gguf, tmp_path / "out", **options)
    assert [note for note in report.notes if "warning: the disk of" in note] == (
        [f"warning: the disk of {tmp_path / 'out'} has 0 MB free, and checkpoints of this run take 0 MB each, "
         "3 of them at a time"] if what else []
    )  # fmt: skip


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
