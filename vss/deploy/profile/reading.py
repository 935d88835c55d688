"""Times of every unit of one network in one run: the profile of onnxruntime or of TensorRT, or hooks on torch modules.

Layers are timed inside of the whole network, since one by itself pays for layout changes that it does not have there
and finds its input in the cache. The least of many runs is taken: what disturbs a run only ever adds time.
On one thread a run's own CPU time counts, which leaves out what other programs took of the core.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vss.core.errors import VssError, need
from vss.deploy.bench import pinned as on_cores
from vss.deploy.profile.units import Graph, Shape

if TYPE_CHECKING:
    from vss.deploy.trt_session import TensorRTSession

WARM_RUNS = 2
MOST_PROFILED = 200


@dataclass(frozen=True)
class Reading:
    """Milliseconds of one network: `units` name -> least time of all runs, `total` of a whole run, likewise."""

    units: dict[str, float]
    total: float

    def least(self, other: Reading) -> Reading:
        """The least of two readings of the same network, unit by unit."""
        both = self.units | other.units
        units = {name: min(self.units.get(name, ms), other.units.get(name, ms)) for name, ms in both.items()}
        return Reading(units, min(self.total, other.total))

    def rounded(self) -> Reading:
        """To a nanosecond."""
        return Reading({name: round(ms, 6) for name, ms in self.units.items()}, round(self.total, 6))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"total": self.total, "units": self.units}


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[list[int] | None]:
    """Keep all threads of this process on the first `threads` usable cores; None where the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    cores = sorted(os.sched_getaffinity(0))[:threads]
    with on_cores(cores):
        yield cores


def usable_threads(asked: int | None) -> int:
    """The thread count of a measurement: as asked, else one per usable core."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked is not None and not 1 <= asked <= usable:
        raise VssError(f"threads is {asked}; this process may use 1 to {usable} cores.")
    return asked or usable


def read_onnx(
    path: Path, feed: Mapping[str, np.ndarray], *, threads: int, graph: Graph, seconds: float = 0.4, least: int = 8
) -> Reading:
    """Profile one ONNX file in onnxruntime on the CPU.

    Args:
        path: the file.
        feed: its input.
        threads: within an operator.
        graph: the exported graph by which units are named; widths do not matter.
        seconds, least: measured for so long, and at least so many runs.
    """
    ort, onnx = need("onnxruntime", "latency tables"), need("onnx", "latency tables")
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, threads
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            total = least_ms(lambda: session.run(None, dict(feed)), seconds, least, alone=threads == 1)
            events = json.loads(Path(session.end_profiling()).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise VssError(f"the profile of {path} cannot be written or read ({error}); free some space.") from error
        optimised = onnx.load(f"{folder}/optimised.onnx").graph
    tensors = {node.name: [*node.input, *node.output] for node in optimised.node}
    times: dict[str, list[float]] = defaultdict(list)
    operators: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            times[name].append(event["dur"] / 1e3)
            operators[name] = event["args"]["op_name"]
    units: dict[str, float] = defaultdict(float)
    for name, each in times.items():
        units[graph.resolve(name, operators[name], tensors.get(name, ()))] += min(each[WARM_RUNS:] or each)
    return Reading(dict(units), total)


def read_engine(
    session: TensorRTSession,
    feed: Mapping[str, np.ndarray],
    *,
    graph: Graph,
    shapes: Callable[[], Mapping[str, Shape]],
    seconds: float = 0.4,
    least: int = 8,
) -> Reading:
    """Profile an engine by TensorRT's own profiler; the whole is timed without it, with the host's copies.

    Args:
        session: the engine, built with detailed verbosity.
        feed: its input.
        graph: the exported graph by which units are named; widths do not matter.
        shapes: sizes of its units; asked for where one engine layer does the work of several.
        seconds, least: measured for so long, and at least so many runs.
    """
    total = least_ms(lambda: session.run(feed), seconds, least, alone=False)
    runs = max(least, min(MOST_PROFILED, int(seconds * 1e3 / total))) + WARM_RUNS
    layers = {each["Name"]: each for each in session.layers()["Layers"] if isinstance(each, dict)}
    units: dict[str, float] = defaultdict(float)
    for name, times in session.profile(feed, runs).items():
        shares = graph.engine_layer(layers.get(name, {"Name": name}), shapes)
        for unit, share in shares.items():
            units[unit] += share * min(times[WARM_RUNS:] or times)
    return Reading(dict(units), total)


def least_ms(call: Callable[[], Any], seconds: float, least: int, *, alone: bool) -> float:
    """Least milliseconds of a call, after a warm-up; CPU time of this thread when it does all the work `alone`."""
    clock = time.thread_time_ns if alone else time.perf_counter_ns
    for _ in range(WARM_RUNS):
        call()
    times: list[int] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = clock()
        call()
        times.append(clock() - start)
    return min(times) / 1e6
