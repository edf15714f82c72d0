"""One run in several processes (`torchrun`, `accelerate launch`): data-parallel, each with the whole model.

Every process knows all samples and the whole plan; of each step it computes the samples that fall to it (`share`). One
all-reduce of the one gradient tensor makes them one step, in which all optimizers do the same. What must be the same
everywhere is compared before the first step. Only the first process writes.

transformers' TrainingArguments joins the process group (gloo on CPUs, nccl on GPUs), as for its Trainer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qgraft.errors import TrainingError, option

if TYPE_CHECKING:
    from qgraft.training.arguments import TrainArguments


class Long(Protocol):
    """A sample of any kind."""

    @property
    def length(self) -> int:
        """How many tokens it has."""


Row = TypeVar("Row", bound=Long)


@dataclass(frozen=True)
class Processes:
    """Those of a run, seen from one of them: number `rank` of `count`."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of(cls, args: "TrainArguments") -> "Processes":
        """The processes that a launcher started beside this one, or this one alone."""
        return cls(args.process_index, args.world_size) if args.world_size > 1 else cls()

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def share(self, samples: Sequence[Row]) -> list[Row]:
        """Those of the samples that this process computes: about as many tokens as the others, in their order."""
        if self.count == 1:
            return list(samples)
        lengths = [sample.length for sample in samples]
        tokens, chosen = [0] * self.count, set[int]()
        for index in sorted(range(len(samples)), key=lambda index: -lengths[index]):  # the longest first
            least = tokens.index(min(tokens))
            tokens[least] += lengths[index]
            if least == self.rank:
                chosen.add(index)
        return [sample for index, sample in enumerate(samples) if index in chosen]

    def add(self, tensor: Tensor) -> Tensor:
        """The tensor, in place the sum of those of all processes."""
        if self.count > 1:
            with _ended_with_the_others():
                dist.all_reduce(tensor)
        return tensor

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """Of each flag, whether it is set in any process."""
        if self.count == 1:
            return list(flags)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return [bool(flag) for flag in self.add(torch.tensor(flags, dtype=torch.int32, device=device)).tolist()]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _ended_with_the_others():
            dist.all_gather_object(values, value)
        return values

    def check_same(self, values: dict[str, Any]) -> None:
        """Raise TrainingError, in all processes, where these differ from one to another."""
        every = self.gather(values)
        wrong = [
            f"{key}: {[each[key] for each in every]}" for key in values if any(e[key] != values[key] for e in every)
        ]
        if wrong:
            raise TrainingError(
                "the processes of this run do not train the same:\n  " + "\n  ".join(wrong),
                hint="give all of them the same options, files and versions",
            )


ALONE = Processes()


@contextmanager
def _ended_with_the_others() -> Iterator[None]:
    """Tell that another process ended where torch tells of a connection."""
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            f"another process of this run ended, or cannot be reached: {str(error).splitlines()[0]}",
            hint=f"its own message says why; {option('resume_from_checkpoint', 'auto')} goes on from the newest checkpoint",
        ) from error


def leave() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
