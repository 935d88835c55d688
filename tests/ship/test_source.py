"""Engines in other precisions and of another runtime: their gates, calibration, options and side files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vss.core.errors import VssError
from vss.core.files import sha256_artefact, sha256_file
from vss.deploy import BACKENDS, BuildSpec
from vss.deploy.backends.trt_plan import BuildPlan, spans
from vss.deploy.backends.trt_runner import KIND, SCHEMA
from vss.deploy.quantize.layers import Net, read_onnx
from vss.deploy.quantize.precision import Precision, convert
from vss.deploy.quantize.qdq import observed
from vss.deploy.quantize.ranges import Method, measure, ranges_of
from vss.ship import bundle as bundling
from vss.ship import check, rebuild, ship, verify
from vss.ship.check import build_spec, open_engine
from vss.ship.source import open_run
from vss.ship.triton import parse

from .test_standalone import rows, start

INT8 = "engine pruned int8"


@pytest.fixture(scope="module")
def int8_run(seg_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run with an INT8 file whose other layers are float16, as `vss run` with `precision.kinds` leaves it."""
    run = Path(shutil.copytree(seg_run, tmp_path_factory.mktemp("int8") / "run"))
    plain, rng = run / "engine/a.onnx", np.random.default_rng(0)
    feeds = [{"image": rng.integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)} for _ in range(4)]
    histograms = measure(plain, feeds, observed(Net(read_onnx(plain))))
    ranges = ranges_of(plain, histograms, Method("minmax"), calibration={"sha256": "c" * 64, "ids": ["a", "b"]})
    ranges.save(run / "ranges/one.json")
    ranges_of(plain, histograms, Method("minmax"), calibration={"sha256": "d" * 64, "ids": ["a", "b"]}).save(
        run / "ranges/other.json"
    )
    convert(plain, run / "engine/a.int8.onnx", Precision("int8", elsewhere="fp16"), ranges)
    files = {"onnx": "engine/a.int8.onnx", "engine": "engine/a.int8.onnx"}
    report = json.loads((run / "report.json").read_text())
    artefact = {"backend": "onnxruntime", "spec": {"optimise": None}, "files": files}
    report["artefacts"][INT8] = sha256_artefact(run, artefact)
    report["rows"].append({"name": INT8, "miou_pct": 49.0})
    verdict = {"passed": True, "sentence": "passed: int8 is close enough."}
    figures = {"metric": "miou_pct", "baseline": 50.0, "candidate": 49.9, "drop": 0.1, "max_drop": 1.0}
    verdict |= figures
    verdict = {**verdict, "ship": [{"what": "pruned against baseline", **verdict}]}
    report["precision"] = {"engine pruned": {"choice": {"chosen": "int8"}, "int8": {"gate": verdict}}}
    (run / "report.json").write_text(json.dumps(report))
    return run


def test_the_engine_that_auto_kept_is_shipped(int8_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(int8_run, tmp_path / "run"))
    assert open_run(run).row == "engine pruned"
    report = json.loads((run / "report.json").read_text())
    report["recipe"]["build"] = {**report["recipe"].get("build", {}), "backend": "auto"}
    (run / "report.json").write_text(json.dumps(report))
    assert (open_run(run).row, open_run(run, "engine pruned").row) == (INT8, "engine pruned")


def test_an_int8_bundle_has_its_own_gate_and_its_calibration_list(int8_run: Path, tmp_path: Path) -> None:
    manifest = ship(int8_run, tmp_path / "b", row=INT8, samples=2)
    whats = ("int8 engine equals its network", "pruned against baseline")
    sentence = "passed: int8 is close enough."
    found = [(each["what"], each["passed"], each["sentence"]) for each in manifest.gate["checks"]]
    assert found == [(what, True, sentence) for what in whats]
    assert [link.what for link in manifest.chain] == ["weights", "plan", "calibration", "onnx", "engine", "report"]
    link = manifest.link("calibration")
    assert link is not None and link.file == "engine/ranges.json"
    listed = json.loads((tmp_path / "b" / link.file).read_text())
    assert listed["calibration"] == {"sha256": "c" * 64, "ids": ["a", "b"]}
    assert verify(tmp_path / "b")[-1]["status"] == "ok"
    assert manifest.metrics["miou_pct"] == 49.0


def test_a_file_that_must_run_as_written_does_so_everywhere(int8_run: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    manifest = ship(int8_run, bundle, row=INT8, samples=2)
    assert manifest.engine.as_written
    assert parse(bundle / "triton/onnxruntime/street/config.pbtxt").optimization.graph.level == 2
    assert parse(bundle / "triton/python/street/config.pbtxt").parameters["as_written"].string_value == "1"
    done = start(bundle, str(bundle / "samples/images"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0 and len(rows(done)) == 2, done.stderr
    with open_engine(bundle, manifest) as session:
        assert session.describe()["optimisation"] == "disabled"


def test_ranges_that_are_gone_are_named(int8_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(int8_run, tmp_path / "run"))
    (run / "ranges/one.json").unlink()
    with pytest.raises(VssError, match="does not hold the ranges of"):
        ship(run, tmp_path / "b", row=INT8)


# TensorRT, with ONNX Runtime in its place: what is written around an engine does not depend on who runs it


class Standing:
    """A backend whose engines are ONNX files with the side file of a TensorRT engine."""

    name = "tensorrt"
    gpu = "NVIDIA Z1"

    def build(self, onnx: Path, out: Path, spec: BuildSpec) -> Path:
        target = out.with_name(f"{out.stem}--z1{out.suffix}")
        shutil.copyfile(onnx, target)
        plan = spec.plan or BuildPlan(profiles=(spans({"image": ["batch", 32, 48, 3]}),))
        about = {
            "kind": KIND, "schema": SCHEMA, "tensorrt": "10.9", "sha256": sha256_file(target), "plan": plan.to_json(),
            "bytes": target.stat().st_size, "device": {"name": self.gpu, "capability": [9, 9]},
        }  # fmt: skip
        target.with_name(target.name + ".json").write_text(json.dumps(about))
        return target

    def open(self, artefact: Path, **options: Any) -> Any:
        return BACKENDS["onnxruntime"].open(artefact, **options)


@pytest.fixture
def trt_run(seg_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run = Path(shutil.copytree(seg_run, tmp_path / "run"))
    built = Standing().build(run / "engine/a.onnx", run / "engine/a.engine", BuildSpec())
    report = json.loads((run / "report.json").read_text())
    files = {"onnx": "engine/a.onnx", "engine": f"engine/{built.name}"}
    artefact = {"backend": "tensorrt", "spec": {"optimise": None, "plan": None}, "files": files}
    report["artefacts"]["engine pruned"] = sha256_artefact(run, artefact)
    (run / "report.json").write_text(json.dumps(report))
    for module in (bundling, check):
        monkeypatch.setattr(module, "available", lambda name: Standing())
    return run


def test_a_tensorrt_bundle_and_its_rebuild(trt_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "b"
    manifest = ship(trt_run, bundle, samples=2)
    assert manifest.triton == {"tensorrt": "triton/tensorrt"} and manifest.engine.backend == "tensorrt"
    assert manifest.engine.device == {
        "name": "NVIDIA Z1", "capability": "9.9", "tensorrt": "10.9", "hardware": "NONE", "version_compatible": False
    }  # fmt: skip
    names = set(manifest.files)
    wanted = {"trt_runner.py", "cpp/trt_example.cpp", "engine/model.onnx", "engine/built.engine"}
    assert wanted | {"engine/built.engine.json", "triton/tensorrt/street/1/model.plan"} <= names
    with pytest.raises(VssError, match=r"built for name NVIDIA Z1 \(here: no GPU\).*vss rebuild"):
        verify(bundle)
    here = [{"name": "NVIDIA Y2", "capability": "8.0"}]
    monkeypatch.setattr(check, "cuda_devices", lambda: here)
    with pytest.raises(VssError, match=r"name NVIDIA Z1 \(here: NVIDIA Y2\), capability 9\.9 \(here: 8\.0\)"):
        verify(bundle)
    monkeypatch.setattr(Standing, "gpu", "NVIDIA Y2")
    after = rebuild(bundle)
    assert after.engine.device is not None and after.engine.device["name"] == "NVIDIA Y2"
    assert after.engine.file == "engine/rebuilt.engine" and (bundle / "engine/rebuilt.engine.json").is_file()
    assert not (bundle / "engine/built.engine").exists() and len(after.rebuilds) == 1
    here[0] = {"name": "NVIDIA Y2", "capability": "9.9"}
    assert verify(bundle)[-1]["name"] == "samples"


def test_a_plugin_library_goes_along_and_the_server_is_told(trt_run: Path, tmp_path: Path) -> None:
    engine = next((trt_run / "engine").glob("a--z1.engine"))
    beside = engine.with_name(engine.name + ".json")
    about = json.loads(beside.read_text())
    beside.write_text(json.dumps(about | {"plan": about["plan"] | {"plugins": ["libvss.so"]}}))
    with pytest.raises(VssError, match=r"needs the plugins in libvss\.so, which the run does not hold"):
        ship(trt_run, tmp_path / "no")
    (trt_run / "engine/libvss.so").write_bytes(b"library")
    report = json.loads((trt_run / "report.json").read_text())
    artefact = report["artefacts"]["engine pruned"]
    artefact["files"]["plugins"] = "engine/libvss.so"
    report["artefacts"]["engine pruned"] = sha256_artefact(trt_run, artefact)
    (trt_run / "report.json").write_text(json.dumps(report))
    manifest = ship(trt_run, tmp_path / "b", samples=1)
    assert manifest.plugins() == ["engine/libvss.so"] and (tmp_path / "b/engine/libvss.so").read_bytes() == b"library"
    assert '"--backend-config=tensorrt,plugins=$PWD/engine/libvss.so"' in (tmp_path / "b/README.md").read_text()


def test_a_plan_comes_back_from_what_was_written_beside_the_engine(tmp_path: Path) -> None:
    library = tmp_path / "engine/libplugins.so"
    library.parent.mkdir()
    library.touch()
    profiles = (spans({"image": ["batch", 32, 48, 3]}, batches=(1, 4, 16)),)
    plan = BuildPlan(profiles=profiles, workspace_mib=512, hardware="AMPERE_PLUS", flags=("REFIT",), plugins=(library,))
    assert build_spec({"plan": json.loads(json.dumps(plan.to_json()))}, tmp_path) == BuildSpec(plan=plan)
    assert build_spec({"optimise": "basic"}, tmp_path) == BuildSpec(optimise="basic")
    with pytest.raises(VssError, match="does not know"):
        build_spec({"plan": plan.to_json() | {"magic": 1}}, tmp_path)
