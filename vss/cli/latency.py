"""`vss lut build`, `vss lut show` and `vss explain`."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from vss.cli.console import (
    Ckpt,
    Level,
    ReportFile,
    Seed,
    Workspace,
    err,
    out,
    refuse_given,
    show_table,
    tell,
    write_figures,
)
from vss.core.errors import NotMeasured, VssError
from vss.core.files import target_of
from vss.core.locks import file_at_work

lut_app = typer.Typer(no_args_is_help=True, help="Latency tables: measured times of a network at many widths.")
explain_app = typer.Typer()
Unstable = Annotated[bool, typer.Option("--allow-unstable", help="exit code 0 on a noisy machine too")]
Reading = Annotated[float, typer.Option("--seconds", min=0.001, max=3600, help="of one reading")]
OF_TENSORRT = ("level", "tf32", "workspace_mib", "hardware", "version_compatible", "flag")


@lut_app.command("build")
def lut_build(
    ctx: typer.Context,
    ckpt: Ckpt,
    save: Annotated[Path, typer.Option("--save", help="the table; a killed build goes on")] = Path("latency.json"),
    backend: Annotated[str, typer.Option(help="onnxruntime, torch or tensorrt")] = "onnxruntime",
    device: Annotated[str, typer.Option(help="of torch: cpu or cuda")] = "",
    precision: Annotated[str, typer.Option(help="fp32, fp16 (not onnxruntime) or int8 (not torch)")] = "fp32",
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="default: one per usable core")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096)] = 1,
    step: Annotated[
        int | None, typer.Option(min=1, max=4096, help="width step, in place of the discovered one")
    ] = None,
    limit: Annotated[int, typer.Option(min=8, max=100_000, help="most samples to fit on")] = 96,
    seconds: Reading = 0.4,
    quick: Annotated[bool, typer.Option(help="a small table, for trying out")] = False,
    labels: Annotated[bool, typer.Option(help="as the recipe's export: argmax in the graph")] = True,
    labels_dtype: Annotated[str, typer.Option(help="as the recipe's export: int32 or uint8")] = "int32",
    keep: Annotated[list[str] | None, typer.Option(help="a layer whose channels stay, as prune.keep")] = None,
    level: Level = None,
    tf32: Annotated[bool, typer.Option(help="tensorrt: float32 layers may use TF32")] = True,
    workspace_mib: Workspace = None,
    hardware: Annotated[str, typer.Option(help="tensorrt: none, same_compute_capability or ampere_plus")] = "none",
    version_compatible: Annotated[bool, typer.Option(help="tensorrt: load in newer releases too")] = False,
    flag: Annotated[list[str] | None, typer.Option(help="tensorrt: a further BuilderFlag by name")] = None,
    seed: Seed = None,
    allow_unstable: Unstable = False,
) -> None:
    """Measure a network at many widths on this machine: alignment, times of every layer, and their error."""
    from vss.data import Preprocess
    from vss.deploy import BuildPlan
    from vss.deploy.profile.build import QUICK, Effort, build
    from vss.deploy.profile.setting import Setting
    from vss.deploy.profile.subject import open_subject

    saved = _with_size(ckpt)
    _refuse_unread(ctx, backend, quick=quick, labels=labels, task=str(saved.model.task))
    options = {} if saved.model.task == "defect" else {"labels": labels, "labels_dtype": labels_dtype}
    plan = BuildPlan(
        workspace_mib=workspace_mib, optimisation_level=level, tf32=tf32, hardware=hardware.upper(),
        version_compatible=version_compatible, flags=tuple(name.upper() for name in flag or []),
    )  # fmt: skip
    setting = Setting(backend, device, precision, threads, batch_size, options, tuple(keep or ()), plan)
    effort = QUICK if quick else dataclasses.replace(Effort(), limit=limit)
    progress = Progress(console=err, transient=True)
    with file_at_work(target_of(save)), tempfile.TemporaryDirectory() as folder, progress as bar:
        task = bar.add_task("exporting", total=None)
        subject = open_subject(saved.model, Path(folder), Preprocess(**saved.preprocess), setting, seconds=seconds)

        def told(done: int, most: int, left: float) -> None:
            bar.update(task, description=f"{done} of at most {most}, {left:.0f} s left", completed=done, total=most)

        table = build(subject, save, effort=effort, step=step, seed=seed or 0, progress=told)
    _shown(table)
    out.print(f"wrote {save}")
    quiet = f"remove {save} and build it again on a quiet machine"
    _require_quiet(table.drift, f"the uncut network drifted during the build; {quiet}", allow_unstable)


def _with_size(ckpt: Path) -> Any:
    """The checkpoint, which must say its preprocessing."""
    from vss.train import checkpoint

    saved = checkpoint.read(ckpt)
    if saved.preprocess is None:
        raise VssError(f"{ckpt} does not say its input size; save it with vss.save(..., preprocess=...).")
    return saved


def _refuse_unread(ctx: typer.Context, backend: str, *, quick: bool, labels: bool, task: str) -> None:
    """Refuse the flags of `vss lut build` that nothing would read."""
    from vss.deploy import BACKENDS

    if BACKENDS.canonical(backend) != "tensorrt":
        refuse_given(ctx, OF_TENSORRT, f"is for backend tensorrt, and the backend is {backend}")
    if quick:
        refuse_given(ctx, ["limit"], "is for a whole table, and --quick asks for a small one")
    if task == "defect":
        refuse_given(ctx, ["labels", "labels_dtype"], "is for networks of classes, and this one finds defects")
    elif not labels:
        refuse_given(ctx, ["labels_dtype"], "is for --labels")


def _require_quiet(noise: float, sentence: str, allow_unstable: bool) -> None:
    """`NotMeasured` where one and the same network took much longer at another moment."""
    from vss.deploy.profile.build import NOISY

    if noise <= NOISY:
        return
    text = f"times of one network differ by {noise:.0%}: {sentence}"
    if not allow_unstable:
        raise NotMeasured(f"{text}, or take it as it is: --allow-unstable.")
    tell(out, "noisy:", "yellow", text)


@lut_app.command("show")
def lut_show(
    table: Path, plot: Annotated[Path | None, typer.Option(help="write the width-cliff plot, SVG")] = None
) -> None:
    """Print what a table says."""
    from vss.deploy.profile.table import LatencyTable, plot_cliffs

    known = LatencyTable.load(table)
    _shown(known)
    if plot:
        out.print(f"wrote {plot_cliffs(known, plot)}")


def _shown(table: Any) -> None:
    rows = [{"name": step, "cost": value} for step, value in table.alignment.items()]
    show_table(rows, {"name": "widths in steps of", "cost": "time per MAC over the best"})
    size = "x".join(map(str, table.key["resolution"]))
    threads = f", {table.key['threads']} threads" if table.key["threads"] else ""
    where = f"{table.key['backend']} {table.key['precision']} on {table.key['device']}{threads}"
    out.print(f"{table.key['network']} {size}, batch {table.key['batch']}, {where}", highlight=False)
    reads = max((sample.reads for sample in table.samples), default=0)
    out.print(f"step {table.step}, {len(table.samples)} samples read up to {reads}x, uncut {table.full_ms():.3f} ms")
    if table.error:
        out.print(
            f"error on {table.error['n']:.0f} unseen width vectors: median {table.error['median']:.1%}, "
            f"largest {table.error['max']:.1%}; uncut network drifted {table.drift:.1%} during the build"
        )
    if not table.done:
        tell(out, "not finished:", "yellow", "the same vss lut build goes on")


@explain_app.command()
def explain(
    run: Annotated[Path, typer.Argument(help="folder of a finished vss run")],
    precision: Annotated[str, typer.Option(help="in which to explain it, as vss lut build")] = "fp32",
    seconds: Reading = 1.0,
    top: Annotated[int, typer.Option(min=1, help="rows to print")] = 20,
    plot: Annotated[Path | None, typer.Option(help="write the width-cliff plot, SVG, of the latency table")] = None,
    lut: Annotated[Path | None, typer.Option(help="that table; default: RUN/latency_table.json")] = None,
    allow_unstable: Unstable = False,
    report: ReportFile = None,
) -> None:
    """Say, layer by layer, why a cut network is or is not as much faster as its MACs fell."""
    from vss.run.explain import cliff_plot
    from vss.run.explain import explain as work

    if lut and not plot:
        raise VssError("--lut is the table of --plot; give both.")
    if plot:
        out.print(f"wrote {cliff_plot(run, lut, plot)}")
    figures = work(run, precision=precision, seconds=seconds)
    heads = {"name": "unit", "cin": "in", "cout": "out", "ms_before": "ms before", "ms_after": "ms after",
             "mmacs_before": "MMACs before", "mmacs_after": "MMACs after", "efficiency": "efficiency",
             "lost_ms": "lost ms", "reason": "why", "better": "better widths"}  # fmt: skip
    rows = [
        {**row, "name": row["unit"], "mmacs_before": row["macs_before"] / 1e6, "mmacs_after": row["macs_after"] / 1e6}
        for row in figures["rows"][:top]
    ]
    show_table(rows, heads)
    out.print(
        f"{figures['ms_before']:.3f} ms before, {figures['ms_after']:.3f} after: {figures['speedup']:.2f}x faster for "
        f"{figures['mac_reduction']:.2f}x fewer MACs ({figures['speedup_per_mac_reduction']:.2f})"
    )
    for cause in figures["causes"]:
        units = ", ".join(cause["units"][:4])
        tell(out, f"{cause['lost_ms']:.3f} ms", "yellow", f"({cause['share']:.0%}) {cause['cause']}: {units}")
    for name, request in figures["request"].items():
        out.print(f"{name}: the engine is {request['engine_share']:.0%} of a request of {request['request_ms']:.2f} ms")
    write_figures(report, "vss.explain", figures)
    _require_quiet(figures["noise"], "an engine was slower in another round; end other work", allow_unstable)
