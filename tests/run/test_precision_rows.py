"""The section `precision` of a recipe: rows, gates, choice and search in a whole run, and that it resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.deploy.marks import needs_openvino
from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.deploy import BACKENDS
from vss.deploy.onnx_file import runtime_of
from vss.run.job import check_build, run

TITLES = ("engine baseline", "engine pruned")


def recipe(root: Path, **precision: Any) -> Recipe:
    fit = {"epochs": 1, "batch_size": 4, "lr": 0.05, "precision": "32-true", "accelerator": "cpu"}
    settings: dict[str, Any] = {
        "name": "typed",
        "split": "val",
        "control": False,
        "data": {"dataset": "camvid", "root": str(root), "size": [48, 64], "augment": {"scale": [1, 1]}},
        "model": {"name": "unet", "options": {"width": 8, "depth": 2}},
        "train": fit,
        "prune": {"criterion": "l1", "batches": 1, "batch_size": 4, "recalibrate": 1},
        "finetune": fit,
        "gate": {"max_drop": 5.0, "max_drop_from_baseline": 100},
        "bench": {"min_seconds": 0.1, "max_seconds": 6.0, "images": 2, "spread": 50},
        "panels": 1,
        "precision": {"kinds": ["fp16", "int8"], "images": 6, "max_drop": 5.0, "search_images": 2, "groups": 3},
    }
    settings["precision"] |= precision
    return Recipe.model_validate(settings)


@pytest.fixture(scope="module")
def finished(street_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run")
    return out, run(recipe(street_root), out, progress=False)


def test_every_precision_has_a_row_with_its_own_figures(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    rows = {row["name"]: row for row in report["rows"]}
    for title in TITLES:
        plain = rows[title]
        for kind in ("fp16", "int8"):
            row = rows[f"{title} {kind}"]
            assert abs(row["miou_pct"] - plain["miou_pct"]) < 5 and row["latency_ms_p50"] > 0
            assert row["size_mib"] < plain["size_mib"] and row["macs_g"] == plain["macs_g"]
            facts = report["precision"][title][kind]["gate"]
            assert facts["passed"] and set(facts["scores"]) == {"torch", "onnxruntime", "engine"}
            assert facts["candidate"] == row["miou_pct"]
            low, high = facts["drop_interval"]
            assert low <= high
            artefact = report["artefacts"][f"{title} {kind}"]
            assert (out / artefact["files"]["engine"]).is_file() and len(artefact["sha256"]) == 3
    assert report["bench"]["precision"]["baseline"] == "engine baseline fp32"
    assert "mode" in report["bench"]["precision"]


def test_the_choice_stands_in_the_report_with_its_reasons(finished: tuple[Path, dict[str, Any]]) -> None:
    rows = {row["name"]: row for row in finished[1]["rows"]}
    for title in TITLES:
        choice = finished[1]["precision"][title]["choice"]
        assert set(choice["why"]) == {"fp32", "fp16", "int8"} - {choice["chosen"]}
        for kind in ("fp16", "int8"):
            said = rows[f"{title} {kind}"]["labels"]
            assert said == ("kept" if choice["chosen"] == kind else f"not kept: {choice['why'][kind]}")
    assert "not kept" in (finished[0] / "report.html").read_text()


def test_files_say_what_they_were_calibrated_on(finished: tuple[Path, dict[str, Any]]) -> None:
    out, report = finished
    exported = report["export"]["engine pruned int8"]["precision"]
    found = {each.key: each.value for each in onnx.load(out / "engine/finetuned.int8.onnx").metadata_props}
    assert exported["calibration"]["split"] == "train" and exported["calibration"]["images"] == 6
    assert found["vss.calibration_sha256"] == exported["calibration"]["sha256"]
    kept = [json.loads(path.read_text()) for path in (out / "ranges").iterdir()]
    assert {each["calibration"]["sha256"] for each in kept} == {exported["calibration"]["sha256"]}
    assert len(kept) == 2 and all(len(each["calibration"]["files"]) == 6 for each in kept)


def test_again_does_nothing_and_a_change_redoes_its_part(
    finished: tuple[Path, dict[str, Any]], street_root: Path
) -> None:
    out, first = finished
    again = run(recipe(street_root), out, progress=False)
    assert {step["status"] for step in again["steps"]} == {"skipped"} and again["rows"] == first["rows"]
    changed = run(recipe(street_root, kinds=["int8"], max_drop=0.0, method="minmax", percent=99.0), out, progress=False)
    redone = {step["name"] for step in changed["steps"] if step["status"] == "ok"}
    assert redone == {"precision-baseline", "precision-finetuned", "precision-bench"}
    for name, title in (("baseline", "engine baseline"), ("finetuned", "engine pruned")):
        facts = changed["precision"][title]["int8"]
        if facts["search"]["gate"]["passed"] if "search" in facts else facts["gate"]["passed"]:
            continue
        choice = json.loads((out / f"engine/{name}.int8.choice.json").read_text())
        assert facts["search"]["freed"] == choice["facts"]["freed"]
        assert facts["search"]["gate"]["diverges"]["probes"] >= 1


def test_float16_that_would_overflow_is_not_kept(
    finished: tuple[Path, dict[str, Any]], street_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0], tmp_path / "copy")
    monkeypatch.setattr("vss.deploy.quantize.layers.LARGEST", 1e-3)
    report = run(recipe(street_root, kinds=["fp16"], max_drop=6.0), tmp_path / "copy", progress=False)
    for title in TITLES:
        facts = report["precision"][title]
        assert facts["choice"]["chosen"] == "fp32" and "float16 ends at 0" in facts["choice"]["why"]["fp16"]
        assert not facts["fp16"]["gate"]["passed"] and facts["fp16"]["gate"]["candidate"] is None


# -- several runtimes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everywhere(
    finished: tuple[Path, dict[str, Any]], street_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("auto") / "run"
    shutil.copytree(finished[0], out)
    return out, run(with_build(recipe(street_root, kinds=["int8"]), backend="auto"), out, progress=False)


def with_build(job: Recipe, **build: Any) -> Recipe:
    return job.model_copy(update={"build": job.build.model_copy(update=build)})


@needs_openvino
def test_auto_builds_for_every_runtime_and_keeps_the_fastest(everywhere: tuple[Path, dict[str, Any]]) -> None:
    out, report = everywhere
    rows, others = {row["name"]: row for row in report["rows"]}, ("fp32 openvino", "int8 openvino")
    for title in TITLES:
        facts = report["precision"][title]
        assert facts.keys() == {"choice", "int8", *others}
        times = {"fp32": report["bench"]["precision"]["sessions"][f"{title} fp32"]["latency_ms_p50"]}
        times |= {kind: rows[f"{title} {kind}"]["latency_ms_p50"] for kind in ("int8", *others)}
        passed = {"fp32", *(kind for kind in ("int8", *others) if facts[kind]["gate"]["passed"])}
        chosen = facts["choice"]["chosen"]
        faster = [kind for kind in passed if times[kind] < times[chosen]]
        assert chosen in passed
        assert all("inside the noise of this machine" in facts["choice"]["why"][kind] for kind in faster)
        for kind in others:
            row, artefact = rows[f"{title} {kind}"], report["artefacts"][f"{title} {kind}"]
            assert row["labels"] == ("kept" if chosen == kind else f"not kept: {facts['choice']['why'][kind]}")
            assert abs(row["miou_pct"] - rows[title]["miou_pct"]) < 5
            assert artefact["backend"] == "openvino" and runtime_of(out / artefact["files"]["engine"]) == "openvino"
        assert rows[f"{title} fp32 openvino"]["miou_pct"] == pytest.approx(rows[title]["miou_pct"], abs=0.05)
        assert rows[title]["speedup"] >= 0 and report["artefacts"][title]["backend"] == "onnxruntime"
    assert "int8 openvino" in (out / "report.html").read_text()


@needs_openvino
def test_auto_comes_back_without_work(everywhere: tuple[Path, dict[str, Any]], street_root: Path) -> None:
    out, first = everywhere
    job = with_build(recipe(street_root, kinds=["int8"]), backend="auto")
    again = run(job, out, progress=False)
    assert {step["status"] for step in again["steps"]} == {"skipped"} and again["rows"] == first["rows"]


@needs_openvino
def test_a_file_that_fails_in_one_runtime_is_scored_in_the_other(
    everywhere: tuple[Path, dict[str, Any]], street_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime is made to compute something else than its file says."""
    session = type(BACKENDS["openvino"].open(everywhere[0] / "engine/finetuned.onnx"))
    usual = session._run

    def wrong(self: Any, feed: Any) -> dict[str, Any]:
        return {name: value * 0 for name, value in usual(self, feed).items()}

    monkeypatch.setattr(session, "_run", wrong)
    shutil.copytree(everywhere[0], tmp_path / "copy")
    job = recipe(street_root, kinds=["int8"], max_drop=0.5, search=False)
    report = run(with_build(job, also=("openvino",)), tmp_path / "copy", progress=False)
    for title in TITLES:
        gate = report["precision"][title]["fp32 openvino"]["gate"]
        assert not gate["passed"]
        assert "in onnxruntime, so the runtime does not compute what the file says" in gate["sentence"]
        assert gate["scores"]["engine in onnxruntime"] == pytest.approx(gate["scores"]["onnxruntime"], abs=1e-6)
        assert report["precision"][title]["choice"]["chosen"] in ("fp32", "int8")


def test_what_auto_cannot_be_is_refused(street_root: Path) -> None:
    latency = {"target": "0.5x"}
    job = Recipe.model_validate({"build": {"backend": "auto"}, "prune": {"latency": latency}})
    with pytest.raises(VssError, match=r"auto and prune\.latency needs the runtime .* one of onnxruntime and openvino"):
        check_build(job, here=True)
    job = Recipe.model_validate({"build": {"backend": "openvino", "also": ["ov"]}})
    with pytest.raises(VssError, match=r"build\.backend and build\.also name openvino twice"):
        check_build(job, here=True)


@needs_openvino
def test_a_device_that_is_not_here_is_refused_first() -> None:
    job = Recipe.model_validate({"build": {"backend": "openvino", "openvino": {"device": "NPU.7"}}})
    with pytest.raises(VssError, match=r"OpenVINO sees no device NPU\.7"):
        check_build(job, here=True)
