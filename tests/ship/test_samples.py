"""How far answers lie apart, and what they score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vss.errors import VssError
from vss.ship import read
from vss.ship.samples import compare, load_expected, metrics


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
