"""Rows held out: which adapter is kept, when a run stops, and what is said of losses that went wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import qgraft
from qgraft.errors import OptionError, TrainingError

ROWS = [{"instruction": f"Question {n}?", "output": f"Answer {n}."} for n in range(12)]


TOO_FAR = {"eval_strategy": "steps", "eval_steps": 1, "num_train_epochs": 10, "learning_rate": 0.05,
           "lr_scheduler_type": "constant"}  # fmt: skip


def run(tiny_gguf: Any, out: Path, model: Any = None, **options: Any) -> Any:
    loaded, tokenizer = qgraft.load(tiny_gguf("llama").path)
    given = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "val_size": 4,
        "plot_loss": False,
        "learning_rate": 1e-3,
    }
    args = qgraft.TrainArguments(output_dir=str(out), **{**given, **options})
    return qgraft.train(loaded if model is None else model, tokenizer, ROWS, args)


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def test_the_best_is_kept_and_the_last_stands_beside_it(tiny_gguf, tmp_path):
    """A rate that is too high: the loss falls first."""
    report = run(tiny_gguf, tmp_path / "out", **TOO_FAR)
    measured = losses(tmp_path / "out")
    best = min((step for step in measured if step), key=lambda step: measured[step])
    assert best < report.steps, "the run did not get worse, so it shows nothing"
    assert report.metrics["best_step"] == best
    assert report.metrics["eval_loss"] == pytest.approx(measured[best])
    assert report.metrics["eval_loss_last"] == pytest.approx(measured[report.steps])
    for folder, expected in (("out", best), ("out/last", report.steps)):
        model, tokenizer = qgraft.load(tiny_gguf("llama").path)
        qgraft.load_adapter(model, tmp_path / folder)
        again = run_loss(model, tokenizer, tmp_path)
        # products in bfloat16, where the CPU has them, are rounded by how many tokens are in a pass
        assert again == pytest.approx(measured[expected], rel=1e-3)
    assert measured[report.steps] > 1.01 * measured[best], "one would pass for the other"


def run_loss(model: Any, tokenizer: Any, folder: Path) -> float:
    """The loss on the rows that val_size=4 held out."""
    from qgraft.data.held_out import hold_out
    from qgraft.training.evaluate import build_samples, evaluate_samples, read_dataset

    samples = build_samples(tokenizer, *read_dataset(ROWS), max_length=128)
    return float(evaluate_samples(model, hold_out(samples, 4, 42)[1]).loss)


def test_without_rows_held_out_the_last_is_kept(tiny_gguf, tmp_path):
    report = run(tiny_gguf, tmp_path / "out", val_size=0)
    assert "best_step" not in report.metrics and not (tmp_path / "out" / "last").exists()


def test_what_is_said_is_obeyed(tiny_gguf, tmp_path):
    report = run(tiny_gguf, tmp_path / "a", load_best_model_at_end=False, **TOO_FAR)
    assert "best_step" not in report.metrics
    assert report.metrics["eval_loss"] == pytest.approx(losses(tmp_path / "a")[report.steps])
    report = run(tiny_gguf, tmp_path / "b", eval_strategy="no")
    assert set(losses(tmp_path / "b")) == {0} and "best_step" not in report.metrics
    for wrong in ({"val_size": 0, "load_best_model_at_end": True}, {"val_size": 0, "early_stopping_patience": 2}):
        with pytest.raises(OptionError, match="no held-out rows"):
            run(tiny_gguf, tmp_path / "c", **wrong)
    with pytest.raises(OptionError, match="nothing is saved"):
        run(tiny_gguf, tmp_path / "c", save_strategy="no", load_best_model_at_end=True)


def test_early_stopping(tiny_gguf, tmp_path):
    report = run(tiny_gguf, tmp_path / "out", early_stopping_patience=3, **TOO_FAR)
    measured = losses(tmp_path / "out")
    best = min((step for step in measured if step), key=lambda step: measured[step])
    assert report.steps == best + 3 < 20 and report.metrics["best_step"] == best


def test_a_run_that_diverges_says_so(tiny_gguf, tmp_path):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    run(tiny_gguf, tmp_path / "first", model, learning_rate=0.01, num_train_epochs=5)
    report = run(tiny_gguf, tmp_path / "out", model, learning_rate=30.0, num_train_epochs=4)
    assert any(note.startswith("warning: the run diverged: the held-out loss rose from") for note in report.notes)
    assert any("learning_rate=3.0" in note for note in report.notes)
    calm = run(tiny_gguf, tmp_path / "calm")
    assert not any("diverged" in note for note in calm.notes)


def test_whose_nan_it_is(tiny_gguf, tmp_path):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    norm = model.model.layers[1].mlp.down_proj.packed_weight.get()
    norm.parts[0].view(torch.uint8)[0, :2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)  # the scale of a block: NaN
    with pytest.raises(TrainingError, match=r"(?s)held-out loss is nan.*the base holds NaN.*layers\.1\.mlp\.down_proj"):
        run(tiny_gguf, tmp_path / "base", model)
    model, _ = qgraft.load(tiny_gguf("llama").path)
    qgraft.attach_lora(model, r=2)
    with torch.no_grad():
        next(iter(qgraft.lora_state_dict(model).values()))[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"(?s)held-out loss is nan.*the adapter 'default' holds NaN"):
        run(tiny_gguf, tmp_path / "adapter", model)


def test_options_of_another_lora_than_the_one_there_is(tiny_gguf, tmp_path):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    qgraft.attach_lora(model, r=8)
    with pytest.raises(OptionError, match=r"(?s)on the model already: r=4, the adapter has 8.*adapter_name='second'"):
        run(tiny_gguf, tmp_path / "out", model, r=4)


def test_run_json_is_json(tiny_gguf, tmp_path):
    report = run(tiny_gguf, tmp_path / "out")
    object.__setattr__(report, "metrics", {**report.metrics, "odd": float("nan"), "odder": float("inf")})
    from qgraft.json_files import json_text

    assert json.loads(json_text(report.metrics), parse_constant=pytest.fail)["odd"] is None
    json.loads((tmp_path / "out" / "run.json").read_text(), parse_constant=pytest.fail)


def test_nothing_that_is_asked_for_is_ignored_in_silence(tiny_gguf, tmp_path):
    often = run(tiny_gguf, tmp_path / "often", val_size=4, eval_steps=1, eval_strategy=None, max_steps=4)
    lines = [json.loads(line) for line in (tmp_path / "often" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 1, 2, 3, 4] and often.steps == 4
    last = run(tiny_gguf, tmp_path / "last", val_size=4, save_strategy="no", max_steps=2, eval_strategy=None)
    assert any("so the last one is kept, not the best" in note for note in last.notes)
    args = qgraft.TrainArguments(output_dir=str(tmp_path), prefix_projection=True, prefix_dropout=0.3, use_cpu=True)
    assert [note.split()[0] for note in args.notes] == ["prefix_projection", "prefix_dropout"]


def test_other_layers_than_those_of_the_adapter_are_refused(tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    qgraft.attach_lora(model, r=8, target_modules="q_proj")
    for options in ({"target_modules": "q_proj,v_proj"}, {"layers_to_transform": "0"}, {"target_modules": "v_proj"}):
        args = qgraft.TrainArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **options)
        with pytest.raises(OptionError, match="is on the model already: target_modules and layers_to_transform name"):
            qgraft.train(model, tokenizer, ROWS, args)
    args = qgraft.TrainArguments(output_dir=str(tmp_path / "out"), use_cpu=True, max_steps=1, target_modules="q_proj")
    assert qgraft.train(model, tokenizer, ROWS, args).steps == 1
