from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vss.core.errors import VssError
from vss.data.check import check, difference_hash

Write = Callable[..., Path]


def test_a_sound_set(street_root: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = check(street_root, progress=lambda done, total: calls.append((done, total)))
    assert report["ok"] and report["problems"] == [] and report["dataset"] == "camvid"
    assert {split: part["pairs"] for split, part in report["splits"].items()} == {"train": 24, "val": 6, "test": 8}
    assert json.loads(json.dumps(report)) == report
    assert calls[-1] == (38, 38) and len(calls) == 38
    masks = [np.array(Image.open(path)) for path in sorted((street_root / "valannot").glob("*.png"))]
    pixels = sum(int((mask < 11).sum()) for mask in masks)
    sky = report["splits"]["val"]["classes"]["Sky"]
    assert sky["pixels"] == sum(int((mask == 0).sum()) for mask in masks)
    assert sky["pixels_pct"] == pytest.approx(100 * sky["pixels"] / pixels, rel=1e-12)
    assert sky["images"] == sum(bool((mask == 0).any()) for mask in masks)
    void = sum(int((mask == 11).sum()) for mask in masks)
    assert report["splits"]["val"]["ignored_pct"] == pytest.approx(100 * void / (void + pixels), rel=1e-12)
    sizes = report["splits"]["val"]["sizes"]
    assert sizes["height"] == [min(len(mask) for mask in masks), max(len(mask) for mask in masks)]
    assert sizes["distinct"] == len({mask.shape for mask in masks})


def test_every_kind_of_damage_is_found(camvid_root: Path, write: Write) -> None:
    train, labels = camvid_root / "train", camvid_root / "trainannot"
    write(labels / "a0.png", np.full((8, 10), 12, np.uint8))
    write(labels / "a1.png", np.zeros((8, 9), np.uint8))
    (train / "a2.png").write_bytes((train / "a2.png").read_bytes()[:70])
    write(train / "lonely.png", np.zeros((8, 10, 3), np.uint8))
    write(labels / "widow.png", np.zeros((8, 10), np.uint8))
    for name in ("b0", "b1"):
        write(labels / f"{name}.png", np.zeros((8, 10), np.uint8))
        shutil.copy(camvid_root / "val" / "a3.png", train / f"{name}.png")
    write(train / "b2.png", np.zeros((8, 10, 3), np.uint8))
    write(labels / "b2.png", np.zeros((8, 10, 3), np.uint8))
    report = check(camvid_root, "camvid")
    assert not report["ok"]
    assert report["unknown_labels"] == [{"mask": str(labels / "a0.png"), "values": [12]}]
    assert report["size_mismatches"] == [str(labels / "a1.png")]
    assert [line.split(" cannot")[0] for line in report["corrupt"][:1]] == [str(train / "a2.png")]
    assert "b2.png has mode 'RGB'" in report["corrupt"][1] and len(report["corrupt"]) == 2
    assert report["images_without_mask"] == [str(train / "lonely.png")]
    assert report["masks_without_image"] == [str(labels / "widow.png")]
    assert [sorted(group) for group in report["duplicates"]] == [["train/b0", "train/b1", "val/a3"]]
    assert [sentence.split(":")[0] for sentence in report["problems"]] == [
        "1 image without a mask",
        "2 files that cannot be read",
        "1 mask of another size than its image",
        "1 mask with labels outside the classes",
        "1 image that is in more than one split",
    ]
    assert (
        "is 8x9, its image 8x10 (height x width)" in report["problems"][2]
        and "label values 12" in report["problems"][3]
    )
    assert any(sentence.startswith("1 mask without an image") for sentence in report["warnings"])


def test_duplicates_are_of_pixels_not_of_files(camvid_root: Path) -> None:
    Image.open(camvid_root / "val" / "a3.png").save(camvid_root / "train" / "a0.bmp")
    (camvid_root / "train" / "a0.png").unlink()
    shutil.copy(camvid_root / "train" / "a1.png", camvid_root / "train" / "a2.png")  # one split: no leak
    assert check(camvid_root)["duplicates"] == [["train/a0", "val/a3"]]


def test_near_duplicates(camvid_root: Path, street_root: Path, write: Write, tmp_path: Path) -> None:
    source = Image.open(sorted((street_root / "train").glob("*.jpg"))[0])
    for split, quality in (("train", 95), ("val", 60)):
        source.save(camvid_root / split / "near.jpg", quality=quality)
        write(camvid_root / f"{split}annot" / "near.png", np.zeros((source.height, source.width), np.uint8))
    report = check(camvid_root, near=True)
    assert report["near_duplicates"] == [["train/near", "val/near"]] and report["duplicates"] == []
    assert report["ok"] and any("1 near duplicate over splits" in sentence for sentence in report["warnings"])


def test_difference_hash_bits() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 252, 28, dtype=np.uint8), (8, 1)))
    assert difference_hash(ramp) == 2**64 - 1
    assert difference_hash(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0


def test_empty_split_and_unseen_class(camvid_root: Path, write: Write) -> None:
    (camvid_root / "test").mkdir()
    for number in range(3):
        write(camvid_root / "trainannot" / f"a{number}.png", np.arange(80, dtype=np.uint8).reshape(8, 10) % 10)
    report = check(camvid_root)
    assert report["problems"] == ["split 'test' is empty"]
    assert report["warnings"] == ["class 'Bicyclist' is in val and in no training mask: its labels may be shifted"]


def test_an_absent_split_is_a_problem_or_a_warning(camvid_root: Path) -> None:
    report = check(camvid_root)
    assert report["problems"] == [] and [line for line in report["warnings"] if "no split" in line] == [
        "no split 'test' (it has train, val); the scores that are reported need test and testannot, or report on val "
        "with --split val (in a recipe, split: val)"
    ]
    for folder in ("val", "valannot"):
        shutil.rmtree(camvid_root / folder)
    problems = check(camvid_root)["problems"]
    assert problems == ["no split 'val' (it has train); training (and --split val) needs val and valannot"]


def test_unknown_layout_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(VssError, match=r"the layout of .* is not known; name the dataset"):
        check(tmp_path)
    with pytest.raises(VssError, match="does not exist"):
        check(tmp_path / "nothing")


def test_real_sets(shared_data: Path) -> None:
    report = check(shared_data / "ksdd1_230")
    assert report["dataset"] == "ksdd2" and report["ok"], report["problems"]
    defects = [report["splits"][split]["classes"]["defect"]["images"] for split in ("train", "val", "test")]
    assert defects == [27, 5, 18]
    report = check(shared_data / "cityscapes_mini")
    assert report["dataset"] == "cityscapes" and report["ok"], report["problems"]
    assert report["splits"]["train"]["sizes"]["common"] == {"1024x2048": 8}
