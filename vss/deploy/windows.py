"""Interleaved timing: sessions take turns in short windows, A B B A, until their medians stand still."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from vss.core.errors import VssError

MIN_ROUNDS = 4
Measure = Callable[[], tuple[int, ...]]
"""One timed call: nanoseconds per stage."""


@dataclass(frozen=True)
class Timing:
    """How long to measure.

    Args:
        warmup: untimed calls per session before anything is timed (fewer, at least one, when they take longer than a
            tenth of `max_seconds`); one more opens every window, so that the threads of the runtime that ran before
            have stopped spinning.
        window_seconds: length of one window of one session (at least one call); shorter where `windows` of them would
            not fit into `max_seconds`.
        windows: the last so many windows of each session decide on stability; also the fewest that are taken.
        spread: stable means that, for every session, the interquartile range of the medians of those windows is at
            most this share of their median.
        min_seconds, max_seconds: wall time of the whole measurement; at the maximum it ends unstable, and says so.
    """

    warmup: int = 10
    window_seconds: float = 0.25
    windows: int = 8
    spread: float = 0.03
    min_seconds: float = 2.0
    max_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.windows < 2 or self.warmup < 0 or min(self.window_seconds, self.spread) <= 0:
            raise VssError(f"{self} cannot be measured; windows >= 2, warmup >= 0, window_seconds and spread above 0.")
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise VssError(f"min_seconds {self.min_seconds} must not exceed max_seconds {self.max_seconds}.")


@dataclass(frozen=True)
class Trace:
    """What was measured.

    Attributes:
        windows: session -> one (calls, stages) int64 array of nanoseconds per window, in order; equal counts.
        stable: whether the stability rule was met.
        spread: session -> the figure that the rule looks at.
        seconds: wall time without the warm-up.
        cold: session -> nanoseconds of its very first call here; None without a warm-up.
    """

    windows: dict[str, list[np.ndarray]]
    stable: bool
    spread: dict[str, float]
    seconds: float
    cold: dict[str, int | None]


def interleave(measures: Mapping[str, Measure], timing: Timing) -> Trace:
    """Time every measure in turns; the order is reversed in every second round, so that drift cancels (A B B A)."""
    if not measures:
        raise VssError("nothing to measure: give at least one session.")
    windows: dict[str, list[np.ndarray]] = {name: [] for name in measures}
    cold = {name: _warm_up(measure, timing) for name, measure in measures.items()}
    names, stable, spread = list(measures), False, dict.fromkeys(measures, float("inf"))
    window = min(timing.window_seconds, timing.max_seconds / (2 * timing.windows * len(measures)))
    with _no_collection():
        start = time.perf_counter()
        while True:
            for order in (names, names[::-1]):
                for name in order:
                    windows[name].append(_window(measures[name], window))
            elapsed = time.perf_counter() - start
            if len(next(iter(windows.values()))) >= timing.windows:
                spread = {name: spread_of(each[-timing.windows :]) for name, each in windows.items()}
                stable = max(spread.values()) <= timing.spread
            if (stable and elapsed >= timing.min_seconds) or elapsed >= timing.max_seconds:
                return Trace(windows, stable, spread, elapsed, cold)


def _warm_up(measure: Measure, timing: Timing) -> int | None:
    """Nanoseconds of the first call."""
    end, first = time.perf_counter() + timing.max_seconds / 10, None
    for _ in range(timing.warmup):
        took = sum(measure())
        first = took if first is None else first
        if time.perf_counter() > end:
            break
    return first


def spread_of(windows: list[np.ndarray]) -> float:
    """Interquartile range of the window medians over their median; (calls, stages) arrays of nanoseconds."""
    medians = np.array([np.median(window.sum(1)) for window in windows])
    low, middle, high = np.percentile(medians, [25, 50, 75])
    return float((high - low) / middle)


def _window(measure: Measure, seconds: float) -> np.ndarray:
    measure()
    end = time.perf_counter_ns() + int(seconds * 1e9)
    calls = [measure()]
    while time.perf_counter_ns() < end:
        calls.append(measure())
    return np.array(calls, dtype=np.int64)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside of a timed window, as timeit does it."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def speedup(
    baseline: list[np.ndarray], candidate: list[np.ndarray], *, samples: int = 500, seed: int = 0
) -> dict[str, float | None]:
    """Ratio of the medians of one run, above 1 when the candidate is faster.

    Args:
        baseline, candidate: windows of the same rounds.

    Returns:
        {"ratio", "low", "high"}: the ratio of the pooled medians and its 95 % bootstrap interval over rounds; the
        interval is None below `MIN_ROUNDS`, where it would look narrower than it is.
    """
    rounds = len(baseline)
    before, after = ([window.sum(1) for window in each] for each in (baseline, candidate))
    if rounds < MIN_ROUNDS:
        return {"ratio": _ratio(before, after), "low": None, "high": None}
    picks = np.random.default_rng(seed).integers(0, rounds, (samples, rounds))
    ratios = [_ratio([before[i] for i in pick], [after[i] for i in pick]) for pick in picks]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return {"ratio": _ratio(before, after), "low": float(low), "high": float(high)}


def _ratio(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    return float(np.median(np.concatenate(before)) / np.median(np.concatenate(after)))
