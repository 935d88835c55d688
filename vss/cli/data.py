"""`vss data check` and `vss data make`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vss.cli.console import Data, ReportFile, out, show_table, tell, write_figures
from vss.core.errors import VssError, counted

data_app = typer.Typer(no_args_is_help=True, help="Check a data set, or generate one.")


@data_app.command("check")
def data_check(
    root: Path,
    dataset: Data = None,
    report: ReportFile = None,
    near: Annotated[bool, typer.Option(help="also look for near duplicates")] = False,
) -> None:
    """Count, match, measure and read every image and mask of a data set."""
    from vss.data.check import check

    figures = check(root, dataset, near=near)
    for split, facts in figures["splits"].items():
        out.print(f"{split}: {counted(facts['pairs'], 'pair')}{_sizes(facts['sizes'])}", highlight=False)
        rows = [{"name": name, **row} for name, row in facts["classes"].items()]
        show_table(rows, {"name": "class", "pixels_pct": "pixels %", "images": "images"})
    for warning in figures["warnings"]:
        tell(out, "warning:", "yellow", warning)
    for problem in figures["problems"]:
        tell(out, "problem:", "red", problem)
    write_figures(report, "vss.data_check", figures)
    if not figures["ok"]:
        raise VssError(f"{root} has {counted(len(figures['problems']), 'problem')}; mend before training.")
    tell(out, "ok:", "green", figures["dataset"])


def _sizes(sizes: dict[str, Any]) -> str:
    if not sizes["distinct"]:
        return ""
    (common, count), *others = sizes["common"].items()
    if not others:
        return f", all {common} (height x width)"
    height, width = ("..".join(str(side) for side in sorted(set(sizes[key]))) for key in ("height", "width"))
    return f" of {sizes['distinct']} sizes, {height} x {width} (height x width), {count} of {common}"


@data_app.command("make")
def data_make(
    kind: Annotated[str, typer.Argument(help="street (CamVid layout) or defects (KSDD2 layout)")],
    root: Path,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Generate a data set from a seed."""
    from vss.core.errors import unknown
    from vss.core.locks import file_at_work
    from vss.data import write_defects, write_street

    makers = {"street": write_street, "defects": write_defects}
    if kind not in makers:
        raise unknown("generated data set", kind, makers)
    with file_at_work(root):
        makers[kind](root, seed=seed)
    out.print(f"wrote {root}")
