"""`vss evaluate`, `bench`, `lut`, `explain` and `report`: accuracy, times, and why a cut is or is not faster."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import Progress
from typer import Argument, Option

from vss.cli.console import COLUMNS, err, out, print_gates, print_table, print_tagged, write_figures
from vss.cli.options import (
    DATA,
    READING,
    TENSORRT,
    Candidate,
    Ckpt,
    Given,
    Plot,
    PrecisionName,
    ReportFile,
    Split,
    Unstable,
    network_of,
    recipe_keys,
    recipe_of,
    refuse_given,
    statistics_of,
    takes,
)
from vss.core.config import Recipe
from vss.core.errors import GateFailed, NotMeasured, VssError
from vss.core.files import file_at_work, require_checkpoint, target_of

if TYPE_CHECKING:
    from vss.deploy.profile.table import LatencyTable

Statistics = dict[str, list[float]] | None
Reading = Annotated[float, Option("--seconds", min=0.001, max=3600, help="seconds of one reading")]


def limits_of(
    max_drop: Annotated[float | None, Option(help="gate: points of mIoU (or AP) that may be lost")] = None,
    max_fnr_increase: Annotated[
        float | None, Option(help="gate: points of missed defects that may be added, on val")
    ] = None,
    max_ap_drop: Annotated[
        float | None, Option(help="gate: points of average precision that may be lost, on val")
    ] = None,
) -> dict[str, Any]:
    return {"max_drop": max_drop, "max_fnr_increase": max_fnr_increase, "max_ap_drop": max_ap_drop}


@takes(given=recipe_keys(*DATA, "data.size"), network=network_of, statistics=statistics_of, limits=limits_of)
def evaluate(
    candidate: Candidate,
    given: Given,
    network: Given,
    statistics: Statistics,
    limits: dict[str, Any],
    baseline: Annotated[Path | None, Option(help="checkpoint or engine to compare with")] = None,
    split: Split = "test",
    bench_seconds: Annotated[float, Option(min=0, max=86400, help="seconds to time a pair; 0: not at all")] = 4.0,
    oracle: Annotated[
        int, Option("--oracle-channels", "--oracle", help="channels of a pair left out one by one; 0: none")
    ] = 32,
    report: ReportFile = None,
) -> None:
    """Score a checkpoint or an engine, alone or against a baseline; a pair is also timed.

    Exit code 1 where a gate fails.
    """
    from vss.run.inputs import require_candidate, require_limits

    where = {"dataset": given.get("data.dataset"), "data_root": given.get("data.root")}
    require_limits(limits, baseline)
    for path in (baseline, candidate):
        if path:
            require_candidate(path)
    job = recipe_of({key: given[key] for key in READING if key in given} | network)
    more: Any = {"network": job.model, "data": job.data}
    from vss.run import candidates

    figures = candidates.evaluate(
        candidate, baseline, split=split, size=given.get("data.size"), limits=limits, statistics=statistics, **where,
        **more,
    )  # fmt: skip
    if baseline and bench_seconds:
        noisy = candidates.speed(figures["rows"], baseline, candidate, seconds=bench_seconds, network=job.model)
        if noisy:
            print_tagged(out, "no times:", "yellow", noisy)
    if baseline and {baseline.suffix, candidate.suffix} == {".safetensors"}:
        figures |= candidates.agreement(baseline, candidate, **where, channels=oracle, **more)
        out.print(f"outputs moved by {figures['reconstruction_relative']:.3f} of their mean square", highlight=False)
        if figures.get("oracle_overlap") is not None:
            text = "an oracle's best channels among the kept: {oracle_overlap:.2f} (chance {oracle_chance:.2f})"
            out.print(text.format(**figures), highlight=False)
    more = {"class_acc_pct": "class acc %", "boundary_iou_pct": "boundary IoU %", "fps": "images/s"}
    print_table(figures["rows"], COLUMNS | {"pixel_acc_pct": "pixel acc %", "fwiou_pct": "FWIoU %"} | more)
    write_figures(report, "vss.evaluation", figures)
    if limits["max_drop"] is None and "comparison" in figures:
        out.print(figures["comparison"], highlight=False)
    if "gate" in figures:
        print_gates(figures["gate"])
        if figures["gate"]["passed"] is False:
            raise GateFailed(f"gate {figures['gate']['sentence']}")


@takes(given=recipe_keys("build.threads", "bench.batch_size", "bench.max_seconds", "bench.cores"), network=network_of)
def bench(
    candidate: Candidate,
    given: Given,
    network: Given,
    baseline: Annotated[Path | None, Option(help="checkpoint or engine to be faster than")] = None,
    backend: Annotated[
        str | None, Option(help="runtime of engines: onnxruntime, tensorrt or tensorrt_rtx; default: that of each file")
    ] = None,
    device: Annotated[str, Option(help="where checkpoints run, in torch: cpu or cuda")] = "cpu",
    precision: Annotated[Literal["fp32", "fp16"], Option(help="what checkpoints compute in")] = "fp32",
    allow_unstable: Unstable = False,
    report: ReportFile = None,
) -> None:
    """Time one or two networks, interleaved window by window, until their times are stable.

    Exit code 3, and no figures, where the machine is too noisy.
    """
    from vss.deploy.bench import noise, pinned
    from vss.run.inputs import require_timed

    most = given.get("bench.max_seconds", 2.0)
    job = recipe_of({"bench.min_seconds": most if 0 < most < 2 else 2.0} | given | network)
    with pinned(job.bench.cores and list(job.bench.cores)):
        require_timed(candidate, baseline, backend=backend, threads=job.build.threads, place=(device, precision))
        from vss.run import candidates

        figures = candidates.bench_engines(
            candidate, baseline, backend=backend, threads=job.build.threads, batch=job.bench.batch_size,
            max_seconds=job.bench.max_seconds, device=device, precision=precision,
            network=job.model,
        )  # fmt: skip
    write_figures(report, "vss.bench", figures)
    noisy = noise(figures)
    if noisy and not allow_unstable:
        raise NotMeasured(f"no figures: {noisy} --allow-unstable prints them all the same.")
    rows = [
        {"name": name, **session, "speedup": figures["speedup"].get(name, {}).get("ratio")}
        for name, session in figures["sessions"].items()
    ]
    heads = {"latency_ms_p90": "p90 ms", "latency_ms_p99": "p99 ms", "latency_ms_cold": "first call ms"}
    more = {"throughput_fps": "FPS", "speedup": "speed-up"}
    print_table(rows, {"name": "engine", "latency_ms_p50": "p50 ms", **heads, **more})
    cpu = figures["environment"]["cpu"]
    used = figures["sessions"]["candidate"]["describe"].get("threads")
    out.print(f"{used or 'all'} threads on cores {', '.join(map(str, cpu['cores']))}", highlight=False)
    if noisy:
        print_tagged(out, "not stable:", "yellow", noisy)


def report(run: Annotated[Path, Argument(help="folder of a run")]) -> None:
    """Write the page report.html of a run again, from its report.json."""
    from vss.run.page import write_page

    out.print(f"wrote {write_page(run / 'report.json', run / 'report.html')}")


RUNTIME = ("build.backend", "build.threads", "bench.batch_size")
NETWORK = ("export.labels", "export.labels_dtype", "prune.keep")


@takes(given=recipe_keys(*RUNTIME, *NETWORK, "seed", *TENSORRT), network=network_of)
def lut_build(
    ctx: typer.Context,
    ckpt: Ckpt,
    given: Given,
    network: Given,
    save: Annotated[Path, Option("--save", help="table to write")] = Path("latency.json"),
    device: Annotated[str, Option(help="torch: cpu or cuda; default: cpu")] = "",
    precision: PrecisionName = "fp32",
    step: Annotated[
        int | None, Option(min=1, max=4096, help="channels between widths; default: found by measuring")
    ] = None,
    limit: Annotated[int, Option("--max-samples", "--limit", min=8, max=100_000, help="most networks to measure")] = 96,
    seconds: Reading = 0.4,
    quick: Annotated[bool, Option(help="make a small table, for trying out")] = False,
    allow_unstable: Unstable = False,
) -> None:
    """Measure a network at many widths on this machine: alignment, times of every layer, and their error.

    The same command goes on where it was stopped.
    """
    require_checkpoint(ckpt)
    from vss.data import Preprocess
    from vss.deploy.backends import timed_plan
    from vss.deploy.profile.build import QUICK, Effort, build
    from vss.deploy.profile.setting import Setting
    from vss.deploy.profile.subject import open_subject

    job = recipe_of(given | network)
    saved = _with_size(ckpt, job)
    defects = saved.model.task == "defect"
    _refuse_unread(ctx, job.build.backend, quick=quick, labels=job.export.labels, defects=defects)
    options = {} if defects else job.export.model_dump(include={"labels", "labels_dtype"})
    plan = timed_plan(job.build)
    where = (job.build.backend, device, precision, job.build.threads, job.bench.batch_size)
    setting = Setting(*where, options, job.prune.keep, plan)
    effort = QUICK if quick else dataclasses.replace(Effort(), limit=limit)
    progress = Progress(console=err, transient=True)
    with file_at_work(target_of(save)), tempfile.TemporaryDirectory() as folder, progress as bar:
        task = bar.add_task("exporting", total=None)
        subject = open_subject(saved.model, Path(folder), Preprocess(**saved.preprocess), setting, seconds=seconds)

        def advance(done: int, most: int, left: float) -> None:
            bar.update(task, description=f"{done} of at most {most}, {left:.0f} s left", completed=done, total=most)

        table = build(subject, save, effort=effort, step=step, seed=job.seed, progress=advance)
    _print_lut(table)
    out.print(f"wrote {save}")
    quiet = f"remove {save} and build it again on a quiet machine"
    _require_quiet(table.drift, f"the uncut network drifted during the build; {quiet}", allow_unstable)


def _with_size(ckpt: Path, job: Recipe) -> Any:
    """The checkpoint, which must say its preprocessing."""
    from vss.run.inputs import require_foreign
    from vss.run.project import read_network

    require_foreign(job.model, [ckpt])
    saved = read_network(ckpt, job.model)
    if saved.preprocess is None:
        raise VssError(f"--ckpt {ckpt} does not say its input size; save it with vss.save(..., preprocess=...).")
    return saved


def _refuse_unread(ctx: typer.Context, backend: str, *, quick: bool, labels: bool, defects: bool) -> None:
    """Refuse the flags of `vss lut build` that nothing would read."""
    from vss.deploy.backends import of_tensorrt

    tensorrt = of_tensorrt(backend)
    if tensorrt and not tensorrt.flavour.targets:
        refuse_given(ctx, ["build.targets"], f"is for --backend tensorrt_rtx, and the backend is {backend}")
    if tensorrt is None:
        refuse_given(ctx, TENSORRT, f"is for --backend tensorrt and tensorrt_rtx, and the backend is {backend}")
    if quick:
        refuse_given(ctx, ["limit"], "is for a whole table, and --quick asks for a small one")
    if defects:
        refuse_given(ctx, NETWORK[:2], "is for networks of classes, and this one finds defects")
    elif not labels:
        refuse_given(ctx, NETWORK[1:2], "is for --labels")


def _require_quiet(noise: float, sentence: str, allow_unstable: bool) -> None:
    """`NotMeasured` where one and the same network took much longer at another moment."""
    from vss.deploy.profile.build import NOISY

    if noise <= NOISY:
        return
    text = f"times of one network differ by {noise:.0%}: {sentence}"
    if not allow_unstable:
        raise NotMeasured(f"{text}, or take it as it is: --allow-unstable.")
    print_tagged(out, "noisy:", "yellow", text)


def lut_show(table: Annotated[Path, Argument(help="table of `vss lut build`")], plot: Plot = None) -> None:
    """Print what a latency table says."""
    from vss.deploy.profile.table import LatencyTable, plot_cliffs

    known = LatencyTable.load(table)
    _print_lut(known)
    if plot:
        out.print(f"wrote {plot_cliffs(known, plot)}")


def _print_lut(table: LatencyTable) -> None:
    rows = [{"name": step, "cost": value} for step, value in table.alignment.items()]
    print_table(rows, {"name": "widths in steps of", "cost": "time per MAC over the best"})
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
        print_tagged(out, "not finished:", "yellow", "the same vss lut build goes on")


@takes(given=recipe_keys("build.targets"))
def explain(
    ctx: typer.Context,
    run: Annotated[Path, Argument(help="folder of a finished run")],
    given: Given,
    backend: Annotated[
        str | None,
        Option(help="runtime to time in, default that of the run; tensorrt_rtx: read engine layers, without a GPU"),
    ] = None,
    precision: PrecisionName = "fp32",
    seconds: Reading = 1.0,
    top: Annotated[int, Option(min=1, help="rows to print")] = 20,
    plot: Plot = None,
    lut: Annotated[
        Path | None, Option(help="latency table to read, for --plot; default: RUN/latency_table.json")
    ] = None,
    allow_unstable: Unstable = False,
    report: ReportFile = None,
) -> None:
    """Say, layer by layer, why a cut network is or is not as much faster as its MACs fell.

    With --backend tensorrt_rtx from the layers of its engines, which are built here and not run.
    """
    if lut and not plot:
        raise VssError("--lut is the table of --plot; give both.")
    from vss.deploy.backends import of_tensorrt
    from vss.run.inputs import run_files

    tensorrt = of_tensorrt(backend) if backend else None
    run_files(run)
    from vss.run import explain as work

    if plot:
        out.print(f"wrote {work.cliff_plot(run, lut, plot)}")
    if backend and tensorrt and tensorrt.flavour.targets:
        refuse_given(ctx, ["seconds", "allow_unstable"], f"is for times, and --backend {backend} measures none")
        _explain_layers(run, backend, precision, given.get("build.targets", ()), top, report)
        _page_again(run, report, plot)
        return
    refuse_given(ctx, ["build.targets"], "is for --backend tensorrt_rtx")
    figures = work.explain(run, backend=backend, precision=precision, seconds=seconds)
    _print_explained(figures, top)
    write_figures(report, "vss.explain", figures)
    _page_again(run, report, plot)
    _require_quiet(figures["noise"], "an engine was slower in another round; end other work", allow_unstable)


def _print_explained(figures: dict[str, Any], top: int) -> None:
    heads = {"name": "unit", "cin": "in", "cout": "out", "ms_before": "ms before", "ms_after": "ms after",
             "mmacs_before": "MMACs before", "mmacs_after": "MMACs after", "efficiency": "efficiency",
             "lost_ms": "lost ms", "reason": "why", "better": "better widths", "kernel": "kernel"}  # fmt: skip
    rows = [
        {**row, "name": row["unit"], "mmacs_before": row["macs_before"] / 1e6, "mmacs_after": row["macs_after"] / 1e6}
        for row in figures["rows"][:top]
    ]
    print_table(rows, heads)
    out.print(
        f"{figures['ms_before']:.3f} ms before, {figures['ms_after']:.3f} after: {figures['speedup']:.2f}x faster for "
        f"{figures['mac_reduction']:.2f}x fewer MACs ({figures['speedup_per_mac_reduction']:.2f})"
    )
    for cause in figures["causes"]:
        text = f"({cause['share']:.0%}) {cause['cause']}: {', '.join(cause['units'][:4])}"
        print_tagged(out, f"{cause['lost_ms']:.3f} ms", "yellow", text)
    for cause in figures["floating"]:
        text = f"in {cause['precision']}, {cause['why']}: {', '.join(cause['units'][:4])}"
        more = len(cause["units"]) - 4
        print_tagged(out, f"{cause['ms']:.3f} ms", "yellow", text + (f" and {more} more" if more > 0 else ""))
    for name, request in figures["request"].items():
        out.print(f"{name}: the engine is {request['engine_share']:.0%} of a request of {request['request_ms']:.2f} ms")


def _page_again(run: Path, *files: Path | None) -> None:
    """Write the page of a run again after a file that it links was written beside it."""
    if any(file and file.resolve().parent == run.resolve() for file in files):
        from vss.run.page import write_page

        write_page(run / "report.json", run / "report.html")


def _explain_layers(
    run: Path, backend: str, precision: str, targets: list[str] | tuple[str, ...], top: int, report: Path | None
) -> None:
    from vss.run.layers import explain_layers

    figures = explain_layers(run, backend, precision=precision, targets=targets)
    kinds = dict.fromkeys([*figures["layers_before"], *figures["layers_after"]])
    counts = {"name": "engine", **{kind: "layers" if kind == "total" else kind for kind in kinds}}
    engines = {"uncut": figures["layers_before"], "cut": figures["layers_after"]}
    print_table([{"name": name, **found} for name, found in engines.items()], counts)
    heads = {"name": "unit", "cin": "in", "cout": "out", "kernels_before": "kernels before",
             "kernels_after": "after", "what": "kernels more", "better": "a width without them"}  # fmt: skip
    found = [{**row, "name": row["unit"], "what": ", ".join(row["extra"])} for row in figures["rows"][:top]]
    if found:
        print_table(found, heads)
    else:
        out.print("no width costs a kernel")
    for step, count in figures["layers_rounded"].items():
        out.print(f"widths rounded up to multiples of {step}: {count} layers")
    for lost in figures["fusions_lost"][:top]:
        print_tagged(out, "fusion lost:", "yellow", f"{lost['node']} with {lost['layer']}")
    out.print(f"{figures['sentence']} Built for {', '.join(figures['targets'])}.", highlight=False)
    write_figures(report, "vss.explain", figures)
