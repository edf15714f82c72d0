"""The trainer takes whatever adapter is active: here a prefix; LoRAs go through whole runs in test_run.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import qgraft
from qgraft.adapters.attach import prefix_encoder, prefix_state_dict
from qgraft.data.batches import IGNORED
from qgraft.data.tokenizing import Sample
from qgraft.errors import CheckpointError
from qgraft.training.decoder import padding_free
from qgraft.training.evaluate import evaluate_samples
from qgraft.training.trainer import LoraTrainer


def make_samples(count: int = 12) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 250, (4 + n % 3,), generator=generator).tolist() for n in range(count)]
    return [Sample([*p, 7, 8, 9], [IGNORED] * len(p) + [7, 8, 9], f"rows:{n}") for n, p in enumerate(prompts)]


def run(tiny_gguf: Any, folder: Path, **options: Any) -> tuple[PreTrainedModel, LoraTrainer]:
    model, _ = qgraft.load(tiny_gguf("llama").path)
    torch.manual_seed(0)
    qgraft.attach_prefix(model, 4, prefix_projection=True)
    args = qgraft.TrainArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True,
        save_strategy="no", **options,
    )  # fmt: skip
    samples = make_samples()
    with padding_free(model, samples) as problem:
        assert problem is None
        trainer = LoraTrainer(model, args, samples, [], 16, [])
        trainer.train()
    return model.eval(), trainer


def test_a_prefix_learns_and_nothing_else_does(tiny_gguf, tmp_path):
    model, _ = run(tiny_gguf, tmp_path)
    base, _ = qgraft.load(tiny_gguf("llama").path)
    trained = evaluate_samples(model, make_samples()).loss
    assert trained < evaluate_samples(base, make_samples()).loss - 0.5
    torch.manual_seed(0)
    qgraft.attach_prefix(base, 4, prefix_projection=True)
    before = prefix_state_dict(base)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in prefix_state_dict(model).items())
    for name, tensor in base.state_dict().items():
        assert ".prefixes." in name or torch.equal(tensor, model.state_dict()[name])


def test_checkpointing_changes_nothing_and_draws_the_same_dropout(tiny_gguf, tmp_path):
    models = [run(tiny_gguf, tmp_path / str(on), gradient_checkpointing=on)[0] for on in (False, True)]
    assert prefix_encoder(models[0]).config.prefix_dropout == 0.1
    for (name, tensor), other in zip(
        prefix_state_dict(models[0]).items(), prefix_state_dict(models[1]).values(), strict=True
    ):
        torch.testing.assert_close(tensor, other, rtol=1e-3, atol=1e-4, msg=name)


def test_the_tensors_of_a_checkpoint_are_taken_back(tiny_gguf, tmp_path):
    model, trainer = run(tiny_gguf, tmp_path)
    other, _ = qgraft.load(tiny_gguf("llama").path)
    for projection in (True, False):
        qgraft.detach_adapter(other)
        qgraft.attach_prefix(other, 4, prefix_projection=projection)
        qgraft.save_adapter(other, tmp_path / str(projection))
        if projection:
            trainer._load_from_checkpoint(str(tmp_path / "True"))
            state = prefix_state_dict(other)
            assert all(torch.equal(tensor, state[name]) for name, tensor in prefix_state_dict(model).items())
    with pytest.raises(CheckpointError, match="holds another adapter"):
        trainer._load_from_checkpoint(str(tmp_path / "False"))
