"""Who is called, when and how often; no time is asserted."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import timing
from kernels_pallas.timing import in_turns


def recorder(*names):
    calls = []
    return calls, [lambda name=name: calls.append(name) for name in names]


def test_functions_take_turns_after_those_that_compile():
    calls, functions = recorder("a", "b")
    seconds = in_turns(iter(functions), 3, warm=2, between=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b" * 5
    assert seconds.shape == (2, 3) and seconds.dtype == np.float64


def test_calls_ahead_of_a_measurement():
    calls, functions = recorder("a", "b")
    in_turns(functions, 2, warm=0, ahead=2, between=lambda: calls.append("-"))
    assert "".join(calls) == "aa-abb-b" * 2


def test_times_stand_where_their_function_and_turn_do(monkeypatch):
    """A clock that every call moves on by its own number: 1, 10 for the first, then by others."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def moves(steps):
        steps = iter(steps)

        def call():
            clock[0] += next(steps)

        return call

    seconds = in_turns([moves((9, 1, 2)), moves((9, 10, 20))], 2)
    np.testing.assert_array_equal(seconds, [[1, 2], [10, 20]])
    pair = [moves(itertools.repeat(step)) for step in (1, 8)]
    np.testing.assert_array_equal(in_turns(pair, 2, shortest=4.0), [[1, 1], [8, 8]])


def test_quick_functions_are_called_in_a_row(monkeypatch):
    """By a clock that each look moves on by a second."""
    ticks = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    calls, functions = recorder("a", "b")
    seconds = in_turns(functions, 1, shortest=2.5)
    assert "".join(calls) == "ab" * 2 + "aaabbb"
    np.testing.assert_allclose(seconds, 1 / 3)


def test_results_of_any_structure_are_waited_for():
    results = [jnp.ones(3), {"a": (jnp.zeros(()), None)}, 1.0]
    seconds = in_turns([lambda result=result: result for result in results], 2)
    assert seconds.shape == (3, 2) and (seconds >= 0).all()


def test_nothing_to_time_is_no_row():
    assert in_turns([], 4).shape == (0, 4)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="repeats=0"):
        in_turns([], 0)
    with pytest.raises(ValueError, match="warm=-1"):
        in_turns([], 1, warm=-1)
