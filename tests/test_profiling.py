"""Oracles: closed forms, and clocks that we turn ourselves."""

import os
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.profiling import Measurement, compare, fitting_batch, measure_alone, speed, time_in_turn, times_as_fast


@pytest.mark.parametrize(("max_seconds", "wanted"), [(100.0, 16), (4.0, 8), (3.9, 4), (1e-9, 1)])
def test_batches_are_halved_until_they_fit(max_seconds: float, wanted: int) -> None:
    assert fitting_batch(1e9, rate=4e9, batch_size=16, max_seconds=max_seconds) == wanted


class Clock:
    """Time that passes only when someone waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_alternatives_take_turns_and_the_ratio_is_found() -> None:
    clock, calls = Clock(), []

    def runner(name: str, seconds: float):
        return lambda: (calls.append(name), clock.wait(seconds))

    alternatives = {"slow": runner("slow", 0.3), "fast": runner("fast", 0.1)}
    seconds = time_in_turn(alternatives, rounds=6, min_seconds=0.15, clock=clock)
    assert calls[:4] == ["slow", "slow", "fast", "fast"]  # warm-up, and one to find how long a call is
    assert calls[4:10] == ["slow", "fast", "fast", "fast", "fast", "slow"]  # 0.15 s and more each, then backwards
    np.testing.assert_allclose(seconds["slow"], [0.3] * 6)
    calls.clear()
    assert len(time_in_turn(alternatives, rounds=5, min_seconds=0, clock=clock)["fast"]) == 5
    assert len(calls) == 2 * 6  # nothing to find where one call is enough
    slow, fast = (Measurement(seconds[name], batch_size=16) for name in ("slow", "fast"))
    np.testing.assert_allclose(times_as_fast(fast, slow), [3, 3, 3])
    np.testing.assert_allclose(speed(fast), [160, 160, 160])
    assert speed(Measurement()) == times_as_fast(fast, Measurement()) == [None] * 3


def test_what_slows_the_machine_down_does_not_change_the_ratio() -> None:
    """The machine gets slower and slower: one after the other they would differ fourfold, in turn they do not."""
    clock = Clock()
    seconds = time_in_turn(dict.fromkeys("ab", lambda: clock.wait(0.1 + clock.now / 20)), rounds=20, clock=clock)
    ratio, low, high = times_as_fast(Measurement(seconds["a"]), Measurement(seconds["b"]))
    assert seconds["a"][-1] > 4 * seconds["a"][0]
    assert low < 1 < high and abs(ratio - 1) < 0.1


def test_timing_goes_on_for_as_long_as_it_is_told() -> None:
    clock = Clock()
    taken = time_in_turn(dict.fromkeys("ab", lambda: clock.wait(0.5)), seconds=20, clock=clock)
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 20, "b": 20}


def test_the_first_call_is_not_timed_and_few_rounds_are_refused() -> None:
    clock, first = Clock(), [5.0]
    seconds = time_in_turn({"compiles": lambda: clock.wait(first.pop() if first else 0.5)}, clock=clock)
    np.testing.assert_allclose(seconds["compiles"], [0.5] * 5)
    with pytest.raises(ValueError, match="got 4 rounds, wanted 5 or more"):
        time_in_turn({}, rounds=4)


def test_the_median_of_few_ratios_has_their_range_for_an_interval() -> None:
    ours, theirs = Measurement(np.ones(5)), Measurement(np.array([1.0, 5, 2, 4, 3]))
    assert times_as_fast(ours, theirs) == [3, 1, 5]


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    for mib in (64, 256):
        found = measure_alone(partial(hold, mib=mib))
        assert found.reason is None and len(found.seconds) == 1
        assert found.memory_gib * 1024 == pytest.approx(mib, abs=8)


def test_what_cannot_be_run_says_why() -> None:
    assert measure_alone(die) == Measurement(reason="its process died: out of memory?")
    assert measure_alone(partial(hold, mib=2**40)).reason == "out of memory"
    with pytest.raises(RuntimeError, match="a mistake"):
        measure_alone(err)


def test_all_are_measured_alone_and_those_that_fit_are_timed() -> None:
    makers = {"quick": partial(wait, 0.01), "slow": partial(wait, 0.3), "hopeless": partial(wait, 1.0)}
    found = compare(makers, batch_size=1, max_seconds=0.2, bounds={"quick": 0.0, "hopeless": 0.5})
    assert list(found) == list(makers)
    assert found["quick"].seconds.shape == (5,) and found["quick"].seconds.min() >= 0.01
    assert found["quick"].seconds.min() < 0.1  # a step, not a call of twenty
    assert found["slow"].seconds is None
    assert float(found["slow"].reason.split()[0]) >= 0.3 and found["slow"].reason.endswith(" s a step")
    assert found["hopeless"] == Measurement(reason="over 0.5 s a step")


def hold(mib: int, steps: int = 1) -> Iterator[torch.Tensor]:
    held = torch.ones(mib, 2**18)  # once: glibc may lay a second one of this size beside the first
    while True:
        yield held


def wait(seconds: float, batch_size: int = 1, steps: int = 1) -> Iterator[None]:
    while True:
        for _ in range(steps):
            time.sleep(seconds)
        yield


def die() -> Iterator[None]:
    os._exit(9)
    yield


def err() -> Iterator[None]:
    raise RuntimeError("a mistake")
    yield
