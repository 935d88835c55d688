"""vss.data.counts: every class is shown, the choice is seeded, and test images never get in."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vss.core.errors import VssError
from vss.core.files import sha256_file
from vss.data import Preprocess, open_data
from vss.data.counts import choose_calibration


def rare_root(root: Path, *, images: int = 40, rare: int = 2) -> Path:
    """CamVid layout, classes 0 and 1 everywhere, class 7 in `rare` of the images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("val", 2), ("test", 2)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for index in range(count):
            mask = np.zeros((8, 10), np.uint8)
            mask[:4] = 1
            if split == "train" and index < rare:
                mask[0, 0] = 7
            name = f"{split}{index:03d}.png"
            Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)).save(root / split / name)
            Image.fromarray(mask).save(root / f"{split}annot" / name)
    return root


@pytest.mark.parametrize("seed", range(5))
def test_a_class_of_two_images_in_forty_is_always_there(tmp_path: Path, seed: int) -> None:
    data = open_data("camvid", rare_root(tmp_path / "d"))
    chosen = choose_calibration(data, count=8, seed=seed)
    ids = [pair.id for pair in chosen.pairs]
    assert len(chosen) == 8 == len(set(ids)) and ids == sorted(ids)
    assert {"train000", "train001"} & set(ids)
    counts = chosen.manifest()["images_per_class"]
    assert counts["Sky"] == counts["Building"] == 8 and counts["Fence"] >= 1


def test_defects_are_a_quarter_of_the_set(defect_root: Path) -> None:
    data = open_data("ksdd2", defect_root)
    defective = {pair.id for pair in data.pairs("train") if data.read_mask(pair.mask).any()}
    chosen = choose_calibration(data, count=12)
    found = defective & {pair.id for pair in chosen.pairs}
    assert len(found) >= min(len(defective), 3) and chosen.images_per_class[1] == len(found)


def test_the_choice_is_seeded_and_hashed(tmp_path: Path) -> None:
    data = open_data("camvid", rare_root(tmp_path / "d"))
    one, same, other = (choose_calibration(data, count=8, seed=seed) for seed in (3, 3, 4))
    assert one.manifest() == same.manifest()
    assert one.sha256() != other.sha256()
    pair = one.pairs[0]
    assert one.manifest()["files"][pair.id] == sha256_file(pair.image)
    Image.fromarray(np.zeros((8, 10, 3), np.uint8)).save(pair.image)
    assert choose_calibration(data, count=8, seed=3).sha256() != one.sha256()


def test_batches_are_the_preprocessed_images(tmp_path: Path) -> None:
    data = open_data("camvid", rare_root(tmp_path / "d"))
    chosen = choose_calibration(data, count=5)
    batches = list(chosen.batches(Preprocess(size=(8, 10)), size=2))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 8, 10), (2, 3, 8, 10), (1, 3, 8, 10)]
    with Image.open(chosen.pairs[4].image) as image:
        assert np.array_equal(batches[2][0].permute(1, 2, 0).numpy(), np.asarray(image))


def test_what_is_refused(tmp_path: Path) -> None:
    data = open_data("camvid", rare_root(tmp_path / "d"))
    for split in ("test", "val"):
        with pytest.raises(VssError, match=f"asked for on the {split} split; ranges come from training images alone"):
            choose_calibration(data, split=split)
    with pytest.raises(VssError, match="'test000' belongs to the test split"):
        choose_calibration(data, ids=["train000", "test000"])
    with pytest.raises(VssError, match=r"unknown training image .*'train00x'"):
        choose_calibration(data, ids=["train00x"])
    with pytest.raises(VssError, match="is empty"):
        choose_calibration(data, ids=[])
    with pytest.raises(VssError, match="is empty"):
        choose_calibration(data, count=0)
    with Image.open(tmp_path / "d" / "trainannot" / "train001.png") as mask:
        other = np.where(np.asarray(mask) == 7, 8, mask).astype(np.uint8)
    Image.fromarray(other).save(tmp_path / "d" / "trainannot" / "train001.png")
    with pytest.raises(VssError, match=r"1 calibration images cannot show every class .* 2 can"):
        choose_calibration(data, count=1)


def test_one_class_is_refused(tmp_path: Path) -> None:
    root = rare_root(tmp_path / "d", rare=0)
    for mask in (root / "trainannot").iterdir():
        Image.fromarray(np.zeros((8, 10), np.uint8)).save(mask)
    with pytest.raises(VssError, match="4 calibration images show Sky alone"):
        choose_calibration(open_data("camvid", root), count=4)


def test_a_test_image_under_a_training_name_is_found(tmp_path: Path) -> None:
    root = rare_root(tmp_path / "d", images=4)
    shutil.copyfile(root / "test" / "test001.png", root / "train" / "train002.png")
    with pytest.raises(VssError, match=r"train002.png is also the test image test001.png"):
        choose_calibration(open_data("camvid", root), count=4)
