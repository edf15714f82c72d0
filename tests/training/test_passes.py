"""Runs whose passes are replayed end as those whose passes are not; what is refused is refused before anything is done."""

import pytest
import torch
from safetensors.torch import load_file

import qgraft
from qgraft.errors import OptionError
from qgraft.jobs.train import train_jobs
from qgraft.passes import graphed, static_pass
from qgraft.training import passes
from qgraft.training.arguments import arguments_from_dict, parse_arguments
from qgraft.training.run import train

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 5)} for i in range(16)]


@pytest.fixture
def replaying(monkeypatch):
    """Graphs on a CPU: a replay is the recorded work once more, on tables that have been filled since."""
    monkeypatch.setattr(static_pass, "recorded", lambda work, device, pool: work)
    monkeypatch.setattr(passes, "why_eager", graphed.why_changing)


def run(tiny_gguf, folder, **options):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path, device="cpu")
    options = {
        "use_cpu": True, "compute": "float32", "max_steps": 12, "save_strategy": "no", "r": 2, "learning_rate": 1e-2,
        "val_size": 3, "max_tokens_per_pass": 256, "per_device_train_batch_size": 4, "logging_steps": 1,
    } | options  # fmt: skip
    report = train(model, tokenizer, ROWS, qgraft.TrainArguments(output_dir=str(folder), **options))
    return report, load_file(folder / "adapter_model.safetensors")


def near(got, expected):
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_run_of_replayed_passes_learns_what_a_run_learns(tiny_gguf, tmp_path, replaying):
    eager, adapter = run(tiny_gguf, tmp_path / "eager", cuda_graphs="no")
    report, replayed = run(tiny_gguf, tmp_path / "graphs", cuda_graphs="yes")
    assert any("replayed" in note for note in report.notes) and not any("replayed" in note for note in eager.notes)
    near(replayed, adapter)
    for name in ("train_loss", "eval_loss", "tokens"):
        assert report.metrics[name] == pytest.approx(eager.metrics[name], rel=1e-4)
    assert report.metrics["eval_loss"] < report.metrics["eval_loss_before"]


def test_a_run_of_replayed_passes_goes_on(tiny_gguf, tmp_path, replaying):
    _, expected = run(tiny_gguf, tmp_path / "whole", cuda_graphs="yes", lr_scheduler_type="constant")
    options = {"cuda_graphs": "yes", "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 7}
    run(tiny_gguf, tmp_path / "parts", max_steps=7, **options)
    _, adapter = run(tiny_gguf, tmp_path / "parts", resume_from_checkpoint="true", **options)
    near(adapter, expected)


def test_a_step_whose_loss_is_not_finite_is_skipped(tiny_gguf, tmp_path, replaying, monkeypatch):
    """Replays that give NaN, as a GPU would: the step's gradients are dropped, and the next step has its own."""
    learn, calls = graphed.GraphedPasses.learn, []

    def broken(self, batch, count):
        loss = learn(self, batch, count)
        calls.append(loss)
        if len(calls) == 5:
            for parameter in self.parameters:
                parameter.grad.fill_(torch.nan)
            return torch.tensor(torch.nan)
        return loss

    monkeypatch.setattr(graphed.GraphedPasses, "learn", broken)
    report, adapter = run(tiny_gguf, tmp_path, cuda_graphs="yes")
    assert report.metrics["skipped_steps"] == 1 and len(calls) >= 12
    assert all(tensor.isfinite().all() for tensor in adapter.values())


def test_graphs_that_are_asked_for_and_cannot_be_are_an_error(tiny_gguf, tmp_path):
    with pytest.raises(OptionError, match="cuda_graphs=yes: the model is not on a GPU"):
        run(tiny_gguf, tmp_path / "out", cuda_graphs="yes")
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gradient_checkpointing": True}, "gradient checkpointing"),
        ({"full_determinism": True}, "full_determinism"),
        ({"cache_frozen_layers": True, "layers_to_transform": "1"}, "cache_frozen_layers"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_options_that_change_a_pass_do_not_go_with_graphs(tiny_gguf, tmp_path, replaying, options, reason):
    with pytest.raises(OptionError, match=f"cuda_graphs=yes: .*{reason}"):
        run(tiny_gguf, tmp_path, cuda_graphs="yes", **options)
    if "full_determinism" not in options:  # which torch keeps for the whole process
        report, _ = run(tiny_gguf, tmp_path, cuda_graphs="auto", max_steps=1, **options)
        assert not any("cuda_graphs" in note for note in report.notes)


def test_the_option_is_said_in_three_ways():
    assert qgraft.TrainArguments(use_cpu=True).cuda_graphs == "auto"
    assert arguments_from_dict({"use_cpu": True, "cuda_graphs": False}).cuda_graphs == "no"  # YAML's no
    assert arguments_from_dict({"use_cpu": True, "cuda_graphs": True}).cuda_graphs == "yes"
    assert parse_arguments(["--use_cpu", "--cuda_graphs", "no"]).cuda_graphs == "no"
    with pytest.raises(OptionError, match="cuda_graphs='never': expected auto, yes or no"):
        qgraft.TrainArguments(use_cpu=True, cuda_graphs="never")


def test_jobs_pass_together_so_none_asks_for_graphs(tiny_gguf, tmp_path):
    model, tokenizer = qgraft.load(tiny_gguf("llama").path, device="cpu")
    jobs = [qgraft.TrainArguments(output_dir=str(tmp_path / name), use_cpu=True, cuda_graphs="yes") for name in "ab"]
    with pytest.raises(OptionError, match="cuda_graphs=yes is for a run alone"):
        train_jobs(model, tokenizer, jobs)
