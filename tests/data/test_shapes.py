"""Masks that are drawn, of COCO and labelme: which pixels they cover, and what is refused."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as tools

from tests.command import cli
from tests.data import sets
from tests.data.sets import pixels, sentence
from vss.core.config import DataOptions
from vss.core.errors import VssError
from vss.data import open_data
from vss.data.check import check
from vss.data.masks import Drawn, Shape, runs_of


def test_coco_run_lengths_crowds_and_what_overlaps(tmp_path: Path) -> None:
    sets.save(tmp_path / "images/0.png", sets.image(0))
    content = sets.coco_content(range(1))
    car, tree = content["annotations"]
    code = tools.encode(np.asfortranarray(sets.mask(0) == 1).astype(np.uint8))
    car["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
    crowd = np.zeros((sets.HEIGHT, sets.WIDTH), np.uint8)
    crowd[:, :10] = 1
    runs = [0, *[int(n) for n in (10 * sets.HEIGHT, 10 * sets.HEIGHT)]]
    content["annotations"] += [
        tree | {"segmentation": {"size": [sets.HEIGHT, sets.WIDTH], "counts": runs}, "iscrowd": 1, "area": 240},
        tree | {"category_id": 1, "segmentation": [sets.polygon((5, 12, 7, 14))], "area": 4},
    ]
    sets.dump(tmp_path / "annotations.json", content)
    data = open_data("coco", tmp_path, DataOptions(split={"train": 1.0}))
    expected = np.where(crowd, 255, 0) * (sets.mask(0) == 0) + sets.mask(0)
    expected[12:14, 5:7] = 1
    assert (data.read(data.splits["train"][0])[1] == expected).all()


def test_polygons_cover_the_pixels_that_pycocotools_gives_on_the_whole_image() -> None:
    """Also of tenths of a pixel, which lie between its points, and outside the image."""
    random, height, width = np.random.default_rng(0), 30, 40
    for round_ in range(400):
        parts = []
        for corners in random.integers(3, 9, int(random.integers(1, 4))):
            middle, reach = random.uniform(0, (width, height)), random.choice([2, 10, 60])
            points = np.clip(middle + random.uniform(-reach, reach, (corners, 2)), -2, (width + 2, height + 2))
            parts.append(points.round(round_ % 3).ravel())
        expected = tools.decode(tools.merge(tools.frPyObjects([part.tolist() for part in parts], height, width)))
        drawn = Drawn(Path("a.json"), "a.png", height, width, (Shape(7, "polygons", parts),))
        assert (drawn.stored() == 7 * expected).all(), parts


def test_a_mask_that_is_no_file_is_hashed_by_what_it_holds(tmp_path: Path) -> None:
    from vss.data.images import sha256_files

    sets.labelme(tmp_path)
    pair = open_data("labelme", tmp_path, DataOptions(split={"train": 1.0})).splits["train"][0]
    before = sha256_files([pair.mask])
    content = json.loads((tmp_path / "0.json").read_text())
    content["shapes"][0]["points"][0][0] += 1
    (tmp_path / "0.json").write_text(json.dumps(content))
    after = open_data("labelme", tmp_path, DataOptions(split={"train": 1.0})).splits["train"][0]
    assert after.id == pair.id and sha256_files([after.mask]) != before


COCO_FAULTS = {
    "annotations.0.segmentation.0.4": (40, "reaches the point 40,8, outside its image of 20x24"),
    "annotations.0.category_id": (5, "is of category 5, which the file does not list"),
    "annotations.0.image_id": (77, "is of image 77, which the file does not list"),
    "annotations.0.segmentation": ([], "has no segmentation (a box alone teaches no pixels)"),
    "annotations.0.segmentation.0": ([1, 1, 2, 2], "has 2 points; expected 3 or more"),
    "annotations.0.segmentation ": ({"size": [24, 20], "counts": [3, 5, 2]}, "add up to 10 pixels, its image has 480"),
    "annotations.0.segmentation  ": ({"size": [24, 20], "counts": [500, -20]}, "hold a run of 500 pixels"),
    "annotations.0.segmentation   ": ({"size": [24, 20], "counts": [-3, 483]}, "hold a run of -3 pixels"),
    "annotations.0.segmentation    ": ({"size": [24, 20], "counts": [3.5, 476.5]}, "neither a list of whole numbers"),
    "annotations.0.segmentation.0 ": ([1, 1, 5, 1, 5], "is [1.0, 1.0, 5.0, 1.0, ...]; expected x,y,x,y"),
    "annotations.1.segmentation": ({"size": [24, 20], "counts": "@@@zz"}, "cannot be read (their text is damaged)"),
    "annotations.1.segmentation ": (
        {"size": [20, 24], "counts": [480]},
        "are of [20, 24] pixels, its image of [24, 20]",
    ),
    "images.0.file_name": ("absent.png", "lists the image absent.png, which is not there"),
    "images.0.width": (21, "is 24x21 and its image 0.png is 24x20"),
    "categories.1.name": ("car", "lists 2 categories, 1 of different names"),
    "categories.1.id": (1, "lists 2 categories of 1 different ids"),
    "categories": (None, "is no COCO file (TypeError"),
}


@pytest.mark.parametrize("place", COCO_FAULTS)
def test_faults_in_a_coco_file(place: str, tmp_path: Path) -> None:
    sets.save(tmp_path / "images/0.png", sets.image(0))
    content = sets.coco_content(range(1))
    *above, last = [int(part) if part.isdecimal() else part for part in place.strip().split(".")]
    inner: Any = content
    for part in above:
        inner = inner[part]
    value, said = COCO_FAULTS[place]
    inner[last] = value
    sets.dump(tmp_path / "annotations.json", content)
    assert said in sentence(tmp_path, split={"train": 1.0})


def test_run_lengths_are_those_that_pycocotools_wrote_and_short_ones_are_refused(tmp_path: Path) -> None:
    """It decodes a text that ends early to pixels of memory that nobody wrote."""
    random = np.random.default_rng(0)
    for share in (0.0, 0.001, 0.1, 0.5, 1.0):
        array = (random.random((173, 211)) < share).astype(np.uint8, order="F")
        flat = array.ravel(order="F").tolist()
        runs = [(value, len(list(group))) for value, group in itertools.groupby(flat)]
        expected = [0] * runs[0][0] + [count for _, count in runs]
        assert runs_of(tools.encode(array)["counts"].decode()).tolist() == expected
    sets.save(tmp_path / "images/0.png", sets.image(0))
    content = sets.coco_content(range(1))
    text = tools.encode(np.asfortranarray(sets.mask(0) == 1).astype(np.uint8))["counts"].decode()
    for end in range(len(text)):
        content["annotations"][0] |= {"id": 77, "segmentation": {"size": [24, 20], "counts": text[:end]}}
        sets.dump(tmp_path / "annotations.json", content)
        assert f"the run lengths of annotation 77 of 0.png in {tmp_path / 'annotations.json'} " in sentence(tmp_path)


def test_without_pycocotools_a_folder_of_coco_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets.coco(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(VssError, match=r'reading COCO files needs pycocotools.mask .* run: pip install "vss\[coco\]"$'):
        open_data("coco", tmp_path)


def test_annotations_without_an_area_are_ordered_by_their_own(tmp_path: Path) -> None:
    sets.save(tmp_path / "images/0.png", sets.image(0))
    content = sets.coco_content(range(1))
    small, large = content["annotations"]
    large["segmentation"] = [sets.polygon((0, 0, 20, 24))]
    content["annotations"] = [{k: v for k, v in each.items() if k != "area"} for each in (small, large)]
    sets.dump(tmp_path / "annotations.json", content)
    data = open_data("coco", tmp_path, DataOptions(split={"train": 1.0}))
    assert pixels(data) == [0, 24, 24 * 20 - 24]


def test_a_panoptic_file_has_one_annotation_of_every_image_and_segments_once(tmp_path: Path) -> None:
    sets.panoptic(tmp_path)
    path = tmp_path / "annotations/panoptic.json"
    content = json.loads(path.read_text())
    first, *rest = content["annotations"]
    sets.dump(path, content | {"annotations": rest})
    assert "has 0 annotations of the image 0.png; a panoptic file has one of each" in sentence(tmp_path)
    twice = first | {"segments_info": [*first["segments_info"], first["segments_info"][0]]}
    sets.dump(path, content | {"annotations": [twice, *rest]})
    assert "lists a segment of the mask 0.png twice" in sentence(tmp_path)


def test_a_category_without_an_image_and_an_image_that_no_file_lists_are_said(tmp_path: Path) -> None:
    sets.coco(tmp_path)
    for path in (tmp_path / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"].append({"id": 100, "name": "ghost"})
        path.write_text(json.dumps(content))
    sets.save(tmp_path / "train2017/99.png", sets.image(99))
    notes = check(tmp_path)["warnings"]
    assert any("1 class that no mask" in note and note.endswith("ghost") for note in notes)
    assert f"1 image that no file lists, not used: {tmp_path / 'train2017/99.png'}" in notes


def test_a_category_of_no_meaning_and_a_background_without_a_pixel_are_said_with_the_way_out(tmp_path: Path) -> None:
    sets.coco(tmp_path)
    for path in (tmp_path / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"].append({"id": 100, "name": "Void"})
        whole = {"category_id": 100, "segmentation": [sets.polygon((0, 0, sets.WIDTH, sets.HEIGHT))], "area": 480}
        content["annotations"] += [
            whole | {"id": 1000 + each["id"], "image_id": each["id"]} for each in content["images"]
        ]
        path.write_text(json.dumps(content))
    assert check(tmp_path)["warnings"] == [
        "1 class that no mask of train, val and test holds: background: every pixel is of another one; --label-map "
        "background=ignore (data.label_map) leaves it out",
        "'Void' counts as any class does; where it means nothing, give --label-map Void=ignore (data.label_map)",
    ]
    done = cli("data", "check", tmp_path, "--label-map", "Void=ignore,background=ignore")
    assert done.returncode == 0 and "warning" not in done.stdout and "classes by data.label_map" in done.stdout


def test_faults_in_a_labelme_file(tmp_path: Path) -> None:
    sets.labelme(tmp_path)
    path = tmp_path / "0.json"
    content = json.loads(path.read_text())
    shape = content["shapes"][0]
    picture = json.loads((tmp_path / "2.json").read_text())["shapes"][0]["mask"]
    for change, said in (
        ({"shape_type": "line"}, "holds a line ('car'), which covers no area"),
        ({"points": [[1, 1], [50, 1], [3, 3]]}, "reaches the point 50,1, outside its image of 20x24"),
        ({"points": [[1, 1], [5, 1]]}, "holds a polygon that cannot be drawn"),
        (
            {"shape_type": "mask", "mask": picture, "points": [[1, 1], [5, 9]]},
            "picture is of (6, 6) pixels and its box of (5, 9)",
        ),
    ):
        path.write_text(json.dumps(content | {"shapes": [shape | change]}))
        assert said in sentence(tmp_path, split={"train": 1.0})
    path.unlink()
    assert "0.png has no mask" in sentence(tmp_path)
    assert len(open_data("labelme", tmp_path, DataOptions(missing_mask="sound")).splits["train"]) == 8
