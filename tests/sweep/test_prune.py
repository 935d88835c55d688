"""The pruning study: a sweep gives what single runs give, shares what can be shared and computes nothing twice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.prune import Plan, count
from vss.run import pruning
from vss.run.project import Project
from vss.sweep import Grid, Settings, Store, sweep
from vss.sweep.grid import benchmark_grid, finetune_grid
from vss.sweep.prune import EngineExperiment, PruneExperiment
from vss.sweep.run import checked, named
from vss.train import checkpoint

from .conftest import Here

FIT = {"batch_size": 4, "precision": "32-true", "accelerator": "cpu"}


def grid(root: Path, **more: Any) -> Grid:
    base = {
        "data": {"dataset": "camvid", "root": str(root), "size": [48, 64], "augment": {"scale": [1, 1]}},
        "model": {"name": "unet", "options": {"width": 8, "depth": 2}},
        "train": FIT | {"epochs": 1, "lr": 0.05},
        "prune": {"batches": 3, "batch_size": 4, "recalibrate": 2},
        "finetune": FIT | {"epochs": 1, "lr": 0.02},
        "bench": {"spread": 50},
    }
    content = {"name": "t", "base": base, "budgets": [0.5], "seeds": [0], "latency_seconds": 0.1, "panels": 1}
    return Grid.model_validate(content | more)


@pytest.fixture(scope="module")
def finished(street_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("sweep")
    chosen = grid(street_root, criteria=["l1", "taylor", "sirfp", "dmcp"])
    summary = sweep(chosen, out, settings=Settings(workers=1, threads=1, retries=0))
    assert list(summary.failed) == ["dmcp--macs_0.5--0"] and summary.ok == 3
    assert "dmcp" in summary.failed["dmcp--macs_0.5--0"]
    return Store.read(out)


def test_baseline_and_calibration_are_computed_once(finished: Store) -> None:
    names = [line["step"] for line in finished.computed()]
    assert names.count("train") == names.count("evaluate-baseline") == 1
    assert len([name for name in names if name.startswith("statistics-")]) == 1
    assert names.count("prune") == names.count("finetune") == 3
    assert finished.repeated() == []


@pytest.mark.parametrize("criterion", ["l1", "taylor", "sirfp"])
def test_the_shared_pass_gives_the_plan_of_a_single_run(finished: Store, criterion: str, tmp_path: Path) -> None:
    cell = next(c for c in finished.trials() if c.coords["criterion"] == criterion)
    share = finished.root / "shared" / finished.stage_of(cell)
    model = checkpoint.load(share / "baseline.safetensors")
    project = Project.open(cell.recipe())
    pruning.prune(project, model, cell.recipe().prune, tmp_path, progress=False)
    assert Plan.load(tmp_path / "plan.json") == Plan.load(finished.folder(cell.id) / "plan.json")
    record = finished.record(cell.id)
    assert record is not None
    small = checkpoint.load(finished.folder(cell.id) / "finetuned.safetensors")
    score = project.score_net(small)
    assert record["row"]["miou_pct"] == pytest.approx(score["miou_pct"], abs=1e-9)
    assert record["row"]["macs_g"] == count(small, (48, 64))["macs_g"]
    assert 0.4 < record["row"]["macs_kept"] <= 0.5


def test_finetune_batch_keeps_the_plans_and_redoes_the_fine_tuning(finished: Store) -> None:
    before = finished.computed()
    again = finetune_grid(finished.grid, {"finetune.epochs": 2})
    sweep(again, finished.root, settings=Here(retries=0), extend=True)
    new = [line["step"] for line in finished.computed() if line not in before]
    assert sorted(new) == ["evaluate-finetuned"] * 3 + ["finetune"] * 3
    assert finished.repeated() == []


def test_benchmark_of_a_run_folder(finished: Store, street_root: Path, tmp_path: Path) -> None:
    cell = finished.trials()[0]
    baseline = finished.root / "shared" / finished.stage_of(cell)
    changes = {"data.root": str(street_root), "finetune.epochs": 0, "prune.recalibrate": 2, "prune.batches": 2}
    changes["bench.spread"] = 50
    chosen = benchmark_grid("b", baseline, ["random"], ["macs:0.7", "macs:0.5"], 2, changes)
    chosen = chosen.model_copy(update={"latency_seconds": 0.1, "panels": 1})
    summary = sweep(chosen, tmp_path / "b", settings=Here())
    store = Store.read(tmp_path / "b")
    records = [store.record(cell.id) for cell in store.trials()]
    assert summary.ok == 4 and all(r is not None and r["stage"] == "pruned" for r in records)
    kept = sorted(r["row"]["macs_kept"] for r in records if r)
    assert all(0.4 < k <= 0.5 for k in kept[:2]) and all(0.6 < k <= 0.7 for k in kept[2:])
    own = Project.open(cell.recipe())
    expected = own.score_net(checkpoint.load(baseline / "baseline.safetensors"))["miou_pct"]
    assert store.shared(store.stage_of(store.trials()[0]))["row"]["miou_pct"] == pytest.approx(expected, abs=1e-9)


def test_what_a_run_refuses_is_refused_before_the_first_training(street_root: Path, tmp_path: Path) -> None:
    void = tmp_path / "void"
    shutil.copytree(street_root, void)
    for path in (void / "testannot").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), 11)).save(path)
    chosen = grid(void, criteria=["l1", "taylor"], budgets=[0.5, 0.4])
    with pytest.raises(VssError, match=r"no trial of the sweep can be run: .*test.*void"):
        sweep(chosen, tmp_path / "out", settings=Settings(workers=1, threads=1))
    assert not (tmp_path / "out").exists()

    changes = {
        "good": {}, "size": {"data.size": [50, 64]}, "keep": {"prune.keep": ["nope"]}, "metric": {"gate.metric": "no"},
        "epochs": {"finetune.epochs": 0}, "batch": {"finetune.batch_size": 64},
    }  # fmt: skip
    variants = [{"name": name, "set": change} for name, change in changes.items()]
    opened: list[str] = []

    class Counted(PruneExperiment):
        def preflight(self, recipe: Recipe, *, here: bool) -> None:
            opened.append(recipe.name)
            super().preflight(recipe, here=here)

    cells = grid(street_root, criteria=["l1", "taylor"], variants=variants).trials()
    faults = {cell.id: cell.fault for cell in checked(cells, Counted(), here=True)}
    assert len(cells) == 12 and len(opened) == 6
    assert {name.split("--")[-1] for name, fault in faults.items() if not fault} == {"good", "epochs", "batch"}
    for name, words in {
        "size": "multiples of 4",
        "keep": "nope",
        "metric": "gate.metric",
    }.items():
        assert all(words in faults[cell.id] for cell in cells if cell.coords["variant"] == name)


def test_a_scope_that_a_criterion_cannot_have_is_named_without_any_data() -> None:
    variants = [{"name": scope, "set": {"prune.budget.scope": scope}} for scope in ("local", "isomorphic", "auto")]
    cells = grid(Path("no data"), criteria=["l1", "dcfp"], variants=variants).trials()
    faults = {cell.id: cell.fault for cell in named(cells, PruneExperiment())}
    assert [name for name, fault in faults.items() if fault] == [
        f"dcfp--macs_0.5--0--{scope}" for scope in ("local", "isomorphic")
    ]
    assert "prune.budget.scope is local, which criterion 'dcfp' cannot have" in faults["dcfp--macs_0.5--0--local"]


def test_engines_of_a_sweep_are_of_one_runtime() -> None:
    recipe = Recipe.model_validate({"build": {"backend": "auto"}, "finetune": {"epochs": 1}})
    PruneExperiment().check(recipe)
    with pytest.raises(VssError, match=r"build\.backend is auto, and engines of a sweep .* one runtime; name it"):
        EngineExperiment().check(recipe)
