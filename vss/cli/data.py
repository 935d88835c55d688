"""`vss data`: look at a folder of images and masks, write it in another layout, or generate one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rich.progress import Progress
from rich.text import Text
from typer import Argument, Option

from vss.cli.console import err, out, print_table, print_tagged, write_figures
from vss.cli.options import READING, Given, ReportFile, recipe_keys, recipe_of, size_of, takes
from vss.core.errors import VssError, counted, unknown
from vss.core.files import file_at_work, target_of


def layouts() -> None:
    """Draw the layouts that are read as they are."""
    from vss.data.layouts import LAYOUTS
    from vss.data.readers import DATASETS

    for name in [*LAYOUTS, *(name for name in DATASETS.names() if name not in LAYOUTS)]:
        out.print(Text(name, style="bold"), highlight=False)
        drawing = LAYOUTS[name].drawing if name in LAYOUTS else "registered by a package of yours"
        out.print(Text("\n".join(f"  {line}" for line in drawing.splitlines())), highlight=False)
    flags = "--missing-mask, --label-map, --ignore-index, --classes, --data-split; masks in colours: --colors"
    out.print(f"all of them: {flags}", highlight=False)


@takes(given=recipe_keys("data.dataset", "model.name", *READING))
def init(
    root: Annotated[Path, Argument(help="folder of images and masks", metavar="FOLDER")],
    given: Given,
    to: Annotated[Path, Option("--save", "--out", help="recipe to write")] = Path("recipe.yaml"),
    force: Annotated[bool, Option("--force", help="replace a recipe that is there")] = False,
) -> None:
    """Look at a folder and write a recipe for it, every key with its reason: `vss run` is the next command."""
    from vss.run.init import in_words, init

    layout, model = given.pop("data.dataset", "auto"), given.pop("model.name", None)
    found = init(root, to, layout=layout, options=recipe_of(given).data, model=model, force=force)
    job = found["recipe"]
    print_tagged(out, "layout:", "bold", f"{found['dataset']}, {len(found['classes'])} classes")
    for split, facts in found["splits"].items():
        out.print(f"{split}: {counted(facts['pairs'], 'pair')}{_sizes(facts['sizes'])}", highlight=False)
    size = "x".join(map(str, job.data.size))
    print_tagged(out, "task:", "bold", f"{found['task']}, {job.model.name} at {size}")
    out.print(f"wrote {to}; training takes about {in_words(found['seconds'])}: vss run {to}", highlight=False)


@takes(given=recipe_keys("data.dataset", *READING))
def check(
    root: Annotated[Path, Argument(help="folder of the data set")],
    given: Given,
    near: Annotated[bool, Option(help="look for near duplicates as well")] = False,
    report: ReportFile = None,
) -> None:
    """Name the layout of a folder, and count, match, measure and read every image and mask in it."""
    from vss.data.check import check as check_folder

    options = recipe_of(given).data
    figures = check_folder(root, given.get("data.dataset"), options=options, near=near)
    _print_layout(figures)
    for split, facts in figures["splits"].items():
        out.print(f"{split}: {counted(facts['pairs'], 'pair')}{_sizes(facts['sizes'])}", highlight=False)
        rows = [{"name": name, **row} for name, row in facts["classes"].items()]
        print_table(rows, {"name": "class", "pixels_pct": "pixels %", "images": "images"})
    for warning in figures["warnings"]:
        print_tagged(out, "warning:", "yellow", warning)
    for problem in figures["problems"]:
        print_tagged(out, "problem:", "red", problem)
    write_figures(report, "vss.data_check", figures)
    if not figures["ok"]:
        raise VssError(f"{root} has {counted(len(figures['problems']), 'problem')}; mend before training.")
    print_tagged(out, "ok:", "green", figures["dataset"])


@takes(given=recipe_keys("data.dataset", *READING))
def import_(
    root: Annotated[Path, Argument(help="folder of the data set", metavar="SRC")],
    to: Annotated[Path, Argument(help="folder to write, a new one", metavar="DST")],
    given: Given,
    fit: Annotated[str, Option(help="shrink images and masks into H,W once, keeping their shape", metavar="H,W")] = "",
) -> None:
    """Write a data set in the plain layout, masks: hard links for images, masks as PNG of class indices."""
    from vss.data.importing import import_data, sentence
    from vss.data.readers import AUTO, open_data

    size = size_of(fit, "--fit") if fit else None
    data = open_data(given.get("data.dataset", AUTO), root, recipe_of(given).data)
    with Progress(console=err, transient=True) as bar:
        task = bar.add_task("pairs", total=None)
        done = import_data(data, to, fit=size, progress=lambda n, total: bar.update(task, completed=n, total=total))
    out.print(sentence(data, done, to), highlight=False)


@takes(given=recipe_keys("data.dataset", *READING))
def view(
    root: Annotated[Path, Argument(help="folder of the data set")],
    given: Given,
    save: Annotated[Path, Option("--save", help="HTML file to write")] = Path("data.html"),
    images: Annotated[int, Option(min=1, max=500, help="pictures on the page")] = 12,
) -> None:
    """Write a page of overlays: masks on images, shares of the classes, sizes, and what the check finds."""
    from vss.data.check import check as check_folder
    from vss.data.check import open_to_look
    from vss.data.readers import AUTO
    from vss.run.page.panels import write_data_page

    data = open_to_look(given.get("data.dataset", AUTO), root, recipe_of(given).data)
    figures = check_folder(data)
    out.print(f"wrote {write_data_page(data, figures, target_of(save), images=images)}", highlight=False)


def _print_layout(figures: dict[str, Any]) -> None:
    """What the folder was read as, and why not as something else."""
    print_tagged(out, "layout:", "bold", figures["dataset"])
    print_tagged(out, "read as:", "bold", figures["protocol"])
    for name, why in figures["not_layouts"].items():
        out.print(Text(f"  not {name}: {why or 'it fits, and another was asked for'}", style="dim"), highlight=False)


def _sizes(sizes: dict[str, Any]) -> str:
    if not sizes["distinct"]:
        return ""
    (common, count), *others = sizes["common"].items()
    if not others:
        return f", all {common} (height x width)"
    height, width = ("..".join(str(side) for side in sorted(set(sizes[key]))) for key in ("height", "width"))
    return f" of {sizes['distinct']} sizes, {height} x {width} (height x width), {count} of {common}"


def make(
    kind: Annotated[str, Argument(help="street (CamVid layout) or defects (KSDD2 layout)")],
    root: Annotated[Path, Argument(help="folder to write")],
    seed: Annotated[int, Option(help="same seed, same images")] = 0,
) -> None:
    """Generate a small data set."""
    from vss.data import write_defects, write_street

    makers = {"street": write_street, "defects": write_defects}
    if kind not in makers:
        raise unknown("generated data set", kind, makers)
    with file_at_work(root):
        makers[kind](root, seed=seed)
    out.print(f"wrote {root}")
