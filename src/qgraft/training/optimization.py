"""What an optimizer step does with gradients: clip, move the parameters, move the learning rate.

Optimizers and schedules go by the names that transformers has for them. In float16 (on a GPU) losses are scaled, and
torch's GradScaler skips the steps that overflow.
"""

import warnings
from collections.abc import Collection, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.optimization import Adafactor
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from qgraft.errors import OptionError
from qgraft.training.gradients import Gradients

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments


class Optimization:
    """The optimizer of a run with its schedule and the gradients of its parameters.

    Attributes:
        by_loss: whether the schedule goes by the held-out loss, and is stepped only when that was measured.
        norm: that of the gradient of the last step, before clipping.
    """

    def __init__(
        self,
        args: "TrainArguments",
        parameters: Sequence[nn.Parameter],
        steps: int,
        rates: Sequence[tuple[float, Sequence[nn.Parameter]]] | None = None,
        vectors: Collection[nn.Parameter] = (),
    ) -> None:
        """The same of some parameters.

        Args:
            rates: the parameters in groups, each with its peak learning rate; None for args.learning_rate for all.
            vectors: those of one dimension that decay as matrices do.
        """
        self.gradients = Gradients(parameters)
        self.optimizer = _make_optimizer(args, rates or [(args.learning_rate, parameters)], vectors)
        self.schedule: Any = get_scheduler(
            args.lr_scheduler_type, self.optimizer, num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps, scheduler_specific_kwargs=cast(dict[str, Any] | None, args.lr_scheduler_kwargs),
        )  # fmt: skip
        self.by_loss = follows_loss(self.schedule)
        self.scaler = torch.amp.GradScaler("cuda") if args.fp16 else None
        self.norm = 0.0
        self._most = args.max_grad_norm

    @property
    def rate(self) -> float:
        """The learning rate of the next step, of the first group."""
        return float(self.schedule.get_last_lr()[0])

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip(self) -> bool:
        """Clip the gradients; returns whether they are finite, or are the scaler's affair."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        self.norm = float(self.gradients.clip(self._most))
        return self.scaler is not None or isfinite(self.norm)

    def step(self) -> None:
        """Move the parameters that have gradients, and the schedule unless float16 overflowed."""
        scale = 1.0
        if self.scaler is None:
            self.optimizer.step()
        else:
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if not self.by_loss and (self.scaler is None or self.scaler.get_scale() >= scale):
            self.schedule.step()

    def state(self) -> dict[str, Any]:
        """What load() takes."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "scaler": scaler}

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from a state. The options stay those of now: a schedule that is a function of the step is computed anew."""
        groups = self.optimizer.state_dict()["param_groups"]
        if self.by_loss:  # such a schedule has no other place for its rate
            groups = [
                {**now, "lr": then["lr"]} for now, then in zip(groups, saved["optimizer"]["param_groups"], strict=True)
            ]
        self.optimizer.load_state_dict({"state": saved["optimizer"]["state"], "param_groups": groups})
        if self.scaler is not None and saved["scaler"] is not None:
            self.scaler.load_state_dict(saved["scaler"])
        if self.by_loss:
            self.schedule.load_state_dict(saved["schedule"])
        else:
            self.go_to(saved["schedule"]["last_epoch"])

    def go_to(self, step: int) -> None:
        """Set the learning rate to that of `step`, which a schedule that goes by the loss has no idea of."""
        if step and not self.by_loss:
            self.schedule.last_epoch = step - 1
            with warnings.catch_warnings():  # torch has not seen the optimizer step, and says so
                warnings.simplefilter("ignore", UserWarning)
                self.schedule.step()


def check_optimization(args: "TrainArguments") -> None:
    """Raise OptionError for an optimizer or a schedule that its options do not fit, before anything is loaded."""
    parameter = nn.Parameter(torch.zeros(1, 1))
    try:
        trial = Optimization(args, [parameter], 10)
        for _ in range(0 if trial.by_loss else 10):
            trial.optimizer.step()
            trial.schedule.step()
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        kind, schedule = OptimizerNames(args.optim).value, SchedulerType(args.lr_scheduler_type).value
        raise OptionError(
            f"optim={kind}, lr_scheduler_type={schedule}, lr_scheduler_kwargs={args.lr_scheduler_kwargs}: {error}"
        ) from error


def follows_loss(schedule: Any) -> bool:
    """Whether a schedule goes by the held-out loss, and is stepped only when that was measured."""
    return not isinstance(schedule, LambdaLR)


def _make_optimizer(
    args: "TrainArguments", rates: Sequence[tuple[float, Sequence[nn.Parameter]]], vectors: Collection[nn.Parameter]
) -> Optimizer:
    """The optimizer of args.optim for parameters with these learning rates. Weights decay, biases do not."""
    groups: list[dict[str, Any]] = []
    decaying = {id(parameter) for parameter in vectors}
    for rate, parameters in rates:
        for decay, chosen in (
            (args.weight_decay, [p for p in parameters if p.dim() > 1]),
            (0.0, [p for p in parameters if p.dim() <= 1 and id(p) not in decaying]),
            *([(args.weight_decay, own)] if (own := [p for p in parameters if id(p) in decaying]) else []),
        ):
            groups.append({"params": chosen, "weight_decay": decay, "lr": rate})
    kind, options = _OPTIMIZERS[OptimizerNames(args.optim).value]
    if kind is torch.optim.AdamW:
        options = {**options, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    optimizer: Optimizer = kind(groups, lr=args.learning_rate, **options)
    return optimizer


# with another one of these an optimizer's state says nothing
OF_OPTIMIZER = {"optim", "lr_scheduler_type", "learning_rate", "loraplus_lr_ratio"}
_OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw_torch_fused": (torch.optim.AdamW, {"fused": True}),
    "adamw_torch": (torch.optim.AdamW, {}),
    "adafactor": (Adafactor, {"scale_parameter": False, "relative_step": False}),
    "sgd": (torch.optim.SGD, {}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
}
OPTIMIZERS = tuple(_OPTIMIZERS)
STATES = {"adamw_torch_fused": 2, "adamw_torch": 2, "adagrad": 1, "rmsprop": 1}  # numbers kept for each that is trained
OF_TORCH = {  # torch's names for them -> transformers'
    "AdamW": "adamw_torch_fused", "adamw": "adamw_torch_fused", "SGD": "sgd", "Adagrad": "adagrad", "RMSprop": "rmsprop",
    "Adafactor": "adafactor",
}  # fmt: skip
