"""What LoraTrainer overrides of transformers' Trainer, when it is called, and what checkpoints hold."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

OVERRIDDEN = {  # method -> the parameters that ours have
    "train": ["resume_from_checkpoint"],
    "_get_num_items_in_batch": ["batch_samples", "device"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "_clip_grad_norm": ["model"],
    "floating_point_ops": ["inputs"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "_save": ["output_dir", "state_dict"],
    "_get_output_dir": ["trial"],
    "_save_checkpoint": ["model", "trial"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
}
CALLED = {"_prepare_inputs": ["inputs"], "compute_loss_context_manager": [], "remove_callback": ["callback"],
          "log": ["logs"], "_wrap_model": ["model"]}  # fmt: skip


@pytest.mark.parametrize("name,parameters", [*OVERRIDDEN.items(), *CALLED.items()])
def test_the_trainer_has_this_method_with_these_parameters(name, parameters):
    method = getattr(Trainer, name, None)
    assert method is not None, f"transformers' Trainer has no {name} any more"
    assert set(parameters) <= inspect.signature(method).parameters.keys()


class Model(nn.Module):
    """Two numbers to be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.cleared = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return {"loss": ((x @ self.weight - labels) ** 2).mean()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.cleared += 1
        super().zero_grad(set_to_none)


class Recorded(Trainer):
    """Writes down when which of the overridden methods is called."""

    def __init__(self, folder: Path, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(12, 2, generator=generator)
        rows = [{"x": row, "labels": row.sum()} for row in x]
        defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 1,
                    "report_to": "none", "use_cpu": True, "learning_rate": 0.1, "disable_tqdm": True}  # fmt: skip
        self.seen: list[str] = []
        args = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
        super().__init__(model=Model(), args=args, train_dataset=rows, eval_dataset=rows)


def _record(name: str) -> Any:
    def call(self: Recorded, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(name)
        return getattr(Trainer, name)(self, *args, **kwargs)

    return call


for _name in OVERRIDDEN:
    setattr(Recorded, _name, _record(_name))


def test_every_overridden_method_is_called_in_a_run(tmp_path):
    trainer = Recorded(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
                       metric_for_best_model="loss")  # fmt: skip
    trainer.train()
    resumed = Recorded(tmp_path, max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    never = OVERRIDDEN.keys() - {*trainer.seen, *resumed.seen}
    assert never == set(), "the Trainer no longer calls what LoraTrainer overrides"


def test_gradients_are_cleared_by_the_model_and_clipped_by_clip_grad_norm(tmp_path):
    trainer = Recorded(tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.model.cleared == 1 + 4, "gradients are no longer cleared once before and once after each step"
    assert trainer.seen.count("_clip_grad_norm") == 4 and trainer.seen.count("training_step") == 8
    assert trainer.seen.count("_get_num_items_in_batch") == 4, "labels are no longer counted once for each step"


def test_without_clipping_clip_grad_norm_is_not_called(tmp_path):
    trainer = Recorded(tmp_path, max_grad_norm=0.0)
    trainer.train()
    assert "_clip_grad_norm" not in trainer.seen


def test_clip_grad_norm_takes_whatever_has_parameters(tmp_path):
    trainer = Recorded(tmp_path)
    tensor = nn.Parameter(torch.zeros(3))
    tensor.grad = torch.tensor([3.0, 0.0, 4.0])
    norm = Trainer._clip_grad_norm(trainer, nn.ParameterList([tensor]))
    assert float(norm) == pytest.approx(5.0) and float(tensor.grad.norm()) == pytest.approx(1.0, rel=1e-4)


def test_a_parameter_without_a_gradient_is_not_stepped(tmp_path):
    class Skipping(Recorded):
        def _clip_grad_norm(self, model: Any) -> Any:
            norm = super()._clip_grad_norm(model)
            model.weight.grad = None
            return norm

    trainer = Skipping(tmp_path, weight_decay=0.1)
    trainer.train()
    assert torch.equal(trainer.model.weight, torch.zeros(2)), "an optimizer steps where there is no gradient"


def test_what_training_step_returns_is_the_loss_that_is_logged(tmp_path):
    class Constant(Recorded):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            super().training_step(model, inputs, num_items_in_batch)
            return torch.tensor(2.5)

    trainer = Constant(tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == [5.0] * 4


def test_a_checkpoint_is_a_folder_below_get_output_dir_with_these_files(tmp_path):
    class Elsewhere(Recorded):
        def _get_output_dir(self, trial: Any) -> str:
            return str(tmp_path / "staging")

    Elsewhere(tmp_path / "out").train()
    names = {path.name for path in (tmp_path / "staging" / "checkpoint-2").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"} <= names | {
        "training_args.bin"
    }
    state = json.loads((tmp_path / "staging" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and {"best_model_checkpoint", "best_global_step", "log_history"} <= state.keys()


def test_a_resumed_run_ends_in_the_same_numbers(tmp_path):
    whole = Recorded(tmp_path / "whole", max_steps=6)
    whole.train()
    Recorded(tmp_path / "parts", max_steps=6).train()
    resumed = Recorded(tmp_path / "parts", max_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert torch.equal(whole.model.weight, resumed.model.weight)


def test_the_best_step_is_in_the_state_when_the_checkpoint_is_saved(tmp_path):
    seen = []

    class Best(Recorded):
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            seen.append((self.state.global_step, self.state.best_global_step))

    Best(tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
         metric_for_best_model="loss").train()  # fmt: skip
    assert all(isinstance(best, int) for _, best in seen) and seen[0] == (2, 2)


def test_progress_is_shown_by_these_callbacks_which_can_be_removed(tmp_path):
    for disable, kind in ((True, PrinterCallback), (False, ProgressCallback)):
        trainer = Recorded(tmp_path, disable_tqdm=disable)
        assert any(isinstance(callback, kind) for callback in trainer.callback_handler.callbacks)
        trainer.remove_callback(kind)
        assert not any(isinstance(callback, kind) for callback in trainer.callback_handler.callbacks)


def test_callbacks_hear_of_these_events_in_this_order(tmp_path):
    heard = []

    class Listener(TrainerCallback):
        pass

    for event in ("on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_save", "on_train_end"):
        setattr(Listener, event, lambda self, args, state, control, event=event, **kwargs: heard.append(event))
    trainer = Recorded(tmp_path, max_steps=1, save_steps=1)
    trainer.add_callback(Listener())
    trainer.train()
    assert heard == ["on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_save", "on_log", "on_train_end"]


def test_training_stops_after_the_step_and_saves_where_a_callback_asks_for_it(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save = control.should_training_stop = True

    trainer = Recorded(tmp_path, save_strategy="no")
    trainer.add_callback(Stop())
    trainer.train()
    assert trainer.state.global_step == 1 and (tmp_path / "checkpoint-1").is_dir()


def test_the_configuration_of_a_model_loses_its_cache_while_it_trains(tiny, tmp_path):
    model = tiny("llama")
    assert model.config.use_cache is True
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    Trainer(model=model, args=args, train_dataset=[{"input_ids": [1]}])
    assert model.config.use_cache is False, "the Trainer no longer turns use_cache off: run.py need not set it back"


def test_more_than_one_gpu_is_asked_of_the_arguments(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    args._n_gpu = 2
    assert args.n_gpu == 2 and args.train_batch_size == 2 * args.per_device_train_batch_size
    assert "self.args.n_gpu > 1" in inspect.getsource(Trainer._wrap_model), "it is decided elsewhere who splits a model"
