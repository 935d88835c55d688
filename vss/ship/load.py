"""Load on a served model: requests at an offered rate whether or not the server keeps up, or as fast as it answers.

With a rate the load is open: request k is due at a fixed time (Poisson arrivals, seeded), and its latency counts from
then, so that a slow server cannot slow its own test down (coordinated omission). Without one every worker sends its
next request when the last is answered, which measures capacity.
"""

from __future__ import annotations

import csv
import itertools
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vss.core.errors import VssError
from vss.ship.client import Client

Feed = Mapping[str, np.ndarray]


@dataclass
class Trace:
    """What happened: seconds since the start per request, and errors by their text."""

    due: list[float] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


def drive(
    send: Callable[[Feed], Any],
    feeds: Sequence[Feed],
    *,
    seconds: float,
    concurrency: int,
    rate: float | None = None,
    seed: int = 0,
) -> Trace:
    """Call `send` from `concurrency` threads for `seconds`; see the module's description.

    Args:
        send: one request; whatever `VssError` it raises is counted by its text.
        feeds: taken in turn.
        concurrency: requests that may be under way at once.
        rate: requests a second, or None.
    """
    if concurrency < 1 or seconds <= 0 or (rate is not None and rate <= 0) or not feeds:
        raise VssError(f"a load of {rate} requests/s from {concurrency} workers for {seconds} s cannot be made.")
    plan: Any = itertools.repeat(0.0)
    if rate is not None:
        draw, amount = np.random.default_rng(seed).exponential, max(1, round(rate * seconds))
        plan = itertools.accumulate(draw(1 / rate) for _ in range(amount))
    trace, lock, numbers = Trace(), threading.Lock(), itertools.count()
    start = time.perf_counter()

    def work() -> None:
        while True:
            with lock:
                due, number = next(plan, None), next(numbers)
            now = time.perf_counter() - start
            if due is None or (rate is None and now >= seconds):
                return
            time.sleep(max(0.0, due - now))
            sent = time.perf_counter() - start
            due = sent if rate is None else due
            try:
                send(feeds[number % len(feeds)])
            except VssError as error:
                with lock:
                    trace.errors[str(error)] += 1
                continue
            with lock:
                trace.due.append(due)
                trace.sent.append(sent)
                trace.done.append(time.perf_counter() - start)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(concurrency)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    trace.seconds = time.perf_counter() - start
    return trace


def summary(trace: Trace, *, rate: float | None, concurrency: int) -> dict[str, Any]:
    """Latencies in ms from the due time, and from the sending (`request_ms`); throughput over the whole time."""
    due, sent, done = (np.array(values) for values in (trace.due, trace.sent, trace.done))
    return {
        "offered_rate": rate,
        "concurrency": concurrency,
        "seconds": trace.seconds,
        "answered": len(done),
        "errors": dict(trace.errors),
        "throughput_rps": len(done) / trace.seconds,
        **_percentiles("latency_ms", 1e3 * (done - due)),
        **_percentiles("request_ms", 1e3 * (done - sent)),
    }


def _percentiles(name: str, values: np.ndarray) -> dict[str, float | None]:
    found = np.percentile(values, [50, 90, 99]).tolist() if len(values) else [None] * 3
    return dict(zip((f"{name}_p50", f"{name}_p90", f"{name}_p99"), found, strict=True))


def load(
    address: str,
    model: str,
    feeds: Sequence[Feed],
    outputs: list[str],
    *,
    seconds: float,
    concurrency: int,
    rate: float | None = None,
    engine: str | None = None,
) -> dict[str, Any]:
    """Drive one model over gRPC and say what came of it.

    Args:
        address: HOST:PORT of gRPC.
        engine: the model that runs the engine, when `model` is an ensemble around it.

    Returns:
        `summary`, and of the server's statistics in that time: `batches` {size: executions} of the engine,
        `mean_batch`, `stages_ms` (mean per request of the engine's model), `engine_share` of the mean request time.
        In their place `lost`, a sentence, where the server gave no statistics afterwards: what was measured is kept.
    """
    client, engine = Client("grpc", address), engine or model
    try:
        before = client.statistics(engine)
        trace = drive(
            lambda feed: client.infer(model, feed, outputs), feeds, seconds=seconds, concurrency=concurrency, rate=rate
        )
        found = {"model": model, **summary(trace, rate=rate, concurrency=concurrency)}
        try:
            served = client.since(engine, before, answered=len(trace.done))
        except VssError as error:
            return {**found, "lost": str(error)}
    finally:
        client.close()
    stages = {name: 1e-6 * ns / max(served["count"][name], 1) for name, ns in served["ns"].items() if name != "fail"}
    mean = 1e3 * float(np.mean(np.array(trace.done) - np.array(trace.sent))) if trace.done else None
    return {
        **found,
        "batches": served["batches"],
        "mean_batch": served["requests"] / served["executions"] if served["executions"] else None,
        "stages_ms": stages,
        "engine_share": stages["compute_infer"] / mean if mean else None,
    }


def perf_analyzer(address: str, model: str, *, seconds: float, concurrency: int, rate: float | None) -> dict[str, Any]:
    """The same question to NVIDIA's perf_analyzer, for those who trust it more; raises `VssError` where it fails."""
    program = shutil.which("perf_analyzer")
    if program is None:
        raise VssError(
            "perf_analyzer is not on the PATH; run: pip install perf-analyzer, or leave --perf-analyzer off."
        )
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.csv"
        command = [program, "-m", model, "-u", address, "-i", "grpc", "-f", str(table), "--percentile=99"]
        command += ["--measurement-interval", str(round(1000 * seconds))]
        if rate is None:
            command += ["--concurrency-range", str(concurrency)]
        else:
            command += ["--request-rate-range", f"{rate:g}", "--max-threads", str(concurrency)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not table.is_file():
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["it said nothing"]
            raise VssError(f"perf_analyzer failed: {last[0]}")
        with open(table, newline="") as file:
            return {key: float(value) for key, value in next(csv.DictReader(file)).items() if value}
