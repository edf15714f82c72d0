"""What a run can go on from, what it is bound to, and what may be changed."""

import json
import os
import signal

import pytest
import safetensors.torch
import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

import qgraft
from qgraft import storage
from qgraft.errors import CheckpointError, OptionError, StorageError
from qgraft.json_files import covered_text
from qgraft.training.checkpoints import Bound, checkpoints, remove_old
from qgraft.training.random_state import RandomState
from qgraft.training.run import train

PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1, "val_size": 4,
           "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 10.0}}  # fmt: skip
ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(12)]


def run(tiny_gguf, folder, rows=ROWS, kind="llama", callbacks=(), **options):
    model, tokenizer = qgraft.load(tiny_gguf(kind).path)
    chosen = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 2, "logging_steps": 1, "use_cpu": True,
              "learning_rate": 1e-2, "r": 2, "plot_loss": False, **options}  # fmt: skip
    return train(model, tokenizer, rows, qgraft.TrainArguments(output_dir=str(folder), **chosen), callbacks=callbacks)


def rates(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}


@pytest.fixture
def stopped(tiny_gguf, tmp_path):
    """A run of 6 steps that was killed after the checkpoint of step 4."""
    run(tiny_gguf, tmp_path / "out")
    storage.remove_folder(tmp_path / "out" / "checkpoint-6")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    return tmp_path / "out"


@pytest.mark.spread(5)
@pytest.mark.parametrize(
    "what, change",
    [("rows", {"rows": ROWS[::-1]}), ("rows", {"max_length": 40}), ("samples of a step", {"per_device_train_batch_size": 2}),
     ("adapter: lora_alpha", {"lora_alpha": 3}), ("adapter: lora_dropout", {"lora_dropout": 0.5}),
     ("adapter: r", {"r": 3}), ("seed", {"seed": 1}), ("optim", {"optim": "sgd"}),
     ("base", {"kind": "qwen2"})],
)  # fmt: skip
def test_another_run_is_refused_by_name(what, change, tiny_gguf, stopped):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=rf"of another run:[\s\S]*{what}.*: was .*, now [\s\S]*hint:"):
        run(tiny_gguf, stopped, resume_from_checkpoint="true", **change)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "what, change",
    [("rows", {"rows": ROWS[:7], "per_device_train_batch_size": 2}), ("seed", {"seed": 1, "lora_alpha": 3}),
     ("optim", {"optim": "sgd"}), ("lr_scheduler_type", PLATEAU)],
)  # fmt: skip
def test_force_goes_on_with_what_is_now(what, change, tiny_gguf, stopped):
    log = (stopped / "metrics.jsonl").read_bytes().splitlines()[:4]
    report = run(tiny_gguf, stopped, resume_from_checkpoint=True, force=True, num_train_epochs=4, **change)
    said = [note for note in report.notes if note.startswith("goes on as force=True says: ")]
    assert any(what in note for note in said) and len(said) >= len(
        change.keys() & {"rows", "seed", "lora_alpha", "optim"}
    )
    assert (stopped / "metrics.jsonl").read_bytes().splitlines()[:4] == log and report.steps > 4
    again = run(tiny_gguf, stopped, resume_from_checkpoint="true", num_train_epochs=4, **change)
    assert again.unchanged  # it is that run now


def test_forced_steps_learn_the_new_rows_from_where_the_run_was(tiny_gguf, stopped, tmp_path):
    """Against a run from the checkpoint's adapter: SGD keeps nothing between steps but the weights."""
    rows = [{"instruction": "other", "output": f"rows {i}"} for i in range(12)]
    more = {"optim": "sgd", "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    run(tiny_gguf, stopped, rows, resume_from_checkpoint="true", force=True, max_steps=6, **more)
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    args = qgraft.TrainArguments(
        output_dir=str(tmp_path / "new"), adapter_name_or_path=str(stopped / "checkpoint-4"), max_steps=2, use_cpu=True,
        per_device_train_batch_size=4, learning_rate=1e-2, plot_loss=False, **more,
    )  # fmt: skip
    qgraft.load_adapter(model, stopped / "checkpoint-4")
    train(model, tokenizer, rows[4:], args)  # step 4 of runs of 3 steps is the second of an epoch
    ours, fresh = (safetensors.torch.load_file(f / "adapter_model.safetensors") for f in (stopped, tmp_path / "new"))
    torch.testing.assert_close(ours, fresh, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("what, change", [("base", {"kind": "qwen2"}), ("adapter: r", {"r": 3})])
def test_no_force_makes_another_base_or_shape_fit(what, change, tiny_gguf, stopped):
    with pytest.raises(CheckpointError, match=rf"{what}.*: was .*, now [\s\S]*hint: give (?!.*force)"):
        run(tiny_gguf, stopped, resume_from_checkpoint="true", force=True, **change)


def test_new_rows_need_steps_that_are_left(tiny_gguf, stopped):
    run(tiny_gguf, stopped, resume_from_checkpoint="true")
    with pytest.raises(CheckpointError, match=r"at step 6 of 6: none is left for what is new[\s\S]*num_train_epochs"):
        run(tiny_gguf, stopped, rows=ROWS[::-1], resume_from_checkpoint="true", force=True)


def test_the_best_of_other_held_out_rows_is_forgotten(tiny_gguf, tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 1, "num_train_epochs": 4}
    run(tiny_gguf, tmp_path / "out", callbacks=[StopAt(3)], val_size=4, **more)
    report = run(tiny_gguf, tmp_path / "out", resume_from_checkpoint="auto", force=True, val_size=3, **more)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert report.metrics["eval_loss"] == min(e["eval_loss"] for e in lines if "eval_loss" in e and e["step"] > 3)
    assert "eval_loss_before" not in report.metrics


def test_what_may_change_is_obeyed_and_named(tiny_gguf, stopped):
    report = run(tiny_gguf, stopped, resume_from_checkpoint="true", learning_rate=5e-2, num_train_epochs=4)
    assert report.steps == 12
    found = rates(stopped)
    assert [found[step] for step in (3, 4)] == pytest.approx([1e-2 * (1 - 2 / 6), 1e-2 * (1 - 3 / 6)])
    assert [found[step] for step in (5, 12)] == pytest.approx([5e-2 * (1 - 4 / 12), 5e-2 * (1 - 11 / 12)])
    said = [note for note in report.notes if "another option than before" in note]
    assert any("learning_rate 0.01 -> 0.05" in note for note in said)
    assert any("num_train_epochs 2 -> 4" in note for note in said) and len(said) == 2


def test_batches_and_accumulation_may_change_places(tiny_gguf, stopped, tmp_path):
    run(tiny_gguf, stopped, resume_from_checkpoint="true", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    run(tiny_gguf, tmp_path / "whole")
    ours, whole = (safetensors.torch.load_file(f / "adapter_model.safetensors") for f in (stopped, tmp_path / "whole"))
    for name, tensor in whole.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_finished_run_goes_on_with_more_epochs_as_if_it_had_them_from_the_first(tiny_gguf, tmp_path):
    options = {"lr_scheduler_type": "constant", "lora_dropout": 0.2}
    run(tiny_gguf, tmp_path / "more", **options)
    report = run(tiny_gguf, tmp_path / "more", resume_from_checkpoint="true", **{**options, "num_train_epochs": 3})
    whole = run(tiny_gguf, tmp_path / "whole", **{**options, "num_train_epochs": 3})
    assert report.steps == whole.steps == 9
    assert report.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-12)
    assert report.metrics["tokens"] == whole.metrics["tokens"]
    names = ("adapter_model.safetensors",)
    assert all((tmp_path / "more" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


@pytest.mark.parametrize("logging", [{"logging_steps": 4}, {"logging_strategy": "no"}])
def test_the_training_loss_is_the_mean_over_all_steps_however_they_are_logged(logging, tiny_gguf, tmp_path):
    every = run(tiny_gguf, tmp_path / "every", save_strategy="no")
    some = run(tiny_gguf, tmp_path / "some", save_strategy="no", **logging)
    lines = [json.loads(line) for line in (tmp_path / "every" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == every.steps == 6
    assert some.metrics["train_loss"] == pytest.approx(sum(losses) / 6) == every.metrics["train_loss"]


class StopAt(TrainerCallback):
    """Ends a run as a signal does, after this step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_schedule_that_follows_the_loss_goes_on_with_its_rate(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "whole", **PLATEAU)
    run(tiny_gguf, tmp_path / "part", callbacks=[StopAt(2)], **PLATEAU)
    run(tiny_gguf, tmp_path / "part", resume_from_checkpoint="true", **PLATEAU)
    assert rates(tmp_path / "part") == rates(tmp_path / "whole")
    ours, whole = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("part", "whole"))
    assert ours == whole
    with pytest.raises(CheckpointError, match="lr_scheduler_type: was reduce_lr_on_plateau, now None"):
        run(tiny_gguf, tmp_path / "part", resume_from_checkpoint="true", **{**PLATEAU, "lr_scheduler_type": "linear",
                                                                         "lr_scheduler_kwargs": None})  # fmt: skip


def test_checkpoints_of_steps_that_are_taken_again_are_gone_and_said_to_be(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "out", save_total_limit=10)
    report = run(tiny_gguf, tmp_path / "out", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"), save_steps=5,
                 save_total_limit=10, callbacks=[StopAt(3)])  # fmt: skip
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]
    assert any("checkpoint-4, checkpoint-6 of later steps were deleted" in note for note in report.notes)


def test_another_runs_folder_is_not_gone_on_in(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "one")
    run(tiny_gguf, tmp_path / "two", rows=ROWS[:8])
    with pytest.raises(StorageError, match="two is not empty"):
        run(tiny_gguf, tmp_path / "two", resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))
    report = run(tiny_gguf, tmp_path / "new", resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-4"))
    assert (
        report.steps == 6
        and (tmp_path / "new" / "adapter_model.safetensors").read_bytes()
        == (tmp_path / "one" / "adapter_model.safetensors").read_bytes()
    )


@pytest.mark.parametrize("options", [{"save_strategy": "best", "learning_rate": 0.0}, {"save_total_limit": -1},
                                     {"save_strategy": "no", "save_only_model": True}])  # fmt: skip
def test_a_signal_always_leaves_a_checkpoint_to_go_on_from(options, tiny_gguf, tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 1, "val_size": 4, **options}
    run(tiny_gguf, tmp_path / "out", callbacks=[StopAt(3)], **more)
    assert checkpoints(tmp_path / "out")[-1].name == "checkpoint-3"
    assert run(tiny_gguf, tmp_path / "out", resume_from_checkpoint="true", **more).finished


def test_the_best_is_kept_although_it_lies_between_two_saves(tiny_gguf, tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 3, "val_size": 4, "load_best_model_at_end": True}
    report = run(tiny_gguf, tmp_path / "out", learning_rate=0.5, **more)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line and line["step"]]
    assert report.metrics["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_options_that_are_wrong_delete_nothing(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "out")
    before = sorted(path for path in (tmp_path / "out").rglob("*"))
    wrong = ({"adam_beta1": 1.5}, {"gradient_accumulation_steps": 0}, {"seed": -1}, {"num_train_epochs": 0},
             {"learning_rate": float("nan")}, {"label_smoothing_factor": 2.0}, {"weight_decay": -1.0},
             {"dataloader_drop_last": True, "per_device_train_batch_size": 64})  # fmt: skip
    for options in wrong:
        with pytest.raises(OptionError):
            run(tiny_gguf, tmp_path / "out", overwrite_output_dir=True, **options)
    assert sorted(path for path in (tmp_path / "out").rglob("*")) == before


def test_two_callbacks_of_one_class_keep_their_own_states(tiny_gguf, tmp_path):
    def both():
        return [EarlyStoppingCallback(5, 0.0), EarlyStoppingCallback(8, 100.0)]

    more = {"eval_strategy": "steps", "eval_steps": 1, "val_size": 4, "num_train_epochs": 6}
    whole = run(tiny_gguf, tmp_path / "whole", callbacks=both(), **more)
    run(tiny_gguf, tmp_path / "part", callbacks=[*both(), StopAt(6)], **more)
    again = run(tiny_gguf, tmp_path / "part", callbacks=both(), resume_from_checkpoint="true", **more)
    assert again.steps == whole.steps == 9


@pytest.mark.parametrize("content", [b"not json", b'{"no_such_field": 1}'])
def test_a_state_of_another_kind_is_refused_in_words(content, tiny_gguf, stopped):
    newest = checkpoints(stopped)[-1]
    (newest / "trainer_state.json").write_bytes(content)
    listed = json.loads((newest / "manifest.json").read_text())
    listed["files"]["trainer_state.json"] = storage.describe_file(newest / "trainer_state.json")
    (newest / "manifest.json").write_text(covered_text(listed))
    with pytest.raises(CheckpointError, match="cannot be read"):
        run(tiny_gguf, stopped, resume_from_checkpoint="true")


def test_a_checkpoint_of_another_loop_is_refused_in_words(tiny_gguf, stopped):
    for path in checkpoints(stopped):
        (path / "progress.json").unlink()
        listed = json.loads((path / "manifest.json").read_text())
        del listed["files"]["progress.json"]
        (path / "manifest.json").write_text(covered_text(listed))
    with pytest.raises(CheckpointError, match=r"an earlier qgraft wrote it[\s\S]*hint: adapter_name_or_path="):
        run(tiny_gguf, stopped, resume_from_checkpoint="true")


@pytest.mark.parametrize("name, content", [("optimizer.pt", b"x"), ("random_state.pt", b"x"), ("progress.json", b"{}")])
def test_files_of_another_kind_are_refused_in_words(name, content, tiny_gguf, stopped):
    newest = checkpoints(stopped)[-1]
    (newest / name).write_bytes(content)
    listed = json.loads((newest / "manifest.json").read_text())
    listed["files"][name] = storage.describe_file(newest / name)
    (newest / "manifest.json").write_text(covered_text(listed))
    with pytest.raises(CheckpointError, match=r"cannot (be )?read"):
        run(tiny_gguf, stopped, resume_from_checkpoint="true")


def test_nothing_is_unpickled_from_a_checkpoint_but_tensors_and_numbers(tiny_gguf, stopped):
    for name in ("optimizer.pt", "random_state.pt"):
        torch.load(checkpoints(stopped)[-1] / name, weights_only=True)


def test_differences_and_changes_are_told_apart():
    before, now = Bound({"seed": 1, "x": 2}, {"r": 4, "a": 1}), Bound({"seed": 1, "x": 3}, {"r": 4, "b": 2})
    assert now.differences(before) == {"x": "x: was 2, now 3"}
    assert now.changes(before) == ["a 1 -> default", "b default -> 2"]


def test_random_numbers_go_on_where_they_were():
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = RandomState.now()
    with state.drawn_from():
        first = draw()
    outside = draw()
    with state.drawn_from():
        second = draw()
    RandomState.now().restore()
    state = RandomState(**vars(state))
    assert len({*first, *outside, *second}) == 6 or first == outside  # one state was taken where the other began
    with state.drawn_from():
        third = draw()
    assert third not in (first, second)


@pytest.mark.parametrize("limit", [None, -1, 1, 2, 3])
@pytest.mark.parametrize("best", [None, 2, 6, 8])
def test_as_many_checkpoints_are_kept_as_transformers_keeps(tmp_path, limit, best):
    for folder in ("ours", "theirs"):
        for step in (2, 4, 6, 8):
            (tmp_path / folder / f"checkpoint-{step}").mkdir(parents=True)
    named = {
        folder: None if best is None else str(tmp_path / folder / f"checkpoint-{best}") for folder in ("ours", "theirs")
    }
    remove_old(tmp_path / "ours", limit, named["ours"])
    rotate_checkpoints(str(tmp_path / "theirs"), limit, named["theirs"])
    ours, theirs = ({path.name for path in (tmp_path / folder).iterdir()} for folder in ("ours", "theirs"))
    assert ours == theirs and "checkpoint-8" in ours


def test_hashes_are_told_by_their_first_digits():
    before, now = (Bound({"rows": digit * 64, "base": f"qg1:{digit * 32}", "r": 2}, {}) for digit in "ab")
    assert now.differences(before) == {
        "base": "base: was qg1:aaaaaaaaaaaa, now qg1:bbbbbbbbbbbb", "rows": "rows: was aaaaaaaaaaaa, now bbbbbbbbbbbb"
    }  # fmt: skip
