"""The segmentation task: what it refuses, and its gates against `vss.deploy.gate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vss import steps
from vss.config import Recipe
from vss.deploy import gate
from vss.errors import VssError
from vss.tasks import TASKS, task_of


def project(root: Path, **gates: Any) -> steps.Project:
    data = {"dataset": "camvid", "root": str(root), "size": [48, 64]}
    return steps.Project.open(Recipe.model_validate({"data": data, "model": {"name": "unet"}, "gate": gates}))


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
    table = np.random.default_rng(0).integers(0, 50, (5, 11, 11))
    before, after = ({"miou_pct": value, task.per_image: table} for value in (60.0, 58.5))
    found = task.verdicts({"baseline": before, "finetuned": before, "engine": after}, start="baseline")
    assert [verdict["passed"] for verdict in found] == [False, True]
    for verdict, limit in zip(found, (1.0, 2.0), strict=True):
        assert {k: v for k, v in verdict.items() if k != "what"} == gate(before, after, max_drop=limit)
