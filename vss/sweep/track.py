"""Where sweeps are followed: TensorBoard always, MLflow (its local file store) by option."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vss.core.errors import VssError
from vss.sweep.store import Store
from vss.sweep.study import Json


def to_tensorboard(folder: Path, row: Json) -> None:
    """The figures of a cell as scalars in `folder/tensorboard`, beside the curves of its fits; older ones go."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for key, value in row.items():
            if isinstance(value, int | float):
                writer.add_scalar(f"cell/{key}", value)


def to_mlflow(store: Store, table: Json) -> None:
    """Write runs into `mlruns` below the sweep's folder; a cell that is there with the same figures is left alone."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        from mlflow.tracking import MlflowClient
    except ModuleNotFoundError as error:
        raise VssError("--mlflow needs MLflow; install it with: pip install 'vss[mlflow]'") from error
    client = MlflowClient(tracking_uri=(store.root / "mlruns").resolve().as_uri())
    found = client.get_experiment_by_name(table["name"])
    experiment = found.experiment_id if found else client.create_experiment(table["name"])
    known = {run.data.tags.get("vss.cell"): run for run in client.search_runs([experiment], max_results=10_000)}
    for row in table["rows"]:
        metrics = {key: float(value) for key, value in row["values"].items() if isinstance(value, int | float)}
        old = known.get(row["id"])
        if row["status"] != "ok" or (old is not None and old.data.metrics == metrics):
            continue
        if old is not None:
            client.delete_run(old.info.run_id)
        run = client.create_run(experiment, run_name=row["id"], tags={"vss.cell": row["id"]})
        for axis, value in row["coords"].items():
            client.log_param(run.info.run_id, axis, value)
        for key, value in metrics.items():
            client.log_metric(run.info.run_id, key, value)
        client.set_terminated(run.info.run_id)
