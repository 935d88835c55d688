"""The report of a run: its head, and rows, curves and details of what the steps found; also of a run that failed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vss import ops
from vss.core.environment import environment
from vss.core.errors import GateFailed, VssError
from vss.core.files import sha256_artefact, sha256_file
from vss.core.report import read_report, write_report
from vss.run.page import write_page
from vss.run.project import Workspace
from vss.run.pruning import Pruned
from vss.run.runner import Json, StepResult
from vss.train.tasks.base import UNPRUNED

PLAN_FACTS = ("criterion", "options", "budget", "calibration", "labels", "kept")
TITLES = {"baseline": "engine baseline", "finetuned": "engine pruned"}
"""Network -> the row of its engine."""


@dataclass(frozen=True, kw_only=True)
class Fit(StepResult):
    """A training; `curves` alone of a network that was taken from a checkpoint."""

    curves: list[Json]
    best_epoch: int | None = None
    best_score: float | None = None
    metric: str | None = None
    steps: int | None = None
    epochs: int | None = None
    precision: str | None = None


@dataclass(frozen=True, kw_only=True)
class Score(StepResult):
    """A network in torch: the static half of its row, and its metrics."""

    row: Json
    metrics: Json


@dataclass(frozen=True, kw_only=True)
class Engine(StepResult):
    """An engine: how it was exported and built, its metrics, what its runtime says of it."""

    export: Json
    metrics: Json
    artefact: Json
    size_mib: float
    inspector: Json | None = None


@dataclass(frozen=True, kw_only=True)
class Beside(StepResult):
    """Engines of one network that were built and not run; `rows` as `vss.core.report.Built`."""

    rows: list[Json]
    files: list[str]


@dataclass(frozen=True, kw_only=True)
class Timing(StepResult):
    """Engines in one interleaved run: alone and end to end; `noise` says why the times are no result."""

    engine: Json
    end_to_end: Json
    noise: str | None
    again: bool = False


@dataclass(frozen=True, kw_only=True)
class Pictures(StepResult):
    files: list[str]
    panels: list[Json]
    defects: list[Json] | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the steps of a run found; `references`, unpruned networks by title; `typed` as of `typed_engines`."""

    train: Fit
    pruned: Pruned
    finetuned: Fit
    control: Fit | None
    scores: Mapping[str, Score]
    engines: Mapping[str, Engine]
    gates: Json
    timing: Timing
    pictures: Pictures
    references: Mapping[str, tuple[Score, Engine]]
    typed: Json
    beside: list[Beside]


def make_report(work: Workspace, found: Found) -> Json:
    pruned, timing, pictures = found.pruned, found.timing, found.pictures
    scores = {**found.scores, **{title: score for title, (score, _) in found.references.items()}}
    engines = {TITLES[name]: engine for name, engine in found.engines.items()}
    engines |= {title: engine for title, (_, engine) in found.references.items()}
    metrics = {name: score.metrics for name, score in scores.items()}
    metrics |= {title: engine.metrics for title, engine in engines.items()}
    report = frame(work, "ok") | {
        "rows": _rows(work, found),
        "curves": _curves(found),
        "groups": [{"id": g, "before": before, "after": after} for g, (before, after) in pruned.widths.items()],
        "locked": pruned.locked,
        "classes": list(work.project.data.class_names),
        "palette": work.project.data.palette.tolist(),
        **work.project.task.report(metrics),
        **work.project.task.details(_by_image(work, found)),
        "panels": pictures.panels,
        **({} if pictures.defects is None else {"defects": pictures.defects}),
        "checks": pruned.checks,
        "bench": {"engine": timing.engine, "end_to_end": timing.end_to_end, "noise": timing.noise},
        "gate": found.gates,
        "plan": {key: getattr(pruned, key) for key in PLAN_FACTS}
        | {key: value for key, value in pruned.phase.items() if key not in ("curves", "labels")},
        "export": {title: engine.export for title, engine in engines.items()},
        "inspector": {title: engine.inspector for title, engine in engines.items() if engine.inspector},
        "artefacts": {title: sha256_artefact(work.out, engine.artefact) for title, engine in engines.items()},
    }
    built = [row for each in found.beside for row in each.rows]
    report |= {"built": built} if built else {}
    _add_precisions(report, found.typed, work)
    return report


def _by_image(work: Workspace, found: Found) -> dict[str, Json]:
    """Row -> scores with the figures by image: before pruning, the control where there is one, the pruned engine."""
    sources = {name: f"evaluate-{name}" for name in UNPRUNED if name in found.scores}
    sources["engine pruned"] = "engine-finetuned"
    return {name: work.scores_of(step) for name, step in sources.items()}


def _rows(work: Workspace, found: Found) -> list[Json]:
    keys, labels = work.project.task.row_keys, {"labels": "; ".join(found.pruned.labels)} if found.pruned.labels else {}
    rows = []
    for name, score in found.scores.items():
        cut = labels if name in ("pruned", "finetuned") else {}
        rows.append(_row(name, score.row, score.metrics, keys) | cut)
    for name, title in TITLES.items():
        timed, engine = _times(found.timing, title), found.engines[name]
        static = found.scores[name].row | {"size_mib": engine.size_mib}
        if title == "engine pruned" and "speedup" in timed:
            ratio = found.scores["baseline"].row["macs_g"] / static["macs_g"]
            timed["speedup_per_mac_reduction"] = timed["speedup"] / ratio
        cut = labels if title == "engine pruned" else {}
        rows.append(_row(title, static, engine.metrics, keys) | timed | cut)
    for title, (score, engine) in found.references.items():
        row = _row(title, score.row | {"size_mib": engine.size_mib}, engine.metrics, keys)
        row["labels"] = "not pruned, trained and fine-tuned as long, on the engine"
        rows.append(row | _times(found.timing, title))
    return rows


def _row(name: str, static: Json, metrics: Json, keys: Iterable[str]) -> Json:
    return static | {"name": name} | {key: metrics[key] for key in keys}


def _curves(found: Found) -> Json:
    curves = {"train": found.train.curves, "sparse": found.pruned.phase.get("curves", [])}
    curves |= {"finetune": found.finetuned.curves, "control": found.control.curves if found.control else []}
    return {name: rows for name, rows in curves.items() if rows}


def _times(timing: Timing, name: str) -> Json:
    """Times of a row; those of a noisy machine are left out, the report's `bench` has them."""
    engine, whole = timing.engine, timing.end_to_end
    end_to_end = {"end_to_end_ms_p50": whole["sessions"][name]["latency_ms_p50"]} if whole["stable"] else {}
    return (_engine_times(engine, name) if engine["stable"] else {}) | end_to_end


def _engine_times(timing: Mapping[str, Any], name: str) -> Json:
    session = timing["sessions"][name]
    return {
        **{key: session[key] for key in ("latency_ms_p50", "latency_ms_p90", "latency_ms_p99")},
        "fps": session["throughput_fps"],
        "speedup": timing["speedup"].get(name, {"ratio": 1.0})["ratio"],
    }


def _add_precisions(report: Json, typed: Json, work: Workspace) -> None:
    """Rows, exports, artefacts and choices of the other precisions and runtimes."""
    if not typed:
        return
    rows = {row["name"]: row for row in report["rows"]}
    for title, net in typed["nets"].items():
        for kind, facts in net["kinds"].items():
            name = f"{title} {kind}"
            row = _precision_row(name, rows[title], facts, typed["bench"])
            why = net["choice"]["why"]
            row["labels"] = "kept" if net["choice"]["chosen"] == kind else f"not kept: {why[kind]}"
            report["rows"].append(row)
            report["export"][name] = facts["export"]
            report["artefacts"][name] = sha256_artefact(work.out, facts["artefact"])
    left_out = ("detail", "again")
    report["bench"]["precision"] = {key: value for key, value in typed["bench"].items() if key not in left_out}
    report["precision"] = {
        title: {"choice": net["choice"]}
        | {kind: {k: facts[k] for k in ("gate", "search") if k in facts} for kind, facts in net["kinds"].items()}
        for title, net in typed["nets"].items()
    }


def _precision_row(name: str, plain: Json, facts: Json, timing: Json) -> Json:
    """A row like that of the float32 engine, with this file's figures; all times are of one run."""
    row = {key: value for key, value in plain.items() if key in ("params_m", "macs_g")}
    row |= {"name": name} | {key: facts["metrics"][key] for key in plain if key in facts["metrics"]}
    row["size_mib"] = facts["size_mib"]
    if timing["stable"]:
        row |= _engine_times(timing, name)
    return row


def frame(work: Workspace, status: str) -> Json:
    """Everything of a report but its results; `status` is "ok" or "failed"."""
    preprocess, task = work.project.preprocess, work.project.task
    files = ("baseline.safetensors", "plan.json", "finetuned.safetensors", "engine/finetuned.onnx")
    hashes = {name: sha256_file(work.out / name) for name in files if (work.out / name).is_file()}
    hashes["preprocess"] = preprocess.sha256
    size = "x".join(map(str, preprocess.size))
    notes = "".join(f" {note}." for note in (*limit_note(work), *task.notes))
    return {
        "kind": "vss.report",
        "schema": 1,
        "name": work.recipe.name,
        "status": status,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": sum(record["seconds"] for record in work.step.records),
        "command": work.command or None,
        "protocol": f"{task.protocol.rstrip('.')}. Reported split: {work.recipe.split}; resolution {size}.{notes}",
        "environment": environment() | {"ops": ops.status()},
        "recipe": work.recipe.model_dump(mode="json"),
        "inputs": hashes,
        "steps": work.step.records,
    }


def limit_note(work: Workspace) -> list[str]:
    """What `data.limit` left out, for whoever reads how many images a split has."""
    limit = work.recipe.data.limit
    if limit is None:
        return []
    splits = work.project.data.splits.items()
    used = ", ".join(f"{min(limit, len(pairs))} of {len(pairs)} {name}" for name, pairs in splits)
    return [f"data.limit {limit}: {used} images were used, evenly spread"]


def write_failed(work: Workspace, error: BaseException) -> None:
    """A report of what was done before the failure, so that the page says where it stopped.

    That of a finished run stays: it is replaced by a finished one alone.
    """
    stopped = isinstance(error, BrokenPipeError | GateFailed) or not isinstance(error, Exception)  # nothing failed
    if work.step.records and not stopped and not _finished(work):
        write_both(work, frame(work, "failed"))


def write_both(work: Workspace, report: Json) -> None:
    write_report(work.out / "report.json", report)
    write_page(work.out / "report.json", work.out / "report.html")


def _finished(work: Workspace) -> bool:
    try:
        return bool(read_report(work.out / "report.json")["status"] == "ok")
    except VssError:
        return False
