"""What pruning is worth to a client of a server: request latency and throughput of bundles in one Triton server.

    vss ship RUN --to B1 --engine "engine baseline" --name baseline --threads 1 --force
    vss ship RUN --to B2 --name pruned --threads 1
    python benchmarks/bench_serving.py --part load --baseline B1 --pruned B2 [--ckpt finetuned.safetensors] [--write]
    python benchmarks/bench_serving.py --part soak --pruned B2 [--soak-minutes 30] [--write]
    vss ship RUN --to B3 --engine "engine pruned fp32 openvino" --name openvino --threads 1    # build.also: [openvino]
    python benchmarks/bench_serving.py --part runtimes --baseline B2 --openvino B3 [--openvino B4] [--write]

`load` has both bundles in one server, compares every sample's answer over HTTP and gRPC with local inference, finds
each capacity in a closed loop, and offers all the same rate (60 % of the smallest capacity), window by window in turns
(A B B A); a ratio is the median over rounds of that one run. `--ckpt` also serves the pruned network without pre- and
post-processing in its graph: as an ensemble in the server, and with both on the client's side.
`runtimes` does the same with one network in ONNX Runtime (`--baseline`) and in OpenVINO, any number of its precisions.
`soak` keeps 80 % of capacity up, watches memory, kills the server with SIGKILL under load, verifies the bundle, starts
the server again and compares its answers. Each part is written into the same result and leaves the other part as it is.
`--cores` pins the server and `--client-cores` this program; where they share a core, small networks feel it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vss.core import __version__
from vss.core.environment import environment
from vss.core.errors import GateFailed, VssError
from vss.core.files import read_json, write_json
from vss.deploy import BACKENDS
from vss.run.candidates import export_checkpoint
from vss.ship import read, verify
from vss.ship.check import open_engine
from vss.ship.load import PROTOCOLS, Client, drive, feeds, load, summary
from vss.ship.manifest import Manifest
from vss.ship.samples import compare
from vss.ship.server import HOST, Ports, Server, deploy, find, free_ports, session_of
from vss.ship.standalone import readable
from vss.ship.triton import Serving, write_repository

RESULTS = Path(__file__).resolve().parent / "results"
OFFERED, SOAKED = 0.6, 0.8  # of capacity
GROWTH = 0.02  # of the memory after the first fifth of a soak that may be added until its end
MEDIANS = (
    "latency_ms_p50", "latency_ms_p90", "latency_ms_p99", "request_ms_p50", "throughput_rps", "mean_batch",
    "engine_share",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("load", "runtimes", "soak"), required=True)
    parser.add_argument("--baseline", type=Path, help="bundle of the unpruned engine, or of that in ONNX Runtime")
    parser.add_argument("--pruned", type=Path, help="bundle of the pruned engine")
    parser.add_argument("--openvino", type=Path, action="append", default=[], help="bundles of OpenVINO, for runtimes")
    parser.add_argument("--also", type=Path, action="append", default=[], help="further bundles: answers compared only")
    parser.add_argument("--ckpt", type=Path, help="checkpoint of the pruned network: pre- and post-processing outside")
    parser.add_argument("--soak-minutes", type=float, default=30.0)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--cores", type=_cores, default=os.sched_getaffinity(0), help="of the server: 0 or 0,1")
    parser.add_argument("--client-cores", type=_cores, help="of this program; default: those of the server")
    parser.add_argument("--quick", action="store_true", help="short windows: to see that it runs")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results")
    options = parser.parse_args()
    options.client_cores = options.client_cores or options.cores
    facts = environment()  # before pinning, which changes what a program sees of the machine
    pin(options.client_cores)
    try:
        found = {"load": compare_pruned, "runtimes": compare_runtimes, "soak": soak}[options.part](options)
    except GateFailed as error:
        sys.stderr.write(f"failed: {error}\n")
        return 1
    except VssError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    found |= {"environment": facts, "concurrency": options.concurrency, "quick": options.quick}
    found["cores"] = {"server": sorted(options.cores), "client": sorted(options.client_cores)}
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    if options.write:
        sys.stdout.write(f"wrote {write(options.part, found)}\n")
    return 0 if found["passed"] else 1


def _cores(text: str) -> set[int]:
    """Numbers of cores with commas between; only such that exist here."""
    cores = {int(part) for part in text.split(",")}
    if not cores <= set(range(os.cpu_count() or 1)):
        raise argparse.ArgumentTypeError(f"{text!r} names cores that this machine has not")
    return cores


def pin(cores: set[int]) -> None:
    """Keep this thread, and the threads and processes that it starts from now on, on some cores."""
    os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def pinned(options: argparse.Namespace) -> Iterator[None]:
    """On the server's cores, for as long as a server is being started."""
    pin(options.cores)
    try:
        yield
    finally:
        pin(options.client_cores)


def write(part: str, found: dict[str, Any]) -> Path:
    """Put one part into the machine's result; the other part stays."""
    path = RESULTS / found["environment"]["machine"] / f"{__version__}--serving.json"
    kept = read_json(path, kind="vss.benchmark", schema=1)["parts"] if path.is_file() else {}
    parts = {**kept, part: found}
    return write_json(path, {"kind": "vss.benchmark", "schema": 1, "suite": "serving", "parts": parts})


def equality(bundle: Path, ports: Ports) -> dict[str, Any]:
    """Largest distance (1 is the tolerance) and share of unequal values, server against local engine, by protocol."""
    manifest = read(bundle)
    names, found = list(manifest.served()[1]), {}
    with open_engine(bundle, manifest) as session:
        for protocol in PROTOCOLS:
            client, worst, unequal = Client(protocol, f"{HOST}:{getattr(ports, protocol)}"), 0.0, 0.0
            for feed in feeds(bundle, manifest):
                want = readable(session.run(feed))
                got = client.infer(manifest.name, feed, names)
                worst = max(worst, compare({name: want[name] for name in names}, got))
                unequal = max(unequal, *(float((want[name] != got[name]).mean()) for name in names))
            client.close()
            found[protocol] = {"distance": worst, "unequal": unequal}
            if worst > 1:
                raise GateFailed(f"{manifest.name} over {protocol} is {worst:.2f} tolerances from local inference.")
    return found


def compare_pruned(options: argparse.Namespace) -> dict[str, Any]:
    if options.baseline is None or options.pruned is None:
        raise VssError("the load part compares two bundles; give --baseline and --pruned.")
    return compare_bundles({"baseline": options.baseline, "pruned": options.pruned}, options)


def compare_runtimes(options: argparse.Namespace) -> dict[str, Any]:
    if options.baseline is None or not options.openvino or options.ckpt:
        raise VssError("the runtimes part compares bundles; give --baseline and --openvino, and no --ckpt.")
    bundles = {"baseline": options.baseline} | {read(path).name: path for path in options.openvino}
    for path, wanted in ((path, "onnxruntime" if name == "baseline" else "openvino") for name, path in bundles.items()):
        if (backend := read(path).engine.backend) != wanted:
            raise VssError(f"{path} is for {backend}; expected a bundle for {wanted}.")
    return compare_bundles(bundles, options)


def compare_bundles(bundles: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Answers of all bundles of one server, and times; ratios are over the one called baseline."""
    window, rounds = (2.0, 1) if options.quick else (10.0, 6)
    with (
        tempfile.TemporaryDirectory(prefix="vss-bench-") as folder,
        served([*bundles.values(), *options.also], Path(folder), options) as (server, manifests),
    ):
        address = f"{HOST}:{server.ports.grpc}"
        answers = {
            m.name: equality(b, server.ports)
            for b, m in zip([*bundles.values(), *options.also], manifests, strict=True)
        }
        loads = {name: _bundle_load(b, read(b), address) for name, b in bundles.items()}
        if options.ckpt:
            loads |= _outside(options.pruned, manifests[1], address)
        for run in loads.values():
            run(None, window / 2, options.concurrency)  # warm-up
        capacity = {name: run(None, window, options.concurrency)["throughput_rps"] for name, run in loads.items()}
        rate = OFFERED * min(capacity.values())
        windows: dict[str, list[dict[str, Any]]] = {name: [] for name in loads}
        closed: dict[str, list[float]] = {name: [] for name in loads}
        for number in range(2 * rounds):
            for name in list(loads) if number % 2 == 0 else list(loads)[::-1]:
                windows[name].append(loads[name](rate, window, options.concurrency))
                closed[name].append(loads[name](None, window / 2, options.concurrency)["throughput_rps"])
                sys.stderr.write(f"{number} {name}: p50 {windows[name][-1]['latency_ms_p50']:.2f} ms\n")
    rows = {name: _row(windows[name], closed[name]) for name in loads}
    return {
        "passed": not any(row["errors"] for row in rows.values()),
        "answers": answers, "offered_rate": rate, "window_seconds": window, "rounds": 2 * rounds, "rows": rows,
        "ratios": {name: _ratios(windows, closed, name) for name in rows if name != "baseline"},
        "bundles": {name: _facts(read(path)) for name, path in bundles.items()},
    }  # fmt: skip


def _facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "chain": {link.what: link.sha256 for link in manifest.chain},
        "metrics": {key: manifest.metrics.get(key) for key in ("macs_g", "params_m", "miou_pct")},
        "size": manifest.image.size,
        "serving": manifest.serving,
        "runtime": {"backend": manifest.engine.backend, "versions": manifest.engine.versions},
    }


def _bundle_load(bundle: Path, manifest: Manifest, address: str) -> Callable[..., dict[str, Any]]:
    sent, outputs = feeds(bundle, manifest), list(manifest.served()[1])
    return lambda rate, seconds, workers: load(
        address, manifest.name, sent, outputs, seconds=seconds, concurrency=workers, rate=rate
    )


def _row(windows: list[dict[str, Any]], closed: list[float]) -> dict[str, Any]:
    """Medians over windows, with the smallest and largest; errors and batches summed."""
    row: dict[str, Any] = {"errors": sum(sum(w["errors"].values()) for w in windows), "windows": len(windows)}
    for key in MEDIANS:
        values = [w[key] for w in windows if w.get(key) is not None]
        if values:
            row[key] = float(np.median(values))
            row[f"{key}_range"] = [min(values), max(values)]
    row["offered_rate"] = windows[0]["offered_rate"]
    row["capacity_rps"] = float(np.median(closed))
    row["capacity_rps_range"] = [min(closed), max(closed)]
    batches = sum((Counter[int](each.get("batches", {})) for each in windows), Counter[int]())
    return row | {"batches": dict(batches)}


def _ratios(
    windows: dict[str, list[dict[str, Any]]], closed: dict[str, list[float]], name: str
) -> dict[str, dict[str, float]]:
    """Against the baseline of the same round; above 1 is better than the baseline. Median and range over rounds."""

    def over(pairs: Iterator[tuple[float, float]]) -> dict[str, float]:
        found = [above / below for above, below in pairs]
        return {"median": float(np.median(found)), "low": min(found), "high": max(found)}

    def times(key: str) -> Iterator[tuple[float, float]]:
        return ((a[key], b[key]) for a, b in zip(windows["baseline"], windows[name], strict=True))

    keys = ("latency_ms_p50", "latency_ms_p99", "request_ms_p50")
    return {key: over(times(key)) for key in keys} | {
        "capacity": over(zip(closed[name], closed["baseline"], strict=True))
    }


def write_outside(folder: Path, ckpt: Path, manifest: Manifest) -> None:
    """The same network, float32 in and logits out, as an ensemble `plain` (with `plain_net` inside) in a repository."""
    onnx = folder / "plain.onnx"
    export_checkpoint(
        ckpt, onnx, labels=False, labels_dtype="int32", preprocess=False, size=None, dynamic_size=False, opset=20
    )
    with BACKENDS["onnxruntime"].open(onnx) as session:
        setting = Serving(
            "plain", session.inputs, session.outputs, manifest.image.mean, manifest.image.std, manifest.classes,
            **manifest.serving,
        )  # fmt: skip
    write_repository(folder / "plain", "python", setting, onnx)


def _outside(bundle: Path, manifest: Manifest, address: str) -> dict[str, Callable[..., dict[str, Any]]]:
    """The ensemble, and a client that normalises and takes the argmax itself; both must give the bundle's labels."""
    sent, client = feeds(bundle, manifest), Client("grpc", address)
    mean, std = (np.array(each, np.float32) for each in (manifest.image.mean, manifest.image.std))

    def by_client(feed: Any) -> np.ndarray:
        pixels = (feed["image"].astype(np.float32) / 255 - mean) / std
        image = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        return client.infer("plain_net", {"image": image}, ["logits"])["logits"].argmax(1)

    for feed in sent:
        want = client.infer(manifest.name, feed, ["labels"])["labels"]
        for other in (client.infer("plain", feed, ["labels"])["labels"], by_client(feed)):
            if compare({"labels": want}, {"labels": other.astype(want.dtype)}) > 1:
                raise GateFailed("pre- and post-processing outside of the graph gives other labels than inside.")

    def whole(rate: float | None, seconds: float, workers: int) -> dict[str, Any]:
        before = client.statistics("plain_net")
        trace = drive(by_client, sent, seconds=seconds, concurrency=workers, rate=rate)
        served = client.since("plain_net", before, answered=len(trace.done))
        found = summary(trace, rate=rate, concurrency=workers)
        engine = 1e-6 * served["ns"]["compute_infer"] / max(served["count"]["compute_infer"], 1)
        mean_ms = 1e3 * float(np.mean(np.array(trace.done) - np.array(trace.sent)))
        return found | {"batches": served["batches"], "engine_share": engine / mean_ms}

    def ensemble(rate: float | None, seconds: float, workers: int) -> dict[str, Any]:
        return load(
            address, "plain", sent, ["labels"], seconds=seconds, concurrency=workers, rate=rate, engine="plain_net"
        )

    return {"pruned, ensemble around the graph": ensemble, "pruned, pre and post by the client": whole}


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """80 % of capacity in slices; memory by slice; kill -9 under load, verify, restart, equal answers."""
    if options.pruned is None:
        raise VssError("the soak part serves one bundle; give --pruned.")
    bundle, manifest = options.pruned, read(options.pruned)
    slice_seconds = 5.0 if options.quick else 30.0
    with tempfile.TemporaryDirectory(prefix="vss-soak-") as folder:
        place, ports, log = deploy(bundle, manifest, find(), Path(folder)), free_ports(), Path(folder) / "log"
        with pinned(options):
            server = Server(find(), [place], ports, log)
        try:
            server.wait_ready()
            run = _bundle_load(bundle, manifest, f"{HOST}:{ports.grpc}")
            run(None, slice_seconds / 2, options.concurrency)  # warm-up
            capacity = run(None, slice_seconds, options.concurrency)["throughput_rps"]
            rate, rows, start = SOAKED * capacity, [], time.monotonic()
            while time.monotonic() - start < 60 * options.soak_minutes:
                found = run(rate, slice_seconds, options.concurrency)
                keys = ("latency_ms_p50", "latency_ms_p99", "throughput_rps", "answered", "mean_batch")
                row = {key: found[key] for key in keys} | {"errors": sum(found["errors"].values())}
                rows.append(row | {"rss_mib": _rss_mib(server), "at_s": time.monotonic() - start})
                sys.stderr.write(f"{rows[-1]}\n")
            killed = _kill_under_load(server, bundle, manifest, rate)
        finally:
            server.stop(kill=True)
        checks = verify(bundle)
        with pinned(options):
            server = Server(find(), [place], ports, log)
        try:
            server.wait_ready()
            answers = equality(bundle, ports)
        finally:
            server.stop()
    memory, errors = _memory(rows), sum(row["errors"] for row in rows)
    grown = memory["last_mib"] - memory["first_mib"]
    return {
        "passed": not errors and grown <= GROWTH * memory["first_mib"] and killed["failed"] > 0,
        "minutes": rows[-1]["at_s"] / 60, "capacity_rps": capacity, "offered_rate": rate, "slices": rows,
        "answered": sum(row["answered"] for row in rows), "errors": errors, "memory": memory,
        "kill_9": {**killed, "verified": checks, "answers": answers}, "bundle": _facts(manifest),
    }  # fmt: skip


def _rss_mib(server: Server) -> float:
    """Resident memory of a server and the processes of its models, from /proc."""
    kib = 0
    for pid in session_of(server.process.pid):
        with contextlib.suppress(OSError):  # it has just ended
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            kib += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
    return kib / 1024


def _kill_under_load(server: Server, bundle: Path, manifest: Manifest, rate: float) -> dict[str, Any]:
    """SIGKILL to the server one second into three seconds of load; requests answered before and failed after it."""
    client, names = Client("grpc", f"{HOST}:{server.ports.grpc}", timeout=5.0), list(manifest.served()[1])
    killer = threading.Timer(1.0, server.stop, kwargs={"kill": True})
    killer.start()
    trace = drive(
        lambda feed: client.infer(manifest.name, feed, names), feeds(bundle, manifest),
        seconds=3.0, concurrency=4, rate=rate,
    )  # fmt: skip
    killer.join()
    client.close()
    return {"answered": len(trace.done), "failed": sum(trace.errors.values()), "status": server.process.returncode}


def _memory(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """MiB of server and models: first and last slice after the first fifth, and the slope of a line through those."""
    rest = rows[len(rows) // 5 :]
    times, sizes = (np.array([row[key] for row in rest]) for key in ("at_s", "rss_mib"))
    slope = float(np.polyfit(times / 3600, sizes, 1)[0]) if len(rest) > 2 else None
    return {
        "first_mib": float(sizes[0]),
        "last_mib": float(sizes[-1]),
        "max_mib": float(sizes.max()),
        "mib_per_hour": slope,
    }


@contextlib.contextmanager
def served(bundles: list[Path], folder: Path, options: argparse.Namespace) -> Iterator[tuple[Server, list[Manifest]]]:
    """A server over bundles and, with a checkpoint, over its network without pre- and post-processing."""
    manifests = [read(bundle) for bundle in bundles]
    if len({manifest.name for manifest in manifests}) < len(bundles):
        raise VssError("two bundles have one name; ship one of them with --name.")
    places = [deploy(bundle, m, find(), folder) for bundle, m in zip(bundles, manifests, strict=True)]
    if options.ckpt:
        write_outside(folder, options.ckpt, manifests[1])
        places.append(folder / "plain")
    with pinned(options):
        server = Server(find(), places, free_ports(), folder / "log")
    try:
        server.wait_ready()
        yield server, manifests
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
