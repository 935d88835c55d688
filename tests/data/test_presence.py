"""Masks that cannot teach or judge are refused before anything is computed, doubtful ones are said."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vss.core.config import DataOptions, Recipe
from vss.core.errors import VssError
from vss.data import SegData, check_labels, open_data
from vss.data.check import check
from vss.data.split import shared_images
from vss.run.project import Project

SPLITS = ("train", "val", "test")


def make(root: Path, names: tuple[str, ...], **masks: list[list[int]]) -> SegData:
    """A `masks` set of two equal images a split, each mask of 8x8 tiled from the rows given for the split."""
    for split in SPLITS:
        rows = np.array(masks.get(split, masks["train"]), np.uint8)
        for number in range(2):
            for kind, array in (("images", np.zeros((8, 8, 3), np.uint8)), ("masks", np.resize(rows, (8, 8)))):
                path = root / kind / split / f"{split}{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array + (10 * number + SPLITS.index(split) if kind == "images" else 0)).save(path)
    (root / "classes.txt").write_text("\n".join(names))
    return open_data("masks", root)


def both(data: SegData) -> str:
    """The sentence by which training refuses, and one of the problems of `vss data check`."""
    with pytest.raises(VssError) as caught:
        check_labels(data, data.splits)
    report = check(data)
    assert not report["ok"] and caught.value.exit_code == 2
    assert any(problem.rstrip(".") in str(caught.value) for problem in report["problems"]), report["problems"]
    return str(caught.value)


def test_binary_masks_of_0_and_255_are_refused_with_the_hint(tmp_path: Path) -> None:
    text = both(make(tmp_path, ("background", "crack"), train=[[0, 255, 0, 0]]))
    assert "hold one class alone, 'background' of 2" in text
    assert "25.0 % of the pixels are" in text and "save class 'crack' as 1" in text


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_without_one_labelled_pixel_is_refused(tmp_path: Path, split: str) -> None:
    masks = {"train": [[0, 1]], "val": [[0, 1]], "test": [[0, 1]], split: [[255]]}
    assert f"split {split!r} has no labelled pixel: all 2 masks" in both(make(tmp_path, ("a", "b"), **masks))


def test_forgotten_labels_are_refused(tmp_path: Path) -> None:
    assert "one class alone, 'a' of 3" in both(make(tmp_path, ("a", "b", "c"), train=[[0]], val=[[0, 1, 2]]))


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    assert "there is one class alone, 'a', so that nothing can be learned" in both(make(tmp_path, ("a",), train=[[0]]))


def test_labels_from_1_to_k_are_refused_with_the_hint(tmp_path: Path) -> None:
    text = both(make(tmp_path, ("a", "b", "c"), train=[[1, 2, 3, 255]]))
    assert "The values run from 1 to 3, as if shifted by one" in text
    with pytest.raises(VssError, match=r"label values 4 that .* fix the mask or the list of classes\.$"):
        check_labels(data := make(tmp_path / "0", ("a", "b", "c"), train=[[0, 1, 4]]), data.splits)


def test_a_shift_that_hides_in_void_is_said(tmp_path: Path, camvid_root: Path) -> None:
    for path in sorted((camvid_root / "trainannot").iterdir()):
        Image.fromarray(1 + np.arange(80, dtype=np.uint8).reshape(8, 10) % 11).save(path)
    data = open_data("camvid", camvid_root)
    notes = check_labels(data, {"train": data.pairs("train")})
    assert any("holds the value 0 and all of 1 to 11 occur: if the labels are shifted" in note for note in notes)
    assert any(note.startswith("1 class that no training mask holds: Sky") for note in notes)


def test_absent_classes_are_said_by_check_and_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = make(tmp_path, ("a", "b", "c", "d"), train=[[0, 1, 2, 255]], val=[[0, 1, 2, 3]], test=[[0, 1]])
    expected = [
        "class 'd' is in val and in no training mask: its labels may be shifted; 255 is ignored in this layout, and "
        "25.0 % of the pixels are: where 255 stands for a class (masks of 0 and 255), save it as its place in "
        "classes.txt, where the first is 0, or give --label-map 255=NAME (data.label_map)",
        "2 classes that no mask of 'test' holds: c, d",
    ]
    assert check_labels(data, data.splits) == expected
    report = check(data)
    assert report["ok"] and [note for note in report["warnings"] if "mask" in note] == expected
    settings = {"data": {"dataset": "masks", "root": str(tmp_path), "size": [8, 8]}, "model": {"name": "unet"}}
    task = Project.open(Recipe.model_validate(settings)).task
    with caplog.at_level(logging.WARNING):
        task.check_labels("train", "val", "test")
        task.check_labels("train")
    assert task.notes == expected and caplog.text.count("class 'd'") == 1


def test_labels_shifted_against_those_of_train_are_one_warning(tmp_path: Path) -> None:
    names = ("road", "sky", "car", "tree")
    data = make(tmp_path / "up", names, train=[[0, 1, 2]], val=[[1, 2, 3]], test=[[1, 2, 3]])
    expected = (
        "class 'tree' is in val and test and in no training mask: the labels of val and test look shifted by one "
        "against those of train (train holds 0 to 2, val holds 1 to 3, test holds 1 to 3)"
    )
    assert check_labels(data, data.splits) == [expected] and expected in check(data)["warnings"]
    down = make(tmp_path / "down", names, train=[[1, 2, 3]], val=[[0, 1, 2]], test=[[1, 2, 3]])
    assert check_labels(down, down.splits) == [
        "class 'road' is in val and in no training mask: the labels of val look shifted by one against those of train "
        "(train holds 1 to 3, val holds 0 to 2)",
        "1 class that no mask of 'test' holds: road",
    ]
    apart = make(tmp_path / "apart", names, train=[[0, 1]], val=[[0, 2]], test=[[0, 1, 2]])
    assert check_labels(apart, apart.splits) == [
        "1 class that no mask of train, val and test holds: tree",
        "class 'car' is in val and test and in no training mask: its labels may be shifted",
        "1 class that no mask of 'val' holds: sky",
    ]


def test_a_training_image_in_another_split_is_refused_by_content(tmp_path: Path) -> None:
    data = make(tmp_path, ("a", "b"), train=[[0, 1]])
    (images := tmp_path / "images").joinpath("val/val0.png").write_bytes((images / "test/test1.png").read_bytes())
    assert check_labels(data, {"train": data.pairs("train"), "val": data.pairs("val")}) == [
        "1 image is in val and test alike (val/val0 = test/test1): figures of images that training chose by are kinder"
    ]
    (images / "test/test1.png").write_bytes((images / "train/train0.png").read_bytes())
    with pytest.raises(VssError) as caught:
        check_labels(data, {split: data.pairs(split) for split in ("train", "val")})
    assert str(caught.value) == (
        f"{tmp_path}: 1 training image is in another split as well, by content (train/train0 = test/test1), and scores "
        "on what was trained on say nothing; take it out of one of the two, or share all images out anew, which keeps "
        "equal ones together: --data-split train=0.7,val=0.15,test=0.15 (data.split)."
    )
    assert check_labels(data, {"test": data.pairs("test")}) == []
    mended = open_data("masks", tmp_path, DataOptions(split={"train": 0.5, "val": 0.25, "test": 0.25}))
    assert check_labels(mended, mended.splits) == []
    (images / "test/test0.png").unlink()
    with pytest.raises(VssError, match=r"test0.png cannot be read \(No such file or directory\); put it back"):
        check_labels(data, {"train": data.pairs("train")})


def test_only_files_of_a_size_that_two_splits_have_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(tmp_path, ("a", "b"), train=[[0, 1]])
    sizes = {"train0": 500, "train1": 501, "val0": 502, "val1": 503, "test0": 503, "test1": 501}
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(path.read_bytes().ljust(sizes[path.stem], b"\0"))
    asked: list[str] = []
    monkeypatch.setattr("vss.data.split.sha256_files", lambda paths: asked.extend(p.stem for p in paths) or [*asked])
    assert shared_images(data.splits) == [] and sorted(asked) == ["test0", "test1", "train1", "val1"]


def test_masks_of_other_depths_are_one_sentence(tmp_path: Path) -> None:
    data = make(tmp_path, ("a", "b"), train=[[0, 1]])
    path = tmp_path / "masks/val/val1.png"
    Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16)).save(path)
    expected = (
        f"5 masks of 8 bits ({tmp_path / 'masks/train/train0.png'}) and 1 mask of 16 bits ({path}) in one set: look "
        "whether their values mean the same classes"
    )
    assert check_labels(data, data.splits) == [expected] and expected in check(data)["warnings"]


def test_masks_of_one_bit_among_masks_of_0_and_255_are_refused(tmp_path: Path) -> None:
    text = both(data := make(tmp_path, ("background", "crack"), train=[[0, 1]], val=[[0, 255]], test=[[0, 1]]))
    assert "4 masks of two classes mark 'crack' as 1, 2 hold 255, which is ignored, and none holds both" in text
    for said, owned in ("crack", 1), ("ignore", 255):
        data = open_data("masks", tmp_path, DataOptions(label_map={255: said}))
        check_labels(data, {split: data.pairs(split) for split in (["train"] if owned == 255 else data.splits)})
        assert data.owner(255) == owned


def test_training_and_scores_are_refused_before_they_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, ("a", "b"), train=[[0, 1]], val=[[255]], test=[[255]])
    settings = {"data": {"dataset": "masks", "root": str(tmp_path), "size": [16, 16]}, "model": {"name": "unet"}}
    recipe = Recipe.model_validate(settings)
    project = Project.open(recipe)
    monkeypatch.setattr("vss.train.fit.fit", lambda *_, **__: pytest.fail("training started"))
    with pytest.raises(VssError, match="split 'val' has no labelled pixel"):
        project.train(project.build_model(), recipe.train, tmp_path / "out")
    with pytest.raises(VssError, match="split 'test' has no labelled pixel"):
        project.score(lambda images: pytest.fail("scoring started"))


def test_a_missing_split_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, ("a", "b"), train=[[0, 1]])
    for kind in ("images", "masks"):
        shutil.rmtree(tmp_path / kind / "val")
    recipe = Recipe.model_validate({
        "data": {"dataset": "masks", "root": str(tmp_path), "size": [16, 16]}, "model": {"name": "unet"}
    })  # fmt: skip
    project = Project.open(recipe)
    monkeypatch.setattr("vss.train.fit.fit", lambda *_, **__: pytest.fail("training started"))
    with pytest.raises(VssError) as caught:
        project.train(project.build_model(), recipe.train, tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path} has no split 'val' (it has train, test); training (and --split val) needs images/val and "
        "masks/val."
    )
    assert not (tmp_path / "out").exists()


def test_a_sound_set_raises_no_doubt(street_root: Path, defect_root: Path) -> None:
    for name, root in (("camvid", street_root), ("ksdd2", defect_root)):
        data = open_data(name, root)
        assert check_labels(data, {"train": data.pairs("train")}) == []


def test_own_data_in_a_wrong_place_gets_the_drawing(tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / kind / "a.png")
    with pytest.raises(
        VssError, match=r"has no classes\.txt; expected images/train/NAME.*masks/train.*values 0\.\.K-1"
    ):
        check(tmp_path, "masks")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    assert "there is no split; expected images/train/NAME" in check(tmp_path, "masks")["problems"][-1]
    with pytest.raises(VssError, match=r"every split of .* is empty.* expected images/train/NAME"):
        open_data("masks", tmp_path)
    (tmp_path / "else").mkdir()
    with pytest.raises(VssError, match=r"is not known; .*Your own data goes like this: expected images/train"):
        check(tmp_path / "else")
