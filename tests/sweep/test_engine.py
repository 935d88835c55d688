"""The engine study on a tiny defect set: shared parts once, engines gated and timed, table and picture on disk."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vss.data import write_defects
from vss.run.report import Engine
from vss.sweep import Grid, Store, TrialDirs, sweep
from vss.sweep.compare import read_results
from vss.sweep.prune import EngineExperiment, job_of
from vss.train import checkpoint

from .conftest import Here

FIT = {"batch_size": 4, "lr": 0.02, "precision": "32-true", "accelerator": "cpu", "epochs": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """naive_fn at two ratios, one seed."""
    folder = tmp_path_factory.mktemp("engine")
    root = write_defects(folder / "data", seed=2, counts={"train": 30, "test": 12}, size=(128, 64), positives=1 / 3)
    base: dict[str, Any] = {
        "data": {"dataset": "ksdd2", "root": str(root), "size": [128, 64], "augment": {"hflip": 0.5}},
        "model": {"name": "segdecnet", "options": {"widths": [4, 6, 6, 6, 10]}},
        "train": FIT,
        "finetune": FIT,
        "defect": {"dilate": 3},
        "sparse": {"epochs": 1},
        "prune": {"criterion": "fn", "batches": 2, "batch_size": 4, "keep": ["seg_mask", "extractor", "fc"],
                  "budget": {"kind": "channels", "scope": "local"}},
        "bench": {"spread": 50},
        "gate": {"max_fnr_increase": 100, "max_ap_drop": 100, "max_drop": 1, "max_drop_from_baseline": 100},
    }  # fmt: skip
    budgets = [{"name": f"r{r}", "set": {"prune.budget.keep": 1 - r / 100}} for r in (20, 50)]
    criteria = [{"name": "naive_fn", "set": {"prune.criterion": "fn"}}]
    content = {"name": "tiny", "study": "engine", "base": base, "criteria": criteria, "budgets": budgets, "seeds": [0]}
    grid = Grid.model_validate(content | {"latency_seconds": 0.1, "panels": 0})
    summary = sweep(grid, folder / "out", settings=Here(retries=0))
    assert summary.failed == {} and summary.ok == 2
    return Store.read(folder / "out")


def test_what_cells_share_is_computed_once(finished: Store) -> None:
    names = [line["step"] for line in finished.computed()]
    for step in ("train", "control", "engine-baseline", "evaluate-control"):
        assert names.count(step) == 1, step
    assert names.count("engine-finetuned") == names.count("prune") == 2 and finished.repeated() == []
    (share,) = {finished.stage_of(cell) for cell in finished.trials()}
    assert len(list((finished.root / "shared" / share / "sparse").glob("*/best.safetensors"))) == 1
    sparse = {
        checkpoint.read(finished.folder(cell.id) / "sparse.safetensors").weights_sha256 for cell in finished.trials()
    }
    assert len(sparse) == 1


def test_rows_have_engines_controls_verdicts_and_latencies(finished: Store) -> None:
    rows = [(finished.record(cell.id) or {})["row"] for cell in finished.trials()]
    shared = finished.shared(finished.stage_of(finished.trials()[0]))
    assert 0 <= shared["row"]["control_ap_pct"] <= 100
    for row in rows:
        assert row["engine_ap_pct"] == pytest.approx(row["ap_pct"], abs=1e-6) and row["ships"] == 1
        assert row["latency_ms_p50"] > 0 and row["speedup"] > 0 and row["engine_fnr_pct"] == row["fnr_pct"]
    assert rows[1]["macs_kept"] < rows[0]["macs_kept"] < 1


def test_a_gate_that_fails_is_a_label_and_ships_nothing(finished: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = finished.trials()[0]
    place = TrialDirs(finished.folder(cell.id), finished.root / "shared" / finished.stage_of(cell), lambda *_: None)
    job = job_of(cell.recipe(), place)
    job.step.keys |= dict.fromkeys(("finetune", "evaluate-finetuned"), "of before")
    shared = finished.shared(finished.stage_of(cell))

    class Strict(type(job.project.task)):  # type: ignore[misc]
        def verdicts(self, results: Any) -> list[dict[str, Any]]:
            assert set(results) == {"finetuned", "engine", "baseline", "control"}
            assert all(self.per_image in result for result in results.values())
            given: list[Any] = [("equal", True, "good"), ("lost", False, "worse"), ("open", None, "no limit")]
            return [{"what": what, "passed": passed, "sentence": sentence} for what, passed, sentence in given]

    job.project.__dict__["task"] = Strict(job.project.recipe, job.project.data, job.project.preprocess)
    found: dict[str, Any] = {"row": {}, "labels": ["first"]}
    record = (place.folder / "steps" / "engine-finetuned.json").read_text()
    stored = Engine.of(job.step.result("engine-finetuned"))
    monkeypatch.setattr("vss.sweep.prune.make_engine", lambda *_: stored)
    EngineExperiment().finish_trial(job, place, shared, found)
    assert found["row"]["ships"] == 0 and found["labels"] == ["first", "lost worse"]
    assert (place.folder / "steps" / "engine-finetuned.json").read_text() == record


def test_table_and_picture(finished: Store) -> None:
    with (finished.root / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["baseline", "naive_fn · r20", "naive_fn · r50"]
    assert rows[1]["criterion"] == "naive_fn" and rows[1]["budget"] == "r20" and rows[0]["sparsity_pct"] == "0.0"
    data = read_results(finished.root)
    for row, group in zip(rows[1:], data["groups"], strict=True):
        values = group["values"]
        assert float(row["ap_pct"]) == values["ap_pct"]["mean"] and row["seeds"] == "1"
        assert float(row["sparsity_pct"]) == pytest.approx(100 * (1 - values["params_kept"]["mean"]))
        for key in ("macs_g", "params_m", "recall_pct", "f1_pct", "fnr_pct", "latency_ms_p50", "fps", "engine_ap_pct"):
            assert float(row[key]) == values[key]["mean"], key
    picture = np.asarray(Image.open(finished.root / "chart.png").convert("L"))
    assert picture.shape[0] == 1200 and 0.02 < (picture < 200).mean() < 0.6


def test_again_nothing_is_computed(finished: Store) -> None:
    before = len(finished.computed())
    summary = sweep(finished.grid, finished.root, settings=Here())
    assert (summary.ok, summary.skipped) == (0, 2) and len(finished.computed()) == before
