"""The segmentation task: what it refuses, and its gates against `vss.train.gate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.run.project import Project
from vss.train.gate import gate
from vss.train.tasks import TASKS, task_of


def project(root: Path, **gates: Any) -> Project:
    data = {"dataset": "camvid", "root": str(root), "size": [48, 64]}
    return Project.open(Recipe.model_validate({"data": data, "model": {"name": "unet"}, "gate": gates}))


def test_tasks_come_from_the_network() -> None:
    assert TASKS.names() == ["defect", "segmentation"]
    assert (task_of("unet"), task_of("segdecnet")) == ("segmentation", "defect")
    with pytest.raises(VssError, match="unknown model"):
        task_of("unett")


@pytest.mark.parametrize("key", ["max_fnr_increase", "max_ap_drop"])
def test_gates_on_missed_defects_are_refused(street_root: Path, key: str) -> None:
    with pytest.raises(VssError, match="'unet' segments"):
        project(street_root, **{key: 1.0})


def test_gates_are_those_of_deploy(street_root: Path) -> None:
    task = project(street_root, max_drop=1.0, max_drop_from_baseline=2.0).task
    before, after, longer = ({"miou_pct": value} for value in (60.0, 58.5, 60.6))
    results = {"baseline": before, "control": longer, "finetuned": before, "engine": after}
    found = task.verdicts(results)
    assert [(verdict.pop("what"), verdict["passed"]) for verdict in found] == [
        ("engine equals its network", False), ("pruned against baseline", True), ("pruned against control", False),
    ]  # fmt: skip
    wanted = [gate(start, after, max_drop=limit) for start, limit in ((before, 1.0), (before, 2.0), (longer, 2.0))]
    assert found == wanted
    assert task.against({"baseline": before}, after)[0]["max_drop"] == 2.0


def test_the_gate_against_the_baseline_is_one_point_by_default_and_off_only_by_null(street_root: Path) -> None:
    results = {name: {"miou_pct": 60.0} for name in ("baseline", "finetuned")} | {"engine": {"miou_pct": 30.0}}
    results["finetuned"] = results["engine"]
    _, verdict = project(street_root).task.verdicts(results)
    assert (verdict["passed"], verdict["max_drop"], verdict["drop"]) == (False, 1.0, 30.0)
    _, verdict = project(street_root, max_drop_from_baseline=None).task.verdicts(results)
    assert (verdict["passed"], verdict["max_drop"], verdict["drop"]) == (None, None, 30.0)
