"""`vss lut`, `vss explain` and `vss prune --latency` from the command line, on a small network and real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vss
from vss import models
from vss.cli import app
from vss.data import Preprocess
from vss.data.labels import CAMVID_NAMES
from vss.errors import VssError
from vss.latency import LatencyTable
from vss.prune import Plan


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ckpt") / "net.safetensors"
    net = models.build("unet", 11, width=16, depth=2)
    return vss.save(net, path, preprocess=Preprocess(size=(48, 64)).model_dump(mode="json"), classes=CAMVID_NAMES,
                    info={"dataset": "camvid"})  # fmt: skip


@pytest.fixture(scope="module")
def table(ckpt: Path) -> Path:
    path = ckpt.parent / "table.json"
    arguments = ["lut", "build", "--ckpt", str(ckpt), "--save", str(path), "--quick", "--threads", "1",
                 "--seconds", "0.03", "--step", "8"]  # fmt: skip
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert "error on 5 unseen width vectors" in done.output
    return path


def test_a_table_is_built_shown_and_drawn(table: Path, tmp_path: Path) -> None:
    known = LatencyTable.load(table)
    assert known.done
    assert known.step == 8
    assert known.key["threads"] == 1
    plot = tmp_path / "cliffs.svg"
    done = CliRunner().invoke(app, ["lut", "show", str(table), "--plot", str(plot)], catch_exceptions=False)
    assert f"step 8, {len(known.samples)} samples" in done.output
    assert plot.read_text().count("<path") > 5


def test_prune_to_a_time_and_its_plan(ckpt: Path, table: Path, street_root: Path, tmp_path: Path) -> None:
    arguments = ["prune", "--ckpt", str(ckpt), "--method", "l1", "--latency", "0.7x", "--lut", str(table),
                 "--data-root", str(street_root), "--save", str(tmp_path)]  # fmt: skip
    changes = {"build.threads": 1, "prune.latency.noise": 0.9, "prune.latency.max_seconds": 1.5,
               "prune.latency.iterations": 2, "prune.recalibrate": 1}  # fmt: skip
    arguments += [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    plan = Plan.load(tmp_path / "plan.json")
    assert plan.budget["kind"] == "latency"
    assert plan.budget["target"] == "0.7x"
    assert plan.criterion == "l1"
    assert 0.2 < plan.cost_after["macs"] / plan.cost_before["macs"] < 0.9
    small = vss.load(tmp_path / "pruned.safetensors")
    kept = {group.id: len(group.kept) for group in plan.groups}
    assert small.get_submodule("encoder.1.0.0").out_channels == kept["encoder.1.0.0"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--latency", "0.5x", "--macs", "0.5"], "exactly one of"),
        (["--latency", "0.5x", "--dry-run"], "no dry run"),
        (["--macs", "0.5", "--lut", "x.json"], "--lut is the table of --latency"),
    ],
)
def test_flags_that_do_not_go_together(ckpt: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(VssError, match=sentence):
        CliRunner().invoke(app, ["prune", "--ckpt", str(ckpt), *arguments], catch_exceptions=False)


def test_a_table_of_another_device_is_refused(ckpt: Path, table: Path, street_root: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.json"
    data = json.loads(table.read_text())
    data["key"]["device"] = "another"
    foreign.write_text(json.dumps(data))
    arguments = ["prune", "--ckpt", str(ckpt), "--method", "l1", "--latency", "0.5x", "--lut", str(foreign),
                 "--data-root", str(street_root), "--set", "build.threads=1", "--save", str(tmp_path)]  # fmt: skip
    with pytest.raises(VssError, match=r"holds for device another and this is .* build one here: vss lut build"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(VssError, match="takes the folder of a finished"):
        CliRunner().invoke(app, ["explain", str(tmp_path)], catch_exceptions=False)
