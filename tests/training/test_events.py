"""Callbacks: transformers' protocol, with transformers' Trainer as the oracle for what is called when."""

import json

import pytest
import torch
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import qgraft
from qgraft.errors import OptionError
from qgraft.training.run import train

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(10)]
EVENTS = ("on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin", "on_substep_end", "on_pre_optimizer_step",
          "on_optimizer_step", "on_step_end", "on_epoch_end", "on_log", "on_evaluate", "on_save", "on_train_end")  # fmt: skip


class Heard(TrainerCallback):
    """Which events come, in order, with the step and what is handed over."""

    def __init__(self):
        self.events, self.given, self.steps = [], {}, []


def _listen(event):
    def heard(self, args, state, control, **kwargs):
        self.events.append((event, state.global_step))
        self.given[event] = kwargs

    return heard


for _event in EVENTS:
    setattr(Heard, _event, _listen(_event))


class Line(nn.Module):
    """Something for transformers' Trainer to train."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return {"loss": ((self.weight - x) ** 2).sum()}


OPTIONS = {"num_train_epochs": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "logging_steps": 2,
           "save_strategy": "epoch", "eval_strategy": "epoch", "use_cpu": True, "report_to": "none"}  # fmt: skip


def run(tiny_gguf, folder, callbacks, **options):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    chosen = {**OPTIONS, "learning_rate": 1e-2, "r": 2, "plot_loss": False, **options}
    args = qgraft.TrainArguments(output_dir=str(folder), **chosen)
    return train(model, tokenizer, ROWS, args, eval_dataset=ROWS[:3], callbacks=callbacks)


def test_the_events_are_those_of_transformers_trainer(tiny_gguf, tmp_path):
    """The same ones at the same steps; only the end of an epoch comes before what its last step asks for."""
    theirs, ours = Heard(), Heard()
    rows = [{"x": torch.tensor(float(n))} for n in range(10)]
    args = TrainingArguments(output_dir=str(tmp_path / "theirs"), disable_tqdm=True, **OPTIONS)
    Trainer(model=Line(), args=args, train_dataset=rows, eval_dataset=rows[:3], callbacks=[theirs]).train()
    run(tiny_gguf, tmp_path / "ours", [ours])
    assert sorted(ours.events) == sorted(theirs.events)
    once = ("on_log", "on_evaluate", "on_save", "on_epoch_end", "on_epoch_begin")
    assert [e for e in ours.events if e[0] not in once] == [e for e in theirs.events if e[0] not in once]
    for event, kwargs in ours.given.items():
        assert {"model", "processing_class", "optimizer", "lr_scheduler"} <= kwargs.keys(), event
    assert "loss" in ours.given["on_log"]["logs"] or "train_loss" in ours.given["on_log"]["logs"]
    assert "eval_loss" in ours.given["on_evaluate"]["metrics"]


def test_early_stopping_ends_a_run_that_gets_no_better(tiny_gguf, tmp_path):
    """And its patience is that of the whole run, also where it is interrupted and goes on."""
    options = {"num_train_epochs": 20, "learning_rate": 0.0, "save_total_limit": None}
    report = run(tiny_gguf, tmp_path / "whole", [EarlyStoppingCallback(3)], **options)
    assert report.finished and report.steps == 4 * 2

    class Interrupt(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_gguf, tmp_path / "part", [EarlyStoppingCallback(3), Interrupt()], **options)
    again = run(tiny_gguf, tmp_path / "part", [EarlyStoppingCallback(3)], resume_from_checkpoint="true", **options)
    assert again.steps == 8


def test_early_stopping_without_a_measurement_is_refused(tiny_gguf, tmp_path):
    with pytest.raises(OptionError, match="never measured"):
        run(tiny_gguf, tmp_path, [EarlyStoppingCallback()], eval_strategy="no")


def test_what_a_callback_asks_for_is_done(tiny_gguf, tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = control.should_log = control.should_evaluate = state.global_step == 3
            return control

    run(tiny_gguf, tmp_path / "out", [Ask], logging_strategy="no", save_strategy="no", eval_strategy="no")
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == [3]
    assert [entry["step"] for entry in logged if "eval_loss" in entry] == [0, 3]
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_an_epoch_that_a_callback_cuts_short_is_followed_by_the_next(tiny_gguf, tmp_path):
    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 1

    heard = Heard()
    report = run(tiny_gguf, tmp_path / "out", [Cut, heard])
    assert report.steps == 3 and report.finished  # one of the first epoch, two of the second
    assert [step for event, step in heard.events if event == "on_epoch_end"] == [1, 3]


def test_a_tracker_whose_package_is_missing_is_an_error_before_anything_is_loaded(tmp_path, monkeypatch):
    import transformers

    module = transformers.integrations.integration_utils
    monkeypatch.setattr(module, "is_wandb_available", lambda: False)
    with pytest.raises(OptionError, match=r"report_to=.*wandb[\s\S]*hint: pip install"):
        qgraft.TrainArguments(output_dir=str(tmp_path), use_cpu=True, report_to="wandb")
    with pytest.raises(OptionError, match=r"no_such is not supported"):
        qgraft.TrainArguments(output_dir=str(tmp_path), use_cpu=True, report_to="no_such")
