"""Optimizers and schedules: transformers' own choice of class and options, and going on from a state."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from qgraft.training.gradients import Gradients
from qgraft.training.optimization import OF_TORCH, OPTIMIZERS, Optimization


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (3, 2), (5,))]


def arguments(folder, **options):
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_classes_and_options_are_those_that_transformers_takes(name, tmp_path):
    args = arguments(tmp_path, optim=name, learning_rate=0.03, adam_beta1=0.8, adam_epsilon=1e-5, weight_decay=0.2)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    ours = Optimization(args, parameters(), 10).optimizer
    theirs = kind([{"params": parameters()}], **options)
    assert type(ours) is kind
    for key, value in theirs.defaults.items():
        if key != "weight_decay":
            assert ours.defaults[key] == value, key
    weights, biases = ours.param_groups
    assert [p.dim() for p in weights["params"]] == [2, 2] and [p.dim() for p in biases["params"]] == [1]
    assert (weights["weight_decay"], biases["weight_decay"]) == (0.2, 0.0)


def test_torchs_names_stand_for_optimizers_that_are_there():
    assert set(OF_TORCH.values()) <= set(OPTIMIZERS)
    assert all(hasattr(torch.optim, name) for name in OF_TORCH if name not in ("adamw",))


def steps(optimization, trained, numbers):
    """Take these steps, each with a gradient of its own; returns the rates."""
    rates = []
    for number in numbers:
        optimization.gradients.clear()
        generator = torch.Generator().manual_seed(number)
        loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in trained)
        optimization.backward(loss)
        assert optimization.clip()
        rates.append(optimization.rate)
        optimization.step()
    return rates


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_going_on_from_a_state_ends_in_the_same_bits(name, kind, tmp_path):
    args = arguments(tmp_path, optim=name, learning_rate=0.03, lr_scheduler_type=kind, warmup_steps=3)
    whole, part = parameters(), parameters()
    rates = steps(Optimization(args, whole, 10), whole, range(10))
    first = Optimization(args, part, 10)
    begun = steps(first, part, range(4))
    state = copy.deepcopy(first.state())
    again = [nn.Parameter(p.detach().clone()) for p in part]
    second = Optimization(args, again, 10)
    second.load(state)
    assert begun + steps(second, again, range(4, 10)) == rates
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_options_of_now_count_when_a_run_goes_on(tmp_path):
    trained = parameters()
    first = Optimization(arguments(tmp_path, learning_rate=0.1, weight_decay=0.3), trained, 10)
    steps(first, trained, range(5))
    second = Optimization(arguments(tmp_path, learning_rate=0.4), parameters(), 20)
    second.load(first.state())
    assert second.rate == pytest.approx(0.4 * (1 - 5 / 20))
    assert second.optimizer.param_groups[0]["weight_decay"] == 0.0


def test_gradients_are_views_that_are_clipped_as_torch_clips():
    ours, theirs = parameters(), parameters()
    gradients = Gradients(ours)
    gradients.clear()
    for trained in (ours, theirs):
        sum((p**3).sum() for p in trained).backward()
    norm = gradients.clip(1.0)
    expected = nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
        assert a.grad.untyped_storage().data_ptr() == gradients.sent.untyped_storage().data_ptr()
    before = [p.grad.clone() for p in ours]
    gradients.clip(0.0)  # no clipping
    assert all(torch.equal(p.grad, b) for p, b in zip(ours, before, strict=True))
    gradients.drop()
    assert all(p.grad is None for p in ours)
