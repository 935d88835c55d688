"""Time and extra memory of every op against the same result in plain torch.

    python benchmarks/bench_ops.py [--op NAME] [--rounds 15] [--threads 2] [--device cpu|cuda] [--compile] [--quick]
                                   [--write] [--resume] [--seconds-left S]

Rows are those of tests/ops/cases.py marked `bench`. One run interleaves the sides round by round, so that a ratio
compares like with like; a figure is the median over rounds. Sides: `native`, `plain` (the published procedure), `torch`
(the best that plain torch does, where that is another thing), `baddbmm` (batched cuBLAS), `compile` (torch.compile of
`plain`, with `--compile`), `no_indices` (pooling without places) and `pass` (one read of the same maps).
`percent_of_floor` is the share of the roofline: what the machine does at best, bytes of inputs and results over the
measured copy bandwidth, or operations over the measured float32 matmul rate, whichever takes longer (`bound`). Caches
are cold. Peak extra memory of a side is measured in a fresh process of its own. With `--write` a row is kept as soon as
it is known; `--resume` leaves out what the file has from the same commit. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
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
from measure import (  # noqa: E402
    COLD_BYTES,
    STOPPED,
    Clock,
    best_rates,
    facts,
    peak_of,
    result_path,
    summary,
    tensor_bytes,
    write,
)
from plain import FUSED, OTHERS, PASS, PLAIN  # noqa: E402

from vss import ops  # noqa: E402

LOG = logging.getLogger("bench_ops")
WARM_UP, WARM_UP_SECONDS = 2, 3.0  # rounds that are dropped, unless they took so long that nothing in them is cold
FEWEST_ROUNDS, SECONDS_PER_ROW = 3, 20.0  # a slow row stops after so many rounds once it has taken so long
QUICK_ROUNDS, QUICK_SECONDS = 5, 4.0
Side = Callable[..., object]


COMPILED: dict[str, Side] = {}  # filled by --compile
OWN = ("native", "plain")


def sides(case: Case) -> dict[str, Side]:
    found: dict[str, Side] = {"native": getattr(torch.ops.vss, case.op), "plain": PLAIN[case.op]}
    found |= OTHERS.get(case.op, {})
    found |= {"compile": COMPILED[case.op]} if case.op in COMPILED else {}
    return found | ({"pass": PASS[case.op]} if case.op in PASS else {})


def compile_plain(op: str, device: str) -> None:
    """`torch.compile` of the plain form, where it pays and works here; else a sentence and no such side."""
    if op not in FUSED:
        return
    case = next(c for c in ALL if c.op == op and c.bench)
    compiled: Side = torch.compile(PLAIN[op], dynamic=False)
    try:
        compiled(*inputs_on(case, device))
    except Exception as error:  # whatever a missing compiler raises
        LOG.info("torch.compile of %s does not work here: %s", op, str(error).strip().partition("\n")[0])
        return
    COMPILED[op] = compiled


def to_device(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    return [to_device(item, device) for item in value] if isinstance(value, list) else value


def inputs_on(case: Case, device: str) -> Args:
    return tuple(to_device(arg, device) for arg in case.inputs())


def copies(case: Case, device: str) -> Iterator[Args]:
    """Endless copies of the inputs, different memory each time, together larger than any cache of a processor."""
    args = case.inputs()
    count = max(2, min(32, COLD_BYTES // max(1, tensor_bytes(args))))
    pool = [tuple(to_device(arg, device) for arg in args) for _ in range(count)]
    while True:
        yield from pool


def warm(case: Case, device: str) -> None:
    """A small call of every side: libraries, threads and pools exist from here on."""
    small = next(c for c in ALL if c.op == case.op and not c.bench)
    for name, side in sides(case).items():
        side(*inputs_on(case if name == "compile" else small, device))  # compiled for the sizes that are timed


def measure_time(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    pool, every, clock = copies(case, arguments.device), sides(case), Clock(arguments.device)
    warm(case, arguments.device)
    times: dict[str, list[float]] = {name: [] for name in every}
    begin = time.perf_counter()
    for turn in range(arguments.rounds + WARM_UP):
        given = {name: next(pool) for name in every}
        elapsed = {name: clock(lambda name=name: every[name](*given[name])) for name in every}  # noqa: B023
        spent = time.perf_counter() - begin
        if turn >= WARM_UP or spent > WARM_UP_SECONDS:
            for name, value in elapsed.items():
                times[name].append(value)
        if len(times["native"]) >= arguments.fewest and spent > arguments.seconds:
            break
    return summary(times)


def floor_ms(case: Case, device: str, rates: dict[str, float]) -> dict[str, Any]:
    """Milliseconds that the machine needs at best, and what bounds it; of a Gram matrix one triangle counts."""
    args = inputs_on(case, device)
    least = (tensor_bytes(args) + tensor_bytes(getattr(torch.ops.vss, case.op)(*args))) / rates["copy_bytes_per_s"]
    if case.op == "gram_accumulate":
        batch, channels, height, width = args[1].shape
        work = batch * channels * (channels + 1) * height * width
        flops = work / rates["matmul_flop_per_s_highest"]
        if flops > least:
            return {"floor_ms": flops * 1e3, "bound": "flops"}
    return {"floor_ms": least * 1e3, "bound": "bytes"}


def measure_memory(case: Case, device: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in OWN:
        figures = memory_of(case, name, device) if device == "cuda" else memory_of_fresh_process(case, name)
        row[f"{name}_peak_mib"] = figures["peak"] / 2**20
        row[f"{name}_peak_without_result_mib"] = max(0, figures["peak"] - figures["result"]) / 2**20
    row["peak_ratio"] = row["native_peak_mib"] / max(row["plain_peak_mib"], 1e-9)
    return row


def memory_of_fresh_process(case: Case, name: str) -> dict[str, int]:
    """`memory_of` on the CPU, where what a process has freed before counts for nothing."""
    command = [sys.executable, __file__, "--memory-of", case.id, name, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, int] = json.loads(done.stdout)
    return figures


def memory_of(case: Case, name: str, device: str) -> dict[str, int]:
    """Peak extra bytes of one call in this process, and bytes of the result. On the CPU call it in a fresh process."""
    warm(case, device)
    args = inputs_on(case, device)
    peak, result = peak_of(lambda: sides(case)[name](*args), device)
    return {"peak": peak, "result": tensor_bytes(result)}


def measure(case: Case, arguments: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    row = {"op": case.op, "case": case.name} | measure_time(case, arguments)
    row |= {"input_mib": tensor_bytes(case.inputs()) / 2**20} | floor_ms(case, arguments.device, rates)
    row["percent_of_floor"] = 100 * row["floor_ms"] / row["native_ms_p50"]
    if "pass_ms_p50" in row:
        row["over_pass"] = 1 / row["speedup_over_pass"]
    if not arguments.quick:
        row |= measure_memory(case, arguments.device)
    others = [f"{name} {row[f'{name}_ms_p50']:.2f} ms" for name in sides(case) if name != "native"]
    line = f"{case.id:52s} {row['native_ms_p50']:9.3f} ms {row['speedup']:8.1f}x  {row['percent_of_floor']:5.1f} %"
    LOG.info("%s of the roofline (%s)  %s", line, row["bound"], ", ".join(others))
    return row


def kept_rows(path: Path, known: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an earlier call with `--write` left at the same commit."""
    if not path.is_file():
        return []
    record = json.loads(path.read_text())
    same = record["environment"]["git"] == known["git"] and record["environment"]["rounds"] == known["rounds"]
    return list(record["rows"]) if same else []


def run(arguments: argparse.Namespace) -> None:
    begin = time.monotonic()
    asked = ops.NAMES if arguments.op is None else (arguments.op,)
    if missing := [op for op in asked if ops.status()[op][arguments.device.upper()] == "reference"]:
        LOG.error("no kernel for %s is loaded of %s, and the reference is not what is measured here: "
                  "VSS_CUDA=%d pip install --no-build-isolation -e .", arguments.device, ", ".join(missing),
                  arguments.device == "cuda")  # fmt: skip
        raise SystemExit(2)
    rates = best_rates(arguments.device)
    LOG.info("at best: %s", ", ".join(f"{name} {value / 1e9:.1f} G" for name, value in rates.items()))
    known = facts(arguments.device, rounds=arguments.rounds, at_best=rates)
    suite = "ops" if arguments.op is None else f"ops-{arguments.op}"
    rows = kept_rows(result_path(suite, arguments.device, known), known) if arguments.resume else []
    done = {(row["op"], row["case"]) for row in rows}
    todo = [c for c in ALL if c.bench and arguments.op in (None, c.op) and (c.op, c.name) not in done]
    tried: set[str] = set()
    for number, case in enumerate(todo):
        if time.monotonic() - begin > arguments.seconds_left:
            LOG.info("time is up with %d of %d rows to go; what is measured stays, --resume goes on",
                     len(todo) - number, len(todo))  # fmt: skip
            raise SystemExit(STOPPED)
        if arguments.compile and case.op not in tried:
            tried.add(case.op)
            compile_plain(case.op, arguments.device)
        rows.append(measure(case, arguments, rates))
        if arguments.write:
            path = write(suite, arguments.device, known, {"rows": rows})
            if number == len(todo) - 1:
                LOG.info("written: %s", path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=ops.NAMES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="few rounds, slow sides once, no memory")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the plain form as a side of its own")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/<machine>/<version>--ops.json")
    parser.add_argument("--resume", action="store_true", help="go on with the file of the same commit")
    parser.add_argument("--seconds-left", type=float, default=float("inf"), help="begin no row after so many seconds")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.fewest, arguments.seconds = (1, QUICK_SECONDS) if arguments.quick else (FEWEST_ROUNDS, SECONDS_PER_ROW)
    arguments.rounds = min(arguments.rounds, QUICK_ROUNDS) if arguments.quick else arguments.rounds
    return arguments


def main() -> None:
    arguments = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        case_id, name = arguments.memory_of
        case = next(case for case in ALL if case.id == case_id)
        sys.stdout.write(json.dumps(memory_of(case, name, arguments.device)))
        return
    run(arguments)


if __name__ == "__main__":
    main()
