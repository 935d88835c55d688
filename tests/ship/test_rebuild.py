"""`vss rebuild`: a new engine from the bundle's ONNX file, judged by the samples, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from vss.core.errors import GateFailed, VssError
from vss.core.files import sha256_file
from vss.ship import read, rebuild, verify
from vss.ship.manifest import Samples, seal, walk


@pytest.fixture
def copy(seg_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(seg_bundle, tmp_path / "bundle"))


def test_the_new_engine_is_everywhere_and_noted(copy: Path, seg_bundle: Path) -> None:
    before = read(copy)
    after = rebuild(copy, options={"optimise": "basic"})
    assert after == read(copy) and verify(copy)[-1]["status"] == "ok"
    link, engine = after.link("engine"), after.engine
    assert link is not None and link.file == engine.file == "engine/rebuilt.onnx" and engine.spec["optimise"] == "basic"
    digest = sha256_file(copy / engine.file)
    assert digest == link.sha256 == after.rebuilds[0]["engine_sha256"] != sha256_file(copy / after.onnx)
    assert after.rebuilds[0]["samples"]["metrics"] == pytest.approx(before.samples.metrics)
    assert {sha256_file(path) for path in (copy / "triton").rglob("model.onnx")} == {digest}
    assert after.link("onnx") == before.link("onnx") and (copy / after.onnx).is_file()
    again = rebuild(copy)
    assert len(again.rebuilds) == 2 and sorted(walk(copy)) == sorted({*walk(seg_bundle), "engine/rebuilt.onnx"})


def test_a_worse_engine_leaves_the_bundle_alone(copy: Path) -> None:
    manifest = read(copy)
    for files in manifest.samples.expected:
        np.save(copy / files["labels"], (np.load(copy / files["labels"]) + 1) % 11)
    seal(copy, manifest)
    before = {name: sha256_file(copy / name) for name in walk(copy)}
    with pytest.raises(GateFailed, match="tolerance off"):
        rebuild(copy)
    assert {name: sha256_file(copy / name) for name in walk(copy)} == before
    assert [path.name for path in copy.parent.iterdir()] == ["bundle"]


def test_refusals(copy: Path) -> None:
    manifest = read(copy)
    with pytest.raises(VssError, match="settings that this version of vss does not know"):
        rebuild(copy, options={"magic": 1})
    (copy / "labels.txt").write_text("changed")
    with pytest.raises(VssError, match=r"labels\.txt does not have the hash"):
        rebuild(copy)
    seal(copy, manifest.model_copy(update={"samples": Samples()}))
    with pytest.raises(VssError, match="holds no samples"):
        rebuild(copy)
