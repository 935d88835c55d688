"""Latency of sessions that are timed interleaved, in short windows, A B B A, until their medians are stable.

`bench` times the engine alone, `bench_end_to_end` everything from an image file to labels.
"""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from pydantic import Field

from vss.core.config import TimeLimits
from vss.core.environment import environment
from vss.core.errors import VssError
from vss.core.yaml12 import parse
from vss.deploy.backends.base import Session

if TYPE_CHECKING:
    from torch import Tensor

    from vss.data.preprocess import Preprocess


MIN_ROUNDS = 4
STAGES = ("decode", "resize", "feed", "engine", "labels")
Measure = Callable[[], tuple[int, ...]]
"""One timed call: nanoseconds per stage."""


class Timing(TimeLimits):
    """How long to measure, and in which windows.

    The warm-up is cut short, to one call at least, when it takes longer than a tenth of `max_seconds`; one more untimed
    call opens every window, so that the threads of the runtime that ran before have stopped spinning. At `max_seconds`
    the measurement ends unstable.
    """

    min_seconds: float = Field(default=2.0, ge=0)
    max_seconds: float = Field(default=60.0, gt=0, le=86400)
    warmup: int = Field(default=10, ge=0, description="untimed calls per session before anything is timed")
    window_seconds: float = Field(
        default=0.25, gt=0, description="of one session; shorter where `windows` of them do not fit into max_seconds"
    )
    windows: int = Field(default=8, ge=2, description="the last so many of each session decide on stability")


@dataclass(frozen=True)
class Trace:
    """What was measured, by session.

    Attributes:
        windows: one (calls, stages) int64 array of nanoseconds per window, in order; equal counts.
        stable: whether `spread` is within the limit for every session.
        spread: interquartile range of the medians of the last windows over their median.
        seconds: wall time without the warm-up.
        cold: nanoseconds of the very first call here; None without a warm-up.
    """

    windows: dict[str, list[np.ndarray]]
    stable: bool
    spread: dict[str, float]
    seconds: float
    cold: dict[str, int | None]


def interleave(measures: Mapping[str, Measure], timing: Timing) -> Trace:
    """Time all measures interleaved; the order is reversed in every second round, so that drift cancels (A B B A)."""
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
    """`ratio` of the pooled medians over windows of the same rounds, above 1 when the candidate is faster, and its 95 %
    bootstrap interval over rounds, `low` and `high`, None below `MIN_ROUNDS`, where it would look narrower than it is.
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


class StagedPredictor(Protocol):
    """What `vss.train.evaluate.engine_predictor` gives: prediction in three steps."""

    def feed(self, images: Tensor) -> dict[str, np.ndarray]: ...
    def infer(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...
    def finish(self, outputs: Mapping[str, np.ndarray], count: int) -> Tensor: ...


def bench(
    sessions: Mapping[str, Session],
    feeds: Mapping[str, Mapping[str, np.ndarray]],
    *,
    against: Mapping[str, str] | None = None,
    **timing: float,
) -> dict[str, Any]:
    """Time `session.run` (with the copies it makes), all sessions interleaved in one run.

    Args:
        sessions: name -> session; the first is the baseline of the speed-ups.
        feeds: name -> what to feed that session; the same images for all, or the ratio means nothing.
        against: name -> another name, for further speed-ups than those over the first.
        timing: fields of `Timing`: spread, min_seconds, max_seconds, warmup, window_seconds, windows.

    Returns:
        JSON-ready: `kind` "vss.bench", `schema`, `mode` "engine", `stable`, `baseline`, `rounds`, `seconds`, `timing`,
        `sessions` {name: batch, n, latency_ms_p50, _p90, _p99, _mean, _cold, throughput_fps, spread, describe}, where
        `_cold` is the first call that this measurement made,
        `speedup` {name: ratio, low, high} over the baseline, with `against` also `speedup_against` {name: the same and
        `of`}, `environment`.

    Raises:
        VssError: no session, a session without a feed, batches that differ, or a feed that a session refuses.
    """
    if sessions.keys() != feeds.keys():
        raise VssError(f"sessions {sorted(sessions)} and feeds {sorted(feeds)} must have the same names.")
    batches = {name: len(next(iter(feed.values()))) for name, feed in feeds.items()}
    if len(set(batches.values())) > 1:
        raise VssError(f"batches differ ({batches}); a speed-up compares equal work.")
    settings: Timing = parse(Timing, timing, source="the timing")
    before = environment()
    trace = interleave({name: _engine(session, feeds[name]) for name, session in sessions.items()}, settings)
    result = _result("engine", trace, settings, batches, before)
    for name, row in result["sessions"].items():
        row["describe"] = sessions[name].describe()
    if against:
        result["speedup_against"] = {
            name: {"of": other, **speedup(trace.windows[other], trace.windows[name])} for name, other in against.items()
        }
    return result


def bench_end_to_end(
    predictors: Mapping[str, StagedPredictor], paths: Sequence[Path], preprocess: Preprocess, **timing: float
) -> dict[str, Any]:
    """Time everything from an image file to labels, one image at a time, predictors interleaved in one run.

    Stages: `decode` (file to RGB), `resize` (to uint8 at the engine's size), `feed` (normalise or reorder, copy),
    `engine` (`session.run` with its copies), `labels` (argmax, when the engine gives logits).

    Args:
        predictors: name -> `vss.train.evaluate.engine_predictor(...)`; the first is the baseline.
        paths: image files; each predictor goes through all of them in the same order.

    Returns:
        As `bench`, with `mode` "end_to_end" and per session `stages_ms_p50` {stage: ms}.
    """
    if not paths:
        raise VssError("no image files to measure with.")
    settings: Timing = parse(Timing, timing, source="the timing")
    before = environment()
    measures = {name: _end_to_end(predictor, paths, preprocess) for name, predictor in predictors.items()}
    trace = interleave(measures, settings)
    result = _result("end_to_end", trace, settings, dict.fromkeys(predictors, 1), before)
    for name, row in result["sessions"].items():
        medians = np.median(np.concatenate(trace.windows[name]), axis=0) / 1e6
        row["stages_ms_p50"] = dict(zip(STAGES, medians.tolist(), strict=True))
    return result


def _engine(session: Session, feed: Mapping[str, np.ndarray]) -> Measure:
    def measure() -> tuple[int, ...]:
        start = time.perf_counter_ns()
        session.run(feed)
        return (time.perf_counter_ns() - start,)

    return measure


def _end_to_end(predictor: StagedPredictor, paths: Sequence[Path], preprocess: Preprocess) -> Measure:
    from vss.data.images import open_rgb

    files = itertools.cycle(paths)

    def measure() -> tuple[int, ...]:
        path = next(files)
        marks = [time.perf_counter_ns()]
        rgb = open_rgb(path)
        marks.append(time.perf_counter_ns())
        pixels = preprocess.image(rgb).unsqueeze(0)
        marks.append(time.perf_counter_ns())
        feed = predictor.feed(pixels)
        marks.append(time.perf_counter_ns())
        outputs = predictor.infer(feed)
        marks.append(time.perf_counter_ns())
        predictor.finish(outputs, 1)
        marks.append(time.perf_counter_ns())
        return tuple(after - before for before, after in itertools.pairwise(marks))

    return measure


def _result(
    mode: str, trace: Trace, timing: Timing, batches: Mapping[str, int], before: dict[str, object]
) -> dict[str, Any]:
    baseline = next(iter(trace.windows))
    after = environment()
    return {
        "kind": "vss.bench",
        "schema": 1,
        "mode": mode,
        "stable": trace.stable,
        "baseline": baseline,
        "rounds": len(trace.windows[baseline]),
        "seconds": trace.seconds,
        "timing": timing.model_dump(),
        "sessions": {
            name: {
                **latency(windows, batches[name]),
                "latency_ms_cold": None if (first := trace.cold[name]) is None else first / 1e6,
                "spread": _finite(trace.spread[name]),
            }
            for name, windows in trace.windows.items()
        },
        "speedup": {
            name: speedup(trace.windows[baseline], windows)
            for name, windows in trace.windows.items()
            if name != baseline
        },
        "environment": before,
        "environment_after": {
            "clock_mhz": after["cpu"]["clock_mhz"],
            "throttled": after["cpu"]["throttled"],
            "load_average": after["load_average"],
            "devices": after["devices"],
        },
    }


def noise(result: Mapping[str, Any]) -> str | None:
    """None for a stable result of `bench`; else a sentence that says how noisy the machine was."""
    if result["stable"]:
        return None
    spreads = {name: row["spread"] for name, row in result["sessions"].items()}
    shown = ", ".join(f"{name} {'not known' if value is None else f'{value:.1%}'}" for name, value in spreads.items())
    timing = result["timing"]
    return (
        f"the machine is too noisy: after {result['seconds']:.0f} s the medians of the last {timing['windows']} "
        f"windows spread by {shown} where {timing['spread']:.0%} is allowed; end other work, or measure for longer."
    )


def unsteady(result: Mapping[str, Any]) -> dict[str, float]:
    """What a table holds in place of the times of a noisy machine: the largest spread of a session, in percent."""
    known = [row["spread"] for row in result["sessions"].values() if row["spread"] is not None]
    return {"latency_spread_pct": 100 * max(known)} if known else {}


@contextmanager
def pinned(cores: Sequence[int] | None) -> Iterator[None]:
    """All threads of this process on these cores, and back; threads that start inside stay there. None: as it is. Cores
    that this process may not use, and systems that cannot pin, are refused.
    """
    if cores is None:
        yield
        return
    if not hasattr(os, "sched_setaffinity"):
        raise VssError(f"cores {list(cores)} came, and this system cannot pin threads; leave the cores out.")
    usable = sorted(os.sched_getaffinity(0))
    if not cores or not set(cores) <= set(usable):
        raise VssError(f"cores {list(cores)} came, and this process may use {usable}; give some of these.")
    before = _pin({thread: set(cores) for thread in _threads()})
    try:
        yield
    finally:
        _pin(before)


def _threads() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def _pin(wanted: Mapping[int, set[int]]) -> dict[int, set[int]]:
    """Thread -> its cores before; threads that have ended meanwhile are left out."""
    before = {}
    for thread, cores in wanted.items():
        with suppress(ProcessLookupError):
            before[thread] = set(os.sched_getaffinity(thread))
            os.sched_setaffinity(thread, cores)
    return before


def latency(windows: Sequence[np.ndarray], batch: int) -> dict[str, Any]:
    """Figures of one session from its (calls, stages) windows of nanoseconds; a latency is that of one call."""
    times = np.concatenate([window.sum(1) for window in windows]) / 1e6
    p50, p90, p99 = np.percentile(times, [50, 90, 99]).tolist()
    return {
        "batch": batch,
        "n": len(times),
        "latency_ms_p50": p50,
        "latency_ms_p90": p90,
        "latency_ms_p99": p99,
        "latency_ms_mean": float(times.mean()),
        "throughput_fps": batch * 1e3 / float(times.mean()),
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
