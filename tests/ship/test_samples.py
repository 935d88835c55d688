"""How far answers lie apart, and what they score."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from vss.core.errors import VssError
from vss.ship import read
from vss.ship.samples import compare, load_expected, metrics, write_samples


def test_labels_are_compared_by_share_and_logits_by_size() -> None:
    labels = np.zeros((1, 100, 100), np.int32)
    other = labels.copy()
    other[0, 0, :5] = 1
    assert compare({"labels": labels}, {"labels": labels}) == 0
    assert compare({"labels": labels}, {"labels": other}) == pytest.approx(5 / 10_000 / 0.001)
    seg = np.array([[-20.0, 4.0]], np.float32)
    assert compare({"seg": seg}, {"seg": seg + 0.01}) == pytest.approx(0.01 / 20 / 1e-3, rel=1e-3)
    worst = compare({"labels": labels, "seg": seg}, {"labels": other, "seg": seg})
    assert worst == compare({"labels": labels}, {"labels": other})
    with pytest.raises(VssError, match="'seg' of the engine is nothing"):
        compare({"seg": seg}, {})
    with pytest.raises(VssError, match=r"is \(1, 1\); the bundle was shipped with \(1, 2\)"):
        compare({"seg": seg}, {"seg": seg[:, :1]})


def test_decisions_are_scored_against_the_masks(defect_bundle: Path) -> None:
    manifest = read(defect_bundle)
    defective = [bool(np.array(Image.open(defect_bundle / path)).any()) for path in manifest.samples.truth]
    shipped = [load_expected(defect_bundle, files) for files in manifest.samples.expected]
    for flip in (1.0, -1.0):
        answers = [
            one | {"decision": np.full((1, 1), flip * (3.0 if bad else -3.0), np.float32)}
            for one, bad in zip(shipped, defective, strict=True)
        ]
        assert metrics(defect_bundle, manifest.samples, answers, manifest) == {
            "decision_acc_pct": 100.0 if flip > 0 else 0.0
        }


def test_miou_of_a_perfect_answer_is_100(seg_bundle: Path) -> None:
    manifest = read(seg_bundle)
    truths = [np.array(Image.open(seg_bundle / path)) for path in manifest.samples.truth]
    answers = [{"labels": np.where(truth == 255, 0, truth)[None].astype(np.int32)} for truth in truths]
    assert metrics(seg_bundle, manifest.samples, answers, manifest) == {"miou_pct": 100.0, "pixel_acc_pct": 100.0}


def test_samples_keep_the_upright_pixels_and_nothing_of_the_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x013B] = 6, "Secret Person"  # a quarter turn, the artist
    exif.get_ifd(0x8825)[2] = (47.0, 22.0, 11.0)  # GPS
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    path = tmp_path / "photo.jpg"
    Image.fromarray(pixels).save(path, exif=exif, comment=b"Secret Person")
    assert b"Secret Person" in path.read_bytes() and Image.open(path).getexif()
    upright = np.array(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    image = {"size": [12, 8], "mean": [0.5] * 3, "std": [0.2] * 3}
    manifest: Any = SimpleNamespace(
        image=SimpleNamespace(model_dump=lambda: image), inputs={"image": SimpleNamespace(dtype="uint8")},
        task="defect", threshold=None,
    )  # fmt: skip
    session: Any = SimpleNamespace(run=lambda feed: {"score": np.zeros(1, np.float32)})
    mask = np.zeros((12, 8), np.uint8)
    made = write_samples(tmp_path / "bundle", [("street/photo", path, mask)], session, manifest, "a set")
    (written,) = made.images
    assert np.array_equal(np.array(Image.open(tmp_path / "bundle" / written)), upright) and upright.shape[:2] == (12, 8)
    files = [file for file in (tmp_path / "bundle").rglob("*") if file.is_file()]
    assert len(files) == 3 and not any(b"Secret" in file.read_bytes() for file in files)
    for file in (file for file in files if file.suffix == ".png"):
        assert not Image.open(file).getexif() and not Image.open(file).info
