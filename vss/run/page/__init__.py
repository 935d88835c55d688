"""report.html: one page that holds everything, works offline and loads nothing.

>>> from vss.run.page import write_page
>>> write_page("runs/camvid_unet/report.json", "runs/camvid_unet/report.html")  # doctest: +SKIP
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vss.core.files import write_text
from vss.core.report import read_report
from vss.deploy.backends.trt_flavour import gpus
from vss.run.page.charts import NOBODY, curves, points_of, trade_off, worth
from vss.run.page.decisions import decisions, defect_pictures
from vss.run.page.evidence import classes, confusion, kind_of, layers, missing, results, worst
from vss.run.page.panels import panels
from vss.run.page.verdict import Verdict, gates, score_of, verdict
from vss.run.page.words import block, number, template, title

__all__ = ["render", "write_page"]

_COLUMNS = (
    ("params_m", "Parameters", "M"),
    ("macs_g", "MACs", "G"),
    ("miou_pct", "mIoU", "%"),
    ("ap_pct", "AP", "%"),
    ("fnr_pct", "Missed", "%"),
    ("f1_pct", "F1", "%"),
    ("latency_ms_p50", "Latency p50", "ms"),
    ("speedup", "Speed-up", "ratio"),
    ("speedup_per_mac_reduction", "Speed-up / MAC reduction", "ratio"),
    ("size_mib", "File", "MiB"),
)
_REPEATED = {"bench": {"kind", "schema", "environment"}, "gate": {"sentence", "detail"}}


def render(report: Mapping[str, object], root: Path, *, linked: bool = True) -> str:
    """The page of one report (see `vss.core.report`) as HTML; pictures are read below `root` and embedded.

    `linked`: the page lies in `root`, so that files beside it can be linked.
    """
    return str(template("report.html.j2").render(context(report, root, linked=linked)))


def write_page(report_path: Path | str, html_path: Path | str) -> Path:
    """Read report.json and write report.html, whole or not at all; pictures lie beside report.json."""
    report_path, html_path = Path(report_path), Path(html_path)
    linked = html_path.resolve().parent == report_path.resolve().parent
    return write_text(html_path, render(read_report(report_path), report_path.parent, linked=linked))


def context(report: Mapping[str, Any], root: Path, *, linked: bool = True) -> dict[str, object]:
    """Everything the template shows: `sections` maps an anchor to (title, data), without those that have no data."""
    builders: dict[str, tuple[str, Callable[[], object]]] = {
        "gates": ("Gates", lambda: gates(report)),
        "tradeoff": ("Trade-off", lambda: trade_off(report)),
        "results": ("Results", lambda: results(report, _COLUMNS)),
        "classes": ("Classes, worst first", lambda: classes(report)),
        "confusion": ("Confusion of classes", lambda: confusion(report)),
        "decisions": ("Decisions and threshold", lambda: decisions(report)),
        "defects": ("Missed defects and false alarms", lambda: defect_pictures(report, root)),
        "worst": ("Worst images", lambda: worst(report)),
        "pictures": ("Pictures of the worst images", lambda: _pictures(report, root)),
        "missing": ("Missing figures", lambda: missing(report)),
        "latency": ("Latency", lambda: _latency(report)),
        "layers": ("Time per layer", lambda: layers(report, root)),
        "training": ("Training", lambda: curves(report)),
        "widths": ("Widths", lambda: _widths(report)),
        "built": ("Engines built, not run", lambda: _built(report)),
        "checks": ("Checks and details", lambda: _blocks(report, "checks", "gate", "export", "plan", "bench")),
        "locked": ("Locked layers", lambda: report.get("locked")),
        "steps": ("Steps", lambda: report.get("steps")),
        "reproduce": ("Reproduce", lambda: _reproduce(report)),
    }
    sections = {name: (heading, data) for name, (heading, build) in builders.items() if (data := build())}
    facts = report.get("environment", {})
    machine = [facts.get("machine"), (facts.get("cpu") or {}).get("model"), *_devices(facts)]
    return {
        "report": report,
        "verdict": judged(report),
        "machine": " \N{MIDDLE DOT} ".join(dict.fromkeys(str(part) for part in machine if part)),
        "created": str(report.get("created") or "")[:16].replace("T", " "),
        "sections": sections,
        "linked": linked,
    }


def judged(report: Mapping[str, object]) -> Verdict:
    """The head of the page, with what pruning is worth where unpruned networks were timed beside."""
    sentence = worth(points_of(report), score_of(report)[1])
    return verdict(report, "" if sentence == NOBODY else sentence)


def _devices(facts: Mapping[str, Any]) -> list[str]:
    return [device.get("name") for device in facts.get("devices") or []]


def _pictures(report: Mapping[str, object], root: Path) -> object:
    found = panels(report, root)
    return found if found.rows else None


def _widths(report: Mapping[str, Any]) -> dict[str, object] | None:
    groups = report.get("groups", [])
    if not groups:
        return None
    before, after = sum(g["before"] for g in groups), sum(g["after"] for g in groups)
    return {
        "groups": [{**group, "share": 100 * group["after"] / group["before"]} for group in groups],
        "before": before,
        "after": after,
        "share": 100 * after / before,
        "least": min(groups, key=lambda group: group["after"] / group["before"]),
    }


def _latency(report: Mapping[str, Any]) -> dict[str, object] | None:
    """Bars to the median with a line to p99, and where the time of the whole way goes."""
    bars, bench = _latency_bars(report), report.get("bench", {})
    stages = None if bench.get("noise") else _stages(bench)
    return {"bars": bars, "stages": stages} if bars or stages else None


def _built(report: Mapping[str, Any]) -> list[dict[str, object]]:
    """Rows of engines that were built for GPUs elsewhere."""
    rows = []
    for row in report.get("built", []):
        layers, targets = row.get("layers") or {}, gpus(row.get("targets") or [])
        made = " ".join(filter(None, (row["runtime"], row.get("version"))))
        rows.append(
            {
                "name": f"{row['name']} {row['precision']}",
                "int8": row["precision"] == "int8",
                "where": f"{made}, for {targets}",
                "layers": layers.get("total", ""),
                "kinds": ", ".join(f"{count} {kind}" for kind, count in layers.items() if kind != "total"),
                "size": number(row["size_mib"], 2) if row.get("size_mib") is not None else "",
                "sentence": row["sentence"].partition("; ")[2] if row["passed"] else row["sentence"],
                "word": "as asked" if row["passed"] else "failed",
                "tone": "good" if row["passed"] else "bad",
            }
        )
    return rows


def _stages(bench: Mapping[str, object]) -> dict[str, object] | None:
    parts = [bench, *(value for value in bench.values() if isinstance(value, Mapping))]
    sessions = {name: row for part in parts for name, row in (part.get("sessions") or {}).items()}
    timed = {name: row["stages_ms_p50"] for name, row in sessions.items() if row.get("stages_ms_p50")}
    if not timed:
        return None
    names = list(dict.fromkeys(stage for stages in timed.values() for stage in stages))
    top = max(sum(stages.values()) for stages in timed.values()) or 1
    rows = [
        {
            "name": title(name),
            "total": sessions[name].get("latency_ms_p50") or sum(stages.values()),
            "parts": [(n, names.index(n), ms, 100 * ms / top) for n, ms in stages.items()],
        }
        for name, stages in timed.items()
    ]
    return {"names": list(enumerate(names)), "rows": rows}


def _latency_bars(report: Mapping[str, Any]) -> list[dict[str, object]]:
    rows = [row for row in report.get("rows", []) if row.get("latency_ms_p50") is not None]
    top = max((row.get("latency_ms_p99") or row["latency_ms_p50"] for row in rows), default=0)
    return [
        {
            "name": title(row["name"]),
            "kind": kind_of(row["name"]),
            "p50": row["latency_ms_p50"],
            "p99": row.get("latency_ms_p99"),
            "fps": row.get("fps"),
            "to_p50": 100 * row["latency_ms_p50"] / top,
            "to_p99": 100 * (row.get("latency_ms_p99") or row["latency_ms_p50"]) / top,
        }
        for row in rows
    ]


def _blocks(report: Mapping[str, Any], *keys: str) -> list[dict[str, object]]:
    titles = {"checks": "Pruning checks", "gate": "Accuracy gate"}
    judged = {"checks", "gate"}
    gate = report.get("gate", {})
    if gates(report):  # a section of their own
        keys = tuple(key for key in keys if key != "gate")
    elif gate.get("checks"):  # the rest repeats one of them
        report = {**report, "gate": {key: gate[key] for key in ("passed", "checks") if key in gate}}
    if report.get("bench", {}).get("noise"):  # times that are no result; report.json keeps them
        keys = tuple(key for key in keys if key != "bench")
    parts = {key: _without(report[key], _REPEATED.get(key, set())) for key in keys if report.get(key)}
    return [block(part, titles.get(key, key.capitalize()), judge=key in judged) for key, part in parts.items()]


def _without(data: object, keys: set[str]) -> Any:
    """The facts without what the page says elsewhere; report.json keeps all of it."""
    if isinstance(data, list):
        return [_without(item, keys) for item in data]
    if not isinstance(data, Mapping):
        return data
    return {key: _without(value, keys) for key, value in data.items() if key not in keys}


def _reproduce(report: Mapping[str, object]) -> dict[str, object] | None:
    command = report.get("command")
    found = {
        "command": shlex.join(command) if isinstance(command, list) else command,
        "inputs": report.get("inputs", {}),
        "blocks": _blocks(report, "recipe", "environment"),
    }
    return found if any(found.values()) else None
