"""A bundle whose engine is OpenVINO's: what it holds, that it verifies and is built anew, and its runner."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.ship.test_standalone import rows, start
from vss.core.environment import package_version
from vss.core.errors import VssError
from vss.core.files import sha256_file
from vss.deploy import onnx_file
from vss.ship import read, rebuild, verify
from vss.ship.manifest import seal
from vss.ship.server import Installation


@pytest.fixture
def copy(openvino_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(openvino_bundle, tmp_path / "bundle"))


def said(bundle: Path, **changes: str) -> None:
    """Make the engine of a bundle say something else of itself, with right hashes."""
    manifest = read(bundle)
    path = bundle / manifest.engine.file
    model = onnx.load(path)
    about = {"backend": "openvino", "device": "CPU", "precision": "f32"} | changes
    onnx_file.set_metadata(model, onnx_file.RUNTIME, json.dumps(about))
    onnx.save(model, path)
    digest = sha256_file(path)
    chain = [link.model_copy(update={"sha256": digest}) if link.what == "engine" else link for link in manifest.chain]
    seal(bundle, manifest.model_copy(update={"chain": chain}))


def test_what_is_in_the_bundle(openvino_bundle: Path) -> None:
    manifest = read(openvino_bundle)
    assert (manifest.engine.backend, list(manifest.triton)) == ("openvino", ["python"])
    assert manifest.engine.versions == {"openvino": package_version("openvino")}
    assert manifest.engine.spec["openvino"] == {"device": "CPU", "precision": "f32", "cache": None}
    assert sha256_file(openvino_bundle / manifest.engine.file) != sha256_file(openvino_bundle / manifest.onnx)
    assert onnx_file.runtime_of(openvino_bundle / manifest.engine.file) == "openvino"
    wanted = (openvino_bundle / "requirements.txt").read_text().splitlines()
    assert wanted[-1] == f"openvino=={package_version('openvino')}"
    assert {line.partition("==")[0] for line in wanted} == {"numpy", "pillow", "openvino"}
    readme = (openvino_bundle / "README.md").read_text()
    assert "needs numpy and openvino in the Python of the server" in readme


def test_it_verifies_and_is_built_anew(copy: Path) -> None:
    assert {row["status"] for row in verify(copy)} == {"ok"}
    after = rebuild(copy)
    assert after.engine.file == "engine/rebuilt.onnx" and verify(copy)[-1]["status"] == "ok"
    digest = sha256_file(copy / after.engine.file)
    assert [sha256_file(path) for path in (copy / "triton").rglob("model.onnx")] == [digest]


def test_the_runner_gives_the_shipped_labels_and_keeps_what_it_compiled(copy: Path, tmp_path: Path) -> None:
    samples, cache = read(copy).samples, tmp_path / "compiled"
    options = ["--batch", "2", "--threads", "1", "--device", "CPU", "--cache", str(cache)]
    done = start(copy, str(copy / "samples/images"), "--out", str(tmp_path), *options)
    assert done.returncode == 0 and len(rows(done)) == 2, done.stderr
    for path, files in zip(samples.images, samples.expected, strict=True):
        got = np.array(Image.open(tmp_path / f"{Path(path).stem}-labels.png"))
        assert np.array_equal(got, np.load(copy / files["labels"])[0])
    blobs = sorted(cache.rglob("*.blob"))
    assert len(blobs) == 2, "one for each size of batches"
    for blob in blobs:
        blob.write_bytes(blob.read_bytes()[:-1])
    again = start(copy, str(copy / samples.images[0]), "--cache", str(cache), "--threads", "1")
    assert again.returncode == 0 and rows(again)[0]["share"] == rows(done)[0]["share"]
    assert b"is not as it was written; it is compiled again" in again.stderr
    verify(copy, run=False)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "NPU"], b"OpenVINO sees no device NPU here (--device); it has CPU"),
        (["--provider", "cuda"], b"--provider is for engines of onnxruntime, and this one is of openvino"),
        (["--threads", "-1"], b"--threads is -1; expected 0 or more"),
        (["--cache", "{bundle}/compiled"], b"in the bundle, which stays as it is"),
        (["--cache", "{bundle}-file"], b"-file cannot be written (Not a directory); name another folder"),
        (["--backend", "onnxruntime"], b"the bundle has no such engine; it has openvino"),
    ],
)
def test_wrong_use_of_the_runner(options: list[str], words: bytes, copy: Path) -> None:
    Path(f"{copy}-file").write_text("")
    done = start(copy, str(copy / "samples/images"), *(each.format(bundle=copy) for each in options))
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert done.stderr.count(b"\n") == 1


def test_without_openvino_the_runner_says_what_to_install(copy: Path) -> None:
    without = "import sys; sys.modules['openvino'] = None; import runpy; sys.argv = sys.argv[1:]; "
    program = f"{without} runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-B", "-c", program, str(copy / "run.py"), str(copy / "samples/images")]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    assert b"the engine needs openvino" in done.stderr and b"run: pip install openvino" in done.stderr


def openvino_capabilities() -> list[str]:
    import openvino

    return list(openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "NPU"}, "OpenVINO sees no device NPU here"),
        ({"precision": "f16"}, "this CPU computes in"),
        ({"precision": "f8"}, "the metadata vss.runtime of"),
    ],
)
def test_an_engine_for_another_machine(
    changes: dict[str, str], words: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changes == {"precision": "f16"} and "FP16" in openvino_capabilities():
        pytest.skip("this CPU computes in f16")
    said(copy, **changes)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "onnx_runner", raising=False)
    program = runpy.run_path(str(copy / "run.py"))
    manifest = program["shipped"](copy / "manifest.json")
    with pytest.raises(program["UsageError"], match=words):
        program["Net"](manifest, threads=1)
    with pytest.raises(VssError, match=r"f8" if changes == {"precision": "f8"} else words):
        verify(copy)


def test_a_server_without_openvino_is_refused_before_it_starts(openvino_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "python").mkdir()
    manifest = read(openvino_bundle)
    for packages, fits in ((frozenset[str](), True), (frozenset({"openvino", "numpy"}), True), ({"numpy"}, False)):
        server = Installation(tmp_path / "tritonserver", tmp_path, packages=frozenset(packages))
        if fits:
            assert server.variant(manifest) == "python"
            continue
        with pytest.raises(VssError, match=r"has no openvino, which intel runs in; run: vss serve --get-server"):
            server.variant(manifest)
