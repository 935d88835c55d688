"""TensorBoard and MLflow hold the figures of the cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from vss.sweep import Grid, Settings, Store, sweep
from vss.sweep.results import to_tensorboard

from .conftest import dry_grid


def test_tensorboard_has_the_last_figures_alone(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for score in (1.0, 2.5):
        to_tensorboard(tmp_path, {"score": score, "note": "text"})
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
