"""TensorBoard and MLflow hold the figures of the cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vss.run.tracking import figures_of, to_tensorboard, track
from vss.sweep import Grid, Settings, Store, sweep

from .conftest import dry_grid


def test_tensorboard_has_the_last_figures_alone(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for score in (1.0, 2.5):
        to_tensorboard(tmp_path, {"cell/score": score, "note": "text"})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["cell/score"]
    assert [event.value for event in events.Scalars("cell/score")] == [2.5]


def test_mlflow_has_a_run_a_cell_and_repeats_none(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="needs MLflow: pip install 'vss[mlflow]'")
    from mlflow.tracking import MlflowClient

    grid = Grid.model_validate(dry_grid({"a": {}, "bad": {"fails": 9}}, seeds=2))
    for _ in range(2):
        sweep(grid, tmp_path / "s", settings=Settings(workers=1, threads=1, retries=0), mlflow=True)
    client = MlflowClient(tracking_uri=(tmp_path / "s" / "mlruns").as_uri())
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    found = {run.data.tags["vss.cell"]: (run.data.metrics["score"], run.data.params) for run in runs}
    assert found == {"0--a": (5.0, {"seed": "0", "variant": "a"}), "1--a": (6.0, {"seed": "1", "variant": "a"})}
    assert len(runs) == 2 and Store.read(tmp_path / "s").repeated() == []


REPORT: dict[str, Any] = {
    "name": "street", "classes": ["car", "<a&b>"], "iou_pct": {"baseline": [50.0, None]}, "recipe": {"seed": 3},
    "rows": [{"name": "engine pruned", "miou_pct": 48.5, "labels": "cut"}],
    "class_drops": {"baseline": [[0.5, 1.5], None]},
    "gate": {"checks": [{"what": "pruned against baseline", "drop": 1.0, "passed": True, "drop_interval": [0.5, 1.5]}]},
}  # fmt: skip
WANTED = {
    "engine pruned/miou_pct": 48.5, "iou_pct/baseline/car": 50.0, "class_drop/baseline/car/low": 0.5,
    "class_drop/baseline/car/high": 1.5, "gate/pruned against baseline/drop": 1.0,
    "gate/pruned against baseline/passed": 1.0, "gate/pruned against baseline/drop_low": 0.5,
    "gate/pruned against baseline/drop_high": 1.5,
}  # fmt: skip


def test_a_run_tracks_the_figures_of_its_report(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert figures_of(REPORT) == WANTED
    track(REPORT, tmp_path, ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == WANTED
    assert not (tmp_path / "mlruns").exists()
    pytest.importorskip("mlflow", reason="needs MLflow: pip install 'vss[mlflow]'")
    from mlflow.tracking import MlflowClient

    for name in ("report.json", "report.html"):
        (tmp_path / name).write_text(name)
    for _ in range(2):
        track(REPORT, tmp_path, ["mlflow"])
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.data.metrics == WANTED and run.data.params["seed"] == "3"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"report.json", "report.html"}
