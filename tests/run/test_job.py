"""`vss run`: every step on a generated set, skipping, resuming after kill -9, and what the report says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vss
from tests.command import cli
from vss.cli.main import app
from vss.core.config import Recipe
from vss.core.errors import GateFailed, VssError
from vss.core.files import TEMPORARY, at_work, sha256_file
from vss.data import open_data
from vss.deploy import BACKENDS
from vss.prune import Plan, count
from vss.run.job import run
from vss.run.project import Project
from vss.run.report import limit_note
from vss.train import checkpoint


def recipe(root: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "name": "tiny",
        "data": {"dataset": "camvid", "root": str(root), "size": [48, 64], "augment": {"scale": [1, 1]}},
        "model": {"name": "unet", "options": {"width": 8, "depth": 2}},
        "train": {"epochs": 2, "batch_size": 4, "lr": 0.05, "precision": "32-true", "accelerator": "cpu"},
        "prune": {"criterion": "taylor", "batches": 3, "batch_size": 4, "recalibrate": 3},
        "finetune": {"epochs": 1, "batch_size": 4, "lr": 0.02, "precision": "32-true", "accelerator": "cpu"},
        "bench": {"min_seconds": 0.1, "max_seconds": 2.0, "images": 2, "spread": 50},
        "panels": 2,
    }
    return Recipe.model_validate(settings | changes)


@pytest.fixture(scope="module")
def finished(street_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run")
    return out, run(recipe(street_root), out, progress=False)


def test_the_table_has_every_network_and_adds_up(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["baseline", "pruned", "finetuned", "control", "engine baseline", "engine pruned"]
    small = checkpoint.load(out / "finetuned.safetensors")
    assert rows["finetuned"]["macs_g"] == count(small, (48, 64))["macs_g"]
    assert 0.48 < rows["finetuned"]["macs_g"] / rows["baseline"]["macs_g"] <= 0.5
    assert rows["control"]["params_m"] == rows["baseline"]["params_m"] > rows["pruned"]["params_m"]
    ratio = rows["baseline"]["macs_g"] / rows["finetuned"]["macs_g"]
    engine = rows["engine pruned"]
    assert engine["speedup_per_mac_reduction"] == pytest.approx(engine["speedup"] / ratio)
    assert engine["miou_pct"] == pytest.approx(rows["finetuned"]["miou_pct"], abs=0.1)
    assert report["checks"]["masked_max_rel"] <= 1e-4
    assert report["environment"]["ops"]["seg_argmax"]["CPU"] in ("native", "reference")
    assert report["gate"]["passed"] and [step["status"] for step in report["steps"]] == ["ok"] * len(report["steps"])


def test_report_files(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    page = (out / "report.html").read_text()
    assert json.loads((out / "report.json").read_text())["rows"] == report["rows"]
    assert page.count("data:image/") >= 2 * 5 and 'src="http' not in page
    assert len(list((out / "panels").glob("*.png"))) == 2 * 5
    for title in ("engine baseline", "engine pruned"):
        built = report["artefacts"][title]
        assert built["backend"] == "onnxruntime" and set(built["spec"].values()) == {None}
        assert set(built["files"]) >= {"onnx", "engine", "scores"}
        assert built["sha256"] == {role: sha256_file(out / name) for role, name in built["files"].items()}
        assert built["sha256"]["onnx"] == report["export"][title]["sha256"]
    assert {check["engine"] for check in report["gate"]["checks"]} == {"engine pruned"}


def test_again_does_nothing_and_says_so(finished: tuple[Path, dict[str, Any]], street_root: Path) -> None:
    out, first = finished
    before = {path: path.stat().st_mtime_ns for path in (out / "steps").iterdir()}
    second = run(recipe(street_root), out, progress=False)
    assert {step["status"] for step in second["steps"]} == {"skipped"}
    assert {path: path.stat().st_mtime_ns for path in (out / "steps").iterdir()} == before
    assert second["rows"] == first["rows"]


def test_a_change_redoes_what_depends_on_it(
    finished: tuple[Path, dict[str, Any]], street_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished[0], tmp_path / "copy")
    report = run(recipe(street_root, export={"labels": False}), tmp_path / "copy", progress=False)
    status = {step["name"]: step["status"] for step in report["steps"]}
    redone = {name for name, value in status.items() if value == "ok"}
    assert redone == {"engine-baseline", "engine-finetuned", "gate", "bench", "panels"}


def test_engines_for_gpus_elsewhere_are_built_beside_and_not_run(
    finished: tuple[Path, dict[str, Any]], street_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13 (Linux x86_64)")
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    asked = recipe(street_root, build={"also": ["tensorrt_rtx"], "targets": ["sm86", "sm89"]})
    report = run(asked, out, progress=False)
    redone = {step["name"] for step in report["steps"] if step["status"] == "ok"}
    assert {"tensorrt_rtx-baseline", "tensorrt_rtx-finetuned"} <= redone and "train" not in redone
    assert [(row["name"], row["precision"], row["targets"], row["passed"]) for row in report["built"]] == [
        (name, "fp32", ["sm86", "sm89"], True) for name in ("engine baseline", "engine pruned")
    ]
    for row in report["built"]:
        engine = out / row["file"]
        assert engine.read_bytes()[:4] == b"vtrt" and sha256_file(engine) == row["sha256"]
        assert row["layers"]["total"] > 10 and row["layers"]["Float"] > 10
        assert json.loads(engine.with_name(engine.name + ".json").read_text())["targets"] == ["sm86", "sm89"]
    page = (out / "report.html").read_text()
    assert "Engines built, not run" in page and "neither accuracy nor time was measured" in page
    assert {step["status"] for step in run(asked, out, progress=False)["steps"]} == {"skipped"}

    def refuses(*_: Any) -> Path:
        raise VssError("TensorRT for RTX cannot build it (node 7).")

    monkeypatch.setattr(BACKENDS["tensorrt_rtx"], "build", refuses)
    other = recipe(street_root, build={"also": ["tensorrt_rtx"], "targets": ["sm75"]})
    with pytest.raises(GateFailed, match=r"engine baseline fp32 for TensorRT for RTX: .*\(node 7\)\. See .*report"):
        run(other, out, progress=False)
    failed = json.loads((out / "report.json").read_text())
    assert [row["passed"] for row in failed["built"]] == [False, False] and failed["rows"] == report["rows"]


def test_a_damaged_file_is_made_again(finished: tuple[Path, dict[str, Any]], street_root: Path, tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "copy")
    (tmp_path / "copy" / "engine" / "finetuned.onnx").write_bytes(b"broken")
    report = run(recipe(street_root), tmp_path / "copy", progress=False)
    assert {s["name"] for s in report["steps"] if s["status"] == "ok"} == {"engine-finetuned"}
    assert report["rows"] == finished[1]["rows"]


def test_gate_from_baseline_fails_with_everything_written(
    finished: tuple[Path, dict[str, Any]], street_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    harsh = recipe(
        street_root,
        gate={"max_drop_from_baseline": 0.0},
        prune={"criterion": "random", "recalibrate": 0, "budget": {"keep": 0.06, "floor": 0.01}},
        finetune={"epochs": 1, "batch_size": 4, "lr": 1e-9, "precision": "32-true", "accelerator": "cpu"},
    )
    with pytest.raises(
        GateFailed, match=r"Gate pruned against baseline failed: .*Gate pruned against control failed: "
    ):
        run(harsh, out, progress=False)
    report = json.loads((out / "report.json").read_text())
    assert not report["gate"]["passed"] and {s["name"]: s["status"] for s in report["steps"]}["gate"] == "not passed"
    checks = {check["what"]: check for check in report["gate"]["checks"]}
    assert [check["passed"] for check in checks.values()] == [True, False, False]
    lost = checks["pruned against baseline"]
    assert lost["drop_interval"][0] <= lost["drop"] <= lost["drop_interval"][1] and lost["max_drop"] == 0
    assert "gate failed: pruned against baseline, pruned against control" in (out / "report.html").read_text()


def test_kill_9_at_any_step_ends_in_the_same_plan(
    finished: tuple[Path, dict[str, Any]], street_root: Path, tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(recipe(street_root).model_dump(mode="json")))
    command = [sys.executable, "-m", "vss.cli", "run", str(job), "--out", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    quiet: Any = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for landmark in ("train/*/lightning/resume.ckpt", "steps/prune.json"):
        process = subprocess.Popen(command, **quiet)
        deadline = time.monotonic() + 300
        while not list((tmp_path / "out").glob(landmark)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert cli("run", job, "--out", tmp_path / "out").returncode in (0, 3)  # 3: too noisy to time
    whole, again = finished[0], tmp_path / "out"
    assert Plan.load(again / "plan.json") == Plan.load(whole / "plan.json")
    for name in ("baseline", "pruned", "finetuned"):
        a, b = checkpoint.read(whole / f"{name}.safetensors"), checkpoint.read(again / f"{name}.safetensors")
        assert a.weights_sha256 == b.weights_sha256, name
    steps = [json.loads((p / "steps" / "train.json").read_text())["result"]["steps"] for p in (whole, again)]
    assert steps[0] == steps[1] == 2 * 6


def test_one_at_a_time_and_a_finished_report_stays(
    finished: tuple[Path, dict[str, Any]], street_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    whole = {name: (out / name).read_bytes() for name in ("report.json", "report.html")}
    with at_work(out), pytest.raises(VssError, match="another vss command is at work in"):
        run(recipe(street_root), out, progress=False)

    def broken(*_: Any, **__: Any) -> Any:
        raise VssError("no clock.")

    monkeypatch.setattr("vss.run.engines.bench", broken)
    left = out / "scores" / f".engine-baseline{TEMPORARY}abcdefgh.npy"
    left.write_bytes(b"half")
    (out / "steps" / ".hidden").write_text("somebody's own")
    with pytest.raises(VssError, match="no clock"):
        run(recipe(street_root, bench={"min_seconds": 0.2, "max_seconds": 2.0, "spread": 50}), out, progress=False)
    assert {name: (out / name).read_bytes() for name in whole} == whole
    assert not left.exists() and (out / "steps" / ".hidden").exists()
    (out / "report.json").write_text(json.dumps(finished[1] | {"status": "failed"}))
    with pytest.raises(VssError, match="no clock"):
        run(recipe(street_root, bench={"min_seconds": 0.2, "max_seconds": 2.0, "spread": 50}), out, progress=False)
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "failed" and report["steps"][-1]["name"] == "bench"


def test_iterative_pruning_composes_into_one_plan(street_root: Path, tmp_path: Path) -> None:
    from vss.run import pruning

    job = recipe(
        street_root,
        prune={"criterion": "taylor", "batches": 2, "batch_size": 4, "recalibrate": 2, "steps": 3, "epochs_between": 1},
    )
    project = Project.open(job)
    model = project.build_model()
    small, facts = pruning.prune(project, model, job.prune, tmp_path, progress=False)
    assert len(small.plans) == 3
    assert 0.45 < facts.kept["macs"] <= 0.5
    whole = Plan.load(tmp_path / "plan.json")
    again = vss.prune.apply_plan(model, whole)
    assert [p.shape for p in again.parameters()] == [p.shape for p in small.parameters()]


def test_times_that_could_not_be_measured_are_exit_code_3_and_limited_images_are_said(
    finished: tuple[Path, dict[str, Any]], street_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0], tmp_path / "copy")
    monkeypatch.setattr("vss.run.engines.noise", lambda result: "the machine is too noisy.")
    job = tmp_path / "job.yaml"
    job.write_text(
        json.dumps(recipe(street_root, bench={"min_seconds": 0.1, "max_seconds": 1.0}).model_dump(mode="json"))
    )
    done = CliRunner().invoke(app, ["run", str(job), "--out", str(tmp_path / "copy")])
    assert done.exit_code == 3 and "all but the times is done" in done.output
    report = json.loads((tmp_path / "copy" / "report.json").read_text())
    status = {step["name"]: step["status"] for step in report["steps"]}
    assert report["status"] == "ok" and status["bench"] == "not measured" and status["gate"] == "skipped"
    page = (tmp_path / "copy" / "report.html").read_text()
    assert "The speed is not known: the machine is too noisy." in page and "\u00d7 faster" not in page
    frame = SimpleNamespace(
        recipe=recipe(street_root, data={"dataset": "camvid", "root": str(street_root), "limit": 5}),
        project=SimpleNamespace(data=open_data("camvid", street_root)),
    )
    assert limit_note(frame) == ["data.limit 5: 5 of 24 train, 5 of 6 val, 5 of 8 test images were used, evenly spread"]
