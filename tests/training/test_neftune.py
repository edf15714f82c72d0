"""NEFTune: the noise of transformers' own hook for each sample by itself, in packed rows, stopped runs and joint jobs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.integrations.neftune import neftune_post_forward_hook

import qgraft
from qgraft import storage
from qgraft.errors import OptionError, UnsupportedError
from qgraft.jobs.train import train_jobs
from qgraft.passes.neftune import Noisy, noisy_embeddings
from qgraft.training.run import train

ROWS = [{"instruction": f"question {i}", "output": f"answer {i % 3} " * (1 + i % 4)} for i in range(12)]


def arguments(folder: Path, **options: Any) -> qgraft.TrainArguments:
    chosen = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_steps": 2, "logging_steps": 1, "use_cpu": True,
              "learning_rate": 1e-2, "r": 2, "plot_loss": False, "compute": "float32"}  # fmt: skip
    return qgraft.TrainArguments(output_dir=str(folder), **{**chosen, "neftune_noise_alpha": 5.0, **options})


def run(tiny_gguf: Any, folder: Path, held_out: Any = None, callbacks: Any = (), **options: Any) -> Any:
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    args = arguments(folder, **options)
    report = train(model, tokenizer, ROWS, args, eval_dataset=held_out, callbacks=callbacks)
    return report, model, tokenizer


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_each_sample_of_a_row_gets_the_noise_that_transformers_gives_it_alone(kind, tiny_gguf, random_ids):
    model, _ = qgraft.load(tiny_gguf(kind).path)
    lengths = [7, 1, 12]
    ids = random_ids(model)[:1].repeat(1, 20)[:, : sum(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    table = model.get_input_embeddings()
    plain = table(ids)
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(3)
    with noisy_embeddings(model, [Noisy(positions, 5.0)]):
        noisy = table(ids)
    assert noisy.dtype == plain.dtype and torch.equal(table(ids), plain)

    class Module:
        training, neftune_noise_alpha = True, 5.0

    torch.manual_seed(seed)
    expected = [neftune_post_forward_hook(Module, None, part) for part in plain.split(lengths, dim=1)]
    torch.testing.assert_close(noisy, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-6)
    assert float((noisy - plain).abs().max()) > 0.01


def test_parts_draw_from_generators_of_their_own_and_those_without_noise_draw_nothing(tiny_gguf, random_ids):
    model, _ = qgraft.load(tiny_gguf("llama").path)
    ids, table = random_ids(model)[:1, :6].repeat(1, 2), model.get_input_embeddings()
    half = ids.shape[1] // 2
    positions = torch.arange(half)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    before = torch.get_rng_state(), generators[1].get_state()
    with noisy_embeddings(model, [Noisy(positions, 5.0, generators[0]), Noisy(positions, None, generators[1])]):
        both = table(ids)
    assert torch.equal(before[0], torch.get_rng_state()) and torch.equal(before[1], generators[1].get_state())
    with noisy_embeddings(model, [Noisy(positions, 5.0, torch.Generator().manual_seed(1))]):
        alone = table(ids[:, :half])
    assert torch.equal(both[:, :half], alone) and torch.equal(both[:, half:], table(ids[:, half:]))
    with noisy_embeddings(model, [Noisy(positions, 5.0)]), pytest.raises(UnsupportedError, match="embeds"):
        table(ids[:, :2])


def test_a_run_goes_on_to_the_same_bytes(tiny_gguf, tmp_path):
    for name in ("whole", "part"):
        run(tiny_gguf, tmp_path / name, lora_dropout=0.1)
    assert weights(tmp_path / "whole") == weights(tmp_path / "part")
    storage.remove_folder(tmp_path / "part" / "checkpoint-6")
    (tmp_path / "part" / "adapter_model.safetensors").unlink()
    run(tiny_gguf, tmp_path / "part", lora_dropout=0.1, resume_from_checkpoint="true")
    assert weights(tmp_path / "whole") == weights(tmp_path / "part")
    run(tiny_gguf, tmp_path / "zero", neftune_noise_alpha=0.0)
    run(tiny_gguf, tmp_path / "none", neftune_noise_alpha=None)
    assert weights(tmp_path / "zero") == weights(tmp_path / "none") != weights(tmp_path / "whole")


def test_what_is_held_out_is_measured_without_noise(tiny_gguf, tmp_path):
    class Look(TrainerCallback):
        same: list[bool] = []  # noqa: RUF012  # of one test

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            ids = torch.arange(3, 12)[None]
            table = model.get_input_embeddings()
            self.same.append(torch.equal(table(ids), table(ids)))

    options = {"eval_strategy": "epoch", "load_best_model_at_end": False, "neftune_noise_alpha": 50.0}
    report, model, tokenizer = run(tiny_gguf, tmp_path / "out", ROWS[:3], [Look()], **options)
    plain, *_ = run(tiny_gguf, tmp_path / "plain", ROWS[:3], **{**options, "neftune_noise_alpha": None})
    assert report.metrics["eval_loss_before"] == plain.metrics["eval_loss_before"]
    assert report.metrics["train_loss"] != pytest.approx(plain.metrics["train_loss"], rel=1e-3)
    assert Look.same and all(Look.same)
    assert report.metrics["eval_loss"] == pytest.approx(qgraft.evaluate(model, tokenizer, ROWS[:3]).loss, rel=1e-5)


def test_a_job_among_others_gets_the_noise_that_it_gets_alone(tiny_gguf, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    jobs = {"noisy": {"lora_dropout": 0.2}, "plain": {"neftune_noise_alpha": None, "seed": 3}, "more": {"seed": 5}}
    told = {"dataset": str(tmp_path / "rows.jsonl"), "max_tokens_per_pass": 100, "save_strategy": "no"}
    model, tokenizer = qgraft.load(tiny_gguf("llama").path)
    each = [arguments(tmp_path / "jobs" / name, adapter_name=name, **{**told, **own}) for name, own in jobs.items()]
    assert all(report.finished for report in train_jobs(model, tokenizer, each))
    for name, own in jobs.items():
        model, tokenizer = qgraft.load(tiny_gguf("llama").path)
        train(model, tokenizer, None, arguments(tmp_path / "alone" / name, **{**told, **own}))
        together, alone = (load_file(tmp_path / k / name / "adapter_model.safetensors") for k in ("jobs", "alone"))
        assert together.keys() == alone.keys()
        for key, tensor in alone.items():
            assert float((together[key] - tensor).norm()) < 1e-4 * float(tensor.norm())


@pytest.mark.parametrize("options", [{"stage": "dpo"}, {"cache_frozen_layers": True}])
def test_what_does_not_go_with_noise_is_refused(options, tmp_path):
    with pytest.raises(OptionError, match="neftune_noise_alpha"):
        arguments(tmp_path, **options)
