"""`vss export`, `calibrate`, `sensitivity`, `build` and `lint`: ONNX files, their precision, and engines."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress
from typer import Argument, Option

from vss.cli.console import err, out, print_table, write_figures
from vss.cli.options import (
    DATA,
    OPENVINO,
    TENSORRT,
    Cache,
    Ckpt,
    Given,
    PrecisionName,
    ReportFile,
    Save,
    Set,
    network_of,
    numbers_of,
    recipe_keys,
    recipe_of,
    refuse_given,
    takes,
)
from vss.core.config import Recipe
from vss.core.errors import GateFailed, VssError, listed, shown, unknown
from vss.core.files import require_checkpoint, require_file, target_of

if TYPE_CHECKING:
    from vss.run.precision import PrecisionExporter

GRAPH = (("export.labels", False), ("export.preprocess", False), "export.opset")
CALIBRATION = ("precision.method", "precision.images", *DATA, "seed")
OF_INT8 = ("choice", "cache", "overrides", "build.backend", "precision.elsewhere", *CALIBRATION)
RANGES = Path("runs/ranges")
MAX_BATCH = 65536
THREE = f"smallest,usual,largest, or one number for all three, that do not fall, each from 1 to {MAX_BATCH},"
FixedBatch = Annotated[int | None, Option(min=1, max=MAX_BATCH, help="images of a call; default: any number")]
ForTensorRT = functools.partial(Option, rich_help_panel="TensorRT")


@takes(
    given=recipe_keys(
        *(*GRAPH, "export.labels_dtype", ("export.plugins", False), "data.size"),
        *("precision.keep", "precision.elsewhere", "build.backend", *CALIBRATION),
    ),
    network=network_of,
)
def export(
    ctx: typer.Context,
    ckpt: Ckpt,
    given: Given,
    network: Given,
    save: Save = Path("model.onnx"),
    precision: PrecisionName = "fp32",
    dynamic_size: Annotated[bool, Option(help="leave H and W open, as the batch is")] = False,
    fixed_batch: FixedBatch = None,
    choice: Annotated[Path | None, Option(help="int8: file of `vss sensitivity` to read")] = None,
    cache: Cache = RANGES,
    overrides: Set = None,
    report: ReportFile = None,
) -> None:
    """Write an ONNX file and check it against the network at three shapes.

    INT8 takes its ranges from training images.
    """
    target_of(save)
    require_checkpoint(ckpt)
    job = recipe_of(given | network, overrides)
    if not job.export.labels:
        refuse_given(ctx, ["export.labels_dtype"], "is for --labels")
    if precision == "int8":
        refuse_given(ctx, ["fixed_batch"], "is for fp32 and fp16")
        _require_data(ckpt, job, given)
        if choice:
            from vss.deploy.quantize.sensitivity import KIND

            require_file(choice, kind=KIND)
        from vss.run.precision import load_choice

        chosen = load_choice(choice, ckpt)
        with tempfile.TemporaryDirectory(prefix="vss-export-") as folder:
            typed = _float32(ckpt, job, given, Path(folder), cache, dynamic_size=dynamic_size)
            figures = typed.write(save, "int8", list(dict.fromkeys([*typed.config.keep, *chosen])))
    else:
        refuse_given(ctx, OF_INT8, "is for --precision int8")
        if precision == "fp32":
            refuse_given(ctx, ["precision.keep"], "is for --precision fp16 and int8")
        from vss.deploy.quantize.precision import Precision
        from vss.run import candidates

        wanted, size = Precision(precision, job.precision.keep), given.get("data.size")
        how: dict[str, Any] = {"size": size, "dynamic_size": dynamic_size, "batch": fixed_batch}
        figures = candidates.export_checkpoint(
            ckpt, save, precision=wanted, recipe=job, **how, **job.export.model_dump()
        )
    shapes = figures["parity"]["shapes"]
    print_table(shapes, {key: key for key in shapes[0]}, "parity with torch")
    out.print(f"{figures['nodes_before']} nodes, {figures['nodes_after']} after clean-up; wrote {save}")
    if "precision" in figures:
        _print_precision(figures)
    write_figures(report, "vss.export", figures)


@takes(given=recipe_keys(*GRAPH, "precision.split", "precision.image_list", *CALIBRATION), network=network_of)
def calibrate(
    ckpt: Ckpt,
    given: Given,
    network: Given,
    save: Annotated[Path | None, Option("--save", help="file to write the ranges to as well")] = None,
    cache: Cache = RANGES,
    overrides: Set = None,
) -> None:
    """Measure INT8 ranges on training images of every class.

    Ranges are kept by the hash of their inputs, so nothing is measured twice.
    """
    if save:
        target_of(save)
    job = recipe_of(given | network, overrides)
    with tempfile.TemporaryDirectory(prefix="vss-export-") as folder:
        typed = _float32(ckpt, job, given, Path(folder), cache)
        known = {path.name for path in cache.glob("*.json")}
        ranges = typed.calibrate()
        measured = {path.name for path in cache.glob("*.json")} - known
    counts = ranges.calibration["images_per_class"].items()
    print_table([{"name": name, "images": count} for name, count in counts], {"name": "class", "images": "images"})
    how = f"measured, kept in {cache}" if measured else f"taken from {cache}"
    out.print(f"{len(ranges.values)} ranges by {ranges.method['method']}, {how}; images {ranges.calibration['sha256']}")
    if save:
        out.print(f"wrote {ranges.save(save)}")


LAYERS = ("build.backend", "precision.max_drop", "precision.groups", "precision.elsewhere", "precision.keep")


@takes(given=recipe_keys(*LAYERS, *GRAPH, *CALIBRATION), network=network_of)
def sensitivity(
    ckpt: Ckpt,
    given: Given,
    network: Given,
    save: Annotated[Path, Option("--save", help="file to write, for vss export --choice")] = Path("choice.json"),
    timed: Annotated[bool, Option(help="try layers that save no time first")] = True,
    cache: Cache = RANGES,
    overrides: Set = None,
) -> None:
    """Find which layers must stay in floating point, by the metric of the task and measured times."""
    target_of(save)
    job = recipe_of(given | network, overrides)
    with tempfile.TemporaryDirectory(prefix="vss-export-") as folder, Progress(console=err, transient=True) as bar:
        typed = _float32(ckpt, job, given, Path(folder), cache)
        task = bar.add_task("groups of layers", total=typed.config.groups)
        choice = typed.search(lambda: bar.advance(task), timed=timed)
    facts = choice.facts
    rows = [{"name": row["group"], **row} for row in facts["groups"]]
    heads = {"name": "only this group in INT8", "metric": facts["by"], "drop": "drop", "gain_ms": "saves ms"}
    print_table(rows, heads, f"float32: {facts['baseline']:.2f} on {facts['images']} validation images")
    choice.save(save)
    if not facts["within"]:
        raise VssError(
            f"no layer can be INT8 within --max-drop {facts['max_drop']} points; {save} says what was tried: export "
            "fp16 or fp32."
        )
    freed = ", ".join(facts["freed"]) or "nothing"
    out.print(f"kept in floating point: {freed}; drop {facts['drop']:.3f} of {facts['max_drop']} allowed; wrote {save}")


def _float32(ckpt: Path, job: Recipe, given: Given, folder: Path, cache: Path, **more: object) -> PrecisionExporter:
    """The checkpoint's network with its data and its float32 file in `folder`."""
    target_of(cache / "ranges.json")
    where = _require_data(ckpt, job, given)
    from vss.run.job import check_calibration
    from vss.run.precision import PrecisionExporter
    from vss.run.project import Project, project_of

    project = project_of(ckpt, **where, recipe=job)
    check_calibration(project)
    if size := given.get("data.size"):
        resized = project.preprocess.model_copy(update={"size": tuple(size)})
        project = Project(project.recipe, project.data, resized)
    images = ("preprocess", "expects") if job.export.preprocess else ("expects", "preprocess")
    changes = job.export.model_dump() | more | dict(zip(images, (project.preprocess, None), strict=True))
    return PrecisionExporter.export(project, project.load(ckpt), project.recipe.precision, folder, cache, **changes)


def _require_data(ckpt: Path, job: Recipe, given: Given) -> dict[str, Any]:
    """Data set and folder of the flags, which the checkpoint fits; None is its own."""
    from vss.run.inputs import read_list, recipe_around

    where = {"data_root": given.get("data.root"), "dataset": given.get("data.dataset")}
    recipe_around(ckpt, **where, recipe=job)
    if job.precision.image_list:
        read_list(Path(job.precision.image_list))
    return where


def _print_precision(figures: dict[str, Any]) -> None:
    facts = figures["precision"]
    size, before = figures["bytes"] / 2**20, facts["fp32"]["bytes"] / 2**20
    kept = ", ".join(f"{name} ({why})" for name, why in facts["kept"].items()) or "none"
    if facts["kind"] == "int8":
        out.print(f"INT8 in {len(facts['int8'])} of {facts['layers']} layers; in floating point: {kept}")
        out.print(f"for {listed(facts['suits'])}; another --backend has a file of its own")
    out.print(f"{size:.2f} MiB, in float32 {before:.2f} MiB")


@takes(given=recipe_keys("build.backend", *OPENVINO, *TENSORRT, "build.tensorrt.plugins"))
def build(
    ctx: typer.Context,
    onnx: Annotated[Path, Option(help="ONNX file to read")],
    given: Given,
    save: Save = Path("model.engine"),
    optimise: Annotated[str | None, Option(help="onnxruntime: basic or extended, once at build time")] = None,
    batch: Annotated[str, ForTensorRT(help="smallest, usual and largest batch, or one for all three")] = "1,1,8",
    sizes: Annotated[
        str | None, ForTensorRT(help="smallest, usual and largest HxW in pixels of a free size, or one for all three")
    ] = None,
    timing_cache: Annotated[Path | None, ForTensorRT(help="file of measured layer times to read and write")] = None,
    aot: Annotated[Path | None, ForTensorRT("--aot-ptx", help="experimental: PTX of VssSegArgmax to read")] = None,
    dry_run: Annotated[bool, ForTensorRT(help="print the plan as shell commands, build nothing")] = False,
) -> None:
    """Make what a runtime loads of an ONNX file.

    A TensorRT engine is named after GPU and version, with its facts beside it.
    """
    from vss.deploy import BACKENDS, BuildPlan, BuildSpec, onnx_file
    from vss.deploy.backends import available, build_spec, of_tensorrt
    from vss.deploy.backends.trt_plan import TRTEXEC_FLAGS, declared, dry_commands, spans

    target_of(save)
    job = recipe_of(given)
    backend = BACKENDS.canonical(job.build.backend)
    tensorrt = of_tensorrt(backend)
    if backend != "openvino":
        refuse_given(ctx, OPENVINO, f"is for --backend openvino, and the backend is {backend}")
    if optimise is not None and backend != "onnxruntime":
        raise VssError(f"--optimise is for --backend onnxruntime, and the backend is {backend}; leave it off.")
    if tensorrt is None:
        own = ("build.tensorrt.plugins", "batch", "sizes", "timing_cache", "aot", "dry_run")
        only = f"is for --backend tensorrt and tensorrt_rtx, and the backend is {backend}"
        refuse_given(ctx, (*TENSORRT, *own), only)
        require_file(onnx, kind="ONNX")
        spec = build_spec(job.build).model_copy(update={"optimise": optimise})
        out.print(f"wrote {available(backend).build(onnx, save, spec)}")
        return
    if not tensorrt.flavour.targets:
        refuse_given(ctx, ["build.targets"], f"is for --backend tensorrt_rtx, and the backend is {backend}")
    inputs = declared(onnx_file.load(onnx))
    _check_files(ctx, inputs, timing_cache, job.build.tensorrt.plugins, aot)
    added: dict[str, Any] = {"timing_cache": timing_cache, "aot": aot}
    added["profiles"] = (spans(inputs, _three("--batch", batch), _sizes(sizes)),)
    plan = (build_spec(job.build).plan or BuildPlan()).model_copy(update=added)
    tensorrt.check(plan)
    if dry_run:
        for name in set(plan.flags) - TRTEXEC_FLAGS.keys():
            raise unknown("--flag of trtexec and polygraphy", name, TRTEXEC_FLAGS)
        for line in dry_commands(plan, onnx, save, tensorrt.flavour).values():
            out.print(line, highlight=False, soft_wrap=True)
        return
    path = available(backend).build(onnx, tensorrt.named(save, plan), BuildSpec(plan=plan))
    _print_engine(path, tensorrt.flavour.title)


def _print_engine(path: Path, title: str) -> None:
    """What was built; a check that fails is exit code 1, and the engine stays with what was found beside it."""
    from vss.deploy.backends.trt import failed_checks
    from vss.deploy.backends.trt_flavour import gpus
    from vss.deploy.backends.trt_runner import read_about

    about = read_about(path) or {}
    where = "for this GPU" if about["device"] else f"for {gpus(about['targets'])}"
    out.print(f"wrote {path} and, beside it, .json, .layers.json and .sh")
    out.print(
        f"{title} {about['tensorrt']}, {where}: {about['bytes'] / 2**20:.2f} MiB in {about['build_seconds']:.1f} s"
    )
    if about["layers"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in about["layers"].items() if kind != "total")
        out.print(f"{about['layers']['total']} engine layers: {kinds}")
    for check in about["checks"]:
        out.print(f"{'ok' if check['passed'] else 'FAILED'}: {check['what']}: {check['sentence']}")
    if not about["device"]:
        out.print("The engine was built without its GPU and was not run: measure accuracy and time there.")
    if failed := failed_checks(path):
        raise GateFailed(f"{path} is not what {about['onnx']} asked for: {failed[0]}")


def _check_files(
    ctx: typer.Context,
    inputs: dict[str, list[int | str]],
    cache: Path | None,
    plugins: Sequence[Path],
    aot: Path | None,
) -> None:
    """Refuse flags that the file's inputs have no use for, and files that are none."""
    if not any(isinstance(side, str) for dims in inputs.values() for side in dims[:1]):
        refuse_given(ctx, ["batch"], "is for a free batch, and the file's is fixed")
    if not any(isinstance(side, str) for dims in inputs.values() for side in dims[1:]):
        refuse_given(ctx, ["sizes"], "is for a free size, and the file's is fixed")
    for path in plugins:
        require_file(path, kind="plugin library")
    if aot:
        require_file(aot, kind="PTX")
    if cache:
        target_of(cache)


def _three(flag: str, text: str) -> list[int]:
    numbers = numbers_of(flag, text, THREE, counts=[1, 3], low=1, high=MAX_BATCH)
    if numbers != sorted(numbers):
        raise VssError(f"{flag} takes {THREE} and got {shown(text)}.")
    return numbers * (3 // len(numbers))


def _sizes(text: str | None) -> list[tuple[int, int]] | None:
    if text is None:
        return None
    parts = [part.split("x") for part in text.lower().split(",")]
    if any(len(part) != 2 for part in parts):
        raise VssError(f"--sizes takes HxW, or three of them with commas between, and got {shown(text)}.")
    sides = (_three("--sizes", ",".join(each)) for each in zip(*parts, strict=True))
    return list(zip(*sides, strict=True))


@takes(given=recipe_keys("build.targets"))
def lint(
    onnx: Annotated[Path, Argument(help="ONNX file, from here or from elsewhere")],
    given: Given,
    backend: Annotated[
        str | None, Option(help="the TensorRT that counts: tensorrt or tensorrt_rtx; default: all")
    ] = None,
    plugin_op: Annotated[list[str] | None, Option(help="further op that a TensorRT plugin implements")] = None,
    parser: Annotated[bool, Option(help="ask TensorRT for RTX as well: parse and build, no GPU needed")] = False,
    report: ReportFile = None,
) -> None:
    """Check an ONNX file against the rules of TensorRT 10, TensorRT 11 and TensorRT for RTX, those of quantisation too.

    Without --backend it must suit all of them. Exit code 1 where an error is among the findings.
    """
    from vss.deploy import lint as judge

    flavours, targets = _judged_for(backend, given)
    found = judge.lint(onnx, plugins=(*judge.PLUGINS, *(plugin_op or [])), flavours=flavours, targets=targets)
    rows = [asdict(finding) for finding in found]
    errors = sum(finding.severity == "error" for finding in found)
    if rows:
        heads = {"rule": "rule", "severity": "severity", "does": "TensorRT", "node": "node", "detail": "what is there",
                 "reason": "why", "fix": "fix"}  # fmt: skip
        print_table([{"name": row["rule"], "does": _by_flavour(row["flavours"]), **row} for row in rows], heads)
    out.print(f"{onnx}: {errors} errors, {len(found) - errors} warnings")
    refused, verdict = _ask_parser(onnx, targets) if parser else ("", None)
    figures = {"onnx": str(onnx), "errors": errors, "findings": rows}
    write_figures(report, "vss.lint", figures | ({"parser": verdict} if verdict else {}))
    if errors:
        raise GateFailed(f"TensorRT would not build {onnx}: {found[0]}")
    if refused and "rtx" in flavours:
        raise GateFailed(refused)


def _judged_for(backend: str | None, given: Given) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Columns of the lint for --backend, and the targets."""
    from vss.deploy import BuildPlan
    from vss.deploy.backends import of_tensorrt
    from vss.deploy.lint import FLAVOURS

    targets = tuple(given.get("build.targets", ()))
    tensorrt = of_tensorrt(backend or "tensorrt_rtx")
    if tensorrt is None:
        raise VssError(f"--backend of vss lint is tensorrt or tensorrt_rtx, and got {shown(backend)}.")
    tensorrt.check(BuildPlan(targets=targets))
    own = tuple(each for each in FLAVOURS if (each == "rtx") is bool(tensorrt.flavour.targets))
    return own if backend else FLAVOURS, targets


def _ask_parser(onnx: Path, targets: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Print what parser and builder of TensorRT for RTX say: a sentence where they refuse, and all of it."""
    from vss.deploy.backends.trt import verdict
    from vss.deploy.backends.trt_flavour import TENSORRT_RTX, gpus

    found = verdict(onnx, TENSORRT_RTX, targets)
    title, where = f"{TENSORRT_RTX.title} {found.version}".strip(), gpus(targets)
    refused = "" if found.built else f"{title} does not build {onnx} for {where}: {found.reason.rstrip('.')}."
    out.print(refused or f"{title} builds it for {where}: {len(found.layers)} engine layers.", soft_wrap=True)
    kept = {key: value for key, value in asdict(found).items() if key != "layers"}
    return refused, {"targets": list(targets), "engine_layers": len(found.layers), **kept}


def _by_flavour(does: dict[str, str]) -> str:
    """10, 11: refused; rtx: warning."""
    kinds = {kind: ", ".join(name for name, each in does.items() if each == kind) for kind in does.values()}
    return "; ".join(f"{names}: {kind}" for kind, names in kinds.items())
