"""`vss ship`, `verify`, `rebuild`, `serve` and `load`: a bundle, and what is done with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from vss.cli.console import out, print_open, print_table, write_figures
from vss.cli.options import Given, ReportFile, recipe_keys, takes
from vss.core.errors import GateFailed, NotMeasured, VssError, counted
from vss.core.files import file_at_work, target_of
from vss.core.report import read_report

Bundle = Annotated[Path, Argument(help="bundle: a folder, or .tar.gz")]
BundleFolder = Annotated[Path, Argument(help="folder of a bundle")]


@takes(given=recipe_keys("data.root"))
def ship(
    run: Annotated[Path, Argument(help="folder of a finished run")],
    to: Annotated[Path, Option("--save", "--to", help="new folder to write, or a file that ends in .tar.gz")],
    given: Given,
    engine: Annotated[
        str | None, Option(help="row of the report to ship; default: engine pruned, of auto the kept one")
    ] = None,
    name: Annotated[str | None, Option(help="name of the model in a server; default: that of the recipe")] = None,
    samples: Annotated[int, Option(min=0, help="most images that go along with truth and answers")] = 4,
    accept_failed_gate: Annotated[
        str | None, Option(help="reason to ship although a gate failed, for the model card")
    ] = None,
    force: Annotated[bool, Option(help="ship what no gate judged, and write that down")] = False,
    max_batch: Annotated[int, Option(min=1, max=4096, help="most images per call of the engine in a server")] = 8,
    delay_us: Annotated[int, Option(min=0, max=60_000_000, help="microseconds that a request waits for others")] = 2000,
    instances: Annotated[int, Option(min=1, max=1024, help="copies of the engine in a server")] = 1,
    threads: Annotated[int, Option(min=0, max=1024, help="CPU threads of each copy; 0: one per core")] = 0,
    licence: Annotated[str | None, Option(help="licence of the weights, for the model card")] = None,
    data_licence: Annotated[str | None, Option(help="licence of the data, for the model card")] = None,
) -> None:
    """Write what an inference team runs: engine, runner, server repository, model card, hashes of everything."""
    report = read_report(run / "report.json")
    from vss.ship import ship as make

    licences = {"weights": licence, "data": data_licence}
    manifest = make(
        run, to, row=engine, name=name, data_root=given.get("data.root"), samples=samples,
        accept=accept_failed_gate, force=force, max_batch=max_batch,
        delay_us=delay_us, instances=instances, threads=threads,
        licences={key: value for key, value in licences.items() if value},
    )  # fmt: skip
    size = sum(fact.bytes for fact in manifest.files.values()) / 2**20
    files = counted(len(manifest.files), "file")
    out.print(f"{manifest.name}: {files}, {size:.1f} MiB, {' and '.join(manifest.triton)} servers")
    if manifest.forced:
        out.print(manifest.forced)
    print_open(report)
    out.print(f"wrote {to}; its README.md says how to run it")


def verify(
    bundle: Bundle,
    run: Annotated[bool, Option("--run/--no-run", help="run the engine and score the samples as well")] = True,
) -> None:
    """Check every hash, the chain, the repositories; run the engine and score the shipped samples."""
    from vss.ship.manifest import opened, read

    with opened(bundle) as folder:
        read(folder)
        from vss.ship import verify as check

        rows = check(folder, run=run)
    print_table(rows, {"name": "check", "status": "status", "detail": "detail"})


def rebuild(
    bundle: BundleFolder,
    max_drop: Annotated[float, Option(min=0, max=100, help="points that a metric of the samples may lose")] = 0.1,
    backend: Annotated[
        str | None, Option(help="tensorrt_rtx: build the engine for GPUs elsewhere; default: the bundle's own")
    ] = None,
    targets: Annotated[str | None, Option(help="GPUs of that engine; default: as before", metavar="sm86,sm89")] = None,
) -> None:
    """Build the engine on this machine from the bundle's ONNX file, judge it by the samples, write it in.

    An engine for GPUs elsewhere is checked against the file and not run.
    """
    from vss.ship import read

    if targets and not backend:
        raise VssError("--targets is for --backend tensorrt_rtx; give both.")
    with file_at_work(bundle):
        read(bundle)
        from vss.ship import rebuild as make
        from vss.ship.check import rebuild_elsewhere

        if backend:
            wanted = [each.strip().lower() for each in (targets or "").split(",") if each.strip()]
            manifest = rebuild_elsewhere(bundle, backend, wanted)
        else:
            manifest = make(bundle, max_drop=max_drop)
    note = manifest.rebuilds[-1]
    said = f"samples: {note['samples']['metrics']}" if note["samples"] else "built and checked, not run"
    out.print(f"{note.get('file', manifest.engine.file)} {manifest.engine.device or ''}; {said}")


def serve(
    bundles: Annotated[list[Path] | None, Argument(help="folders of bundles")] = None,
    get_server: Annotated[bool, Option("--get-server", help="install a Triton server for the CPU first")] = False,
    http_port: Annotated[int, Option(min=1, max=65535, help="port of HTTP")] = 8000,
    grpc_port: Annotated[int, Option(min=1, max=65535, help="port of gRPC")] = 8001,
    metrics_port: Annotated[int | None, Option(min=1, max=65535, help="port of metrics; default: none")] = None,
    log: Annotated[Path, Option(help="file to append the server's own log to")] = Path("triton.log"),
    once: Annotated[bool, Option("--once", help="stop after the answers were checked")] = False,
) -> None:
    """Start a Triton server over bundles, check its answers, and serve until interrupted."""
    from vss.ship import read

    if not bundles and not get_server:
        raise VssError("BUNDLES is missing: give one or more bundles to serve.")
    if not get_server:
        for bundle in bundles or []:
            read(bundle)
    from vss.ship import server as tritonserver
    from vss.ship.server import Ports
    from vss.ship.server import serve as start

    if get_server:
        out.print(f"server: {tritonserver.make()}")
    if not bundles:
        return
    with (
        file_at_work(target_of(log)),
        start(bundles, ports=Ports(http_port, grpc_port, metrics_port), log=log) as (server, distances),
    ):
        for name, distance in distances.items():
            out.print(f"{name}: answers {distance:.2g} of the tolerance away from the shipped ones")
        out.print(f"ready: http 127.0.0.1:{http_port}, grpc 127.0.0.1:{grpc_port}; log {log}; Ctrl-C stops it")
        out.file.flush()
        if not once:
            server.process.wait()
            raise server.ended()


def load(
    bundle: BundleFolder,
    address: Annotated[str, Option(help="HOST:PORT of gRPC", metavar="HOST:PORT")] = "127.0.0.1:8001",
    rate: Annotated[
        float | None, Option(min=0.001, max=1e6, help="requests a second; default: as fast as it answers")
    ] = None,
    concurrency: Annotated[int, Option(min=1, max=1024, help="requests under way at once")] = 8,
    seconds: Annotated[float, Option(min=0.1, max=86400, help="seconds to send for")] = 10.0,
    perf_analyzer: Annotated[bool, Option("--perf-analyzer", help="use NVIDIA's tool as well")] = False,
    report: ReportFile = None,
) -> None:
    """Send the bundle's samples to a server: latency, throughput, errors, and the batches that the server formed."""
    from vss.ship import read

    read(bundle)
    from vss.ship import load as tools
    from vss.ship.load import load_bundle

    figures = load_bundle(bundle, address, seconds=seconds, concurrency=concurrency, rate=rate)
    if perf_analyzer and "lost" not in figures:
        try:
            figures["perf_analyzer"] = tools.perf_analyzer(
                address, read(bundle).name, seconds=seconds, concurrency=concurrency, rate=rate
            )
        except VssError as error:  # what was measured before is kept
            figures["lost"] = str(error)
    heads = {
        "model": "model", "latency_ms_p50": "p50 ms", "latency_ms_p90": "p90 ms", "latency_ms_p99": "p99 ms",
        "throughput_rps": "requests/s", "mean_batch": "mean batch", "engine_share": "engine share",
    }  # fmt: skip
    print_table([figures], heads)
    failed = sum(figures["errors"].values())
    out.print(f"answered: {figures['answered']}; errors: {failed}; batches formed: {figures.get('batches', 'unknown')}")
    write_figures(report, "vss.load", figures)
    first = f"{failed} requests failed: {next(iter(figures['errors']))}" if failed else ""
    if "lost" in figures:
        raise NotMeasured(f"{figures['lost']} What was measured until then is kept above. {first}".rstrip())
    if failed:
        raise GateFailed(first)
