"""Runs of P-Tuning v2: resumed to the same bytes, interrupted, the best kept, described."""

import json
import os
import signal

import pytest
import torch

import qgraft
from qgraft import storage
from qgraft.adapters.base import find_adapter
from qgraft.adapters.prefix import encoder_of
from qgraft.errors import CheckpointError, OptionError
from qgraft.training.callbacks import StopOnSignal
from qgraft.training.checkpoints import checkpoints
from qgraft.training.run import train

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(20)]
FILES = ("adapter_model.safetensors", "adapter_config.json")
ENCODER = "prefix_encoder.safetensors"


def arguments(folder, **options):
    defaults = {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 2, "logging_steps": 1, "use_cpu": True}
    return qgraft.TrainArguments(
        output_dir=str(folder), **{**defaults, "learning_rate": 1e-2, "pre_seq_len": 4, **options}
    )


def run(tiny_gguf, folder, **options):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    return model, train(model, tokenizer, ROWS, arguments(folder, **options))


def adapter_bytes(folder):
    return [(folder / name).read_bytes() for name in (*FILES, ENCODER) if (folder / name).exists()]


OPTIONS = {
    "plain": {},
    "projection": {"prefix_projection": True, "prefix_dropout": 0.3},
    "in parts, checkpointed": {
        "prefix_projection": True,
        "gradient_accumulation_steps": 2,
        "max_tokens_per_pass": 60,
        "gradient_checkpointing": True,
    },
}


@pytest.mark.spread(1)
@pytest.mark.parametrize("case", OPTIONS)
def test_a_resumed_run_ends_in_the_same_bytes(tiny_gguf, tmp_path, case):
    whole, part, options = tmp_path / "whole", tmp_path / "part", OPTIONS[case]
    run(tiny_gguf, whole, **options)

    class Stop(RuntimeError):
        pass

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_end", stop)
        with pytest.raises(Stop):
            run(tiny_gguf, part, **options)
    assert not (part / FILES[0]).exists()
    _, report = run(tiny_gguf, part, resume_from_checkpoint="true", **options)
    assert report.steps == 6
    assert len(adapter_bytes(whole)) == (3 if options.get("prefix_projection") else 2)
    assert adapter_bytes(part) == adapter_bytes(whole)
    middle = (whole / "checkpoint-4" / FILES[0]).read_bytes()
    assert middle != adapter_bytes(whole)[0]


@pytest.mark.slow
def test_a_signal_saves_and_leaves_and_resuming_ends_in_the_same_bytes(tiny_gguf, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(tiny_gguf, whole, save_strategy="no", prefix_projection=True)
    original = StopOnSignal.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnSignal, "on_step_end", interrupt)
        _, report = run(tiny_gguf, part, save_strategy="no", prefix_projection=True)
    assert (report.finished, report.exit_code) == (False, 143)
    assert not (part / FILES[0]).exists()
    run(tiny_gguf, part, save_strategy="no", prefix_projection=True, resume_from_checkpoint="true")
    assert adapter_bytes(part) == adapter_bytes(whole)


def test_the_best_checkpoint_is_loaded_at_the_end(tiny_gguf, tmp_path):
    options = {"val_size": 4, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 8}
    _, report = run(tiny_gguf, tmp_path / "out", learning_rate=5.0, prefix_projection=True, **options)
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in logged if "eval_loss" in entry]
    assert report.metrics["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


def test_checkpoints_are_whole_and_hold_no_base(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "out", prefix_projection=True)
    for path in checkpoints(tmp_path / "out"):
        assert storage.check_folder(path) == []
        assert {*FILES, ENCODER} < {file.name for file in path.iterdir()}
        assert sum(file.stat().st_size for file in path.iterdir()) < 400_000
        model, _ = qgraft.load(tiny_gguf("llama").path)
        qgraft.load_adapter(model, path)


@pytest.mark.parametrize("change", [{"pre_seq_len": 5}, {"prefix_projection": False}, {"finetuning_type": "lora"}])
@pytest.mark.spread(1)
def test_resuming_with_another_adapter_is_refused(tiny_gguf, tmp_path, change):
    run(tiny_gguf, tmp_path / "out", prefix_projection=True)
    with pytest.raises(CheckpointError, match="is of another run"):
        run(tiny_gguf, tmp_path / "out", resume_from_checkpoint="true", **{"prefix_projection": True, **change})


def test_run_json_says_what_was_trained(tiny_gguf, tmp_path):
    model, report = run(tiny_gguf, tmp_path / "p", prefix_projection=True, save_strategy="no")
    saved = json.loads((tmp_path / "p" / "run.json").read_text())
    assert saved["adapter"] == {
        "kind": "prefix", "pre_seq_len": 4, "prefix_projection": True, "prefix_hidden_size": None,
        "prefix_dropout": 0.1, "layout": "peft",
    }  # fmt: skip
    assert (
        saved["parameters"] == report.parameters == sum(p.numel() for p in encoder_of(find_adapter(model)).parameters())
    )
    run(tiny_gguf, tmp_path / "l", pre_seq_len=None, r=2, save_strategy="no")
    saved = json.loads((tmp_path / "l" / "run.json").read_text())
    assert saved["adapter"] == {
        "kind": "lora", "layers": 14, "r": 2, "lora_alpha": 16.0, "lora_dropout": 0.0, "use_rslora": False,
        "target_modules": "all-linear", "layers_to_transform": None,
    }  # fmt: skip


def test_training_goes_on_from_a_loaded_prefix(tiny_gguf, tmp_path):
    run(tiny_gguf, tmp_path / "first", prefix_projection=True, save_strategy="no")
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    qgraft.load_adapter(model, tmp_path / "first")
    start = {key: tensor.clone() for key, tensor in find_adapter(model).state_dict().items()}
    assert len(start) == 5
    train(model, tokenizer, ROWS, arguments(tmp_path / "second", save_strategy="no"))
    assert all(not torch.equal(start[key], tensor) for key, tensor in find_adapter(model).state_dict().items())


def test_options_that_speak_of_another_adapter_are_refused(tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    qgraft.attach_prefix(model, 4)
    cases = [
        ({"pre_seq_len": 128}, "pre_seq_len=128: the prefix 'default' has 4 tokens"),
        ({"pre_seq_len": None}, "finetuning_type=lora: the model has a prefix of that name"),
    ]
    for options, message in cases:
        with pytest.raises(OptionError, match=message):
            train(model, tokenizer, ROWS, arguments(tmp_path / "out", **options))
    qgraft.attach_lora(model, name="lora")
    with pytest.raises(OptionError, match="finetuning_type=p_tuning: the adapter 'lora' is a LoRA"):
        train(model, tokenizer, ROWS, arguments(tmp_path / "out", adapter_name="lora"))
    assert not (tmp_path / "out").exists()


def test_a_new_prefix_takes_its_positions_from_the_context(tiny_gguf, tmp_path):
    """Samples are cut so that prefix and sample fit; once it is attached the limit is the same."""
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    model.config.max_position_embeddings = 40
    options = {"pre_seq_len": 8, "max_steps": 1, "save_strategy": "no", "max_length": 100}
    rows = [{"instruction": "a", "output": "b " * 60}] * 4
    report = train(model, tokenizer, rows, arguments(tmp_path / "new", **options))
    again = train(model, tokenizer, rows, arguments(tmp_path / "again", **options))
    for each in (report, again):
        assert "the model's context is 32 tokens" in each.notes[0]
        assert each.accounting.truncated == 4
