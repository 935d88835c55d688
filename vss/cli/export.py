"""`vss export`, `vss calibrate` and `vss sensitivity`: ONNX files and what they compute in."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from vss.cli.console import (
    Ckpt,
    Data,
    ReportFile,
    Root,
    Save,
    Seed,
    Set,
    Size,
    err,
    out,
    recipe_of,
    refuse_given,
    show_table,
    size_of,
    write_figures,
)
from vss.core.errors import VssError
from vss.core.files import target_of
from vss.run.project import Project, project_of

export_app = typer.Typer()
OF_INT8 = ("choice", "elsewhere", "method", "images", "cache", "dataset", "data_root", "seed", "overrides")
Labels = Annotated[bool, typer.Option("--labels", help="argmax in the graph")]
Pixels = Annotated[bool, typer.Option("--preprocess", help="uint8 images in, normalisation in the graph")]
Opset = Annotated[int, typer.Option("--opset")]
Method = Annotated[str | None, typer.Option("--method", help="INT8 ranges: minmax, percentile or entropy")]
Images = Annotated[int | None, typer.Option("--images", help="calibration images, from the training split")]
Elsewhere = Annotated[str | None, typer.Option("--elsewhere", help="beside INT8: fp32 or fp16")]
Keep = Annotated[list[str] | None, typer.Option("--keep", help="a layer that stays in floating point")]
Cache = Annotated[Path, typer.Option("--cache", help="folder of measured ranges")]


@export_app.command()
def export(
    ctx: typer.Context,
    ckpt: Ckpt,
    save: Save = Path("model.onnx"),
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8")] = "fp32",
    labels: Labels = False,
    labels_dtype: Annotated[str, typer.Option(help="int32 or uint8")] = "int32",
    preprocess: Pixels = False,
    input_size: Size = None,
    dynamic_size: Annotated[bool, typer.Option(help="H and W dynamic as well")] = False,
    opset: Opset = 20,
    plugins: Annotated[bool, typer.Option("--plugins", help="nodes of the TensorRT plugins, with bodies")] = False,
    keep: Keep = None,
    choice: Annotated[Path | None, typer.Option(help="int8: file of vss sensitivity, the layers to keep")] = None,
    elsewhere: Elsewhere = None,
    method: Method = None,
    images: Images = None,
    cache: Cache = Path("runs/ranges"),
    dataset: Data = None,
    data_root: Root = None,
    seed: Seed = None,
    overrides: Set = None,
    report: ReportFile = None,
) -> None:
    """Write typed ONNX and prove parity with torch at three shapes. INT8 takes ranges from training images."""
    from vss.deploy.quantize.precision import Precision
    from vss.run import command

    target_of(save)
    if not labels:
        refuse_given(ctx, ["labels_dtype"], "is for --labels")
    options: dict[str, Any] = {"labels": labels, "labels_dtype": labels_dtype, "preprocess": preprocess}
    options |= {"dynamic_size": dynamic_size, "opset": opset, "plugins": plugins}
    if Precision(precision).kind == "int8":
        from vss.run.precision import load_choice

        job = _job(seed, overrides, method, images, elsewhere, keep)
        chosen = load_choice(choice, ckpt)
        with tempfile.TemporaryDirectory(prefix="vss-export-") as folder:
            typing = _typing(ckpt, job, Path(folder), cache, dataset, data_root, size_of(input_size), options)
            figures = typing.write(save, "int8", list(dict.fromkeys([*typing.config.keep, *chosen])))
    else:
        refuse_given(ctx, OF_INT8, "is for --precision int8")
        if precision == "fp32":
            refuse_given(ctx, ["keep"], "is for --precision fp16 and int8")
        wanted = Precision(precision, tuple(keep or ()))
        figures = command.export_checkpoint(ckpt, save, precision=wanted, size=size_of(input_size), **options)
    show_table(figures["parity"]["shapes"], {key: key for key in figures["parity"]["shapes"][0]}, "parity with torch")
    out.print(f"{figures['nodes_before']} nodes, {figures['nodes_after']} after clean-up; wrote {save}")
    if "precision" in figures:
        _tell(figures)
    write_figures(report, "vss.export", figures)


@export_app.command()
def calibrate(
    ckpt: Ckpt,
    save: Annotated[Path | None, typer.Option("--save", help="also write the ranges here")] = None,
    method: Method = None,
    images: Images = None,
    split: Annotated[str | None, typer.Option(help="train; ranges come from no other")] = None,
    image_list: Annotated[Path | None, typer.Option(help="file with ids of training images, one a line")] = None,
    labels: Labels = False,
    preprocess: Pixels = False,
    opset: Opset = 20,
    cache: Cache = Path("runs/ranges"),
    dataset: Data = None,
    data_root: Root = None,
    seed: Seed = None,
    overrides: Set = None,
) -> None:
    """Measure INT8 ranges on training images of every class; kept by hash, so that nothing is measured twice."""
    if save:
        target_of(save)
    job = _job(seed, overrides, method, images, None, None, split=split, image_list=image_list and str(image_list))
    options = {"labels": labels, "preprocess": preprocess, "opset": opset}
    with tempfile.TemporaryDirectory(prefix="vss-export-") as folder:
        typing = _typing(ckpt, job, Path(folder), cache, dataset, data_root, None, options)
        known = {path.name for path in cache.glob("*.json")}
        ranges = typing.calibrate()
        measured = {path.name for path in cache.glob("*.json")} - known
    shown = ranges.calibration["images_per_class"]
    rows = [{"name": name, "images": count} for name, count in shown.items()]
    show_table(rows, {"name": "class", "images": "images"})
    how = f"measured, kept in {cache}" if measured else f"taken from {cache}"
    out.print(f"{len(ranges.values)} ranges by {ranges.method['method']}, {how}; images {ranges.calibration['sha256']}")
    if save:
        out.print(f"wrote {ranges.save(save)}")


@export_app.command()
def sensitivity(
    ckpt: Ckpt,
    save: Annotated[Path, typer.Option("--save", help="the choice, for vss export --choice")] = Path("choice.json"),
    max_drop: Annotated[float | None, typer.Option(help="points that INT8 may cost on validation images")] = None,
    groups: Annotated[int | None, typer.Option(help="most groups of layers to tell apart")] = None,
    timed: Annotated[bool, typer.Option(help="layers that save no time go back to floating point first")] = True,
    method: Method = None,
    images: Images = None,
    elsewhere: Elsewhere = None,
    keep: Keep = None,
    labels: Labels = False,
    preprocess: Pixels = False,
    opset: Opset = 20,
    cache: Cache = Path("runs/ranges"),
    dataset: Data = None,
    data_root: Root = None,
    seed: Seed = None,
    overrides: Set = None,
) -> None:
    """Find which layers must stay in floating point, by the metric of the task and measured times."""
    target_of(save)
    job = _job(seed, overrides, method, images, elsewhere, keep, max_drop=max_drop, groups=groups)
    options = {"labels": labels, "preprocess": preprocess, "opset": opset}
    with tempfile.TemporaryDirectory(prefix="vss-export-") as folder, Progress(console=err, transient=True) as bar:
        typing = _typing(ckpt, job, Path(folder), cache, dataset, data_root, None, options)
        task = bar.add_task("groups of layers", total=typing.config.groups)
        choice = typing.search(lambda: bar.advance(task), timed=timed)
    facts = choice.facts
    rows = [{"name": row["group"], **row} for row in facts["groups"]]
    heads = {"name": "only this group in INT8", "metric": facts["by"], "drop": "drop", "gain_ms": "saves ms"}
    show_table(rows, heads, f"float32: {facts['baseline']:.2f} on {facts['images']} validation images")
    choice.save(save)
    if not facts["within"]:
        raise VssError(
            f"no layer can be INT8 within {facts['max_drop']} points; {save} says what was tried: export fp16 or fp32."
        )
    freed = ", ".join(facts["freed"]) or "nothing"
    out.print(f"kept in floating point: {freed}; drop {facts['drop']:.3f} of {facts['max_drop']} allowed; wrote {save}")


def _job(
    seed: int | None, overrides: list[str] | None, method: str | None, images: int | None, elsewhere: str | None,
    keep: list[str] | None, **more: Any,
) -> Any:  # fmt: skip
    """A recipe from the flags that the commands share."""
    flags = {"method": method, "images": images, "elsewhere": elsewhere, "keep": keep or None, **more}
    return recipe_of(None, overrides, seed=seed, **{f"precision__{key}": value for key, value in flags.items()})


def _typing(
    ckpt: Path, job: Any, folder: Path, cache: Path, dataset: str | None, data_root: str | None,
    size: list[int] | None, options: dict[str, Any],
) -> Any:  # fmt: skip
    """The checkpoint's network with its data and its float32 file."""
    from vss.run.precision import Typing
    from vss.run.preflight import check_calibration
    from vss.train import checkpoint

    target_of(cache / "ranges.json")
    project = project_of(ckpt, data_root=data_root, dataset=dataset, recipe=job)
    check_calibration(project)
    if size:
        resized = project.preprocess.model_copy(update={"size": tuple(size)})
        project = Project(project.recipe, project.data, resized)
    where = ("preprocess", "expects") if options.get("preprocess") else ("expects", "preprocess")
    changes = options | dict(zip(where, (project.preprocess, None), strict=True))
    return Typing.export(project, checkpoint.load(ckpt), project.recipe.precision, folder, cache, **changes)


def _tell(figures: dict[str, Any]) -> None:
    facts = figures["precision"]
    size, before = figures["bytes"] / 2**20, facts["fp32"]["bytes"] / 2**20
    kept = ", ".join(f"{name} ({why})" for name, why in facts["kept"].items()) or "none"
    if facts["kind"] == "int8":
        out.print(f"INT8 in {len(facts['int8'])} of {facts['layers']} layers; in floating point: {kept}")
    out.print(f"{size:.2f} MiB, in float32 {before:.2f} MiB")
