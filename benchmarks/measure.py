"""How benchmarks measure: times in turns, peak extra memory, what the machine can do at best, and the record."""

from __future__ import annotations

import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import vss
from vss import ops
from vss.core.environment import environment
from vss.core.files import write_json

RESULTS = Path(os.environ.get("VSS_RESULTS") or Path(__file__).resolve().parent / "results")
COLD_BYTES = 256 * 2**20
STOPPED = 75  # exit code of a benchmark that ended for want of time and has kept what it measured
Call = Callable[[], object]


def tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


class Clock:
    """Milliseconds of one call; on CUDA by events, after a write over memory larger than the second-level cache."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.cold = torch.empty(COLD_BYTES if self.cuda else 0, dtype=torch.uint8, device=device)

    def __call__(self, call: Call) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.cold.fill_(1)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def summary(times: Mapping[str, list[float]], base: str = "native") -> dict[str, Any]:
    """Medians and largest of every side; speed-ups of `base` over the others as medians of ratios round by round."""
    row: dict[str, Any] = {f"{name}_ms_p50": statistics.median(values) for name, values in times.items()}
    row |= {f"{name}_ms_max": max(values) for name, values in times.items()}
    for name, values in times.items():
        if name == base:
            continue
        ratios = [other / own for own, other in zip(times[base], values, strict=True)]
        key = "speedup" if name == "plain" else f"speedup_over_{name}"
        row |= {key: statistics.median(ratios), f"{key}_min": min(ratios), f"{key}_max": max(ratios)}
    return row | {"rounds": len(times[base])}


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_of(call: Call, device: str) -> tuple[int, object]:
    """Peak extra bytes during one call, and its result."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at the present size
    before = resident("VmRSS")
    result = call()
    return max(0, resident("VmHWM") - before), result


def best_rates(device: str) -> dict[str, float]:
    """Copy bandwidth (bytes read and written a second) and float32 matmul rates (operations a second), measured."""
    clock = Clock(device)
    source = torch.ones(2**28 if device == "cuda" else 2**25, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    side = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    rates = {"copy_bytes_per_s": 2 * tensor_bytes(source) / _best(clock, lambda: target.copy_(source))}
    before = torch.get_float32_matmul_precision()
    for precision in ("highest", "high") if device == "cuda" else ("highest",):
        torch.set_float32_matmul_precision(precision)
        rates[f"matmul_flop_per_s_{precision}"] = 2 * side**3 / _best(clock, lambda: a @ b)
    torch.set_float32_matmul_precision(before)
    return rates


def _best(clock: Clock, call: Call) -> float:
    """Seconds of the fastest of five calls."""
    return min(clock(call) for _ in range(5)) / 1e3


def facts(device: str, **more: Any) -> dict[str, Any]:
    """The environment of vss.core.environment, and what concerns the ops."""
    return environment() | {
        "device": device, "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "build": ops.build_info(), "status": ops.status(),
    } | more  # fmt: skip


def result_path(suite: str, device: str, known: Mapping[str, Any]) -> Path:
    """results/<machine>/<version>--<suite>.json; a suite on a CUDA device has `-cuda` behind its name.

    VSS_RESULTS names another folder than benchmarks/results.
    """
    name = f"{vss.__version__}--{suite}{'-cuda' if device == 'cuda' else ''}.json"
    return RESULTS / known["machine"] / name


def write(suite: str, device: str, known: dict[str, Any], body: Mapping[str, Any]) -> Path:
    """A result with the environment that it was made in."""
    record = {"kind": f"vss.bench_{suite.partition('-')[0]}", "schema": 1, "environment": known}
    return write_json(result_path(suite, device, known), record | dict(body))
