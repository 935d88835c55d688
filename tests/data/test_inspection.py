"""Labels, weights and targets of defect images against loops, and what dilation and mixed supervision change."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vss.core.errors import VssError
from vss.data import Augment, DefectSplit, Preprocess, Targets, choose_annotated, labels_of, open_data
from vss.data.defects import distance_weights, shrink

SIZE = (96, 48)


def drawn() -> np.ndarray:
    """Three defects: a square, one pixel, and two squares that touch at a corner."""
    mask = np.zeros((40, 30), bool)
    mask[4:11, 5:12] = True
    mask[20, 20] = True
    mask[28:31, 4:7] = mask[31:36, 7:12] = True
    return mask


def flood(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """8-connected components, slowly."""
    left, found = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}, []
    while left:
        stack, part = [left.pop()], set()
        while stack:
            y, x = stack.pop()
            part.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
        found.append(part)
    return found


def slow_weights(mask: np.ndarray, power: float, maximum: float) -> np.ndarray:
    weights = np.ones(mask.shape)
    background = [(y, x) for y, x in np.ndindex(*mask.shape) if not mask[y, x]]
    for part in flood(mask):
        distance = {p: min(math.dist(p, q) for q in background) for p in part}
        top = max(distance.values())
        for place, value in distance.items():
            weights[place] = maximum * (value / top) ** power
    return weights


@pytest.mark.parametrize(("power", "maximum"), [(2.0, 3.0), (1.0, 5.0)])
def test_distance_weights_component_by_component(power: float, maximum: float) -> None:
    mask = drawn()
    assert len(flood(mask)) == 3
    found = distance_weights(mask, power=power, maximum=maximum)
    np.testing.assert_allclose(found, slow_weights(mask, power, maximum), rtol=1e-6)
    assert found[20, 20] == maximum == found.max() and found[7, 8] == maximum
    assert found[4, 5] == pytest.approx(maximum * (1 / 4) ** power)


def test_weights_without_background_or_defect_are_one() -> None:
    for mask in (np.zeros((5, 4), bool), np.ones((5, 4), bool)):
        assert (distance_weights(mask) == 1).all()


def test_shrink_is_the_mean_of_reflected_windows() -> None:
    x = torch.rand(32, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = shrink(x, 8)
    padded = np.pad(x.numpy(), 8, mode="reflect")
    expected = [[padded[8 * i : 8 * i + 17, 8 * j : 8 * j + 17].mean() for j in range(3)] for i in range(4)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert shrink(torch.zeros(640, 232), 8).shape == (80, 29)


def test_void_pixels_have_no_weight() -> None:
    mask = torch.zeros(32, 32, dtype=torch.int64)
    mask[:, 16:] = 255
    item = Targets().of(mask)
    assert item["target"].sum() == 0 and item["weight"][:, 3].max() == 0 and item["weight"][1, 0] == 1


def test_labels_come_from_the_stored_mask(defect_root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "train"
    folder.mkdir(parents=True)
    for number, pixel in enumerate((False, True)):
        mask = np.zeros((64, 64), np.uint8)
        mask[33, 31] = 255 * pixel  # lost when the mask is resized to a quarter
        Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(mask).save(folder / f"{number}_GT.png")
    (folder.parent / "val").symlink_to(folder)
    split = DefectSplit(open_data("ksdd2", tmp_path / "set"), "train", Preprocess(size=(16, 16)))
    assert [float(split[i]["label"]) for i in range(2)] == [0.0, 1.0]
    assert all(split[i]["mask"].sum() == 0 for i in range(2))
    data = open_data("ksdd2", defect_root)
    labels = labels_of(data, data.pairs("train"))
    slow = [bool(np.asarray(Image.open(pair.mask)).any()) for pair in data.pairs("train")]
    assert labels.tolist() == slow and 0 < sum(slow) < len(slow)


def test_dilation_and_targets_in_training_alone(defect_root: Path) -> None:
    data = open_data("ksdd2", defect_root)
    index = int(np.flatnonzero(labels_of(data, data.pairs("train")))[0])
    still = Augment(scale=(1, 1), hflip=0, brightness=0, contrast=0, saturation=0)
    plain = DefectSplit(data, "train", Preprocess(size=SIZE))
    taught = DefectSplit(data, "train", Preprocess(size=SIZE), still, targets=Targets(dilate=5))
    a, b = plain[index], taught[index]
    assert "target" not in a and torch.equal(a["image"], b["image"])
    assert bool((b["mask"] >= a["mask"]).all()) and int(b["mask"].sum()) > int(a["mask"].sum())
    assert b["target"].shape == b["weight"].shape == (12, 6) and float(b["target"].max()) > 0
    assert float(b["annotated"]) == 1
    stored = np.asarray(Image.open(data.pairs("train")[index].mask)) > 0
    grown = np.array([
        [stored[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].any() for x in range(stored.shape[1])]
        for y in range(stored.shape[0])
    ])  # fmt: skip
    assert np.array_equal(taught.read(data.pairs("train")[index])[1], grown)


def test_mixed_supervision_keeps_labels_and_drops_maps(defect_root: Path) -> None:
    data = open_data("ksdd2", defect_root)
    pairs = data.pairs("train")
    labels = labels_of(data, pairs)
    some = choose_annotated(data, pairs, 2, seed=3)
    assert len(some) == 2 + int((~labels).sum()) and some == choose_annotated(data, pairs, 2, seed=3)
    assert choose_annotated(data, pairs, 1, seed=3) < some
    split = DefectSplit(data, "train", Preprocess(size=SIZE), targets=Targets(annotated=some))
    found = [split[i] for i in range(len(split))]
    assert [float(item["label"]) for item in found] == labels.astype(float).tolist()
    assert sum(float(item["annotated"]) for item in found) == len(some)
    with pytest.raises(VssError, match=f"annotated is 99; expected 0..{int(labels.sum())}"):
        choose_annotated(data, pairs, 99)


@pytest.mark.parametrize("size", [0, 4])
def test_dilation_is_odd(size: int) -> None:
    with pytest.raises(VssError, match="odd number of pixels"):
        Targets(dilate=size)


def test_split_no_test_selection(defect_root: Path) -> None:
    splits = open_data("ksdd2", defect_root).splits
    ids = {name: {pair.id for pair in pairs} for name, pairs in splits.items()}
    assert ids["val"] and not ids["val"] & (ids["train"] | ids["test"]) and not ids["train"] & ids["test"]
    assert {pair.image.parent.name for name in ("train", "val") for pair in splits[name]} == {"train"}
