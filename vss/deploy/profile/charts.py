"""The width-cliff plot of a table: time of the network against the width of one group, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vss.core.errors import VssError
from vss.core.files import atomic
from vss.deploy.profile.table import LatencyTable


def cliffs(table: LatencyTable) -> dict[str, list[tuple[int, float]]]:
    """Group id -> [(width, milliseconds of the units that it changes)], ascending, of every scanned group."""
    found: dict[str, list[tuple[int, float]]] = {}
    for sample in table.of_role("cliff"):
        index = int(sample.name.split("-")[1])
        units = [u for u, (_, _, slopes) in table.channels.items() if str(index) in slopes]
        near = sum(sample.reading.units.get(unit, 0.0) for unit in units)
        found.setdefault(table.groups[index][0], []).append((sample.widths[index], near))
    return {name: sorted(points) for name, points in found.items()}


def plot_cliffs(table: LatencyTable, path: Path, kept: Mapping[str, int] | None = None) -> Path:
    """Write the plot, with a line at the width that a plan has `kept` of a group; needs matplotlib."""
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise VssError("the width-cliff plot needs matplotlib: pip install matplotlib.") from error
    found = cliffs(table)
    if not found:
        raise VssError("the table has no scanned widths; build it with at least one cliff.")
    figure = Figure(figsize=(6, 3.2 * len(found)), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(len(found), squeeze=False)[:, 0], found.items(), strict=True):
        axes.plot(*zip(*points, strict=True), marker="o", color="#2b6cb0")
        axes.set(title=f"{name} on {table.key['backend']}", xlabel="width (channels)", ylabel="ms of its layers")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if kept and name in kept:
            axes.axvline(kept[name], color="#c05621", linestyle="--", label=f"kept: {kept[name]}")
            axes.legend(frameon=False)
    with atomic(path) as temporary:
        FigureCanvasSVG(figure).print_svg(str(temporary), metadata={"Date": None})
    return path
