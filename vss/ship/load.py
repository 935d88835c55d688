"""Requests to a Triton server: one face for HTTP and gRPC, the samples of a bundle, and load.

Load is at an offered rate whether or not the server keeps up, or as fast as it answers.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vss.core.errors import SHOWN, GateFailed, VssError, need, one_line, shown
from vss.data.images import open_rgb
from vss.ship.manifest import Manifest, inside, read
from vss.ship.samples import compare, load_expected
from vss.ship.standalone import prepare, readable

PROTOCOLS = ("grpc", "http")
TRITON_TYPES = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32", "float16": "FP16", "int64": "INT64"}


class Client:
    """One connection. A gRPC client may be shared by threads, an HTTP client may not.

    Args:
        protocol: "grpc" or "http".
        address: HOST:PORT of that protocol.
        timeout: of one request, seconds.
    """

    def __init__(self, protocol: str, address: str, *, timeout: float = 60.0) -> None:
        if protocol not in PROTOCOLS:
            raise VssError(f"protocol is {protocol!r}; expected grpc or http.")
        self.lib: Any = need(f"tritonclient.{protocol}", "talking to a server")
        self.protocol, self.address, self.timeout = protocol, address, timeout
        extra = {"network_timeout": timeout, "connection_timeout": timeout} if protocol == "http" else {}
        self.client = self.lib.InferenceServerClient(address, **extra)

    def infer(self, model: str, inputs: Mapping[str, np.ndarray], outputs: list[str]) -> dict[str, np.ndarray]:
        """One request. Raises `VssError` with the server's own words for everything that it refuses."""
        fields = []
        for name, value in inputs.items():
            dtype = TRITON_TYPES.get(value.dtype.name, value.dtype.name.upper())
            fields.append(self.lib.InferInput(name, list(value.shape), dtype))
        extra = {"client_timeout": self.timeout} if self.protocol == "grpc" else {}
        with self._asking(f"the server refused the request to {model}"):
            for field, value in zip(fields, inputs.values(), strict=True):
                field.set_data_from_numpy(value)
            wanted = [self.lib.InferRequestedOutput(name) for name in outputs]
            answer = self.client.infer(model, fields, outputs=wanted, **extra)
            found = {name: answer.as_numpy(name) for name in outputs}
        if missing := [name for name, value in found.items() if value is None]:
            raise VssError(f"the server's answer of {model} lacks {', '.join(missing)}; expected {', '.join(outputs)}.")
        return found

    def statistics(self, model: str) -> dict[str, object]:
        """Counters of one model since it was loaded: requests, executions, batches {size: executions}, ns by stage."""
        extra = {"as_json": True} if self.protocol == "grpc" else {}
        with self._asking(f"the server at {self.address} gives no statistics of {model}"):
            return _counters(self.client.get_inference_statistics(model, **extra)["model_stats"][0])

    def since(
        self, model: str, before: Mapping[str, object], *, answered: int, seconds: float = 10.0
    ) -> dict[str, Any]:
        """What a model did since `before` (see `difference`), once the server has counted `answered` requests.

        A server counts a request a moment after its answer. Raises `VssError` when it does not within `seconds`.
        """
        end = time.monotonic() + seconds
        while True:
            found = difference(self.statistics(model), before)
            if found["count"]["success"] >= answered:
                return found
            if time.monotonic() > end:
                raise VssError(f"the server counts {found['count']['success']} of {answered} requests to {model}.")
            time.sleep(0.02)

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Errors of the server and of the connection, and answers that are none of Triton's, as one sentence."""
        from tritonclient.utils import InferenceServerException

        try:
            yield
        except (InferenceServerException, OSError) as error:
            raise VssError(f"{what}: {one_line(str(error))}") from error
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise VssError(
                f"{what}: its answer cannot be read ({type(error).__name__}: {one_line(str(error), SHOWN)}); is a "
                f"Triton server at {self.address}?"
            ) from error

    def close(self) -> None:
        self.client.close()


def _counters(row: Mapping[str, Any]) -> dict[str, object]:
    """`Client.statistics` from Triton's own words."""
    stats = row.get("inference_stats", {})
    stages = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    return {
        "requests": int(row.get("inference_count", 0)),
        "executions": int(row.get("execution_count", 0)),
        "batches": {
            int(each["batch_size"]): int(each["compute_infer"].get("count", 0)) for each in row.get("batch_stats", [])
        },
        "ns": {name: int(stats.get(name, {}).get("ns", 0)) for name in stages},
        "count": {name: int(stats.get(name, {}).get("count", 0)) for name in stages},
    }


def difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What happened between two `Client.statistics`; batch sizes that did not occur are left out."""
    found: dict[str, Any] = {key: after[key] - before[key] for key in ("requests", "executions")}
    for key in ("batches", "ns", "count"):
        found[key] = {name: value - before[key].get(name, 0) for name, value in after[key].items()}
    return found | {"batches": {size: count for size, count in sorted(found["batches"].items()) if count}}


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
    send: Callable[[Feed], object],
    feeds: Sequence[Feed],
    *,
    seconds: float,
    concurrency: int,
    rate: float | None = None,
    seed: int = 0,
) -> Trace:
    """Call `send` from `concurrency` threads for `seconds`; a `VssError` of it is counted by its text.

    Args:
        feeds: taken in turn.
        concurrency: requests that may be under way at once.
        rate: requests a second; None: as fast as it answers.
    """
    if concurrency < 1 or seconds <= 0 or (rate is not None and rate <= 0) or not feeds:
        raise VssError(f"a load of {rate} requests/s from {concurrency} workers for {seconds} s cannot be made.")
    plan: Iterator[float] = itertools.repeat(0.0)
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


def summary(trace: Trace, *, rate: float | None, concurrency: int) -> dict[str, object]:
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
) -> dict[str, object]:
    """Drive one model over gRPC and say what came of it.

    Args:
        address: HOST:PORT of gRPC.
        engine: the model that runs the engine, when `model` is an ensemble around it.

    Returns:
        `summary`, and of the server's statistics in that time: `batches` {size: executions} of the engine,
        `mean_batch`, `stages_ms` (mean per request of the engine's model), `engine_share` of the mean request time.
        In their place `lost`, a sentence, where the server gave no statistics afterwards: what was measured is kept.
    """
    engine = engine or model
    with contextlib.closing(Client("grpc", address)) as client:
        before = client.statistics(engine)
        trace = drive(
            lambda feed: client.infer(model, feed, outputs), feeds, seconds=seconds, concurrency=concurrency, rate=rate
        )
        found = {"model": model, **summary(trace, rate=rate, concurrency=concurrency)}
        try:
            served = client.since(engine, before, answered=len(trace.done))
        except VssError as error:
            return {**found, "lost": str(error)}
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


def pixels(path: Path, manifest: Manifest) -> np.ndarray:
    """One image as a client sends it: (1, H, W, 3) uint8."""
    return prepare(open_rgb(path), manifest.image.model_dump(), True)[None]


def feeds(bundle: Path, manifest: Manifest) -> list[dict[str, np.ndarray]]:
    """What a client sends for every sample; noise where the bundle has no samples."""
    if manifest.samples.images:
        return [{"image": pixels(inside(bundle, path), manifest)} for path in manifest.samples.images]
    noise = np.random.default_rng(0).integers(0, 256, (1, *manifest.image.size, 3), dtype=np.uint8)
    return [{"image": noise}]


def check_answers(bundle: Path, manifest: Manifest, client: Client) -> float:
    """Send every sample; the largest distance (see `vss.ship.samples.compare`) from the shipped answers.

    Raises `GateFailed` when it is out of tolerance.
    """
    names, distance = list(manifest.served()[1]), 0.0
    for feed, files in zip(feeds(bundle, manifest), manifest.samples.expected, strict=False):
        shipped = readable(load_expected(bundle, files))
        found = client.infer(manifest.name, feed, names)
        distance = max(distance, compare({name: shipped[name] for name in names}, found))
    if distance > 1:
        raise GateFailed(f"answers of the server to the samples of {manifest.name} are {distance:.2f} tolerances off.")
    return distance


def engine_name(manifest: Manifest) -> str:
    """The model that runs the engine: the bundle's own, or the inner one of its ensemble."""
    ensemble = manifest.inputs["image"].dtype == "float32" or "logits" in manifest.outputs
    return f"{manifest.name}_net" if ensemble else manifest.name


def load_bundle(
    bundle: Path, address: str, *, seconds: float, concurrency: int, rate: float | None = None
) -> dict[str, Any]:
    """Load the model of a bundle with its own samples; see `vss.ship.load.load`."""
    manifest = read(bundle)
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise VssError(f"--address is {shown(address)}; expected HOST:PORT, the port from 1 to 65535.")
    outputs = list(manifest.served()[1])
    return load(
        address,
        manifest.name,
        feeds(bundle, manifest),
        outputs,
        seconds=seconds,
        concurrency=concurrency,
        rate=rate,
        engine=engine_name(manifest),
    )
