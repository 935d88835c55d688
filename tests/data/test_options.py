"""`data.classes`, `label_map`, `ignore_index`, `colors` and `split`: what becomes of classes and images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data import sets
from vss.core.config import DataConfig, DataOptions, load_recipe
from vss.core.errors import VssError
from vss.data import SegData, count_classes, open_data
from vss.data.base import Pair
from vss.data.classes import GROUPS
from vss.data.split import share_out

CAMVID32 = (
    "Animal", "Archway", "Bicyclist", "Bridge", "Building", "Car", "CartLuggagePram", "Child", "Column_Pole", "Fence",
    "LaneMkgsDriv", "LaneMkgsNonDriv", "Misc_Text", "MotorcycleScooter", "OtherMoving", "ParkingBlock", "Pedestrian",
    "Road", "RoadShoulder", "Sidewalk", "SignSymbol", "Sky", "SUVPickupTruck", "TrafficCone", "TrafficLight", "Train",
    "Tree", "Truck_Bus", "Tunnel", "VegetationMisc", "Void", "Wall",
)  # fmt: skip
CAMVID11 = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip


def opened(root: Path, name: str = "flat", **options: object) -> SegData:
    return open_data(name, root, DataOptions.model_validate(options))


def counts(data: SegData) -> dict[str, int]:
    found = count_classes(data, [pair for pairs in data.splits.values() for pair in pairs])
    return dict(zip(data.class_names, found.pixels.tolist(), strict=True)) | {"ignored": found.ignored}


BACK, CAR, TREE = sets.PIXELS
MAPS = [
    ({"label_map": {"tree": "car"}}, {"background": BACK, "car": CAR + TREE, "ignored": 0}),
    ({"label_map": {2: "ignore"}}, {"background": BACK, "car": CAR, "ignored": TREE}),
    ({"label_map": {"car": "tree", "tree": "car"}}, {"background": BACK, "car": TREE, "tree": CAR, "ignored": 0}),
    ({"label_map": {"car": "thing", "tree": "thing"}}, {"background": BACK, "thing": CAR + TREE, "ignored": 0}),
    ({"label_map": {"2": 0}}, {"background": BACK + TREE, "car": CAR, "ignored": 0}),
    ({"ignore_index": 0}, {"car": CAR, "tree": TREE, "ignored": BACK}),
    ({"classes": ["a", "b", "c"]}, {"a": BACK, "b": CAR, "c": TREE, "ignored": 0}),
    (
        {"classes": ["tree", "rest"], "label_map": {"background": "rest", "car": 1}},
        {"tree": TREE, "rest": BACK + CAR, "ignored": 0},
    ),
]


@pytest.mark.parametrize(("options", "expected"), MAPS)
def test_classes_that_become_others(options: dict[str, object], expected: dict[str, int], tmp_path: Path) -> None:
    sets.flat(tmp_path)
    data = opened(tmp_path, **options)
    assert counts(data) == expected and list(data.class_names) == [name for name in expected if name != "ignored"]
    assert data.palette.shape == (len(data.class_names), 3)
    assert opened(tmp_path).meaning != data.meaning and DataOptions.model_validate(data.kept).given()
    again = open_data("flat", tmp_path, DataOptions.model_validate(data.kept))
    assert again.meaning == data.meaning


FAULTS = [
    ({"label_map": {"tre": "car"}}, "unknown class in data.label_map of .* 'tre'. Did you mean 'tree'"),
    ({"label_map": {"tree": 7}}, "maps to class 7, and there are 3; give 0 to 2"),
    ({"label_map": "camvid12"}, "unknown ready label map 'camvid12'. Did you mean 'camvid11'"),
    ({"label_map": {"tree": "car"}, "classes": ["background", "car", "tree"]}, "no value of the masks of .* is 'tree'"),
    ({"classes": ["background", "car"]}, "leaves out 'tree' of .*--label-map 'tree'=ignore"),
    ({"classes": ["a", "A", "b"]}, "names 'A' twice"),
    ({"classes": ["names.txt"]}, "data.classes names the file names.txt, which is neither"),
    ({"split": {"train": "a.txt"}}, "data.split names the file a.txt"),
]


@pytest.mark.parametrize(("options", "said"), FAULTS)
def test_options_that_do_not_fit(options: dict[str, object], said: str, tmp_path: Path) -> None:
    sets.flat(tmp_path)
    with pytest.raises(VssError, match=said):
        opened(tmp_path, **options)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.split={train: 0.5, val: 0.2}", "add up to 0.7; expected 1"),
        ("data.split={train: 0.5, val: a.txt}", "mixes fractions and files"),
        ("data.split={val: 1.0}", "names no train"),
        ("data.missing_mask=ok", "data.missing_mask"),
        ("data.colors={a: [1, 2, 300]}", "data.colors"),
        ("data.ignore_index=-1", "data.ignore_index"),
    ],
)
def test_recipe_keys_that_are_wrong(setting: str, said: str) -> None:
    with pytest.raises(VssError, match=said) as caught:
        load_recipe(None, [setting])
    assert "\n" not in str(caught.value)


def test_numbers_for_names_alone_are_refused(tmp_path: Path) -> None:
    sets.rgb(tmp_path)
    with pytest.raises(VssError, match=r"data\.label_map gives a number, and classes of the layout 'colours' have"):
        opened(tmp_path, "colours", label_map={1: "ignore"})
    assert counts(opened(tmp_path, "colours", label_map={"background": "ignore"}))["ignored"] == BACK


def test_colours_come_from_the_recipe_too_and_stay(tmp_path: Path) -> None:
    sets.rgb(tmp_path)
    (tmp_path / "label_colors.txt").rename(tmp_path / "mine.txt")
    by_file = opened(tmp_path, colors="mine.txt")
    table = {name: list(colour) for name, colour in sets.COLOURS.items()}
    assert by_file.kept == {"colors": table} and counts(by_file)["tree"] == TREE
    (tmp_path / "mine.txt").unlink()
    assert open_data("flat", tmp_path, DataOptions.model_validate(by_file.kept)).meaning == by_file.meaning
    flags = DataOptions.model_validate({"colors": {name: ",".join(map(str, c)) for name, c in table.items()}})
    assert flags.colors == sets.COLOURS


def test_values_without_names_get_them_from_the_map(tmp_path: Path) -> None:
    sets.flat(tmp_path)
    (tmp_path / "classes.txt").unlink()
    for i in range(sets.COUNT):
        sets.save(tmp_path / f"labels/{i}_mask.png", (sets.mask(i).astype(np.uint16) * 1000).astype(np.uint16))
    data = opened(tmp_path, label_map={0: "floor", 1000: "car", 2000: "ignore"})
    assert counts(data) == {"floor": BACK, "car": CAR, "ignored": TREE}


def test_the_ready_map_of_camvid_has_every_class_once(tmp_path: Path) -> None:
    grouped = [old for olds in GROUPS["camvid11"].values() for old in olds]
    assert sorted([*grouped, "Void"]) == sorted(CAMVID32) and tuple(GROUPS["camvid11"]) == CAMVID11
    mask = np.arange(32, dtype=np.uint8).reshape(4, 8)
    colours = np.stack([mask * 3, mask, mask * 0 + 7], -1)
    sets.save(tmp_path / "images/a.png", np.zeros((4, 8, 3), np.uint8))
    sets.save(tmp_path / "masks/a.png", colours)
    lines = [f"{3 * i} {i} 7 {name}" for i, name in enumerate(CAMVID32)]
    (tmp_path / "label_colors.txt").write_text("\n".join(lines))
    data = opened(tmp_path, "colours", label_map="camvid11", classes=CAMVID11, split={"train": 1})
    sizes = {name: len(GROUPS["camvid11"][name]) for name in CAMVID11}
    assert counts(data) == sizes | {"ignored": 1}


def test_fractions_by_a_hash_with_every_class_spread_evenly(tmp_path: Path) -> None:
    """200 images, of which 10 hold the rare class: each split gets its share of them, in whatever order they come."""
    pairs = []
    for i in range(200):
        path = tmp_path / f"{i:03d}.txt"
        path.write_text(str(i))
        pairs.append(Pair(id=path.stem, image=path, mask=path))
    present = np.array([[True, i % 20 == 0, i % 2 == 0] for i in range(200)])
    shares = {"train": 0.7, "val": 0.1, "test": 0.2}
    splits = share_out(pairs, present, shares)
    assert {name: len(found) for name, found in splits.items()} == {"train": 140, "val": 20, "test": 40}
    rare = {name: sum(int(pair.id) % 20 == 0 for pair in found) for name, found in splits.items()}
    half = {name: sum(int(pair.id) % 2 == 0 for pair in found) for name, found in splits.items()}
    assert rare == {"train": 7, "val": 1, "test": 2} and half == {"train": 70, "val": 10, "test": 20}
    order = np.random.default_rng(0).permutation(200)
    again = share_out([pairs[i] for i in order], present[order], shares)
    assert {name: {p.id for p in found} for name, found in again.items()} == {
        name: {p.id for p in found} for name, found in splits.items()
    }


def test_equal_images_stay_in_one_split(tmp_path: Path) -> None:
    sets.flat(tmp_path)
    for i in range(1, 6):
        sets.save(tmp_path / f"imgs/{i}.png", sets.image(0))
    data = opened(tmp_path, split={"train": 0.5, "val": 0.25, "test": 0.25})
    where = {name for name, pairs in data.splits.items() if {pair.id for pair in pairs} & set("012345")}
    assert len(where) == 1 and sum(map(len, data.splits.values())) == sets.COUNT


def test_files_that_list_the_splits(tmp_path: Path) -> None:
    sets.split_folders(tmp_path)
    (tmp_path / "a.txt").write_text("train/images/3.png extra\n\ntrain/4\n9\n")
    (tmp_path / "b.txt").write_text("5\n")
    data = opened(tmp_path, split={"train": "a.txt", "val": str(tmp_path / "b.txt")})
    assert {name: [pair.id for pair in pairs] for name, pairs in data.splits.items()} == {
        "train": ["train/3", "train/4", "val/9"], "val": ["train/5"],
    }  # fmt: skip


def test_what_was_said_and_what_is_the_default() -> None:
    assert DataConfig().said() == {} and DataOptions().given() == {}
    config = DataConfig.model_validate({"missing_mask": "refuse", "root": "x"})
    assert config.said() == {"missing_mask": "refuse"} and config.given() == {}
    whole = DataConfig.model_validate(DataConfig(ignore_index=3).model_dump(mode="json"))
    assert whole.said() == {"ignore_index": 3}
    mapped = DataOptions.model_validate({"label_map": {"255": "a", "b": "1"}})
    assert mapped.label_map == {255: "a", "b": 1}
    assert DataOptions.model_validate(mapped.model_dump(mode="json")) == mapped
