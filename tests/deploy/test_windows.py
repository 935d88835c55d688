"""vss.deploy.bench: order, stability and ratios, with measures whose times are made up."""

from __future__ import annotations

import gc
import itertools
import time

import numpy as np
import pytest

from vss.core.errors import VssError
from vss.deploy.bench import Timing, bench, interleave, speedup, spread_of

FAST = Timing(warmup=2, window_seconds=1e-9, windows=4, spread=0.1, min_seconds=0.0, max_seconds=5.0)


def timing(warmup: int, seconds: float, windows: int, spread: float, least: float, most: float) -> Timing:
    return Timing(
        warmup=warmup, window_seconds=seconds, windows=windows, spread=spread, min_seconds=least, max_seconds=most
    )


def test_order_is_abba_after_the_warm_up() -> None:
    calls: list[str] = []

    def measure(name: str):
        def run() -> tuple[int, ...]:
            calls.append(name)
            return (1000,)

        return run

    trace = interleave({"a": measure("a"), "b": measure("b")}, FAST)
    assert calls[:4] == ["a", "a", "b", "b"]
    timed = [name for name, _ in itertools.groupby(calls[4:])]
    assert timed == ["a", "b", "a", "b", "a"]  # A B B A A B B A, neighbours merged
    assert len(calls) == 4 + 4 * 2 * (1 + 1)  # 4 rounds of 2 windows: one untimed call and a timed one
    assert [len(window) for window in trace.windows["a"]] == [1, 1, 1, 1]
    assert trace.stable
    assert trace.spread == {"a": 0.0, "b": 0.0}


def test_it_goes_on_until_the_medians_stand_still() -> None:
    drift = itertools.count()

    def settling() -> tuple[int, ...]:
        return (1000 + max(0, 500 - 10 * next(drift)),)  # constant from call 50 on

    trace = interleave({"a": settling}, timing(2, 1e-9, 4, 0.01, 0.0, 5.0))
    assert trace.stable
    assert len(trace.windows["a"]) > 12
    assert trace.spread["a"] <= 0.01


def test_what_never_settles_ends_and_says_so() -> None:
    noise = itertools.cycle([1000] * 4 + [3000] * 4)
    start = time.perf_counter()
    trace = interleave(
        {"a": lambda: (next(noise),)},
        timing(2, 1e-9, 4, 0.05, 0.0, 0.2),
    )
    assert not trace.stable
    assert trace.spread["a"] > 0.05
    assert 0.2 <= trace.seconds <= time.perf_counter() - start < 5


def test_min_seconds_is_kept() -> None:
    assert (
        interleave(
            {"a": lambda: (5,)},
            timing(0, 1e-3, 2, 0.5, 0.1, 1.0),
        ).seconds
        >= 0.1
    )


def test_garbage_collection_is_off_inside_and_back_on_after() -> None:
    seen: set[bool] = set()
    assert gc.isenabled()
    interleave(
        {"a": lambda: (seen.add(gc.isenabled()) or 7,)},
        timing(0, 1e-9, 2, 0.5, 0.0, 1.0),
    )
    assert seen == {False}
    assert gc.isenabled()


def test_spread_is_the_interquartile_range_of_the_medians() -> None:
    windows = [np.array([[value, 0], [value, 0], [9999, 1]]) for value in (100, 110, 120, 130, 140)]
    assert spread_of(windows) == pytest.approx(20 / 120)


def windows_of(times: list[float]) -> list[np.ndarray]:
    return [np.full((4, 1), value, dtype=np.int64) for value in times]


def test_speedup_is_a_ratio_of_medians_with_an_interval() -> None:
    assert speedup(windows_of([300] * 6), windows_of([100] * 6)) == {"ratio": 3.0, "low": 3.0, "high": 3.0}
    noisy = speedup(windows_of([290, 300, 310, 300, 295, 305]), windows_of([100, 95, 105, 110, 90, 100]))
    assert noisy["ratio"] == pytest.approx(3.0)
    assert 2.6 < noisy["low"] < 3.0 < noisy["high"] < 3.4


def test_few_rounds_give_no_interval() -> None:
    assert speedup(windows_of([300] * 3), windows_of([100] * 3)) == {"ratio": 3.0, "low": None, "high": None}


def test_warm_up_of_slow_calls_is_cut_short() -> None:
    calls: list[float] = []

    def slow() -> tuple[int, ...]:
        calls.append(time.perf_counter())
        time.sleep(0.03)
        return (1,)

    interleave({"a": slow}, timing(100, 1e-9, 2, 0.5, 0.0, 0.5))
    assert len(calls) <= 2 + 2 * 2  # the warm-up ends after 50 ms, then two rounds


def test_common_drift_cancels() -> None:
    """Both slow down together over the run: rounds are resampled in pairs, so the interval stays narrow."""
    clock = np.linspace(1, 2, 8)
    found = speedup(windows_of(list(1000 * clock)), windows_of(list(500 * clock)))
    assert found["low"] == pytest.approx(2.0, rel=0.01)
    assert found["high"] == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("bad", [{"windows": 1}, {"warmup": -1}, {"spread": 0}, {"min_seconds": 9, "max_seconds": 1}])
def test_bad_settings(bad: dict) -> None:
    with pytest.raises(VssError, match=f"the timing: .*{next(iter(bad))}"):
        bench({}, {}, **bad)


def test_nothing_to_measure() -> None:
    with pytest.raises(VssError, match="nothing to measure"):
        interleave({}, FAST)
