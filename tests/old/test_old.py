"""Files that version 0.1.0 wrote before any format changed still load and give the figures that they gave then.

`expected.json` was computed by the version that wrote the files.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vss
from vss.core.config import load_recipe
from vss.deploy.profile.table import LatencyTable
from vss.deploy.quantize.ranges import Ranges
from vss.prune import Plan, apply_plan
from vss.run.page import write_page
from vss.ship.check import verify
from vss.sweep.compare import compare
from vss.sweep.store import Store

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / "expected.json").read_text())
    return found


@pytest.mark.parametrize("name", ["baseline", "pruned"])
def test_an_old_checkpoint_computes_what_it_did(name: str, expected: dict[str, Any]) -> None:
    model = vss.load(HERE / "run" / f"{name}.safetensors")
    with torch.no_grad():
        logits = model(torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)))
    then = expected[name]
    assert sum(p.numel() for p in model.parameters()) == then["parameters"]
    assert logits.argmax(1)[0, ::8, ::8].tolist() == then["labels"]
    assert float(logits.double().mean()) == pytest.approx(then["mean"], rel=1e-4)
    assert float(logits.double().std()) == pytest.approx(then["std"], rel=1e-4)


def test_an_old_plan_cuts_the_old_network(expected: dict[str, Any]) -> None:
    plan = Plan.load(HERE / "run" / "plan.json")
    assert {group: list(widths) for group, widths in plan.widths().items()} == expected["widths"]
    assert plan.sha256() == expected["plan_sha256"]
    cut = apply_plan(vss.load(HERE / "run" / "baseline.safetensors"), plan)
    assert sum(p.numel() for p in cut.parameters()) == expected["pruned"]["parameters"]


def test_an_old_recipe_says_what_it_did() -> None:
    recipe = load_recipe(str(HERE / "recipe.yaml"))
    assert (recipe.model.options, recipe.prune.budget.align) == ({"width": 8, "depth": 2}, 2)


def test_an_old_table_and_old_ranges(expected: dict[str, Any]) -> None:
    table, then = LatencyTable.load(HERE / "table.json"), expected["table"]
    half = np.array([[channels // 2 for channels in table.full]])
    assert float(table.model()(half)[0]) == pytest.approx(then["predicted_half_ms"], rel=1e-6)
    assert table.step == then["step"]
    assert Ranges.load(HERE / "ranges.json").sha256() == expected["ranges_sha256"]


def test_an_old_bundle_verifies(tmp_path: Path) -> None:
    with tarfile.open(HERE / "bundle.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert {row["status"] for row in verify(tmp_path / "bundle")} == {"ok"}


def test_an_old_report_becomes_a_page(tmp_path: Path) -> None:
    shutil.copy(HERE / "run" / "report.json", tmp_path)
    page = write_page(tmp_path / "report.json", tmp_path / "report.html").read_text()
    assert "engine pruned" in page and "MACs" in page


def test_an_old_sweep_reads_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(HERE / "recipe.yaml", tmp_path / "old.yaml")  # the sweep names its recipe by a relative path
    monkeypatch.chdir(tmp_path)
    store = Store.read(HERE / "sweep")
    assert [cell.id for cell in store.grid.trials()] == ["unet--l1--macs_0.5--0", "unet--taylor--macs_0.5--0"]
    rows = compare(HERE / "sweep", HERE / "sweep")["rows"]
    assert rows and {row["change"] for row in rows} == {0.0}
