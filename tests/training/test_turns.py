"""Runs that take turns: who computes what, with which random numbers, and how errors travel."""

import random
import threading

import pytest
import torch

from qgraft.training.turns import Ended, Turns, by_driver


@by_driver
def who(error=None):
    if error is not None:
        raise error
    return threading.current_thread(), torch.get_num_threads(), random.random()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_only_the_driver_computes_on_all_cores(two_threads):
    def work(run):
        own = threading.current_thread(), torch.get_num_threads()
        return own, who()

    run = Turns(work)
    assert torch.get_num_threads() == 2
    run.advance()
    run.end()
    (thread, threads), (helper, helping, _) = run.result
    assert (threads, helping) == (1, 2)
    assert thread is not helper and helper is threading.current_thread()
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))  # takes the number set last
    later.start()
    later.join()
    assert found == [2]


def test_what_the_driver_does_for_a_run_draws_from_that_run():
    def work(run):
        random.seed(7)
        run.pause()
        return who()[2]

    run = Turns(work)
    run.advance()
    random.seed(8)
    run.advance()
    expected = random.Random(8).random(), random.Random(7).random()
    assert (random.random(), run.result) == expected


def test_errors_of_such_work_are_the_runs():
    def work(run):
        with pytest.raises(KeyError, match="lost"):
            who(KeyError("lost"))
        who(ValueError("not caught"))

    run = Turns(work)
    run.advance()
    assert run.ended and isinstance(run.error, ValueError)


def test_an_interrupt_during_such_work_is_the_drivers():
    cleaned = []

    def work(run):
        try:
            who(KeyboardInterrupt())
        finally:
            cleaned.append(True)

    run = Turns(work)
    with pytest.raises(KeyboardInterrupt):
        run.advance()
    assert not run.ended
    run.end()
    assert cleaned and isinstance(run.error, Ended)


def test_a_run_waits_where_it_hands_in():
    run = Turns(lambda run: (run.hand_in("a"), run.hand_in("b")))
    run.advance()
    assert run.handed == "a"
    run.answer = 1
    run.advance()
    assert run.handed == "b" and not run.ended
    run.answer = 2
    run.advance()
    assert run.ended and run.handed is None and run.result == (1, 2)


def test_a_run_that_never_moved_ends():
    run = Turns(lambda run: pytest.fail("moved"))
    run.end()
    assert run.ended and run.error is None and run.result is None
