"""Time and extra memory of every op against the same result in plain torch.

    python benchmarks/bench_ops.py [--op NAME] [--rounds 15] [--threads 2] [--device cpu|cuda] [--write]

Rows are those of tests/ops/cases.py marked `bench`. One run interleaves the two sides round by round, so that a ratio
compares like with like; a figure is the median over rounds. Every call gets the next of several copies of its inputs
(cold cache). Peak extra memory of a side is measured in a fresh process of its own. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ops"), str(ROOT / "benchmarks")]

from cases import ALL, Args, Case  # noqa: E402
from plain import FLOOR, PLAIN  # noqa: E402

import vss  # noqa: E402
from vss import ops  # noqa: E402
from vss.environment import environment  # noqa: E402
from vss.files import write_json  # noqa: E402

LOG = logging.getLogger("bench_ops")
COLD_BYTES = 256 * 2**20
WARM_UP = 2
FEWEST_ROUNDS, SECONDS_PER_ROW = 3, 20.0  # a slow row stops after so many rounds once it has taken so long
Side = Callable[..., object]


def sides(case: Case) -> dict[str, Side]:
    floor = {"floor": FLOOR[case.op]} if case.op in FLOOR else {}
    return {"native": getattr(torch.ops.vss, case.op), "plain": PLAIN[case.op]} | floor


def to_device(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    return [to_device(item, device) for item in value] if isinstance(value, list) else value


def tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def copies(case: Case, device: str) -> Iterator[Args]:
    """Endless copies of the inputs, different memory each time, together larger than any cache."""
    args = case.inputs()
    count = max(2, min(32, COLD_BYTES // max(1, tensor_bytes(args))))
    pool = [tuple(to_device(arg, device) for arg in args) for _ in range(count)]
    while True:
        yield from pool


def timed(side: Side, args: Args, device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        side(*args)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    side(*args)
    return (time.perf_counter() - begin) * 1e3


def measure_time(case: Case, *, rounds: int, device: str) -> dict[str, Any]:
    pool, both = copies(case, device), sides(case)
    times: dict[str, list[float]] = {name: [] for name in both}
    begin = time.perf_counter()
    for turn in range(rounds + WARM_UP):
        for name, side in both.items():
            elapsed = timed(side, next(pool), device)
            if turn >= WARM_UP:
                times[name].append(elapsed)
        if len(times["plain"]) >= FEWEST_ROUNDS and time.perf_counter() - begin > SECONDS_PER_ROW:
            break
    row: dict[str, Any] = {f"{name}_ms_p50": statistics.median(values) for name, values in times.items()}
    row |= {f"{name}_ms_max": max(values) for name, values in times.items()}
    ratios = [plain / native for native, plain in zip(times["native"], times["plain"], strict=True)]
    row |= {"speedup": statistics.median(ratios), "speedup_min": min(ratios), "speedup_max": max(ratios)}
    row["rounds"] = len(ratios)
    if "floor" in times:
        over = [native / floor for native, floor in zip(times["native"], times["floor"], strict=True)]
        row["over_floor"] = statistics.median(over)
    row["input_mib"] = tensor_bytes(case.inputs()) / 2**20
    return row


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{key}:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


def peak_memory(case: Case, name: str, device: str) -> dict[str, int]:
    """Peak extra bytes of one call in this process, with and without the result. Call it in a fresh process."""
    side = sides(case)[name]
    small = next(c for c in ALL if c.op == case.op and not c.bench)
    side(*(to_device(arg, device) for arg in small.inputs()))  # libraries, threads and pools exist from here on
    args = tuple(to_device(arg, device) for arg in case.inputs())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = side(*args)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at the present size
        before = resident("VmRSS")
        result = side(*args)
        peak = resident("VmHWM") - before
    return {"peak": peak, "result": tensor_bytes(result)}


def measure_memory(case: Case, device: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in ("native", "plain"):
        command = [sys.executable, __file__, "--memory-of", case.id, name, "--device", device]
        command += ["--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        figures = json.loads(done.stdout)
        row[f"{name}_peak_mib"] = figures["peak"] / 2**20
        row[f"{name}_peak_without_result_mib"] = max(0, figures["peak"] - figures["result"]) / 2**20
    row["peak_ratio"] = row["native_peak_mib"] / max(row["plain_peak_mib"], 1e-9)
    return row


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """The environment of vss.environment, and what concerns the ops."""
    return environment() | {
        "device": arguments.device, "threads": torch.get_num_threads(), "rounds": arguments.rounds,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(), "build": ops.build_info(), "status": ops.status(),
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    chosen = [c for c in ALL if c.bench and arguments.op in (None, c.op)]
    rows = []
    for case in chosen:
        row = {"op": case.op, "case": case.name}
        row |= measure_time(case, rounds=arguments.rounds, device=arguments.device)
        row |= measure_memory(case, arguments.device)
        rows.append(row)
        LOG.info(
            "%-45s %9.2f ms  plain %9.2f ms  %7.1fx   peak %8.2f MiB  plain %8.2f MiB%s",
            case.id, row["native_ms_p50"], row["plain_ms_p50"], row["speedup"], row["native_peak_mib"],
            row["plain_peak_mib"], f"   {row['over_floor']:.2f}x floor" if "over_floor" in row else "",
        )  # fmt: skip
    if arguments.write:
        suite = "ops" if arguments.op is None else f"ops-{arguments.op}"
        known = facts(arguments)
        path = ROOT / "benchmarks" / "results" / known["machine"] / f"{vss.__version__}--{suite}.json"
        record = {"kind": "vss.bench_ops", "schema": 1, "environment": known}
        LOG.info("written: %s", write_json(path, record | {"rows": rows}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=ops.NAMES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/<machine>/<version>--ops.json")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        case_id, name = arguments.memory_of
        case = next(case for case in ALL if case.id == case_id)
        sys.stdout.write(json.dumps(peak_memory(case, name, arguments.device)))
        return
    run(arguments)


if __name__ == "__main__":
    main()
