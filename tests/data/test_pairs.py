from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vss.core.errors import VssError
from vss.data import BadSampleError, SegData, guess_layout, open_data
from vss.data.base import Pair
from vss.data.images import read_stored_mask
from vss.data.readers import carve_val

Write = Callable[..., Path]

# cityscapesScripts, helpers/labels.py: labelId -> trainId, written out.
TRAIN_IDS = [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
TRAIN_IDS += [255, 255, 16, 17, 18]


def sizes(data: SegData) -> dict[str, int]:
    return {split: len(pairs) for split, pairs in data.splits.items()}


def defective(data: SegData, split: str) -> int:
    return sum(bool(read_stored_mask(pair.mask).any()) for pair in data.pairs(split))


def test_camvid_generated(street_root: Path) -> None:
    data = open_data("camvid", street_root)
    assert sizes(data) == {"train": 24, "val": 6, "test": 8}
    assert data.class_names[0] == "Sky" and data.class_names[10] == "Bicyclist" and data.num_classes == 11
    assert data.palette.shape == (11, 3) and data.palette.dtype == np.uint8
    assert len({tuple(colour) for colour in data.palette.tolist()}) == 11
    assert all(pair.image.stem == pair.mask.stem == pair.id for pair in data.pairs("train"))
    for part in ("11 classes", "void ignored", "24 train, 6 val, 8 test", "one confusion matrix", "resolution"):
        assert part in data.protocol


def test_camvid_real(shared_data: Path) -> None:
    data = open_data("camvid", shared_data / "camvid")
    assert sizes(data) == {"train": 367, "val": 101, "test": 233}
    for split in ("train", "val", "test"):
        listed = (shared_data / "camvid" / f"{split}.txt").read_text().split()
        assert [pair.id for pair in data.pairs(split)] == sorted(listed)
    image, mask = data.read(data.pairs("test")[0])
    assert image.size == (480, 360) and mask.shape == (360, 480)
    assert set(np.unique(mask)) <= {*range(11), 255}


def test_camvid_decode_table(camvid_root: Path) -> None:
    stored = np.array([[*range(12), 255]], np.uint8)
    assert open_data("camvid", camvid_root).decode(stored).tolist() == [[*range(11), 255, 255]]


def test_camvid_class_names_file(camvid_root: Path) -> None:
    names = [f"class {index}" for index in range(11)]
    (camvid_root / "classes.txt").write_text("\n".join([*names, "void"]) + "\n")
    assert open_data("camvid", camvid_root).class_names == tuple(names)
    (camvid_root / "classes.txt").write_text("sky\nroad\n")
    with pytest.raises(VssError, match="names 2 classes; the camvid layout has 11 and void: use the 'masks' layout"):
        open_data("camvid", camvid_root)


def test_any_image_extension(camvid_root: Path) -> None:
    for name, suffix in (("a0", ".bmp"), ("a1", ".TIFF"), ("a2", ".webp")):
        image = Image.open(camvid_root / "train" / f"{name}.png")
        image.save(camvid_root / "train" / f"{name}{suffix}")
        (camvid_root / "train" / f"{name}.png").unlink()
    (camvid_root / "train" / "notes.txt").write_text("no image")
    (camvid_root / "train" / "._a0.png").write_bytes(b"metadata of an archive")
    data = open_data("camvid", camvid_root)
    assert [pair.image.suffix for pair in data.pairs("train")] == [".bmp", ".TIFF", ".webp"]


def test_cityscapes_real(shared_data: Path) -> None:
    root = shared_data / "cityscapes_mini"
    data = open_data("cityscapes", root)
    assert sizes(data) == {"train": 8, "val": 1} and data.num_classes == 19
    assert data.pairs("val")[0].id == "frankfurt_000000_000294"
    assert all(pair.mask.stem.endswith("labelTrainIds") for pair in data.pairs("train"))


def test_cityscapes_label_ids_equal_the_published_train_ids(shared_data: Path, tmp_path: Path) -> None:
    name, mini = "aachen_000000_000019", shared_data / "cityscapes_mini"
    for folder, file in (("leftImg8bit", f"{name}_leftImg8bit.png"), ("gtFine", f"{name}_gtFine_labelIds.png")):
        (tmp_path / folder / "train" / "aachen").mkdir(parents=True)
        shutil.copy(mini / folder / "train" / "aachen" / file, tmp_path / folder / "train" / "aachen")
    from_ids = open_data("cityscapes", tmp_path)
    pair = from_ids.pairs("train")[0]
    assert pair.mask.stem.endswith("labelIds") and "from labelIds" in from_ids.protocol
    published = np.array(Image.open(mini / "gtFine" / "train" / "aachen" / f"{name}_gtFine_labelTrainIds.png"))
    assert np.array_equal(from_ids.read_mask(pair.mask), published)


def test_cityscapes_decode_table(write: Write, tmp_path: Path) -> None:
    ids = np.arange(34, dtype=np.uint8)[None]
    write(tmp_path / "leftImg8bit/train/ulm/ulm_0_0_leftImg8bit.png", np.zeros((1, 34, 3), np.uint8))
    write(tmp_path / "gtFine/train/ulm/ulm_0_0_gtFine_labelIds.png", ids)
    data = open_data("cityscapes", tmp_path)
    assert data.read_mask(data.pairs("train")[0].mask)[0].tolist() == TRAIN_IDS
    with pytest.raises(VssError, match="label values 34, 200 that no class owns"):
        data.decode(np.array([[7, 34, 200]], np.uint8))


@pytest.mark.parametrize("masks", ["absent", "placeholders", "real"])
def test_cityscapes_test_split(write: Write, tmp_path: Path, masks: str) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"leftImg8bit/{split}/ulm/ulm_{split}_leftImg8bit.png", np.zeros((2, 2, 3), np.uint8))
    write(tmp_path / "gtFine/train/ulm/ulm_train_gtFine_labelIds.png", np.full((2, 2), 7, np.uint8))
    if masks != "absent":
        value = 3 if masks == "placeholders" else 7
        write(tmp_path / "gtFine/test/ulm/ulm_test_gtFine_labelIds.png", np.full((2, 2), value, np.uint8))
    data = open_data("cityscapes", tmp_path)
    assert sizes(data) == ({"train": 1, "test": 1} if masks == "real" else {"train": 1})


def test_ksdd2_generated(defect_root: Path) -> None:
    data = open_data("ksdd2", defect_root)
    # 15 % of 35 sound and of 5 defective training images, each rounded, at least one.
    assert sizes(data) == {"train": 34, "val": 6, "test": 16}
    assert [defective(data, split) for split in ("train", "val", "test")] == [4, 1, 2]
    assert data.class_names == ("background", "defect")
    assert data.decode(np.array([[0, 255, 1]], np.uint8)).tolist() == [[0, 1, 1]]
    assert not {pair.id for pair in data.pairs("val")} & {pair.id for pair in data.pairs("train")}


def test_ksdd2_layout_real(shared_data: Path) -> None:
    data = open_data("ksdd2", shared_data / "ksdd1_230")
    train_and_val = len(data.pairs("train")) + len(data.pairs("val"))
    assert (train_and_val, len(data.pairs("test"))) == (248, 135)
    assert defective(data, "train") + defective(data, "val") == 32 and defective(data, "test") == 18
    assert len(data.pairs("val")) == round(0.15 * 32) + round(0.15 * 216) and defective(data, "val") == 5
    assert data.protocol.startswith("ksdd1_230 (KSDD2 layout)")


def test_ksdd2_own_val_folder_is_used(write: Write, tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        for number in range(count):
            write(tmp_path / split / f"{number}.png", np.zeros((4, 4), np.uint8))
            write(tmp_path / split / f"{number}_GT.png", np.zeros((4, 4), np.uint8))
    assert sizes(open_data("ksdd2", tmp_path)) == {"train": 4, "val": 2, "test": 1}


def test_ksdd2_stray_copies_are_named_and_left_out(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("10301", "10301 (copy)", "10302", "10302_GT", "10301_GT", "10301_GT (copy)"):
        write(tmp_path / "train" / f"{name}.png", np.zeros((4, 4), np.uint8))
    with caplog.at_level(logging.WARNING):
        data = open_data("ksdd2", tmp_path)
    assert sizes(data) == {"train": 1, "val": 1}
    assert "10301 (copy).png" in caplog.text and "10301_GT (copy).png" in caplog.text


def test_carving_is_the_order_of_hashes() -> None:
    pairs = [Pair(id=str(number), image=Path("i"), mask=Path("m")) for number in range(100)]
    train, val = carve_val(pairs, [number < 20 for number in range(100)], fraction=0.15, seed=7)
    by_hash = sorted(range(100), key=lambda number: hashlib.sha256(f"7:{number}".encode()).digest())
    expected = [number for number in by_hash if number < 20][:3] + [number for number in by_hash if number >= 20][:12]
    assert sorted(int(pair.id) for pair in val) == sorted(expected)
    assert [pair for pair in pairs if pair not in val] == train
    reordered = carve_val(pairs[::-1], [number < 20 for number in range(100)][::-1], fraction=0.15, seed=7)
    assert {pair.id for pair in reordered[1]} == {pair.id for pair in val}


def test_masks_layout(write: Write, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("ground\nwater\n\n")
    for split in ("train", "holdout"):
        write(tmp_path / "images" / split / "north" / "1.jpg", np.zeros((4, 6, 3), np.uint8))
        write(tmp_path / "masks" / split / "north" / "1.png", np.array([[0, 1, 255] * 2] * 4, np.uint8))
    data = open_data("masks", tmp_path)
    assert sizes(data) == {"train": 1, "holdout": 1} and data.class_names == ("ground", "water")
    assert data.pairs("holdout")[0].id == "north/1"
    assert data.palette.tolist() == [[0, 0, 0], [128, 0, 0]]
    assert data.read(data.pairs("train")[0])[1][0].tolist() == [0, 1, 255, 0, 1, 255]


def test_palette_and_one_bit_masks_give_indices(camvid_root: Path) -> None:
    indices = np.arange(80, dtype=np.uint8).reshape(8, 10) % 12
    picture = Image.fromarray(indices)
    picture.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    assert picture.mode == "P"
    picture.save(camvid_root / "trainannot" / "a0.png")
    Image.fromarray(indices > 5).save(camvid_root / "trainannot" / "a1.png")
    Image.fromarray(indices.astype(np.uint16)).save(camvid_root / "trainannot" / "a2.png")
    data = open_data("camvid", camvid_root)
    palette, one_bit, deep = (data.read_mask(pair.mask) for pair in data.pairs("train"))
    expected = np.where(indices == 11, 255, indices)
    assert np.array_equal(palette, expected) and np.array_equal(deep, expected)
    assert np.array_equal(one_bit, (indices > 5).astype(np.uint8))


def test_guess_layout(street_root: Path, defect_root: Path, tmp_path: Path) -> None:
    assert guess_layout(street_root) == "camvid" and guess_layout(defect_root) == "ksdd2"
    assert guess_layout(tmp_path) is None and guess_layout(tmp_path / "absent") is None
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    assert guess_layout(tmp_path) == "masks"
    (tmp_path / "leftImg8bit").mkdir()
    with pytest.raises(VssError, match="fits the layouts cityscapes and masks; say which is meant: --dataset citysc"):
        guess_layout(tmp_path)


# Bad input: one sentence each.


def refused(root: Path, name: str = "camvid") -> str:
    with pytest.raises(VssError) as caught:
        open_data(name, root)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_missing_folder_and_unknown_dataset(tmp_path: Path) -> None:
    assert "nothing does not exist; give the folder that holds the 'camvid' data" in refused(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    assert "is a file; give the folder" in refused(tmp_path / "file")
    assert "unknown dataset 'camvit'. Did you mean 'camvid'?" in refused(tmp_path, "camvit")


def test_wrong_layout_names_the_closest(camvid_root: Path, tmp_path: Path) -> None:
    assert "not laid out as 'ksdd2'" in refused(camvid_root, "ksdd2")
    assert refused(camvid_root, "ksdd2").endswith("it looks like 'camvid': choose that dataset.")
    assert refused(tmp_path, "camvid").endswith("mine inside it looks like 'camvid': give that folder.")
    (tmp_path / "empty").mkdir()
    assert "or one of another layout (cityscapes, masks, camvid, ksdd2, flat, colours, " in refused(tmp_path / "empty")


def test_image_without_mask(camvid_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (camvid_root / "trainannot" / "a1.png").rename(camvid_root / "trainannot" / "b1.png")
    sentence = refused(camvid_root)
    assert "train/a1.png has no mask (1 such image in" in sentence and "expected one mask per image" in sentence
    (camvid_root / "train" / "a1.png").unlink()
    with caplog.at_level(logging.WARNING):
        assert sizes(open_data("camvid", camvid_root)) == {"train": 2, "val": 1}
    assert "1 mask without an image, not used" in caplog.text and "b1.png" in caplog.text


def test_mask_of_another_size(camvid_root: Path, write: Write) -> None:
    write(camvid_root / "trainannot" / "a1.png", np.zeros((10, 8), np.uint8))
    assert "a1.png is 10x8 and its image a1.png is 8x10 (height x width)" in refused(camvid_root)


def test_colour_mask(camvid_root: Path, write: Write) -> None:
    write(camvid_root / "trainannot" / "a1.png", np.zeros((8, 10, 3), np.uint8))
    assert "trainannot/a1.png has mode 'RGB'; expected one channel of class indices" in refused(camvid_root)


def test_labels_outside_the_classes(camvid_root: Path, write: Write) -> None:
    mask = np.zeros((8, 10), np.uint8)
    mask[0, :3] = (12, 77, 12)
    write(camvid_root / "trainannot" / "a1.png", mask)
    data = open_data("camvid", camvid_root)
    with pytest.raises(BadSampleError, match=r"a1\.png holds label values 12, 77 .* expected 0\.\.10 or 11 or 255"):
        data.read(data.pairs("train")[1])
    write(camvid_root / "trainannot" / "a1.png", np.full((8, 10), 4000, np.uint16))
    with pytest.raises(BadSampleError, match="label values 4000 that"):
        data.read(data.pairs("train")[1])


@pytest.mark.parametrize("folder", ["train", "trainannot"])
def test_corrupt_file(camvid_root: Path, folder: str) -> None:
    path = camvid_root / folder / "a1.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    data = open_data("camvid", camvid_root)
    with pytest.raises(BadSampleError, match=rf"{folder}/a1\.png cannot be read as an image \(.+\); replace"):
        data.read(data.pairs("train")[1])
    path.write_bytes(b"")
    assert f"{folder}/a1.png cannot be read as an image" in refused(camvid_root)


def test_deep_image(camvid_root: Path, write: Write) -> None:
    write(camvid_root / "train" / "a1.png", np.zeros((8, 10), np.uint16))
    assert "train/a1.png has more than 8 bits a channel" in refused(camvid_root)


def test_empty_and_unknown_split(camvid_root: Path) -> None:
    data = open_data("camvid", camvid_root)
    with pytest.raises(VssError, match=r"unknown split of .* 'vla'\. Did you mean 'val'\? Known: train, val"):
        data.pairs("vla")
    with pytest.raises(VssError) as caught:
        data.pairs("test")
    assert str(caught.value) == (
        f"{camvid_root} has no split 'test' (it has train, val); the scores that are reported need test and testannot, "
        "or report on val with --split val (in a recipe, split: val)."
    )
    for path in (camvid_root / "val" / "a3.png", camvid_root / "valannot" / "a3.png"):
        path.unlink()
    assert "split 'val' of" in refused(camvid_root) and "is empty; expected images with masks" in refused(camvid_root)


def test_two_images_of_one_name(camvid_root: Path, write: Write) -> None:
    write(camvid_root / "train" / "a1.bmp", np.zeros((8, 10, 3), np.uint8))
    assert "a1.bmp and a1.png share one name; keep one of the two files" in refused(camvid_root)
