"""The loop trains whatever adapter is named: here a prefix; LoRAs go through whole runs in test_run.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import qgraft
from qgraft.adapters.base import find_adapter
from qgraft.adapters.prefix import encoder_of
from qgraft.data.batches import IGNORED
from qgraft.data.tokenizing import Sample
from qgraft.errors import CheckpointError
from qgraft.passes.decoder import padding_free
from qgraft.training.adapter import take_trained
from qgraft.training.loop import TrainingLoop
from qgraft.training.objective import evaluate_samples


def make_samples(count: int = 12) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 250, (4 + n % 3,), generator=generator).tolist() for n in range(count)]
    return [Sample([*p, 7, 8, 9], [IGNORED] * len(p) + [7, 8, 9], f"rows:{n}") for n, p in enumerate(prompts)]


def run(tiny_gguf: Any, folder: Path, **options: Any) -> tuple[PreTrainedModel, TrainingLoop]:
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
        loop = TrainingLoop(model, args, samples, [], 16)
        loop.run()
    return model.eval(), loop


def test_a_prefix_learns_and_nothing_else_does(tiny_gguf, tmp_path):
    model, _ = run(tiny_gguf, tmp_path)
    base, _ = qgraft.load(tiny_gguf("llama").path)
    trained = evaluate_samples(model, make_samples()).loss
    assert trained < evaluate_samples(base, make_samples()).loss - 0.5
    torch.manual_seed(0)
    qgraft.attach_prefix(base, 4, prefix_projection=True)
    before = find_adapter(base).state_dict()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in find_adapter(model).state_dict().items())
    for name, tensor in base.state_dict().items():
        assert ".prefixes." in name or torch.equal(tensor, model.state_dict()[name])


def test_checkpointing_changes_nothing_and_draws_the_same_dropout(tiny_gguf, tmp_path):
    models = [run(tiny_gguf, tmp_path / str(on), gradient_checkpointing=on)[0] for on in (False, True)]
    assert encoder_of(find_adapter(models[0])).config.prefix_dropout == 0.1
    for (name, tensor), other in zip(
        find_adapter(models[0]).state_dict().items(), find_adapter(models[1]).state_dict().values(), strict=True
    ):
        torch.testing.assert_close(tensor, other, rtol=1e-3, atol=1e-4, msg=name)


def test_the_tensors_of_a_checkpoint_are_taken_back(tiny_gguf, tmp_path):
    model, _ = run(tiny_gguf, tmp_path)
    other, _ = qgraft.load(tiny_gguf("llama").path)
    for projection in (True, False):
        qgraft.detach_adapter(other)
        qgraft.attach_prefix(other, 4, prefix_projection=projection)
        qgraft.save_adapter(other, tmp_path / str(projection))
        if projection:
            take_trained(model, tmp_path / "True", "default")
            state = find_adapter(other).state_dict()
            assert all(torch.equal(tensor, state[name]) for name, tensor in find_adapter(model).state_dict().items())
    with pytest.raises(CheckpointError, match="holds another adapter"):
        take_trained(model, tmp_path / "False", "default")


@pytest.mark.spread(2)
@pytest.mark.parametrize("tokens_per_pass", [8, 1000])
@pytest.mark.parametrize("batch, accumulated", [(6, 1), (2, 3)])
def test_a_step_learns_the_weighted_mean_whatever_its_parts(tiny_gguf, tmp_path, batch, accumulated, tokens_per_pass):
    """One step of plain gradient descent on all samples; the gradient computed by hand in float64 from the own logits."""
    model, _ = qgraft.load(tiny_gguf("llama").path)
    qgraft.attach_lora(model, r=2)
    torch.manual_seed(0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.05)
    before = {name: p.detach().clone() for name, p in trained.items()}
    samples = [
        Sample(each.input_ids, each.labels, each.source,
               [0.0 if label == IGNORED else (n + 1) / 2 for label in each.labels] if n % 2 else None)
        for n, each in enumerate(make_samples(6))
    ]  # fmt: skip
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for number, sample in enumerate(samples):
        log_p = model(input_ids=torch.tensor([sample.input_ids])).logits[0].double().log_softmax(-1)
        each = (number + 1) / 2 if number % 2 else 1.0
        places = [place for place, label in enumerate(sample.labels[1:]) if label != IGNORED]
        total = total - each * sum(log_p[place, sample.labels[place + 1]] for place in places)
        weight += each * len(places)
    wanted = torch.autograd.grad(total / weight, list(trained.values()))
    args = qgraft.TrainArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated,
        learning_rate=1.0, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, use_cpu=True, save_strategy="no",
        compute="float32", logging_steps=1,
    )  # fmt: skip
    with padding_free(model, samples):
        loop = TrainingLoop(model, args, samples, [], tokens_per_pass)
        loop.run()
    assert loop.events.state.log_history[0]["loss"] == pytest.approx(float(total.detach()) / weight, rel=1e-3)
    for (name, parameter), grad in zip(trained.items(), wanted, strict=True):
        torch.testing.assert_close(before[name] - parameter, grad, rtol=3e-3, atol=3e-5, msg=name)
