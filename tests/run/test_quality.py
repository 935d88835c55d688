"""`vss methods`, `vss quality` and `vss prune --weights`, from files, against what the parts compute alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vss
from vss import models
from vss.cli.main import app
from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.data import Preprocess
from vss.data.readers import CAMVID_NAMES
from vss.prune import CRITERIA, make_criterion, make_plan, masked
from vss.prune import quality as measures
from vss.prune.criteria import method_rows, parse_methods
from vss.run import quality
from vss.run.pruning import network_to_prune


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ckpt") / "net.safetensors"
    net = models.build("unet", 11, width=8, depth=2)
    return vss.save(net, path, preprocess=Preprocess(size=(48, 64)).model_dump(mode="json"), classes=CAMVID_NAMES,
                    info={"dataset": "camvid"})  # fmt: skip


def test_the_table_of_methods_has_every_criterion_and_what_it_needs() -> None:
    rows = {row["name"]: row for row in method_rows()}
    assert list(rows) == CRITERIA.names()
    needs = {name: row["needs"] for name, row in rows.items()}
    wanted = {
        "l1": "weights", "random": "weights", "slimming": "weights", "sirfp": "images", "corr": "images",
        "taylor": "images, labels, gradients", "taylor_fo": "images, labels, gradients",
        "fgp": "images, labels, classes", "defect": "images, labels, gradients",
    }  # fmt: skip
    assert {name: needs[name] for name in wanted} == wanted
    assert {name for name, row in rows.items() if row["sparse_phase"]} == {"slimming", "fn", "dmcp"}
    ranking = {
        **dict.fromkeys(("taylor", "slimming", "fn", "fgp", "obd", "lamp"), "global"),
        "sirfp": "pools", "dcfp": "pools", "dmcp": "widths",
    }  # fmt: skip
    assert {name: row["ranking"] for name, row in rows.items()} == dict.fromkeys(rows, "local") | ranking
    assert "c1" in rows["hw_l1"]["aliases"] and "faithful" in rows["sirfp"]["presets"]
    done = CliRunner().invoke(app, ["methods"])
    assert done.exit_code == 0 and all(name in done.stdout for name in rows)


def test_quality_of_a_checkpoint(ckpt: Path, street_root: Path, tmp_path: Path) -> None:
    report = tmp_path / "out.json"
    words = ["quality", "--ckpt", ckpt, "--methods", "random,taylor,slimming", "--data-root", street_root, "--channels",
             12, "--batches", 2, "--batch-size", 2, "--sensitivity", "l1", "--report", report]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0
    assert "12 channels left out on 4 images, 26 forward passes" in " ".join(done.stdout.split())
    figures = json.loads(report.read_text())
    rows = {row["name"]: row for row in figures["methods"]}
    assert list(rows) == ["random", "taylor", "slimming"]
    assert rows["slimming"]["note"] and not rows["taylor"]["note"]
    assert figures["oracle"]["forwards"] == 26 and len(figures["oracle"]["sample"]) == 12
    assert rows["taylor"]["correlations"]["taylor"] == pytest.approx(1)
    assert rows["taylor"]["correlations"]["random"] == pytest.approx(rows["random"]["correlations"]["taylor"])
    job = Recipe.model_validate({"prune": {"batches": 2, "batch_size": 2}})
    subject = quality.Subject.open(ckpt, job, dataset=None, data_root=str(street_root), channels=12)
    loss, net = subject.project.task.calibration_loss(), subject.net
    plan = make_plan(net, torch.zeros(1, 3, 48, 64), criterion="taylor", batches=subject.batches, loss=loss)
    mask = masked(net, plan).eval()
    with torch.no_grad():
        whole, left = (torch.cat([n(x) for x, _ in subject.batches]).double() for n in (net, mask))
    expected = float((whole - left).square().sum() / whole.square().sum())
    assert rows["taylor"]["relative_error"] == pytest.approx(expected, rel=1e-6)
    changes = torch.tensor([row["change"] for row in figures["oracle"]["sample"]])
    scores = subject.scores({"taylor": make_criterion("taylor")})["taylor"]
    mine = measures.sampled_scores(subject.groups, scores, subject.sample)
    assert rows["taylor"]["overlap_25"] == measures.overlap(mine, changes.abs(), share=0.25)
    assert len(figures["sensitivity"]) == 3 * len(subject.groups)


def test_foreign_weights_are_pruned(street_root: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = models.build("unet", 11, width=8, depth=2)
    weights = tmp_path / "theirs.pt"
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, weights)
    words = ["prune", "--model", "unet", "--weights", weights, "--set", "model.options={width: 8, depth: 2}",
             "--dataset", "camvid", "--data-root", street_root, "--input-size", "48,64", "--method", "l1",
             "--macs", 0.5, "--save", tmp_path / "out", "--set", "prune.recalibrate=0"]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0
    small = vss.load(tmp_path / "out" / "pruned.safetensors")
    plan = make_plan(net, torch.zeros(1, 3, 48, 64), criterion="l1", budget={"kind": "macs", "keep": 0.5})
    assert [group.kept for group in small.plans[0].groups] == [group.kept for group in plan.groups]


def test_a_preset_reaches_the_criterion(ckpt: Path, street_root: Path, tmp_path: Path) -> None:
    words = ["prune", "--ckpt", ckpt, "--method", "slimming", "--preset", "faithful", "--global-ratio", 0.3,
             "--data-root", street_root, "--save", tmp_path, "--set", "prune.recalibrate=0"]  # fmt: skip
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["criterion_options"] == {"reduce": "max"}


@pytest.mark.parametrize(
    ("ckpt_too", "model", "weights", "match"),
    [
        (True, "unet", True, "--ckpt alone, or --model and --weights"),
        (False, "unet", False, "--ckpt alone, or --model and --weights"),
        (False, "segnet", True, "has no backbone"),
    ],
)
def test_what_to_prune_must_be_said_once_and_fit(
    ckpt: Path, street_root: Path, ckpt_too: bool, model: str, weights: bool, match: str
) -> None:
    with pytest.raises(VssError, match=match):
        network_to_prune(
            Recipe(), ckpt if ckpt_too else None, model, ckpt if weights else None, dataset="camvid",
            data_root=str(street_root), size=[48, 64],
        )  # fmt: skip


def test_unknown_names_are_refused(ckpt: Path) -> None:
    for name, match in (("tailor", "taylor"), ("taylor:fatihful", "faithful"), ("", "criterion")):
        with pytest.raises(VssError, match=match):
            parse_methods([name])
