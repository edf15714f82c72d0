"""The random generators of a process: taken, put back, and kept in a checkpoint."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
