from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vss.core.errors import VssError
from vss.data import class_weights, count_classes, open_data
from vss.data.counts import ClassCounts, weights_from_counts


def test_counts_are_those_of_a_plain_loop(street_root: Path) -> None:
    data = open_data("camvid", street_root)
    masks = [np.array(Image.open(pair.mask)) for pair in data.pairs("train")]
    counts = count_classes(data, data.pairs("train"))
    for index in range(11):
        holding = [mask for mask in masks if (mask == index).any()]
        assert counts.pixels[index] == sum(int((mask == index).sum()) for mask in masks)
        assert counts.images[index] == len(holding)
        assert counts.in_images[index] == sum(int((mask < 11).sum()) for mask in holding)
    assert counts.ignored == sum(int((mask == 11).sum()) for mask in masks) > 0


def test_weights_by_hand() -> None:
    # Two images of 100 labelled pixels: class 0 fills 90 and 100, class 1 fills 10 of the first, class 2 is absent.
    counts = ClassCounts(np.array([[90, 10, 0], [100, 0, 0]]), void=np.array([7, 0]))
    # f = 190/200, 10/100; median of the present ones is their mean, 0.525.
    assert np.allclose(weights_from_counts(counts, "median"), [0.525 / 0.95, 0.525 / 0.1, 1], rtol=1e-12)
    assert np.allclose(weights_from_counts(counts, "log"), [1 / np.log(1.97), 1 / np.log(1.07), 1], rtol=1e-12)
    assert weights_from_counts(counts, "none").tolist() == [1, 1, 1]
    with pytest.raises(VssError, match=r"unknown class weight mode 'medain'\. Did you mean 'median'"):
        weights_from_counts(counts, "medain")


def test_class_weights_are_large_for_rare_classes(street_root: Path) -> None:
    data = open_data("camvid", street_root)
    for mode in ("median", "log"):
        weights = dict(zip(data.class_names, class_weights(data, mode=mode).tolist(), strict=True))
        assert weights["Pole"] > 2 * weights["Road"] and weights["SignSymbol"] > 2 * weights["Building"]
    assert class_weights(data, mode="none").tolist() == [1.0] * 11


def test_camvid_counts(shared_data: Path) -> None:
    """The real training split, counted here with Pillow's own histogram."""
    data = open_data("camvid", shared_data / "camvid")
    total = np.zeros(256, np.int64)
    for pair in data.pairs("train"):
        total += np.array(Image.open(pair.mask).histogram())
    assert count_classes(data, data.pairs("train")).pixels.tolist() == total[:11].tolist()
