"""Line charts as inline SVG that follow the page's colours, light or dark.

matplotlib draws with placeholder colours through its object interface; they are then replaced by CSS variables. Text
stays text, so it takes the page's font. XML heads, metadata and namespace addresses are removed.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vss.core.errors import need
from vss.run.page.verdict import score_of
from vss.run.page.words import number, signed, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes


WIDTH, HEIGHT, FONT = 400, 250, 12.5
MAX_POINTS = 400
INK, MUTED, _LINE, _CARD, _BAD = "#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005"
SERIES = ("#0a0011", "#0a0012", "#0a0013", "#0a0014")
_VARIABLES = {INK: "--ink", MUTED: "--muted", _LINE: "--line", _CARD: "--card", _BAD: "--bad"} | {
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
    for key, name, unit, scale in _CURVES:
        lines, axis = lines_of(report.get("curves", {}), key)
        if not any(len(line.x) > 1 for line in lines):
            continue
        if scale == "log" and min(y for line in lines for y in line.y) <= 0:
            scale = "linear"
        mark = _baseline(report, key) if key.startswith("val_") else None
        alt = f"{name} over {axis}: " + "; ".join(
            f"{line.name} from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in lines
        )
        charts.append(Chart(name, _draw(key, lines, axis, unit, scale, mark), alt))
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
    matplotlib = need("matplotlib", "a chart of the page")
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

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
        legend(axes, 4)


def legend(axes: Axes, columns: int) -> None:
    """Above the axes, in so many columns."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, labelcolor=INK, handlelength=1.2,
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


# Score against latency: the engines of one interleaved run, those that none beats, and what pruning is worth.


PRUNED, BASELINE = "engine pruned", "engine baseline"
CUT = (PRUNED, "pruned", "finetuned")
NOBODY = (
    "No network that is not pruned is as fast here; name small ones in references of the recipe to see whether to "
    "prune at all."
)


class Point(NamedTuple):
    """One network: median milliseconds, or another cost, and score in percent."""

    name: str
    ms: float
    score: float


class TradeOff(NamedTuple):
    """The plot, one sentence on what pruning is worth at equal latency, and what the costs are."""

    chart: Chart
    sentence: str
    note: str


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of (cost, score) pairs that no other pair beats in one and equals or beats in the other, by cost."""
    front: list[int] = []
    best = -math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            front.append(index)
            best = points[index][1]
    return front


def points_of(report: Mapping[str, Any]) -> list[Point]:
    """Rows that were timed interleaved with the pruned engine: times of another run do not compare.

    The unpruned network counts with the score that it has after as much training as the others, where the run has such
    a control; its engine takes the same time.
    """
    key, _ = score_of(report)
    timed = report.get("bench", {}).get("engine", {}).get("sessions", {})
    rows = {row["name"]: row for row in report.get("rows", [])}
    control = rows.get("control", {}).get(key)
    points = []
    for name, row in rows.items():
        if name in timed and row.get("latency_ms_p50") is not None and row.get(key) is not None:
            as_long = name == BASELINE and control is not None
            score = control if as_long else row[key]
            points.append(Point("control" if as_long else name, row["latency_ms_p50"], score))
    return points


def front_of(points: Sequence[Point]) -> list[Point]:
    return [points[index] for index in pareto([(point.ms, point.score) for point in points])]


def worth(points: Sequence[Point], score: str) -> str:
    """What the pruned engine scores above the unpruned ones at its own latency; empty without a pruned engine."""
    pruned = next((point for point in points if point.name == PRUNED), None)
    others = front_of([point for point in points if point.name != PRUNED])
    if pruned is None or not others:
        return ""
    time = f"At {number(pruned.ms, 2)} ms"
    faster = [point for point in others if point.ms <= pruned.ms]
    if not faster:
        return NOBODY
    best = faster[-1]
    if best.score >= pruned.score:
        return (
            f"{time} or less, {short(best.name)}, which is not pruned, reaches {number(best.score, 2)} % {score}, "
            f"{signed(best.score - pruned.score, 2)} points against the pruned network: pruning does not pay here."
        )
    slower = next((point for point in others if point.ms > pruned.ms), None)
    if slower is None:
        gain = signed(pruned.score - best.score, 2)
        return f"{time} the pruned network has {gain} points of {score} over the best of the rest, {short(best.name)}."
    share = (pruned.ms - best.ms) / (slower.ms - best.ms)
    level = best.score + share * (slower.score - best.score)
    verb = "pruning pays" if pruned.score > level else "a smaller network does as well"
    return (
        f"{time} the front of networks that are not pruned, between {short(best.name)} and {short(slower.name)}, is at "
        f"{number(level, 2)} % {score}: {signed(pruned.score - level, 2)} points for the pruned network, so {verb}."
    )


def trade_off(report: Mapping[str, object]) -> TradeOff | None:
    """Against latency, or against MACs where fewer than two engines were timed."""
    points, (_, name) = points_of(report), score_of(report)
    if len(points) >= 2:
        sentence, note = worth(points, name), "Engines timed interleaved in one run."
        return TradeOff(_against(points, name, "latency", "latency p50", "ms"), sentence, note)
    points = _by_macs(report)
    if len({point.ms for point in points}) < 2:
        return None
    note = "Latencies are missing (see Missing figures), so MACs stand in for them; fewer MACs are not always faster."
    return TradeOff(_against(points, name, "MACs", "MACs", "G"), "", note)


def _by_macs(report: Mapping[str, Any]) -> list[Point]:
    key, _ = score_of(report)
    every = [row for row in report.get("rows", []) if not row["name"].startswith("engine ")]
    tuned = any(row["name"] == "finetuned" for row in every)
    rows = [row for row in every if not (tuned and row["name"] == "pruned")]
    known = [row for row in rows if row.get("macs_g") is not None and row.get(key) is not None]
    return [Point(row["name"], row["macs_g"], row[key]) for row in known]


def _against(points: Sequence[Point], name: str, cost: str, axis: str, unit: str) -> Chart:
    front = front_of(points)
    told = (f"{short(p.name)} {p.ms:.4g} {unit} {p.score:.4g} %{', not beaten' if p in front else ''}" for p in points)
    svg = draw("trade-off", lambda axes: _paint(axes, points, front, name, f"{axis} ({unit})"), width=560, height=330)
    return Chart(f"{name} against {cost}", svg, f"{name} against {cost}: {'; '.join(told)}")


def short(name: str) -> str:
    """A network's name beside its point, where all are engines or none is.

    >>> short("engine pruned"), short("control"), short("reference unet width=8")
    ('pruned', 'unpruned control', 'unet width=8')
    """
    words = {BASELINE: "unpruned", PRUNED: "pruned", "control": "unpruned control"}
    return words.get(name) or title(name.removeprefix("reference "))


def _paint(axes: Axes, points: Sequence[Point], front: Sequence[Point], score: str, cost: str) -> None:
    from matplotlib.ticker import MaxNLocator

    line = [point.ms for point in front], [point.score for point in front]
    axes.plot(*line, color=MUTED, linewidth=1, linestyle=(0, (4, 4)), zorder=1, label="none costs less and is better")
    middle = (min(point.ms for point in points) + max(point.ms for point in points)) / 2
    for label, pruned, colour in (("not pruned", False, SERIES[0]), ("pruned", True, SERIES[2])):
        own = [point for point in points if (point.name in CUT) is pruned]
        axes.scatter([p.ms for p in own], [p.score for p in own], s=46, color=colour, zorder=2, label=label)
        for point in own:
            left = point.ms <= middle
            axes.annotate(
                short(point.name), (point.ms, point.score), xytext=(8, -13) if left else (-8, 6),
                color=INK, fontsize=FONT - 1, textcoords="offset points", ha="left" if left else "right",
            )  # fmt: skip
    axes.set_xlabel(cost, color=MUTED)
    axes.set_ylabel(f"{score} (%)", color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(0.08, 0.15)
    legend(axes, 3)
