"""The random generators of a process: taken, put back, kept in a checkpoint, and drawn from by one thread's run at a time."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qgraft.errors import UnsupportedError

_RUNS = threading.RLock()  # held by the thread whose run draws


@contextmanager
def undisturbed() -> Iterator[None]:
    """Within the block no run of another thread draws from the process's generators: a run depends on its seed alone.

    Raises UnsupportedError where one does.
    """
    if not _RUNS.acquire(blocking=False):
        raise UnsupportedError(
            "another thread of this process trains: both runs would draw from the same random numbers",
            hint="train_jobs() trains several adapters of a model at once; train other models one after another, or in a "
            "process each",
        )
    try:
        yield
    finally:
        _RUNS.release()


@dataclass
class RandomState:
    """What Python, NumPy and torch will draw next."""

    python: Any
    numpy: tuple[Any, ...]  # its array as a list: a checkpoint is read without unpickling anything but tensors
    torch: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> "RandomState":
        """As it is."""
        name, keys, *others = np.random.get_state(legacy=True)
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(random.getstate(), (name, np.asarray(keys).tolist(), *others), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Make it so again."""
        random.setstate(self.python)
        name, keys, *others = self.numpy
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *others))
        torch.set_rng_state(self.torch)
        if self.cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.cuda)

    @contextmanager
    def drawn_from(self) -> Iterator[None]:
        """Within the block random numbers are drawn from here; afterwards the process's own are as they were."""
        outside = RandomState.now()
        self.restore()
        try:
            yield
        finally:
            self.__dict__.update(RandomState.now().__dict__)
            outside.restore()
