"""Which samples each optimizer step learns: a pure function of the run's options, so a run can go on from any step.

    epoch    e draws its order from the seed data_seed + e (seed + e where there is none), or keeps the rows' order
    batch    per_device_train_batch_size samples of that order for each process
    step     gradient_accumulation_steps batches, the last step of an epoch what is left

Steps and epochs mean what they mean in transformers' Trainer, and the order is the one that it draws.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from qgraft.errors import OptionError

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments


@dataclass
class Plan:
    """The steps of a run.

    Attributes:
        samples: how many there are.
        batch_size: samples of a batch, of all processes together.
        accumulation: batches of a step.
        seed: what orders are drawn with; None for the rows' own order.
        drop_last: whether an incomplete batch at the end of an epoch is left out.
        steps: of the whole run.
    """

    samples: int
    batch_size: int
    accumulation: int
    seed: int | None
    drop_last: bool
    steps: int
    _order: tuple[int, list[int]] = field(default=(-1, []), repr=False)  # of the epoch that was asked for last

    @property
    def batches_per_epoch(self) -> int:
        """Whole ones only with `drop_last`."""
        return self.samples // self.batch_size if self.drop_last else math.ceil(self.samples / self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every sample is learned once."""
        return math.ceil(self.batches_per_epoch / self.accumulation)

    @property
    def epochs(self) -> int:
        """How many are begun."""
        return math.ceil(self.steps / self.steps_per_epoch)

    def step(self, number: int) -> list[int]:
        """The samples of optimizer step `number`, counted from 0, by their places in the list of all."""
        epoch, within = divmod(number, self.steps_per_epoch)
        size = self.batch_size * self.accumulation
        end = self.batches_per_epoch * self.batch_size  # behind it is only what drop_last leaves out
        return self._order_of(epoch)[within * size : min(end, (within + 1) * size)]

    def batches(self, number: int) -> int:
        """How many batches step `number` takes: `accumulation`, or fewer at the end of an epoch."""
        return math.ceil(len(self.step(number)) / self.batch_size)

    def epoch_after(self, steps: int) -> float:
        """How many epochs so many steps are, in whole batches, as transformers counts them."""
        epoch, within = divmod(steps, self.steps_per_epoch)
        return epoch + min(within * self.accumulation, self.batches_per_epoch) / self.batches_per_epoch

    def next_epoch(self, number: int) -> int:
        """The first step of the epoch behind that of step `number`."""
        return (number // self.steps_per_epoch + 1) * self.steps_per_epoch

    def _order_of(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            if self.seed is None:
                order = list(range(self.samples))
            else:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                order = torch.randperm(self.samples, generator=generator).tolist()
            self._order = epoch, order
        return self._order[1]


def plan_of(args: "TrainArguments", samples: int, processes: int) -> Plan:
    """The steps of a run with these options. Raises OptionError where they leave none."""
    seed = args.seed if args.data_seed is None else args.data_seed
    plan = Plan(
        samples, args.per_device_train_batch_size * processes, args.gradient_accumulation_steps,
        None if args.train_sampling_strategy == "sequential" else seed, args.dataloader_drop_last, 0,
    )  # fmt: skip
    if not plan.batches_per_epoch:
        raise OptionError(
            f"dataloader_drop_last leaves no batch: there are {samples} samples, fewer than the {plan.batch_size} of one",
            hint="leave it out, or take smaller batches",
        )
    plan.steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * plan.steps_per_epoch)
    return plan
