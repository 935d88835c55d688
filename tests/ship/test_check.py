"""`vss verify`: every file that is touched is named; answers that differ fail; nothing leads out of the bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vss.core.errors import GateFailed, VssError
from vss.core.files import sha256_file
from vss.ship import read, ship, verify
from vss.ship.check import refuse_foreign
from vss.ship.manifest import MANIFEST, SUMS, seal, walk


@pytest.fixture
def copy(seg_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(seg_bundle, tmp_path / "bundle"))


def test_a_whole_bundle_passes(seg_bundle: Path) -> None:
    rows = verify(seg_bundle)
    assert [row["name"] for row in rows] == ["files", "hash chain", "gate", "server repositories", "engine", "samples"]
    assert {row["status"] for row in rows} == {"ok"}
    assert rows[-1]["detail"].startswith("3 images") and "distance 0 of 1" in rows[-1]["detail"]
    assert verify(seg_bundle, run=False)[-1] == {
        "name": "engine", "status": "skipped", "detail": "asked not to run it"
    }  # fmt: skip


def test_a_changed_byte_in_any_file_fails_by_name(copy: Path) -> None:
    names = list(walk(copy))
    assert len(names) > 20 and {MANIFEST, SUMS} < set(names)
    for name in names:
        path = copy / name
        before = path.read_bytes()
        position = len(before) // 2
        path.write_bytes(before[:position] + bytes([before[position] ^ 1]) + before[position + 1 :])
        with pytest.raises(VssError) as caught:
            verify(copy, run=False)
        assert name in str(caught.value), f"{name} was changed, and the sentence is: {caught.value}"
        path.write_bytes(before)
    verify(copy, run=False)


def test_missing_added_and_linked_files_fail_by_name(copy: Path, tmp_path: Path) -> None:
    (copy / "labels.txt").rename(tmp_path / "labels.txt")
    (copy / "extra.txt").write_text("")
    with pytest.raises(VssError, match=r"labels\.txt is missing; extra\.txt is not listed in the manifest"):
        verify(copy, run=False)
    (copy / "extra.txt").unlink()
    (copy / "labels.txt").symlink_to(tmp_path / "labels.txt")
    with pytest.raises(VssError, match=r"labels\.txt is a link or leads out of the bundle"):
        verify(copy, run=False)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "a\\b", "./a"])
def test_a_path_that_escapes_is_refused(copy: Path, path: str) -> None:
    data = json.loads((copy / MANIFEST).read_text())
    data["engine"]["file"] = path
    (copy / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(VssError, match=r"engine\.file is .*; .* is no plain path below the bundle"):
        verify(copy, run=False)


def test_another_engine_with_right_hashes_fails_the_samples(copy: Path, defect_bundle: Path) -> None:
    manifest = read(copy)
    for files in manifest.samples.expected:
        answer = np.load(copy / files["labels"])
        np.save(copy / files["labels"], (answer + 1) % 11)
    seal(copy, manifest)
    with pytest.raises(GateFailed, match="times the tolerance off"):
        verify(copy)
    better = manifest.samples.model_copy(update={"metrics": {"miou_pct": 99.0}})
    seal(copy, manifest.model_copy(update={"samples": better}))
    with pytest.raises(GateFailed, match=r"miou_pct of the samples is .* and was 99\.000"):
        verify(copy)


def test_an_onnx_file_of_other_weights_breaks_the_chain(copy: Path, logits_bundle: Path, defect_bundle: Path) -> None:
    manifest = read(copy)
    shutil.copyfile(defect_bundle / "engine/model.onnx", copy / "engine/model.onnx")
    digest = sha256_file(copy / "engine/model.onnx")
    changed = [x.model_copy(update={"sha256": digest}) if x.what in ("onnx", "engine") else x for x in manifest.chain]
    seal(copy, manifest.model_copy(update={"chain": changed}))
    with pytest.raises(VssError, match="made from other weights"):
        verify(copy, run=False)


def test_an_engine_for_another_gpu_is_refused(copy: Path) -> None:
    device: dict[str, Any] = {"name": "NVIDIA X9", "capability": "99.0", "tensorrt": "10.0"}
    manifest = read(copy)
    other = manifest.model_copy(update={"engine": manifest.engine.model_copy(update={"device": device})})
    with pytest.raises(VssError, match=r"built for name NVIDIA X9 .*vss rebuild"):
        refuse_foreign(other, copy)
    seal(copy, other)
    with pytest.raises(VssError, match=r"built for name NVIDIA X9"):
        verify(copy)


def test_a_bundle_that_lost_its_gate_is_refused(copy: Path) -> None:
    seal(copy, read(copy).model_copy(update={"gate": None}))
    with pytest.raises(VssError, match="no passed gate"):
        verify(copy, run=False)


def test_not_a_bundle(tmp_path: Path, seg_run: Path) -> None:
    with pytest.raises(VssError, match=r"manifest\.json does not exist"):
        verify(tmp_path)
    (tmp_path / MANIFEST).write_text((seg_run / "report.json").read_text())
    with pytest.raises(VssError, match=r"holds 'vss\.report'; expected a file of kind 'vss\.bundle'"):
        verify(tmp_path)


def test_a_newer_schema_is_refused(copy: Path) -> None:
    data = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(data | {"schema": 99}))
    with pytest.raises(VssError, match="reads up to 2: upgrade vss"):
        verify(copy)


def test_shipping_twice_gives_the_same_engine_and_samples(seg_run: Path, seg_bundle: Path, tmp_path: Path) -> None:
    again = ship(seg_run, tmp_path / "again", samples=3)
    first = read(seg_bundle)
    same = {n for n, f in again.files.items() if first.files[n] == f}
    assert set(first.files) - same <= {"MODEL_CARD.md"}
