"""The figures of a report or of a sweep in TensorBoard and MLflow, beside the curves that every fit writes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vss.core.errors import need

TENSORBOARD, MLFLOW = "tensorboard", "mlflow"


class Tracked(NamedTuple):
    """One run of an experiment; `id` is its own for ever."""

    id: str
    params: Mapping[str, object]
    figures: Mapping[str, float]
    files: Sequence[Path] = ()


def figures_of(report: Mapping[str, Any]) -> dict[str, float]:
    """Every number of the rows, the IoU of every class, and what the gates compared, by names with slashes.

    >>> figures_of({"rows": [{"name": "engine pruned", "miou_pct": 50.0, "labels": "x"}]})
    {'engine pruned/miou_pct': 50.0}
    """
    found = {f"{row['name']}/{key}": value for row in report.get("rows", []) for key, value in row.items()}
    for name, values in report.get("iou_pct", {}).items():
        found |= {f"iou_pct/{name}/{each}": v for each, v in zip(report["classes"], values, strict=True)}
    for name, spans in report.get("class_drops", {}).items():
        for each, span in zip(report["classes"], spans, strict=True):
            sides = zip(("low", "high"), span or (), strict=False)
            found |= {f"class_drop/{name}/{each}/{side}": value for side, value in sides}
    for check in report.get("gate", {}).get("checks", []):
        span = check.get("drop_interval") or (None, None)
        found |= {f"gate/{check['what']}/drop": check["drop"], f"gate/{check['what']}/passed": check["passed"]}
        found |= {f"gate/{check['what']}/drop_{side}": v for side, v in zip(("low", "high"), span, strict=True)}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def track(report: Mapping[str, Any], out: Path, kinds: Iterable[str]) -> None:
    """Write the figures of a report into `out/tensorboard` or, with the report and its page, into `out/mlruns`."""
    found = figures_of(report)
    if TENSORBOARD in kinds:
        to_tensorboard(out, found)
    if MLFLOW in kinds:
        model, prune = (report.get("recipe", {}).get(section, {}) for section in ("model", "prune"))
        params = {"model": model.get("name"), "criterion": prune.get("criterion"), "budget": prune.get("budget")}
        params["seed"] = report.get("recipe", {}).get("seed")
        files = [out / name for name in ("report.json", "report.html")]
        to_mlflow(out / "mlruns", report["name"], [Tracked("run", params, found, files)])


def to_tensorboard(folder: Path, figures: Mapping[str, object]) -> None:
    """Numbers as scalars in `folder/tensorboard`; older ones go."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for key, value in figures.items():
            if isinstance(value, int | float):
                writer.add_scalar(key, value)


def to_mlflow(folder: Path, experiment: str, runs: Iterable[Tracked]) -> None:
    """Write runs into the folder of an MLflow store; one that is there with the same figures is left alone."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = need("mlflow.tracking", "tracking by MLflow").MlflowClient(tracking_uri=folder.resolve().as_uri())
    found = client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else client.create_experiment(experiment)
    known = {run.data.tags.get("vss.cell"): run for run in client.search_runs([number], max_results=10_000)}
    for each in runs:
        metrics = {re.sub(r"[^\w.\-/ ]", "_", name): float(value) for name, value in each.figures.items()}
        old = known.get(each.id)
        if old is not None and old.data.metrics == metrics:
            continue
        if old is not None:
            client.delete_run(old.info.run_id)
        run = client.create_run(number, run_name=each.id, tags={"vss.cell": each.id})
        for name, value in each.params.items():
            client.log_param(run.info.run_id, name, value)
        for name, value in metrics.items():
            client.log_metric(run.info.run_id, name, value)
        for file in each.files:
            client.log_artifact(run.info.run_id, str(file))
        client.set_terminated(run.info.run_id)
