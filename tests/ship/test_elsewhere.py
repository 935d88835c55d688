"""Engines of TensorRT for RTX in a bundle: beside the judged one, verified, built anew, refused without a GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.deploy.rtx import needs_rtx
from tests.ship.test_standalone import start
from vss.cli.main import app
from vss.core.errors import VssError
from vss.core.files import sha256_file
from vss.core.report import read_report, write_report
from vss.deploy import BACKENDS, Binding, BuildPlan, BuildSpec
from vss.deploy.backends.trt_runner import ALONE, read_about
from vss.ship import read, ship, verify
from vss.ship.check import rebuild_elsewhere
from vss.ship.manifest import seal, walk
from vss.ship.triton import Serving, write_repository

pytestmark = needs_rtx
TARGETS = ("sm86", "sm89")


@pytest.fixture(scope="module")
def bundle(seg_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that has built an engine for two GPUs beside its own; never changed by a test: copy it."""
    run = tmp_path_factory.mktemp("elsewhere") / "run"
    shutil.copytree(seg_run, run)
    name = "engine/finetuned.fp32.tensorrt_rtx.engine"
    spec = BuildSpec(plan=BuildPlan(targets=TARGETS))
    built = BACKENDS["tensorrt_rtx"].build(run / "engine/a.onnx", run / name, spec)
    about = read_about(built) or {}
    row = {
        "name": "engine pruned", "runtime": "TensorRT for RTX", "version": about["tensorrt"], "targets": TARGETS,
        "precision": "fp32", "file": name, "sha256": about["sha256"], "size_mib": about["bytes"] / 2**20,
        "build_seconds": about["build_seconds"], "layers": about["layers"], "passed": True, "sentence": "as asked",
    }  # fmt: skip
    failed = row | {"precision": "int8", "file": None, "sha256": None, "passed": False, "sentence": "not built"}
    write_report(run / "report.json", {**read_report(run / "report.json"), "built": [row, failed]})
    ship(run, run.parent / "bundle", samples=2)
    return run.parent / "bundle"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def test_what_is_in_the_bundle(bundle: Path) -> None:
    manifest = read(bundle)
    (one,) = manifest.elsewhere
    assert (one.backend, one.targets, one.where) == ("tensorrt_rtx", list(TARGETS), "sm86, sm89")
    assert one.file == f"engine/sm86-sm89-rtx{one.version}.engine" and (bundle / one.file).is_file()
    assert manifest.engine.backend == "onnxruntime" and "tensorrt" not in manifest.triton
    assert all((bundle / name).is_file() for name in ALONE)
    wanted = (bundle / "requirements-elsewhere.txt").read_text().splitlines()
    assert wanted == ["numpy", "pillow", "cuda-python", f"tensorrt-rtx-cu13=={one.version}"]
    readme = " ".join((bundle / "README.md").read_text().split())
    assert "They were not run" in readme and one.file in readme and "--backend tensorrt_rtx" in readme
    about = read_about(bundle / one.file)
    assert about is not None and "commands" not in about and about["onnx_sha256"] == sha256_file(bundle / manifest.onnx)


def test_verify_ties_an_engine_to_the_file_it_was_built_of(copy: Path) -> None:
    rows = {row["name"]: row for row in verify(copy)}
    assert rows["engines for GPUs elsewhere"]["detail"].endswith("for sm86, sm89: of engine/model.onnx, not run")
    assert rows["samples"]["status"] == "ok"
    manifest = read(copy)
    beside = copy / f"{manifest.elsewhere[0].file}.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"onnx_sha256": "0" * 64}))
    seal(copy, manifest)
    with pytest.raises(
        VssError, match=r"was not built of engine/model\.onnx; run: vss rebuild .* --backend tensorrt_rtx"
    ):
        verify(copy, run=False)
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"onnx_sha256": sha256_file(copy / manifest.onnx)}))
    one = manifest.elsewhere[0].model_copy(update={"targets": ["sm120"]})
    seal(copy, manifest.model_copy(update={"elsewhere": [one]}))
    with pytest.raises(VssError, match="is for other GPUs or of another version than the manifest says"):
        verify(copy, run=False)


def test_rebuild_makes_it_for_other_gpus(copy: Path) -> None:
    before = read(copy)
    done = CliRunner().invoke(app, ["rebuild", str(copy), "--backend", "tensorrt_rtx", "--targets", "sm120,sm86"])
    assert done.exit_code == 0, done.output
    assert "built and checked, not run" in " ".join(done.output.split())
    after = read(copy)
    (one,) = after.elsewhere
    assert one.targets == ["sm120", "sm86"] and after.engine == before.engine and after.chain == before.chain
    assert after.rebuilds[-1]["samples"] is None and after.rebuilds[-1]["file"] == one.file
    assert before.elsewhere[0].file not in set(walk(copy))
    assert verify(copy, run=False)[-2]["status"] == "ok"
    again = rebuild_elsewhere(copy, "tensorrt_rtx")
    assert again.elsewhere[0].targets == ["sm120", "sm86"] and verify(copy, run=False)[-2]["status"] == "ok"
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]


def test_a_bundle_without_one_gets_one(seg_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(seg_bundle, tmp_path / "bundle"))
    assert rebuild_elsewhere(copy, "tensorrt_rtx", ["sm86"]).elsewhere[0].targets == ["sm86"]
    assert all((copy / name).is_file() for name in (*ALONE, "requirements-elsewhere.txt"))
    assert "They were not run" in " ".join((copy / "README.md").read_text().split())
    assert verify(copy, run=False)[-2]["name"] == "engines for GPUs elsewhere"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backend", "tensorrt"], "builds no engines for GPUs elsewhere; expected tensorrt_rtx"),
        (["--backend", "tensorrt_rtx", "--targets", "sm90"], "sm90 (H100, H200) is served by TensorRT"),
        (["--targets", "sm86"], "--targets is for --backend tensorrt_rtx; give both"),
    ],
)
def test_rebuilds_that_are_refused(options: list[str], words: str, copy: Path) -> None:
    before = {name: sha256_file(copy / name) for name in walk(copy)}
    done = CliRunner().invoke(app, ["rebuild", str(copy), *options])
    assert done.exit_code == 2 and words in " ".join(done.output.split())
    assert {name: sha256_file(copy / name) for name in walk(copy)} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backend", "tensorrt_rtx", "--cuda-graph", "--runtime-cache", "kernels"], b"libcuda.so.1"),
        (["--backend", "tensorrt"], b"the bundle has no such engine; it has tensorrt_rtx, onnxruntime"),
        (["--cuda-graph"], b"--cuda-graph is for engines of tensorrt and tensorrt_rtx, and this one is of onnxruntime"),
        (["--runtime-cache", "kernels"], b"--runtime-cache is for engines of tensorrt_rtx"),
    ],
)
def test_the_runner_without_a_gpu(options: list[str], words: bytes, bundle: Path) -> None:
    done = start(bundle, str(bundle / "samples/images"), *options)
    assert done.returncode == 2 and words in done.stderr and b"Traceback" not in done.stderr


def test_triton_does_not_load_it(bundle: Path, tmp_path: Path) -> None:
    engine = bundle / read(bundle).elsewhere[0].file
    ends = {"image": Binding((None, 32, 48, 3), "uint8")}, {"labels": Binding((None, 32, 48), "int32")}
    with pytest.raises(VssError, match="Triton's tensorrt backend does not load; serve the ONNX file by onnxruntime"):
        write_repository(tmp_path, "tensorrt", Serving("net", *ends), engine)
