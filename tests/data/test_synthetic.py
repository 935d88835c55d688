from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vss.core.errors import VssError
from vss.data import count_classes, open_data
from vss.data.images import read_stored_mask
from vss.data.synthetic import write_defects, write_street

SMALL = {"counts": {"train": 4, "val": 1, "test": 2}, "size": ((64, 80), 96)}


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_street_is_a_function_of_the_seed(tmp_path: Path) -> None:
    one = write_street(tmp_path / "one", seed=5, workers=1, **SMALL)
    two = write_street(tmp_path / "two", seed=5, workers=4, **SMALL)
    other = write_street(tmp_path / "other", seed=6, **SMALL)
    assert digests(one) == digests(two) and len(digests(one)) == 2 * 7 + 2
    assert not set(digests(one).values()) - {digests(one)["classes.txt"]} & set(digests(other).values())
    more = write_street(tmp_path / "more", seed=5, counts={"train": 6}, size=SMALL["size"])
    common = [name for name in digests(more) if name.startswith("train")][:4]
    assert len(common) == 4 and all(digests(more)[name] == digests(one)[name] for name in common)


def test_defects_are_a_function_of_the_seed(tmp_path: Path) -> None:
    arguments = {"counts": {"train": 8, "test": 4}, "size": (96, (40, 48))}
    one = write_defects(tmp_path / "one", seed=5, workers=1, **arguments)
    two = write_defects(tmp_path / "two", seed=5, workers=3, **arguments)
    assert digests(one) == digests(two) and len(digests(one)) == 2 * 12 + 1
    assert digests(one) != digests(write_defects(tmp_path / "other", seed=6, **arguments))


def test_street_statistics(street_root: Path) -> None:
    data = open_data("camvid", street_root)
    counts = count_classes(data, data.pairs("train"))
    share = dict(zip(data.class_names, counts.pixels / counts.pixels.sum(), strict=True))
    assert counts.images.min() >= 6, "every class is in a quarter of the training images at least"
    assert all(share[name] < 0.04 for name in ("Pole", "SignSymbol", "Pedestrian", "Bicyclist", "Fence"))
    assert all(share[name] > 0.06 for name in ("Sky", "Building", "Road", "Tree"))
    assert 0.005 < counts.ignored / (counts.ignored + counts.pixels.sum()) < 0.08
    sizes = {Image.open(pair.image).size for pair in data.pairs("train")}
    assert len(sizes) > 10 and all(92 <= w <= 100 and 68 <= h <= 76 for w, h in sizes)


def test_colour_alone_does_not_solve_the_street(street_root: Path) -> None:
    """The best label for each of 512 colours, fitted to the very images it is scored on, stays far from the truth."""
    data = open_data("camvid", street_root)
    table = np.zeros((512, 12), np.int64)
    for pair in data.pairs("train"):
        image, mask = data.read(pair)
        bins = (np.asarray(image) // 32).astype(np.int64) @ np.array([64, 8, 1])
        np.add.at(table, (bins.ravel(), np.minimum(mask, 11).ravel()), 1)
    best = table[:, :11].argmax(axis=1)
    hits = np.array([table[best == index, index].sum() for index in range(11)])
    predicted = np.array([table[best == index, :11].sum() for index in range(11)])
    iou = hits / (predicted + table[:, :11].sum(axis=0) - hits)
    assert 0.05 < iou.mean() < 0.45


def test_defect_statistics(defect_root: Path) -> None:
    for split, first, total, positives in (("train", 10000, 40, 5), ("test", 20000, 16, 2)):
        names = sorted(path.name for path in (defect_root / split).glob("*_GT.png"))
        assert names == [f"{first + number}_GT.png" for number in range(total)]
        masks = [read_stored_mask(defect_root / split / name) for name in names]
        assert sum(bool(mask.any()) for mask in masks) == positives
        assert set(np.unique(np.concatenate([mask.ravel() for mask in masks]))) == {0, 255}
    data = open_data("ksdd2", defect_root)
    for pair in data.pairs("test"):
        image, mask = data.read(pair)
        grey = np.asarray(image.convert("L"), dtype=np.float64)
        if mask.any():
            ring = (np.abs(np.roll(mask, 4, 0).astype(int) - mask) == 1) & (mask == 0)
            assert abs(grey[mask == 1].mean() - grey[ring].mean()) > 8


def test_a_written_set_is_kept_and_a_foreign_folder_refused(tmp_path: Path) -> None:
    root = write_street(tmp_path / "street", seed=5, **SMALL)
    before = (root / "classes.txt").stat().st_mtime_ns
    assert write_street(root, seed=5, **SMALL) == root and (root / "classes.txt").stat().st_mtime_ns == before
    for call in (lambda: write_street(root, seed=6, **SMALL), lambda: write_defects(root)):
        with pytest.raises(VssError, match="exists and holds something else; choose a new folder"):
            call()
    (tmp_path / "empty").mkdir()
    assert open_data("camvid", write_street(tmp_path / "empty", **SMALL)).num_classes == 11


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        write_street(tmp_path / "street", progress=stop, **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"counts": {"train": 0}}, "expected at least 1 image"),
        ({"counts": {"holdout": 3}}, "some of train, val, test"),
        ({"size": (16, 96)}, "range of at least 32"),
        ({"size": ((90, 80), 96)}, "range of at least 32"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(VssError, match=sentence):
        write_street(tmp_path / "street", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_positives_outside_the_range(tmp_path: Path) -> None:
    with pytest.raises(VssError, match=r"positives is 1\.5; expected a share between 0 and 1"):
        write_defects(tmp_path / "defects", positives=1.5)
