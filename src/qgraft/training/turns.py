"""Runs that take turns: each in a thread of its own, of which exactly one moves at a time.

transformers' Trainer is a loop that calls its caller back, so several of them can only be interleaved as threads. These
never run at the same time: a run moves when the driver lets it, until it hands something in and waits for the answer, or
ends. So nothing needs a lock, and what a run believes to have for itself can be given to it for its turn: the random
generators of Python, NumPy and torch, and accelerate's state (gradient accumulation among it), one for the process.
Each run draws the numbers that it would draw alone.

    driver    advance(a) ........ advance(b) ........ work on both ... advance(a) ...
    run a         step, hand_in() = wait                                   = answer, optimizer, ...
    run b                             step, hand_in() = wait
"""

import random
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

Handed = TypeVar("Handed")
Answer = TypeVar("Answer")
Result = TypeVar("Result")

_ACCELERATE: tuple[Any, ...] = (PartialState, AcceleratorState, GradientState)  # each one dict for the process


class Ended(BaseException):
    """Raised in a run that must end at once, where it waits. Not an Exception: nothing but a `finally` may see it."""


class Turns(Generic[Handed, Answer, Result]):
    """One run: `work` is given this object, and calls hand_in() on it.

    Attributes:
        handed: what the run waits to have answered; None once it has ended.
        answer: what hand_in() returns when the run moves next.
        ended: whether `work` has returned its `result`, or raised its `error`.
    """

    def __init__(self, work: Callable[["Turns[Handed, Answer, Result]"], Result]) -> None:
        self.handed: Handed | None = None
        self.answer: Answer | None = None
        self.ended = False
        self.result: Result | None = None
        self.error: BaseException | None = None
        self._work = work
        self._state = _ProcessState()
        self._moving = self._ending = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self) -> None:
        """Let the run move until it hands something in, or ends."""
        outside = _ProcessState()
        self._state.restore()
        self.handed, self._moving = None, True
        self._go.release()
        self._stopped.acquire()
        self._moving = False
        self._state = _ProcessState()
        outside.restore()

    def hand_in(self, thing: Handed) -> Answer:
        """Called by the run: wait until the driver has answered."""
        self.handed = thing
        self._stopped.release()
        self._go.acquire()
        if self._ending:
            raise Ended
        answer, self.answer = self.answer, None
        assert answer is not None
        return answer

    def end(self) -> None:
        """Raise Ended in the run, if it has not ended, and wait until it has cleaned up."""
        if self._moving:  # the driver was interrupted while it waited
            self._stopped.acquire()
        self._ending = True
        if not self.ended:
            self.advance()
        self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        with _Outcome(self):
            if not self._ending:
                self.result = self._work(self)


class _Outcome:
    """A block that ends a run: what it raises becomes the run's error, for the driver to judge."""

    def __init__(self, run: Turns[Any, Any, Any]) -> None:
        self._of = run

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        self._of.error, self._of.ended = error, True
        self._of._stopped.release()
        return True


class _ProcessState:
    """What a run believes to have for itself, as it is now."""

    def __init__(self) -> None:
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        self.accelerate = [dict(kind._shared_state) for kind in _ACCELERATE]

    def restore(self) -> None:
        """Make it so again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        for kind, state in zip(_ACCELERATE, self.accelerate, strict=True):
            kind._shared_state.clear()
            kind._shared_state.update(state)
