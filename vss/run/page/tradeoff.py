"""Score against latency: the engines of one interleaved run, those that none beats, and what pruning is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vss.run.page.charts import FONT, INK, MUTED, SERIES, Chart, draw
from vss.run.page.text import number, signed
from vss.run.page.verdict import score_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PRUNED, BASELINE = "engine pruned", "engine baseline"
NOBODY = (
    "No network that is not pruned is as fast here; name small ones in the recipe's `references` to see whether to "
    "prune at all."
)


class Point(NamedTuple):
    """One engine: median milliseconds and score in percent."""

    name: str
    ms: float
    score: float


class TradeOff(NamedTuple):
    """The plot, and one sentence on what pruning is worth at equal latency."""

    chart: Chart
    sentence: str


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
    """Rows that were timed in turns with the pruned engine: times of another run do not compare.

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
    """Points that none beats, fastest first."""
    return [points[index] for index in pareto([(point.ms, point.score) for point in points])]


def worth(points: Sequence[Point], title: str) -> str:
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
            f"{time} or less, {short(best.name)}, which is not pruned, reaches {number(best.score, 2)} % {title}, "
            f"{signed(best.score - pruned.score, 2)} points against the pruned network: pruning does not pay here."
        )
    slower = next((point for point in others if point.ms > pruned.ms), None)
    if slower is None:
        gain = signed(pruned.score - best.score, 2)
        return f"{time} the pruned network has {gain} points of {title} over the best of the rest, {short(best.name)}."
    share = (pruned.ms - best.ms) / (slower.ms - best.ms)
    level = best.score + share * (slower.score - best.score)
    verb = "pruning pays" if pruned.score > level else "a smaller network does as well"
    return (
        f"{time} the front of networks that are not pruned, between {short(best.name)} and {short(slower.name)}, is at "
        f"{number(level, 2)} % {title}: {signed(pruned.score - level, 2)} points for the pruned network, so {verb}."
    )


def trade_off(report: Mapping[str, Any]) -> TradeOff | None:
    """Of a report; None with fewer than two engines."""
    points, (_, title) = points_of(report), score_of(report)
    if len(points) < 2:
        return None
    front = front_of(points)
    told = (f"{short(p.name)} {p.ms:.4g} ms {p.score:.4g} %{', not beaten' if p in front else ''}" for p in points)
    svg = draw("trade-off", lambda axes: _paint(axes, points, front, title), width=560, height=330)
    chart = Chart(f"{title} against latency", svg, f"{title} against latency: {'; '.join(told)}")
    return TradeOff(chart, worth(points, title))


def short(name: str) -> str:
    """Without the word that all names here share.

    >>> short("engine pruned"), short("reference unet width=8")
    ('pruned', 'unet width=8')
    """
    return name.removeprefix("engine ").removeprefix("reference ")


def _paint(axes: Axes, points: Sequence[Point], front: Sequence[Point], title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    line = [point.ms for point in front], [point.score for point in front]
    axes.plot(*line, color=MUTED, linewidth=1, linestyle=(0, (4, 4)), zorder=1, label="none is faster and better")
    middle = (min(point.ms for point in points) + max(point.ms for point in points)) / 2
    for label, pruned, colour in (("not pruned", False, SERIES[0]), ("pruned", True, SERIES[2])):
        own = [point for point in points if (point.name == PRUNED) is pruned]
        axes.scatter([p.ms for p in own], [p.score for p in own], s=46, color=colour, zorder=2, label=label)
        for point in own:
            left = point.ms <= middle
            axes.annotate(
                short(point.name), (point.ms, point.score), xytext=(8, -13) if left else (-8, 6),
                color=INK, fontsize=FONT - 1, textcoords="offset points", ha="left" if left else "right",
            )  # fmt: skip
    axes.set_xlabel("latency p50 (ms)", color=MUTED)
    axes.set_ylabel(f"{title} (%)", color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(0.08, 0.15)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, labelcolor=INK, handlelength=1.4,
        columnspacing=1.2, handletextpad=0.5, borderaxespad=0.2, fontsize=FONT,
    )  # fmt: skip
