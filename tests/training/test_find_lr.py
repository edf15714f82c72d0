"""The learning-rate finder: steps whose losses are those of a plain loop with growing rates, and nothing left behind."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import qgraft
from qgraft.adapters.attach import attach_lora
from qgraft.adapters.base import find_adapter
from qgraft.cli.main import main
from qgraft.errors import OptionError, TrainingError
from qgraft.jobs.train import check_jobs
from qgraft.training import find_lr as module
from qgraft.training.arguments import parse_arguments
from qgraft.training.find_lr import growing_rates, has_diverged, smooth, suggested_rate
from qgraft.training.run import train

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(12)]


def arguments(folder: Path, **options: Any) -> qgraft.TrainArguments:
    chosen = {
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "r": 2,
        "plot_loss": False,
        "compute": "float32",
        **options,
    }
    return qgraft.TrainArguments(output_dir=str(folder), **chosen)


def test_rates_grow_by_one_factor_and_losses_are_smoothed_without_a_pull_to_zero():
    rates = growing_rates(40, 1e-6, 1.0)
    assert np.allclose(rates, np.geomspace(1e-6, 1.0, 40))
    losses = np.random.default_rng(0).uniform(1, 3, 30)
    weights = [module.SMOOTHING ** np.arange(n)[::-1] for n in range(1, 31)]
    assert np.allclose(smooth(losses), [np.average(losses[: len(w)], weights=w) for w in weights])
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)


def test_what_is_suggested_is_a_tenth_of_the_rate_with_the_lowest_loss():
    rates = growing_rates(5, 1e-4, 1.0)
    assert suggested_rate(rates, [3.0, 2.0, 1.0, 5.0]) == 1e-3
    assert suggested_rate(rates, [1.0, 2.0, 3.0]) is None and suggested_rate(rates, []) is None
    assert has_diverged([2.0, 1.0, 2.1]) and has_diverged([2.0, math.nan]) and not has_diverged([2.0, 1.0, 1.9])


@pytest.mark.parametrize("options", [{}, {"loraplus_lr_ratio": 4.0}])
def test_the_losses_are_those_of_a_loop_that_changes_its_rate(options, tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    before = torch.get_rng_state()
    found = qgraft.find_lr(model, tokenizer, ROWS, arguments(tmp_path / "out", warmup_steps=5, **options))
    assert torch.equal(before, torch.get_rng_state())
    assert not qgraft.adapter_names(model) and not qgraft.active_adapters(model) and not model.training
    count = len(found.rates)
    count = len(found.rates)
    assert found.suggested and 10 < count == len(found.losses) == len(found.smoothed)
    assert found.diverged == (not options) and (found.diverged or count == module.STEPS)
    assert max(found.losses) > min(found.losses) + 1

    class Grow(TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
        ) -> None:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] / args.learning_rate * found.rates[state.global_step]

    args = arguments(tmp_path / "run", max_steps=count, logging_steps=1, save_strategy="no", lr_scheduler_type="constant",
                     **options)  # fmt: skip
    train(model, tokenizer, ROWS, args, callbacks=[Grow()])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(found.losses, rel=1e-5)


def test_an_adapter_that_is_there_keeps_its_weights(tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    attach_lora(model, 2, name="mine")
    attach_lora(model, 2, name="other")
    with torch.no_grad():
        for _, parameter in find_adapter(model, "mine").named_parameters():
            parameter.normal_(0, 0.05)
    before = {key: value.clone() for key, value in find_adapter(model, "mine").state_dict().items()}
    qgraft.find_lr(model, tokenizer, ROWS, arguments(tmp_path / "out", adapter_name="mine"))
    after = find_adapter(model, "mine").state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert qgraft.active_adapters(model) == {"other": 1.0}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["find_lr.json"]


def test_the_command_draws_says_what_to_try_and_leaves_room_for_the_run(tiny_gguf, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["train", "--model_name_or_path", str(tiny_gguf("llama").path), "--dataset", str(tmp_path / "rows.jsonl"),
             "--output_dir", str(tmp_path / "out"), "--use_cpu", "--r", "2", "--val_size", "2"]  # fmt: skip
    assert main([*words, "--find_lr"]) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path / "out" / "find_lr.json").read_text())
    assert f"suggested: --learning_rate {found['suggested']:g}" in said and "no adapter was kept" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["find_lr.json", "find_lr.png"]
    assert (tmp_path / "out" / "find_lr.png").read_bytes()[:4] == b"\x89PNG"
    assert main([*words, "--max_steps", "2"]) == 0
    adapter = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert main([*words, "--find_lr"]) == 0  # beside the run, of which it changes nothing
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == adapter


def test_a_rate_that_is_not_finite_ends_it(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "growing_rates", lambda: growing_rates(40, 1e25, 1e35))
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    found = qgraft.find_lr(model, tokenizer, ROWS, arguments(tmp_path / "out", plot_loss=True))
    told = json.loads((tmp_path / "out" / "find_lr.json").read_text())
    assert (
        found.diverged
        and len(found.losses) < 5
        and told["suggested"] is None
        and (tmp_path / "out" / "find_lr.png").is_file()
    )


def test_what_has_no_meaning_beside_it_is_refused(tiny_gguf, tmp_path):
    with pytest.raises(OptionError, match="find_lr: train"):
        train(*qgraft.load(tiny_gguf("llama").path), ROWS, arguments(tmp_path, find_lr=True))
    for options in ({"do_train": True, "do_eval": True}, {"resume_from_checkpoint": "auto"}):
        with pytest.raises(OptionError, match="find_lr"):
            arguments(tmp_path, find_lr=True, **options)
    with pytest.raises(OptionError, match="find_lr is for a run alone"):
        check_jobs([arguments(tmp_path / name, find_lr=name == "a") for name in "ab"])
    assert parse_arguments(["--output_dir", str(tmp_path), "--use_cpu", "--find_lr"]).find_lr is True


def test_a_broken_base_is_named(make_gguf, tmp_path):
    """Not called a divergence, of which a lower rate would be the cure."""
    weight = np.full((64, 256), 0.1, np.float32)
    weight[3, 3] = np.nan
    make_gguf(tmp_path / "tiny.gguf", extra={"blk.1.ffn_down.weight": weight})
    model, tokenizer = qgraft.load(tmp_path / "tiny.gguf")
    with pytest.raises(TrainingError, match=r"(?s)first step.*the base holds NaN.*layers\.1\.mlp\.down_proj"):
        qgraft.find_lr(model, tokenizer, ROWS, arguments(tmp_path / "out"))
    assert not (tmp_path / "out" / "find_lr.json").exists()
