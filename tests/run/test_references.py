"""Unpruned networks beside the pruned one: trained as long, timed in the same run, resumed, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vss.core.config import ModelConfig, Recipe
from vss.core.errors import VssError
from vss.core.files import sha256_file
from vss.run.job import run, title_of
from vss.train import checkpoint

FIT = {"epochs": 1, "batch_size": 8, "lr": 0.02, "precision": "32-true", "accelerator": "cpu"}
NARROW = {"name": "unet", "options": {"width": 4, "depth": 1}}


def recipe(root: Path, *references: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({
        "name": "tiny", "data": {"root": str(root), "size": [32, 48], "limit": 8}, "control": False, "panels": 0,
        "model": {"name": "unet", "options": {"width": 8, "depth": 1}}, "references": references, "train": FIT,
        "prune": {"criterion": "l1", "batches": 1, "recalibrate": 1}, "finetune": FIT, "build": {"threads": 1},
        "bench": {"min_seconds": 0.1, "max_seconds": 2.0, "images": 1, "spread": 100.0},
    })  # fmt: skip


def test_a_smaller_network_is_trained_and_timed_beside(street_root: Path, tmp_path: Path) -> None:
    report = run(recipe(street_root, NARROW), tmp_path, progress=False)
    title = "reference unet width=4 depth=1"
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["baseline", "pruned", "finetuned", "engine baseline", "engine pruned", title]
    small = checkpoint.load(tmp_path / "references" / "unet-width=4-depth=1" / "control.safetensors")
    assert rows[title]["params_m"] == pytest.approx(sum(p.numel() for p in small.parameters()) / 1e6)
    assert 0.2 < rows[title]["params_m"] / rows["baseline"]["params_m"] < 0.3
    sessions = report["bench"]["engine"]["sessions"]
    assert list(sessions) == ["engine baseline", "engine pruned", title]
    assert rows[title]["latency_ms_p50"] == sessions[title]["latency_ms_p50"]
    assert "not pruned" in rows[title]["labels"] and "labels" not in rows["engine baseline"]
    built = report["artefacts"][title]
    assert built["sha256"] == {role: sha256_file(tmp_path / name) for role, name in built["files"].items()}
    steps = {step["name"]: step["status"] for step in report["steps"]}
    assert steps[f"{title}: train"] == steps[f"{title}: control"] == steps[f"{title}: engine-control"] == "ok"
    assert "unet width=4 depth=1" in (tmp_path / "report.html").read_text()

    again = run(recipe(street_root, NARROW), tmp_path, progress=False)
    assert {step["status"] for step in again["steps"]} == {"skipped"} and again["rows"] == report["rows"]
    less = run(recipe(street_root), tmp_path, progress=False)
    assert {step["name"] for step in less["steps"] if step["status"] == "ok"} == {"bench"}
    assert json.loads((tmp_path / "report.json").read_text())["rows"][-1]["name"] == "engine pruned"


@pytest.mark.parametrize(
    ("references", "sentence"),
    [
        ([NARROW, NARROW], "two references are called 'reference unet width=4 depth=1'"),
        ([{"name": "segdecnet"}], "reference segdecnet is not for the task of unet"),
        ([{"name": "unett"}], "unknown model"),
    ],
)
def test_references_that_cannot_be_compared(
    references: list[dict[str, Any]], sentence: str, street_root: Path, tmp_path: Path
) -> None:
    with pytest.raises(VssError, match=sentence):
        run(recipe(street_root, *references), tmp_path, progress=False)
    assert not (tmp_path / "steps").exists()


def test_a_checkpoint_is_called_by_its_file() -> None:
    assert title_of(ModelConfig(checkpoint="nets/small.safetensors")) == "reference small"
