"""Decisions about images: precision against recall, scores by truth, misses against false alarms, and pictures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vss.run.page.charts import INK, MUTED, SERIES, Chart, draw, legend
from vss.run.page.evidence import LAST
from vss.run.page.panels import Cell, data_uri, open_picture, shrink
from vss.run.page.words import number, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image

DEFECT, SOUND = "#0a0005", SERIES[0]
TICKS = (1e-6, 1e-4, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999, 0.999999)
MANY = 30
_COLOURS = {"baseline": SERIES[0], "control": SERIES[3]}
Decided = Mapping[str, Any]


def decisions(report: Mapping[str, Any]) -> dict[str, object] | None:
    """Charts of the decisions on the reported split, and a sentence on the threshold that was chosen."""
    found: Mapping[str, Decided] = report.get("decisions", {})
    if LAST not in found:
        return None
    last = found[LAST]
    at = chosen(last)
    told = "no image is called defective"
    if at is not None:
        alarms = last["false_alarms"][at]
        told = f"{last['misses'][at]} missed, {alarms} false alarm{'' if alarms == 1 else 's'}"
    charts = [
        Chart("Precision against recall", draw("pr", lambda axes: _curves(axes, found)), _alt(found)),
        Chart(
            f"Scores by truth, {title(LAST)}", draw("histogram", lambda axes: _histogram(axes, last)),
            f"{sum(last['sound'])} sound and {sum(last['defective'])} defective images by score",
        ),
        Chart(
            f"Misses and false alarms over the threshold, {title(LAST)}",
            draw("threshold", lambda axes: _counts(axes, last)), f"at the chosen threshold: {told}",
        ),
    ]  # fmt: skip
    share = 1 / (1 + math.exp(-max(-700.0, min(700.0, last["threshold"]))))
    sentence = f"At the threshold {number(share)}, chosen on validation: {told}, of {sum(last['defective'])} defective "
    sentence += f"and {sum(last['sound'])} sound images."
    free = [wrong for misses, wrong in zip(last["misses"], last["false_alarms"], strict=True) if misses == 0]
    if free and at is not None and last["misses"][at]:
        sentence += f" To miss none of these images, it would call {min(free)} sound ones defective."
    return {"charts": charts, "sentence": sentence}


def chosen(found: Decided) -> int | None:
    """Index of the lowest score that is called defective; None where none is."""
    called = sum(score >= found["threshold"] for score in found["score"])
    return called - 1 if called else None


def _alt(found: Mapping[str, Decided]) -> str:
    parts = []
    for name, each in found.items():
        at = chosen(each)
        if at is not None:
            recall, precision = number(each["recall_pct"][at], 1), number(each["precision_pct"][at], 1)
            parts.append(f"{title(name)} at its threshold: recall {recall} %, precision {precision} %")
    return "; ".join(parts)


def _curves(axes: Axes, found: Mapping[str, Decided]) -> None:
    for name, each in found.items():
        colour = _COLOURS.get(name, SERIES[2])
        recall, precision = [0.0, *each["recall_pct"]], [each["precision_pct"][0], *each["precision_pct"]]
        axes.step(recall, precision, where="pre", color=colour, linewidth=2, label=title(name).split(",")[0])
        at = chosen(each)
        if at is not None:
            axes.plot(each["recall_pct"][at], each["precision_pct"][at], "o", color=colour, markersize=7)
    axes.set_xlabel("recall (%); dots: chosen thresholds", color=MUTED)
    axes.set_ylabel("precision (%)", color=MUTED)
    axes.margins(0.03, 0.08)
    legend(axes, 1)


def _histogram(axes: Axes, found: Decided) -> None:
    edges = found["edges"]
    widths = [high - low for low, high in itertools.pairwise(edges)]
    for name, key, colour in (("sound", "sound", SOUND), ("defective", "defective", DEFECT)):
        axes.bar(edges[:-1], found[key], widths, align="edge", color=colour, alpha=0.75, label=name)
    _thresholds(axes, found, edges)
    _counted(axes)
    axes.set_ylabel("images", color=MUTED)
    legend(axes, 3)


def _counts(axes: Axes, found: Decided) -> None:
    """A threshold between two scores calls what the higher one calls."""
    for name, key, colour in (("missed", "misses", DEFECT), ("false alarms", "false_alarms", SERIES[0])):
        axes.step(found["score"], found[key], where="post", color=colour, linewidth=2, label=name)
    _thresholds(axes, found, found["score"])
    _counted(axes)
    axes.set_ylabel("images", color=MUTED)
    legend(axes, 3)


def _thresholds(axes: Axes, found: Decided, scores: Sequence[float]) -> None:
    """The chosen threshold as a line, and the axis of log-odds with probabilities as its ticks."""
    axes.axvline(found["threshold"], color=INK, linewidth=1, linestyle=(0, (4, 3)), label="chosen")
    low, high = min(*scores, found["threshold"]), max(*scores, found["threshold"])
    kept: list[float] = []
    for share in TICKS:
        place = math.log(share / (1 - share))
        near = kept and place - math.log(kept[-1] / (1 - kept[-1])) < (high - low) / 7
        if low <= place <= high and not near:
            kept.append(share)
    places = [math.log(share / (1 - share)) for share in kept]
    if len(kept) < 3:
        places = [low + (high - low) * part / 3 for part in range(4)]
        kept = [1 / (1 + math.exp(-place)) for place in places]
    axes.set_xticks(places, [f"{share:.3g}" if share < 0.99 else f"{share:.6g}" for share in kept])
    axes.set_xlabel("score: probability of a defect", color=MUTED)


def _counted(axes: Axes) -> None:
    """Counts from 0 on; large ones on a logarithmic axis, so that the few that matter are seen beside them."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    if axes.get_ylim()[1] > MANY:
        axes.set_yscale("symlog", linthresh=1)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_ylim(bottom=0)


# Defects that the engine misses, worst first, the weakest of those that it finds, and sound images that it calls
# defective: image, mask and heat map.


def defect_pictures(report: Mapping[str, Any], root: Path) -> dict[str, object] | None:
    """{"parts": [(heading, sentence, [(id, note, wrong, cells)])]} in the order of the report; None for others."""
    listed = report.get("defects")
    if listed is None:
        return None
    engine: Mapping[str, Any] = next((row for row in report["rows"] if row["name"] == LAST), {})
    threshold = engine.get("threshold")
    limit = "" if threshold is None else f"; its threshold, chosen on validation, is {number(threshold, 4)}"
    missed = sum(row["missed"] for row in listed)
    total, alarms = sum(int(engine.get(key) or 0) for key in ("tp", "fn")), int(engine.get("fp") or 0)
    told = f"The engine misses {missed or 'none'} of {total} defective images{limit}. "
    told += "Lowest score first, then the weakest that it finds." if missed else "These are the weakest it finds."
    shown = sum(not row.get("defective", True) for row in listed)
    wrongly = f"The engine calls {alarms or 'no'} sound images defective" if "fp" in engine else "Sound images"
    parts = [("Missed defects", told, _rows(listed, root, lambda row: row.get("defective", True)))]
    if shown:
        which = f"; the {shown} with the highest score" if shown < alarms else ", highest score first"
        alarm_rows = _rows(listed, root, lambda row: not row.get("defective", True))
        parts.append(("False alarms", f"{wrongly}{which}.", alarm_rows))
    return {"parts": parts}


def _rows(
    listed: Sequence[Mapping[str, Any]], root: Path, wanted: Callable[[Mapping[str, Any]], bool]
) -> list[tuple[str, str, bool, list[Cell]]]:
    rows = []
    for row in filter(wanted, listed):
        cells = [_cell(name, open_picture(root, path)) for name, path in row["files"].items()]
        word = "missed" if row["missed"] else "found" if row.get("defective", True) else "false alarm"
        rows.append((row["id"], f"{word}, score {number(row['score'], 4)}", word != "found", cells))
    return rows


def _cell(name: str, picture: Image.Image | str) -> Cell:
    if isinstance(picture, str):
        return Cell(name, "", picture, False)
    return Cell(name, data_uri(shrink(picture)), "", False)
