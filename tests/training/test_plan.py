"""Which samples each step learns: the order of accelerate's sampler, the counts of transformers' Trainer."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from qgraft.errors import OptionError
from qgraft.training.plan import Plan, plan_of


def arguments(**options):
    defaults = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": -1, "num_train_epochs": 2,
                "seed": 42, "data_seed": None, "train_sampling_strategy": "random",
                "dataloader_drop_last": False}  # fmt: skip
    return SimpleNamespace(**{**defaults, **options})


def test_epochs_have_the_order_of_the_sampler_that_transformers_takes():
    plan = plan_of(arguments(seed=7, num_train_epochs=3), 21, 1)
    sampler = SeedableRandomSampler(range(21), data_seed=7)
    for epoch in range(3):
        ours = [index for step in range(6) for index in plan.step(6 * epoch + step)]
        assert ours == list(sampler)


class Seen(TrainerCallback):
    """The steps of transformers' Trainer as its callbacks see them."""

    def __init__(self):
        self.epochs, self.ends, self.plan = [], [], None

    def on_train_begin(self, args, state, control, **kwargs):
        self.plan = state.max_steps, state.num_train_epochs

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs.append(state.epoch)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ends.append(state.global_step)


class Line(nn.Module):
    """Something to be trained."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return {"loss": (self.weight * x).sum()}


@pytest.mark.spread(3)
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("steps", [{"max_steps": 7}, {"num_train_epochs": 2}, {"num_train_epochs": 1.5}])
@pytest.mark.parametrize("samples, batch, accumulated", [(10, 4, 1), (11, 2, 4), (12, 3, 2), (5, 4, 3)])
def test_steps_and_epochs_are_those_of_transformers_trainer(samples, batch, accumulated, steps, drop_last, tmp_path):
    seen = Seen()
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, use_cpu=True,
        dataloader_drop_last=drop_last, report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no",
        **steps,
    )  # fmt: skip
    rows = [{"x": torch.tensor(float(n))} for n in range(samples)]
    Trainer(model=Line(), args=args, train_dataset=rows, callbacks=[seen]).train()
    plan = plan_of(args, samples, 1)
    assert (plan.steps, plan.epochs) == seen.plan
    assert [plan.epoch_after(step + 1) for step in range(plan.steps)] == pytest.approx(seen.epochs)
    ends = {step for step in range(1, plan.steps + 1) if step % plan.steps_per_epoch == 0} | {plan.steps}
    assert sorted(ends) == seen.ends


@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([None, 3]),
    st.booleans(),
    st.integers(1, 3),
)
def test_an_epoch_has_every_sample_once_and_whole_batches(samples, batch, accumulation, seed, drop_last, epoch):
    plan = Plan(samples, batch, accumulation, seed, drop_last, 10**6)
    if not plan.batches_per_epoch:
        return
    first = epoch * plan.steps_per_epoch
    steps = [plan.step(first + number) for number in range(plan.steps_per_epoch)]
    learned = [index for step in steps for index in step]
    assert len(set(learned)) == len(learned)
    assert len(learned) == (samples // batch * batch if drop_last else samples)
    assert all(len(step) == batch * accumulation for step in steps[:-1])
    assert plan.next_epoch(first) == first + plan.steps_per_epoch
    assert sum(plan.batches(first + number) for number in range(len(steps))) == plan.batches_per_epoch


def test_processes_make_batches_larger():
    assert plan_of(arguments(), 40, 2).step(0) == plan_of(arguments(per_device_train_batch_size=8), 40, 1).step(0)


def test_dropping_the_only_batch_is_refused():
    with pytest.raises(OptionError, match=r"there are 3 samples, fewer than the 4 of one"):
        plan_of(arguments(dataloader_drop_last=True), 3, 1)
