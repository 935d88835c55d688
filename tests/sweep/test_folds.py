"""Cross-validation as an axis of a sweep: parts of the data, trials put together, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vss.core.config import DataOptions, Recipe
from vss.core.errors import VssError
from vss.data import labels_of, open_data, write_defects
from vss.run.page.sweep import folds, headline
from vss.run.project import Project
from vss.sweep import Grid, Store, sweep
from vss.sweep.compare import read_results
from vss.sweep.results import over_folds

from .conftest import Here

FIT = {"batch_size": 4, "lr": 0.02, "precision": "32-true", "accelerator": "cpu", "epochs": 1}


def base(root: Path) -> dict[str, Any]:
    return {
        "data": {"dataset": "ksdd2", "root": str(root), "size": [128, 64], "augment": {"hflip": 0.5}},
        "model": {"name": "segdecnet", "options": {"widths": [4, 6, 6, 6, 10]}},
        "train": FIT,
        "finetune": FIT | {"epochs": 0},
        "defect": {"dilate": 3},
        "prune": {"criterion": "l1", "recalibrate": 0, "keep": ["seg_mask", "extractor", "fc"]},
        "gate": {"max_fnr_increase": 100, "max_ap_drop": 3},
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folds")
    return write_defects(folder, seed=3, counts={"train": 33, "test": 8}, size=(128, 64), positives=1 / 3)


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("sweep") / "out"
    grid = Grid.model_validate({"name": "cv", "base": base(root), "criteria": ["l1"], "folds": 3, "panels": 0,
                                "latency_seconds": 0})  # fmt: skip
    summary = sweep(grid, out, settings=Here())
    assert summary.failed == {} and summary.ok == 3
    return Store.read(out)


def test_every_image_is_validated_once_and_defects_are_spread(root: Path) -> None:
    whole = open_data("ksdd2", root)
    ids = sorted(pair.id for split in ("train", "val") for pair in whole.splits[split])
    seen, defects = [], []
    for number in range(1, 6):
        data = open_data("ksdd2", root, DataOptions(fold=f"{number}/5"))
        train, val = ({pair.id for pair in data.splits[split]} for split in ("train", "val"))
        assert not train & val and sorted(train | val) == ids
        assert data.splits["test"] == whole.splits["test"] and data.kept["fold"] == f"{number}/5"
        assert f"{len(train)} train, {len(val)} val, 8 test images, val part {number} of 5" in data.protocol
        seen += sorted(val)
        defects.append(int(labels_of(data, data.splits["val"]).sum()))
    assert sorted(seen) == ids and max(defects) - min(defects) <= 1 and sum(defects) == 11


def test_a_fold_that_is_none_is_a_sentence(root: Path) -> None:
    for text in ("0/5", "6/5", "1/1"):
        with pytest.raises(ValueError, match=f"fold is {text}; expected K/N with N of 2 or more and K from 1 to N"):
            DataOptions(fold=text)
    with pytest.raises(VssError, match=r"data.fold is 1/90 .* has 33 images .* do not make 90 parts; give fewer folds"):
        open_data("ksdd2", root, DataOptions(fold="1/90"))
    few = Recipe.model_validate(base(root) | {"data": base(root)["data"] | {"fold": "12/12"}})
    with pytest.raises(VssError, match=r"no defective images .* or give fewer folds \(data.fold\)"):
        for number in range(1, 13):
            data = few.data.model_copy(update={"fold": f"{number}/12"})
            Project.open(few.model_copy(update={"data": data}))


def test_a_network_that_learnt_from_the_fold_is_refused(finished: Store) -> None:
    trial = finished.trials()[0]
    network = finished.root / "shared" / finished.stage_of(trial) / "baseline.safetensors"
    recipe = trial.recipe()
    model = recipe.model.model_copy(update={"checkpoint": str(network)})
    Project.open(recipe.model_copy(update={"model": model}))
    other = recipe.data.model_copy(update={"fold": "2/3"})
    with pytest.raises(VssError, match=r"data.fold is 2/3 and .* was trained on 1/3 fold, so images of that part"):
        Project.open(recipe.model_copy(update={"model": model, "data": other}))


def test_trials_of_all_folds_are_judged_together(finished: Store) -> None:
    (case,) = read_results(finished.root)["over_folds"]
    assert (case["name"], case["folds"]) == ("l1", 3) and list(case["rows"]) == ["baseline", "pruned"]
    trials = sorted(finished.trials(), key=lambda trial: str(trial.recipe().data.fold))
    for name, row in case["rows"].items():
        parts = []
        for trial in trials:
            shared = finished.root / "shared" / finished.stage_of(trial)
            table = np.load((shared if name == "baseline" else finished.folder(trial.id)) / "scores" / f"{name}.npy")
            parts.append(table[table[:, 0] == 0][:, 1:])
        assert sum(map(len, parts)) == 33 and row["positives"] == 11
        judged = np.concatenate([part[:, 1] >= limit for part, limit in zip(parts, row["thresholds"], strict=True)])
        labels = np.concatenate(parts)[:, 0] == 1
        assert (row["fn"], row["fp"]) == (int((labels & ~judged).sum()), int((judged & ~labels).sum()))
    misses, precision = case["checks"]
    assert misses["passed"] and "over all folds, against baseline" in misses["what"]
    drop = case["rows"]["baseline"]["ap_pct"] - case["rows"]["pruned"]["ap_pct"]
    assert precision["drop"] == pytest.approx(drop) and precision["passed"] == (drop <= 3)
    assert precision["drop_interval"][0] <= drop <= precision["drop_interval"][1]
    shown = folds({"over_folds": [case, case | {"name": "l2"}]})
    counts = {stage: (row["fn"], row["fp"], row["ap_pct"]) for stage, row in case["rows"].items()}
    assert [row[0] for row in shown["rows"]] == [*list(counts)[:-1], "l1", "l2"]  # what both share stands once
    for row, (fn, fp, score) in zip(shown["rows"], counts.values(), strict=False):
        assert row[1].startswith(f"{fn} of 11 (") and row[2] == f"{fp} of 22" and row[3] == f"{score:.2f}"
    assert [name for name, _ in shown["verdicts"]] == ["l1"] * len(case["checks"]) + ["l2"] * len(case["checks"])
    texts = [text for _, text in shown["verdicts"]]
    assert all(check["sentence"] in text for check, text in zip(case["checks"] * 2, texts, strict=True))
    assert folds({"over_folds": [case | {"checks": [], "seed": "3"}]})["verdicts"][0][0] == "l1 · seed 3"
    found = read_results(finished.root)
    judged = headline(found | {"over_folds": [case | {"checks": [misses, misses | {"passed": False}]}]})
    assert judged["tone"] == "warn" and "l1 failed 1 of 2 checks of the ship rule over 3 folds." in judged["sentences"]
    held = headline(found | {"over_folds": [case | {"checks": [misses], "seed": "3"}]})
    assert (
        held["tone"] == "good"
        and "l1 · seed 3 passed all checks (1) of the ship rule over 3 folds." in held["sentences"]
    )
    assert "Cross-validation" in (finished.root / "report.html").read_text()
    (group,) = read_results(finished.root)["groups"]
    assert group["name"] == "l1" and group["values"]["ap_pct"]["n"] == 3


def test_a_fold_that_is_missing_is_named_and_nothing_is_put_together(finished: Store) -> None:
    trials = finished.trials()
    (case,) = over_folds(finished, trials, {trial.id for trial in trials[1:]})
    assert case == {"name": "l1", "seed": "", "folds": 3, "missing": ["1/3"]}
    assert folds({"over_folds": [case]}) == {"rows": [], "verdicts": [["l1", "folds 1/3 are not done."]]}
    some = over_folds(finished, trials[:2], {trial.id for trial in trials})
    assert some[0]["missing"] == ["3/3"]
