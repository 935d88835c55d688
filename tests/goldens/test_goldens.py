"""What the command line takes and what two small runs give, as the goldens in this folder say.

They change only where a change is meant: `VSS_GOLDENS=write pytest tests/goldens` writes them anew, and the difference
is read before it is committed. Figures are equal to the bit on the processor and with the torch that made them; on
another one they are equal up to rounding, which may move a channel or a pixel.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer
from typer.testing import CliRunner

from vss.cli.main import app

HERE = Path(__file__).parent
COMMON = ["bench.min_seconds=0.1", "bench.max_seconds=0.3", "bench.spread=50", "bench.images=2", "panels=0"]
DEMO = ["data.size=[48,64]", "model.options={width: 8, depth: 2}", "train.epochs=1", "finetune.epochs=1"]
DEFECT = ["data.size=[128,64]", "model.options={widths: [4, 8, 8, 8, 32]}", "train.epochs=2", "train.val_every=1"]
DEFECT += ["finetune.epochs=1", "finetune.val_every=1", "gate.max_fnr_increase=100", "gate.max_ap_drop=100"]
RUNS = {"demo": (*DEMO, "gate.max_drop_from_baseline=100"), "ksdd_small": (*DEFECT,)}
MEASURED = ("latency", "fps", "speedup", "end_to_end", "size_mib")


def compared(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The golden `name`, after writing it where that was asked for."""
    path = HERE / f"{name}.json"
    if os.environ.get("VSS_GOLDENS") == "write":
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    golden: dict[str, Any] = json.loads(path.read_text())
    return golden


def flags(command: click.Command, prefix: str = "") -> dict[str, dict[str, str]]:
    """Every command below `command`: its flags and arguments with default and help."""
    rows = {}
    for name, below in getattr(command, "commands", {}).items():
        rows |= flags(below, f"{prefix} {name}".strip())
    if not rows:
        for parameter in command.params:
            label = ", ".join([*parameter.opts, *parameter.secondary_opts])
            facts = [str(parameter.default), str(getattr(parameter, "help", None))]
            rows.setdefault(prefix, {})[label] = " | ".join(facts)
    return rows


def test_every_command_and_every_flag() -> None:
    found = flags(typer.main.get_command(app))
    assert found == compared("commands", found)


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_gives_the_plan_and_the_rows_that_it_gave(
    name: str, tmp_path: Path, street_root: Path, defect_root: Path
) -> None:
    root = street_root if name == "demo" else defect_root
    words = [word for change in (f"data.root={root}", *COMMON, *RUNS[name]) for word in ("--set", change)]
    done = CliRunner().invoke(app, ["run", name, "--out", str(tmp_path / "run"), *words])
    assert done.exit_code in (0, 3), done.output  # 3: so short a measurement may be too noisy
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    groups = json.loads((tmp_path / "run" / "plan.json").read_text())["groups"]
    kept = {group["id"]: [len(group["kept"]), group["channels"]] for group in groups}
    digest = hashlib.sha256(json.dumps([[group["id"], group["kept"]] for group in groups]).encode()).hexdigest()
    rows = [{key: row[key] for key in row if not key.startswith(MEASURED)} for row in report["rows"]]
    found = {
        "made_by": [report["environment"]["cpu"]["model"], torch.__version__, torch.get_num_threads()],
        "steps": [step["name"] for step in report["steps"]],
        "kept": kept,
        "kept_sha256": digest,
        "rows": rows,
    }
    golden = compared(name, json.loads(json.dumps(found)))
    assert found["steps"] == golden["steps"]
    if found["made_by"] == golden["made_by"]:
        assert found == golden
        return
    widths = [{group: width for group, (_, width) in each.items()} for each in (kept, golden["kept"])]
    assert widths[0] == widths[1]  # by name: the file has its own order
    for row, then in zip(rows, golden["rows"], strict=True):
        assert set(row) == set(then)
        for key in ("params_m", "macs_g"):
            assert row[key] == pytest.approx(then[key], rel=0.1)
