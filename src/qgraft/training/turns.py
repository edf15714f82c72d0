"""Runs that take turns: each in a thread of its own, of which exactly one moves at a time.

transformers' Trainer is a loop that calls its caller back, so several of them can only be interleaved as threads. These
never run at the same time: a run moves when the driver lets it, until it hands something in and waits for the answer, or
ends. So nothing needs a lock, and what a run believes to have for itself can be given to it for its turn: the random
generators of Python, NumPy and torch, and accelerate's state (gradient accumulation among it), one for the process.
Each run draws the numbers that it would draw alone.

    driver    advance(a) ........ advance(b) ........ work on both ... advance(a) ...
    run a         step, hand_in() = wait                                   = answer, optimizer, ...
    run b                             step, hand_in() = wait

Only the driver's thread computes on more than one core. OpenMP makes each thread that does a pool of its own, and GNU's
lets its workers sleep at once, instead of waiting actively, where the pools together have more threads than there are
cores: a pass then took twice as long. So a run's own thread has one core, and what is worth more than that, such as an
evaluation, is done `by_driver`.
"""

import functools
import random
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

Handed = TypeVar("Handed")
Answer = TypeVar("Answer")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")

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
        self._errand: Callable[[], None] | None = None
        self._state = _ProcessState()
        self._moving = self._ending = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        threads = torch.get_num_threads()
        self._thread.start()
        self._stopped.acquire()
        torch.set_num_threads(threads)  # the number is each thread's own, but new threads take the one set last

    def advance(self) -> None:
        """Let the run move until it hands something in, pauses, or ends."""
        outside = _ProcessState()
        self._state.restore()
        self.handed = None
        self._move()
        while self._errand is not None:
            self._errand()
            self._move()
        self._state = _ProcessState()
        outside.restore()

    def hand_in(self, thing: Handed) -> Answer:
        """Called by the run: wait until the driver has answered."""
        self.handed = thing
        self.pause()
        answer, self.answer = self.answer, None
        assert answer is not None
        return answer

    def pause(self) -> None:
        """Called by the run: wait for the next turn."""
        self._stopped.release()
        self._go.acquire()
        if self._ending:
            raise Ended

    def end(self) -> None:
        """Raise Ended in the run, if it has not ended, and wait until it has cleaned up."""
        if self._moving:  # the driver was interrupted while it waited
            self._stopped.acquire()
        self._ending, self._errand = True, None
        if not self.ended:
            self.advance()
        self._thread.join()

    def _move(self) -> None:
        self._errand, self._moving = None, True
        self._go.release()
        self._stopped.acquire()
        self._moving = False

    def _run(self) -> None:
        torch.get_num_threads()  # the first call in a thread sets the number
        torch.set_num_threads(1)
        _of_thread.run = self
        self._stopped.release()
        self._go.acquire()
        with _Caught(BaseException) as caught:
            if not self._ending:
                self.result = self._work(self)
        self.error, self.ended = caught.error, True
        self._stopped.release()

    def _send(self, work: Callable[[], Answer]) -> Answer:
        """Called by the run: let the driver do this work within the run's turn."""
        results: list[Answer] = []
        caught = _Caught(Exception)  # what else ends the driver's work, such as Ctrl-C, is the driver's

        def errand() -> None:
            with caught:
                results.append(work())

        self._errand = errand
        self.pause()
        if caught.error is not None:
            raise caught.error
        return results[0]


class _OfThread(threading.local):
    """The run whose thread this is, if it is one's."""

    run: Turns[Any, Any, Any] | None = None


_of_thread = _OfThread()


def by_driver(function: Callable[Parameters, Answer]) -> Callable[Parameters, Answer]:
    """The function, done by the driver's thread when a run calls it, on all cores; else as it is.

    What torch keeps for each thread (no_grad, autocast) it must set for itself.
    """

    @functools.wraps(function)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Answer:
        run = _of_thread.run
        return function(*args, **kwargs) if run is None else run._send(lambda: function(*args, **kwargs))

    return wrapper


class _Caught:
    """A block whose errors of this kind are kept in `error` instead of raised."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.error: BaseException | None = None
        self._kind = kind

    def __enter__(self) -> "_Caught":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.error = error
        return isinstance(error, self._kind)


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
