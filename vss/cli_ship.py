"""`vss ship`, `vss verify`, `vss rebuild`, `vss serve`, `vss load`: a bundle, and what is done with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vss.console import Root, out, show_table

ship_app = typer.Typer()
Bundle = Annotated[Path, typer.Argument(help="a bundle: folder, or .tar.gz")]


@ship_app.command()
def ship(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    to: Annotated[Path, typer.Option("--to", help="new folder, or a file that ends in .tar.gz")],
    engine: Annotated[str | None, typer.Option(help="row of the report; default: engine pruned")] = None,
    name: Annotated[str | None, typer.Option(help="of the model in a server; default: that of the recipe")] = None,
    data_root: Root = None,
    samples: Annotated[int, typer.Option(help="images with truth and answers that go along")] = 4,
    force: Annotated[bool, typer.Option(help="ship without a passed gate; the manifest says so")] = False,
    max_batch: Annotated[int, typer.Option(help="images per execution in a server")] = 8,
    delay_us: Annotated[int, typer.Option(help="how long a request waits for others, microseconds")] = 2000,
    instances: Annotated[int, typer.Option(help="copies of the engine in a server")] = 1,
    threads: Annotated[int, typer.Option(help="of each copy on the CPU; 0: one per core")] = 0,
    licence: Annotated[str | None, typer.Option(help="of the weights, for the model card")] = None,
    data_licence: Annotated[str | None, typer.Option(help="of the data, for the model card")] = None,
) -> None:
    """Write what an inference team runs: engine, runner, server repository, model card, hashes of everything."""
    from vss.ship import ship as make

    given = {"weights": licence, "data": data_licence}
    manifest = make(
        run, to, row=engine, name=name, data_root=data_root, samples=samples, force=force, max_batch=max_batch,
        delay_us=delay_us, instances=instances, threads=threads,
        licences={key: value for key, value in given.items() if value},
    )  # fmt: skip
    size = sum(fact.bytes for fact in manifest.files.values()) / 2**20
    out.print(f"{manifest.name}: {len(manifest.files)} files, {size:.1f} MiB, {' and '.join(manifest.triton)} servers")
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
    max_drop: Annotated[float, typer.Option(help="points that a metric of the samples may lose")] = 0.1,
) -> None:
    """Build the engine on this machine from the bundle's ONNX file, judge it by the samples, write it in."""
    from vss.ship import rebuild as make

    manifest = make(bundle, max_drop=max_drop)
    note = manifest.rebuilds[-1]
    out.print(f"{manifest.engine.file} {manifest.engine.device or ''}; samples: {note['samples']['metrics']}")
