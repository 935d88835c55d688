"""`vss ship`, `vss verify`, `vss rebuild`, `vss serve`, `vss load`: a bundle, and what is done with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vss.cli.console import ReportFile, Root, out, show_table, write_figures
from vss.core.files import target_of
from vss.core.locks import file_at_work

ship_app = typer.Typer()
Port = Annotated[int, typer.Option(min=1, max=65535)]
Bundle = Annotated[Path, typer.Argument(help="a bundle: folder, or .tar.gz")]


@ship_app.command()
def ship(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    to: Annotated[Path, typer.Option("--to", help="new folder, or a file that ends in .tar.gz")],
    engine: Annotated[str | None, typer.Option(help="row of the report; default: engine pruned")] = None,
    name: Annotated[str | None, typer.Option(help="of the model in a server; default: that of the recipe")] = None,
    data_root: Root = None,
    samples: Annotated[int, typer.Option(min=0, help="most images with truth and answers that go along")] = 4,
    accept_failed_gate: Annotated[
        str | None, typer.Option(help="why it ships although a gate failed: words for the model card")
    ] = None,
    force: Annotated[bool, typer.Option(help="ship what no gate judged; the manifest says so")] = False,
    max_batch: Annotated[int, typer.Option(min=1, max=4096, help="images per execution in a server")] = 8,
    delay_us: Annotated[
        int, typer.Option(min=0, max=60_000_000, help="microseconds that a request waits for others")
    ] = 2000,
    instances: Annotated[int, typer.Option(min=1, max=1024, help="copies of the engine in a server")] = 1,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="of each copy on the CPU; 0: one per core")] = 0,
    licence: Annotated[str | None, typer.Option(help="of the weights, for the model card")] = None,
    data_licence: Annotated[str | None, typer.Option(help="of the data, for the model card")] = None,
) -> None:
    """Write what an inference team runs: engine, runner, server repository, model card, hashes of everything."""
    from vss.core.errors import counted
    from vss.ship import ship as make

    given = {"weights": licence, "data": data_licence}
    manifest = make(
        run, to, row=engine, name=name, data_root=data_root, samples=samples,
        accept=accept_failed_gate, force=force, max_batch=max_batch,
        delay_us=delay_us, instances=instances, threads=threads,
        licences={key: value for key, value in given.items() if value},
    )  # fmt: skip
    size = sum(fact.bytes for fact in manifest.files.values()) / 2**20
    files = counted(len(manifest.files), "file")
    out.print(f"{manifest.name}: {files}, {size:.1f} MiB, {' and '.join(manifest.triton)} servers")
    if manifest.forced:
        out.print(manifest.forced)
    out.print(f"wrote {to}; its README.md says how to run it")


@ship_app.command()
def verify(
    bundle: Bundle,
    run: Annotated[bool, typer.Option("--run/--no-run", help="also run the engine and score the samples")] = True,
) -> None:
    """Check every hash, the chain, the repositories; run the engine and score the shipped samples."""
    from vss.ship import archive
    from vss.ship import verify as check

    with archive.opened(bundle) as folder:
        rows = check(folder, run=run)
    show_table(rows, {"name": "check", "status": "status", "detail": "detail"})


@ship_app.command()
def rebuild(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle")],
    max_drop: Annotated[float, typer.Option(min=0, max=100, help="points that a metric of the samples may lose")] = 0.1,
) -> None:
    """Build the engine on this machine from the bundle's ONNX file, judge it by the samples, write it in."""
    from vss.ship import rebuild as make

    with file_at_work(bundle):
        manifest = make(bundle, max_drop=max_drop)
    note = manifest.rebuilds[-1]
    out.print(f"{manifest.engine.file} {manifest.engine.device or ''}; samples: {note['samples']['metrics']}")


@ship_app.command()
def serve(
    bundles: Annotated[list[Path] | None, typer.Argument(help="folders of bundles")] = None,
    get_server: Annotated[bool, typer.Option("--get-server", help="install a Triton server for the CPU first")] = False,
    http_port: Port = 8000,
    grpc_port: Port = 8001,
    metrics_port: Annotated[int | None, typer.Option(min=1, max=65535, help="off unless given")] = None,
    log: Annotated[Path, typer.Option(help="takes everything the server says")] = Path("triton.log"),
    once: Annotated[bool, typer.Option("--once", help="stop after the answers were checked")] = False,
) -> None:
    """Start a Triton server over bundles, wait until it is ready, check its answers, go on until interrupted."""
    from vss.core.errors import VssError
    from vss.ship import server as server_env
    from vss.ship.serve import serve as start
    from vss.ship.server import Ports

    if get_server:
        out.print(f"server: {server_env.make()}")
    if not bundles:
        if get_server:
            return
        raise VssError("give one or more bundles to serve.")
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


@ship_app.command()
def load(
    bundle: Annotated[Path, typer.Argument(help="folder of a bundle that is being served")],
    address: Annotated[str, typer.Option(help="HOST:PORT of gRPC")] = "127.0.0.1:8001",
    rate: Annotated[
        float | None, typer.Option(min=0.001, max=1e6, help="requests a second; without it as fast as it answers")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1024, help="requests under way at once")] = 8,
    seconds: Annotated[float, typer.Option(min=0.1, max=86400)] = 10.0,
    perf_analyzer: Annotated[bool, typer.Option("--perf-analyzer", help="also ask NVIDIA's tool")] = False,
    report: ReportFile = None,
) -> None:
    """Send the bundle's samples to a server; latency, throughput, errors, and the batches that the server formed."""
    from vss.core.errors import GateFailed, NotMeasured, VssError
    from vss.ship import load as tools
    from vss.ship.manifest import read
    from vss.ship.serve import load_bundle

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
    show_table([figures], heads)
    failed = sum(figures["errors"].values())
    out.print(f"answered: {figures['answered']}; errors: {failed}; batches formed: {figures.get('batches', 'unknown')}")
    write_figures(report, "vss.load", figures)
    first = f"{failed} requests failed: {next(iter(figures['errors']))}" if failed else ""
    if "lost" in figures:
        raise NotMeasured(f"{figures['lost']} What was measured until then is kept above. {first}".rstrip())
    if failed:
        raise GateFailed(first)
