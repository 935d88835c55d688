"""Line charts as inline SVG that follow the page's colours, light or dark.

matplotlib draws with placeholder colours through its object interface; they are then replaced by CSS variables. Text
stays text, so it takes the page's font. XML heads, metadata and namespace addresses are removed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vss.core.errors import VssError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, FONT = 400, 250, 12.5
MAX_POINTS = 400
INK, MUTED, _LINE, _CARD = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
SERIES = ("#0a0011", "#0a0012", "#0a0013", "#0a0014")
_VARIABLES = {INK: "--ink", MUTED: "--muted", _LINE: "--line", _CARD: "--card"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES)
}
_ROLES = {"train": 0, "finetune": 1, "control": 3}
_CURVES = (
    ("val_miou_pct", "Validation mIoU", "mIoU (%)", "linear"),
    ("val_ap_pct", "Validation AP", "AP (%)", "linear"),
    ("loss", "Training loss", "loss", "log"),
    ("lr", "Learning rate", "learning rate", "linear"),
)


class Chart(NamedTuple):
    """An inline `svg` element with its title and the sentence read to those who cannot see it."""

    title: str
    svg: str
    alt: str


class Line(NamedTuple):
    """One phase of training: `x` in epochs (or steps) from the start of the whole run."""

    name: str
    x: list[float]
    y: list[float]


def curves(report: Mapping[str, Any]) -> list[Chart]:
    """Every logged quantity of every phase, phases one after another on one axis."""
    charts = []
    for key, title, unit, scale in _CURVES:
        lines, axis = lines_of(report.get("curves", {}), key)
        if not any(len(line.x) > 1 for line in lines):
            continue
        if scale == "log" and min(y for line in lines for y in line.y) <= 0:
            scale = "linear"
        mark = _baseline(report, key) if key.startswith("val_") else None
        alt = f"{title} over {axis}: " + "; ".join(
            f"{line.name} from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines
        )
        charts.append(Chart(title, _draw(key, lines, axis, unit, scale, mark), alt))
    return charts


def lines_of(phases: Mapping[str, Sequence[Mapping[str, Any]]], key: str) -> tuple[list[Line], str]:
    """The phases that logged `key`, each shifted to begin where the one before ended, and the name of the x axis.

    The control is trained beside fine-tuning, so it begins where fine-tuning does. Epochs counted from 0 are drawn
    where they end, at 1, 2, ...
    """
    points = [point for phase in phases.values() for point in phase]
    use = "epoch" if all(point.get("epoch") is not None for point in points) else "step"
    first = 1.0 if use == "epoch" and any(point["epoch"] < 1 for point in points) else 0.0
    end, lines = 0.0, []
    starts: dict[str, float] = {}
    for name, phase in phases.items():
        starts[name] = starts.get("finetune", end) if name == "control" else end
        pairs = [(p[use] + first + starts[name], p.get(key)) for p in phase if p.get(use) is not None]
        end = max([end, *(x for x, _ in pairs)])
        known = [(x, y) for x, y in pairs if y is not None]
        if known:
            lines.append(Line(name, *_thin(known)))
    return lines, f"{use}s"


def _thin(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: means of equal runs of neighbours."""
    size = -(-len(pairs) // MAX_POINTS)
    bins = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return [sum(x for x, _ in b) / len(b) for b in bins], [sum(y for _, y in b) / len(b) for b in bins]


def _baseline(report: Mapping[str, Any], key: str) -> float | None:
    """Best validation score of the first phase, the level that fine-tuning has to regain."""
    first: Sequence[Mapping[str, Any]] = next(iter(report.get("curves", {}).values()), [])
    values = [point[key] for point in first if point.get(key) is not None]
    return max(values) if values and len(report["curves"]) > 1 else None


def _draw(key: str, lines: list[Line], axis: str, unit: str, scale: str, mark: float | None) -> str:
    def paint(axes: Axes) -> None:
        _lines(axes, lines, mark)
        _scales(axes, axis, unit, scale)

    return draw(key, paint)


def draw(key: str, paint: Callable[[Axes], None], *, width: float = WIDTH, height: float = HEIGHT) -> str:
    """What `paint` puts into axes as an inline `svg` element in the page's style; `key` makes its ids its own."""
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise VssError("the page's charts need matplotlib: pip install matplotlib.") from error
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": f"vss {key}", "font.size": FONT, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        _style(axes)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return inline(buffer.getvalue())


def _lines(axes: Axes, lines: list[Line], mark: float | None) -> None:
    marker = "o" if max(len(line.x) for line in lines) <= 24 else ""
    for index, line in enumerate(lines):
        colour = SERIES[_ROLES.get(line.name, index % len(SERIES))]
        axes.plot(line.x, line.y, color=colour, linewidth=2, marker=marker, markersize=3.5, label=line.name)
        if index and line.name != "control":
            axes.axvline(line.x[0], color=_LINE, linewidth=1, zorder=0)
    if mark is not None:
        axes.axhline(mark, color=MUTED, linewidth=1, linestyle=(0, (4, 4)), zorder=0, label=f"best: {mark:.1f}")
    if len(lines) > 1:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, labelcolor=INK, handlelength=1.2,
            columnspacing=1.2, handletextpad=0.5, borderaxespad=0.2, fontsize=FONT,
        )  # fmt: skip


def _scales(axes: Axes, axis: str, unit: str, scale: str) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    axes.set_xlabel(axis, color=MUTED)
    axes.set_ylabel(unit, color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))


def _style(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.figure.patch.set_alpha(0)
    axes.tick_params(colors=MUTED, length=0, which="both")
    axes.grid(axis="y", color=_LINE, linewidth=1)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)


def inline(svg: str) -> str:
    """A matplotlib SVG file as an element for HTML: no head, no metadata, no addresses, CSS colours, page font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    svg = re.sub(r'\sid="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()
