"""A whole run on a tiny model: files, resuming to the same bytes, signals, NaN, bad input."""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch

import qgraft
from qgraft import storage
from qgraft.adapters.base import find_adapter
from qgraft.errors import CheckpointError, DataError, OptionError, StorageError, TrainingError, UnsupportedError
from qgraft.kernels.choice import has_fast_bf16
from qgraft.training import objective as objective_module
from qgraft.training.adapter import adapter_in_training
from qgraft.training.callbacks import StopOnSignal
from qgraft.training.checkpoints import checkpoints, newest_whole_checkpoint
from qgraft.training.run import train

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(20)]


def arguments(folder, **options):
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1, "use_cpu": True,
                "plot_loss": False}  # fmt: skip
    return qgraft.TrainArguments(output_dir=str(folder), **{**defaults, "learning_rate": 1e-2, "r": 2, **options})


def run(tiny_gguf, folder, rows=ROWS, **options):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    return model, train(model, tokenizer, rows, arguments(folder, **options))


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_samples_of_one_row_are_held_out_together_and_notes_are_said(tiny_gguf, tmp_path):
    """Under a template that rewrites earlier answers a row gives several samples; what the rows' keys did is in the notes."""
    file = tmp_path / "rewriting.jinja"
    file.write_text(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and not loop.last %}old "
        "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = [
        {
            "id": n,
            "messages": [
                {"role": role, "content": f"{role} {n} {k}"} for k in range(3) for role in ("user", "assistant")
            ],
        }
        for n in range(6)
    ]
    _, report = run(tiny_gguf, tmp_path / "out", rows, val_size=2, template=str(file), max_steps=1, save_strategy="no")
    saved = json.loads((tmp_path / "out" / "run.json").read_text())
    assert saved["dataset"]["samples"] == 12 and saved["dataset"]["held_out"] == 6
    assert saved["dataset"]["accounting"]["kept"] == 6
    assert any("rewrites earlier answers" in note and "(rows: 6)" in note for note in report.notes)
    assert any(note == "keys of rows that have no effect: id (6)" for note in report.notes)


def test_a_run_leaves_a_sealed_adapter_a_log_a_plot_and_its_accounting(tiny_gguf, tmp_path):
    model, report = run(tiny_gguf, tmp_path / "out", val_size=4, save_strategy="no", plot_loss=True)
    folder = tmp_path / "out"
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "calibration.safetensors",
        "qgraft.json",
        "run.json",
        "metrics.jsonl",
        "loss.png",
    } == {path.name for path in folder.iterdir()}
    saved = json.loads((folder / "run.json").read_text())
    assert saved["finished"] and saved["steps"] == report.steps == 6
    assert saved["dataset"]["samples"] == 16 and saved["dataset"]["held_out"] == 4
    assert saved["dataset"]["accounting"]["read"] == saved["dataset"]["accounting"]["kept"] == 20
    assert saved["metrics"]["eval_loss"] < saved["metrics"]["eval_loss_before"]
    assert saved["arguments"]["r"] == 2
    assert saved["base"]["fingerprint"] == model.qgraft.info.fingerprint
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert all(entry["tokens_per_second"] > 0 for entry in logged if "loss" in entry)
    assert logged[0] == {"step": 0, "eval_loss": saved["metrics"]["eval_loss_before"]}
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    other, _ = qgraft.load(tiny_gguf("llama").path)
    loaded = qgraft.load_adapter(other, folder)
    assert loaded.applied == loaded.total == 14
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(other(ids).logits, model(ids).logits)


def test_a_dataset_named_in_the_call_is_remembered_for_merging(tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    options = arguments(tmp_path / "out", max_steps=1, save_strategy="no", name="Aria", author="the team")
    train(model, tokenizer, "identity_en", options, eval_dataset="identity_en_heldout")
    remembered = find_adapter(model, "default").trained
    assert (remembered["dataset"], remembered["eval_dataset"]) == ("identity_en", "identity_en_heldout")
    assert (options.dataset, options.eval_dataset) == (None, None)
    assert qgraft.merge(model, min_retained=-1e9).calibration_rows > 20


def test_rows_are_not_sealed_as_the_dataset_that_the_options_name(tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    options = arguments(tmp_path / "out", max_steps=1, save_strategy="no", dataset="identity_en", name="Aria",
                        author="the team", eval_dataset="identity_en_heldout", max_eval_samples=2,
                        save_calibration=False)  # fmt: skip
    train(model, tokenizer, ROWS, options)
    remembered = find_adapter(model, "default").trained
    assert "dataset" not in remembered and remembered["eval_dataset"] == "identity_en_heldout"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["dataset"]["name"] is None
    with pytest.raises(DataError, match="calibration"):
        qgraft.merge(model)
    options.overwrite_output_dir = True
    train(model, tokenizer, ROWS, options, eval_dataset=ROWS[:3])
    assert "eval_dataset" not in find_adapter(model, "default").trained


def test_the_model_is_as_before_but_for_its_adapter(tiny_gguf, tmp_path):
    path = tiny_gguf("llama").path
    before = path.read_bytes()
    model, _ = qgraft.load(path)
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    model, _ = run(tiny_gguf, tmp_path / "out", save_strategy="no")
    assert model.config.use_cache and not model.training
    with qgraft.adapters_off(model):
        assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(model(ids).logits, expected)
    qgraft.detach_lora(model)
    assert torch.equal(model(ids).logits, expected)
    assert path.read_bytes() == before


@pytest.mark.spread(1)
@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.2, "gradient_accumulation_steps": 2, "max_tokens_per_pass": 60}]
)
def test_a_resumed_run_ends_in_the_same_bytes(tiny_gguf, tmp_path, options):
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(tiny_gguf, whole, **options)
    stopped_before = []

    class Stop(RuntimeError):
        pass

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            stopped_before.append(state.global_step)
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_end", stop)
        with pytest.raises(Stop):
            run(tiny_gguf, part, **options)
    assert stopped_before and not (part / "adapter_model.safetensors").exists()
    _, report = run(tiny_gguf, part, resume_from_checkpoint="true", **options)
    assert report.steps == 6
    assert adapter_bytes(part) == adapter_bytes(whole)


def test_resuming_passes_over_a_broken_checkpoint(tiny_gguf, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(tiny_gguf, whole)
    run(tiny_gguf, part)
    newest = part / "checkpoint-6"
    damaged = bytearray((newest / "optimizer.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(damaged)
    assert newest_whole_checkpoint(part)[0] == part / "checkpoint-4"
    _, report = run(tiny_gguf, part, resume_from_checkpoint="true")
    assert sum("passed over" in note for note in report.notes) == 1
    assert adapter_bytes(part) == adapter_bytes(whole)


def test_checkpoints_are_sealed_rotated_and_hold_no_base(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "out", save_total_limit=2)
    kept = checkpoints(tmp_path / "out")
    assert [path.name for path in kept] == ["checkpoint-4", "checkpoint-6"]
    for path in kept:
        assert storage.check_folder(path) == []
        tensors = safetensors.torch.load_file(path / "adapter_model.safetensors")
        assert all(".lora_" in name for name in tensors)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_resuming_with_other_options_of_the_adapter_is_refused(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "out")
    with pytest.raises(CheckpointError, match="adapter: r: was 2, now 4"):
        run(tiny_gguf, tmp_path / "out", resume_from_checkpoint="true", r=4)


def test_the_best_checkpoint_is_loaded_at_the_end(tiny_gguf, tmp_path):
    options = {"val_size": 4, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 8}
    _, report = run(tiny_gguf, tmp_path / "out", learning_rate=0.5, **options)
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in logged if "eval_loss" in entry]
    assert report.metrics["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.spread(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves_and_resuming_ends_in_the_same_bytes(tiny_gguf, tmp_path, number):
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(tiny_gguf, whole, save_strategy="no")
    original = StopOnSignal.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), number)
        original(self, args, state, control, **kwargs)

    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_end", interrupt)
        _, report = run(tiny_gguf, part, save_strategy="no")
    assert signal.getsignal(number) is before
    assert (report.finished, report.signal, report.exit_code) == (False, number, 128 + number)
    assert [path.name for path in checkpoints(part)] == [f"checkpoint-{report.steps}"]
    assert not (part / "adapter_model.safetensors").exists()
    run(tiny_gguf, part, save_strategy="no", resume_from_checkpoint="true")
    assert adapter_bytes(part) == adapter_bytes(whole)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.spread(1)
def test_one_step_of_nan_is_skipped_and_counted(max_grad_norm, tiny_gguf, tmp_path, monkeypatch):
    original = objective_module.batch_loss
    calls = []

    def sometimes_nan(*args, **kwargs):
        calls.append(1)
        value = original(*args, **kwargs)
        return value * float("nan") if len(calls) == 3 else value

    monkeypatch.setattr(objective_module, "batch_loss", sometimes_nan)
    _, report = run(tiny_gguf, tmp_path / "out", max_grad_norm=max_grad_norm, save_strategy="no")
    assert report.metrics["skipped_steps"] == 1
    tensors = safetensors.torch.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def test_a_gradient_of_nan_is_skipped_too(tiny_gguf, tmp_path, monkeypatch):
    original = objective_module.batch_loss
    calls = []

    def infinite_gradient(*args, **kwargs):
        calls.append(1)
        value = original(*args, **kwargs)
        if len(calls) == 2:
            value.register_hook(lambda grad: grad * float("inf"))
        return value

    monkeypatch.setattr(objective_module, "batch_loss", infinite_gradient)
    _, report = run(tiny_gguf, tmp_path / "out", save_strategy="no")
    assert report.metrics["skipped_steps"] == 1


def test_three_steps_of_nan_end_the_run_and_leave_the_adapter_finite(tiny_gguf, tmp_path, monkeypatch):
    original = objective_module.batch_loss
    monkeypatch.setattr(objective_module, "batch_loss", lambda *a, **k: original(*a, **k) * float("nan"))
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    with pytest.raises(TrainingError, match="3 times in a row"):
        train(model, tokenizer, ROWS, arguments(tmp_path / "out", save_strategy="no"))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in qgraft.lora_state_dict(model).values())
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_accumulation_and_parts_give_the_gradient_of_the_whole_batch(tiny_gguf, tmp_path):
    options = {"max_steps": 2, "save_strategy": "no", "compute": "float32"}
    run(tiny_gguf, tmp_path / "a", per_device_train_batch_size=8, max_tokens_per_pass=4096, **options)
    run(tiny_gguf, tmp_path / "b", per_device_train_batch_size=8, max_tokens_per_pass=50, **options)
    run(tiny_gguf, tmp_path / "c", per_device_train_batch_size=4, gradient_accumulation_steps=2, **options)
    results = [safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc"]
    for name, tensor in results[0].items():
        for other in results[1:]:
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "a", save_strategy="no")
    run(tiny_gguf, tmp_path / "b", save_strategy="no", gradient_checkpointing=True)
    results = [safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_training_goes_on_from_a_loaded_adapter(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "first", save_strategy="no")
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    qgraft.load_adapter(model, tmp_path / "first", name="mine")
    start = {key: tensor.clone() for key, tensor in qgraft.lora_state_dict(model).items()}
    train(model, tokenizer, ROWS, arguments(tmp_path / "second", adapter_name="mine", save_strategy="no"))
    assert qgraft.adapter_names(model) == ["mine"]
    assert any(not torch.equal(start[key], tensor) for key, tensor in qgraft.lora_state_dict(model).items())


def test_a_folder_that_is_not_empty_is_refused_unless_told(tiny_gguf, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("keep me")
    with pytest.raises(StorageError, match=r"not empty: thesis\.txt"):
        run(tiny_gguf, tmp_path / "out")
    run(tiny_gguf, tmp_path / "out", overwrite_output_dir=True, save_strategy="no")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "keep me"


def test_overwriting_deletes_nothing_before_the_new_run_is_known_to_start(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "out")
    before = {path.name for path in (tmp_path / "out").iterdir()}
    for wrong in ({"rows": []}, {"target_modules": "nosuch"}):
        with pytest.raises((DataError, OptionError)):
            run(tiny_gguf, tmp_path / "out", overwrite_output_dir=True, **wrong)
    assert {path.name for path in (tmp_path / "out").iterdir()} == before


def test_nothing_to_resume_from(tiny_gguf, tmp_path):
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        run(tiny_gguf, tmp_path / "out", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_ends_with_the_path_and_leaves_no_adapter(tiny_gguf, tmp_path, monkeypatch):
    real = os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        train(model, tokenizer, ROWS, arguments(tmp_path / "out", save_steps=2))
    monkeypatch.setattr(os, "fsync", real)
    assert checkpoints(tmp_path / "out") == []
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_rows_without_an_answer_are_dropped_and_counted(tiny_gguf, tmp_path):
    _, report = run(tiny_gguf, tmp_path / "out", rows=[*ROWS, {"instruction": "q", "output": ""}], save_strategy="no")
    assert report.accounting.kept == 20 and sum(report.accounting.dropped.values()) == 1


@pytest.mark.parametrize("rows", [[], [{"instruction": "q", "output": ""}]])
def test_a_dataset_without_anything_to_learn_is_refused(tiny_gguf, tmp_path, rows):
    with pytest.raises(DataError):
        run(tiny_gguf, tmp_path / "out", rows=rows)


def test_an_unknown_target_names_the_closest(tiny_gguf, tmp_path):
    with pytest.raises(OptionError, match="did you mean") as caught:
        run(tiny_gguf, tmp_path / "out", target_modules="q_porj")
    assert "q_proj" in str(caught.value)


def test_evaluate_is_the_mean_over_answer_tokens(tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    result = qgraft.evaluate(model, tokenizer, ROWS)
    singles = [qgraft.evaluate(model, tokenizer, [row]) for row in ROWS]
    expected = sum(s.loss * s.labels for s in singles) / sum(s.labels for s in singles)
    assert result.loss == pytest.approx(expected, rel=1e-4)
    assert result.labels == sum(s.labels for s in singles) and result.samples == len(ROWS)


def test_a_sample_longer_than_the_context_is_cut_there_and_counted(tiny_gguf, tmp_path):
    rows = [*ROWS, {"instruction": "long", "output": "word " * 100}, {"instruction": "word " * 100, "output": "short"}]
    model, report = run(tiny_gguf, tmp_path / "out", rows=rows, save_strategy="no")
    context = model.config.max_position_embeddings
    assert any(f"context is {context} tokens" in note for note in report.notes)
    assert report.accounting.truncated == 1
    assert list(report.accounting.dropped) == [f"no answer token within max_length {context}"]
    assert report.accounting.kept == len(rows) - 1


@pytest.mark.parametrize("compute", ["bf16", "int8"])
@pytest.mark.slow
def test_the_loss_curve_of_rounded_products_is_that_of_float32_within_a_percent(compute, tiny_gguf, tmp_path):
    if compute == "bf16" and not has_fast_bf16():
        pytest.skip("this CPU has no bfloat16 arithmetic")
    curves = []
    for name in ("float32", compute):
        run(tiny_gguf, tmp_path / name, compute=name, learning_rate=1e-2, max_steps=6, logging_steps=1, val_size=4)
        log = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        curves.append([entry["loss"] for entry in log if "loss" in entry] + [log[-1].get("eval_loss", 0.0)])
        assert json.loads((tmp_path / name / "run.json").read_text())["compute"] == name
    assert curves[0] != curves[1], "the option must do something"
    assert curves[1] == pytest.approx(curves[0], rel=0.01)
    assert curves[0][-2] < 0.9 * curves[0][0], "there must be a curve"


@pytest.mark.parametrize("work", ["train", "evaluate"])
def test_other_threads_may_not_call_a_model_that_is_trained_or_evaluated(tiny_gguf, tmp_path, work):
    """It drops inputs, attends within samples and rounds products meanwhile: an answer would be another one."""
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    qgraft.attach_lora(model, r=2)
    ids, refused = torch.arange(3, 9)[None], []

    def ask(*_):
        with ThreadPoolExecutor(1) as pool:
            refused.append(type(pool.submit(model, ids).exception()))

    want = model(ids).logits
    hook = model.base_model.layers[0].mlp.register_forward_hook(ask)
    if work == "train":
        train(model, tokenizer, ROWS, arguments(tmp_path / "out", max_steps=1, save_strategy="no"))
    else:
        qgraft.evaluate(model, tokenizer, ROWS)
    hook.remove()
    assert set(refused) == {UnsupportedError}
    with ThreadPoolExecutor(1) as pool:
        after = pool.submit(model, ids).result().logits
    assert torch.equal(after, want) == (work == "evaluate")


def test_another_model_is_not_trained_at_the_same_time(tiny_gguf):
    """Both runs would draw from the process's random numbers, and neither come to what it comes to alone."""
    (one, _), (other, _) = (qgraft.load(tiny_gguf("llama").path) for _ in range(2))

    def begin(model):
        with adapter_in_training(model, arguments("unused")):
            return

    with ThreadPoolExecutor(1) as pool:
        with adapter_in_training(one, arguments("unused")):
            refused = pool.submit(begin, other).exception()
            assert isinstance(refused, UnsupportedError) and "the same random numbers" in str(refused)
            assert "trained in another thread" in str(pool.submit(begin, one).exception())
        assert pool.submit(begin, other).exception() is None
