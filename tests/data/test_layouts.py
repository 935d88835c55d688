"""Layouts that people have: which one a folder is, which pixels are of which class, and what is refused."""

from __future__ import annotations

import itertools
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import cli, refused
from tests.data import sets
from vss.core.config import DataOptions
from vss.core.errors import VssError
from vss.data import SegData, count_classes, guess_layout, open_data
from vss.data.base import Pair
from vss.data.check import check
from vss.data.layouts import LAYOUTS
from vss.data.masks import ColourFile, Drawn, Shape, runs_of
from vss.data.readers import DATASETS

coco_tools = pytest.mark.skipif(not find_spec("pycocotools"), reason="needs pycocotools: pip install vss[coco]")
FORMS = [pytest.param(form, marks=coco_tools if name == "coco" else ()) for form, (name, _) in sets.LAYOUTS.items()]


def pixels(data: SegData) -> list[int]:
    pairs = [pair for found in data.splits.values() for pair in found]
    return [int(count) for count in count_classes(data, pairs).pixels]


def sentence(root: Path, name: str = "auto", **options: object) -> str:
    """By what the folder is refused; one sentence."""
    with pytest.raises(VssError) as caught:
        data = open_data(name, root, DataOptions.model_validate(options))
        for found in data.splits.values():
            count_classes(data, found)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and "VssError" not in text and caught.value.exit_code == 2
    return text


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_recognised_and_read(form: str, tmp_path: Path) -> None:
    layout, write = sets.LAYOUTS[form]
    write(tmp_path)
    assert guess_layout(tmp_path) == layout
    data = open_data(layout, tmp_path)
    assert data.name == layout and sorted(data.class_names) == sorted(sets.NAMES)
    order = [data.class_names.index(name) for name in sets.NAMES]
    assert [pixels(data)[i] for i in order] == sets.PIXELS
    assert {split: len(pairs) for split, pairs in data.splits.items()} == {"train": 8, "val": 2, "test": 2}
    pair = data.splits["val"][0]
    number = int(Path(pair.image).stem)
    names = np.array([*data.class_names, *[""] * 253])[data.read(pair)[1]]
    assert (names == np.array(sets.NAMES)[sets.mask(number)]).all()
    report = check(tmp_path)
    assert report["ok"], report["problems"]
    assert report["not_layouts"].keys() == LAYOUTS.keys() - {layout} and all(report["not_layouts"].values())


def test_every_drawn_layout_has_a_reader() -> None:
    done = cli("data", "layouts")
    assert done.returncode == 0
    for name, layout in LAYOUTS.items():
        assert name in DATASETS and all(" ".join(line.split()) in " ".join(done.stdout.split())
                                        for line in layout.drawing.splitlines())  # fmt: skip


def test_anomaly_folders_as_published_and_shared_out_anew(tmp_path: Path) -> None:
    sets.anomaly(tmp_path)
    assert guess_layout(tmp_path) == "anomaly"
    data = open_data("anomaly", tmp_path)
    assert {split: len(pairs) for split, pairs in data.splits.items()} == {"train": 6, "test": 6}
    assert data.class_names == ("background", "defect") and pixels(data)[1] == 6 * (4 + 5 + 6)
    assert any("the training masks hold one class alone" in problem for problem in check(tmp_path)["problems"])
    options = DataOptions(split={"train": 0.34, "val": 0.33, "test": 0.33})
    anew = open_data("anomaly", tmp_path, options)
    held = {split: int((count_classes(anew, pairs).rows[:, 1] > 0).sum()) for split, pairs in anew.splits.items()}
    assert held == {"train": 1, "val": 1, "test": 1} and pixels(anew)[1] == 90


def test_an_image_without_mask_is_sound_where_the_options_say_so(tmp_path: Path) -> None:
    sets.flat(tmp_path)
    (tmp_path / "labels/3_mask.png").unlink()
    assert "give --missing-mask sound (data.missing_mask)" in sentence(tmp_path)
    data = open_data("flat", tmp_path, DataOptions(missing_mask="sound"))
    sound = sets.PIXELS[1] - 6 * 4
    assert pixels(data) == [sets.PIXELS[0] + 6 * 4, sound, sets.PIXELS[2]]
    refused(cli("data", "check", tmp_path), "1 problem")
    assert cli("data", "check", tmp_path, "--missing-mask", "sound").returncode == 0


def test_masks_of_0_and_255_need_no_list_of_classes(tmp_path: Path) -> None:
    sets.flat(tmp_path)
    for i in range(sets.COUNT):
        sets.save(tmp_path / f"labels/{i}_mask.png", np.where(sets.mask(i), 255, 0).astype(np.uint8))
    (tmp_path / "classes.txt").unlink()
    data = open_data("flat", tmp_path)
    assert data.class_names == ("background", "foreground")
    assert pixels(data) == [sets.PIXELS[0], sets.CAR + sets.TREE]
    sets.save(tmp_path / "labels/0_mask.png", sets.mask(0) * 100)
    assert "hold the values 0, 100, 200, 255, and nothing says which classes" in sentence(tmp_path)


@coco_tools
def test_coco_run_lengths_crowds_and_what_overlaps(tmp_path: Path) -> None:
    from pycocotools import mask as tools

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


@coco_tools
def test_polygons_cover_the_pixels_that_pycocotools_gives_on_the_whole_image() -> None:
    """Also of tenths of a pixel, which lie between its points, and outside the image."""
    from pycocotools import mask as tools

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


# Bad input: one sentence each.


def test_two_layouts_that_fit_are_named(tmp_path: Path) -> None:
    sets.flat(tmp_path)
    sets.dump(tmp_path / "annotations.json", sets.coco_content(range(1)))
    assert sentence(tmp_path).endswith(
        "fits the layouts flat and coco; say which is meant: --dataset flat (data.dataset)."
    )
    assert open_data("flat", tmp_path).class_names == sets.NAMES
    refused(cli("data", "check", tmp_path), "fits the layouts flat and coco")


def test_two_folders_of_masks_are_named(tmp_path: Path) -> None:
    sets.flat(tmp_path)
    sets.save(tmp_path / "masks/0.png", sets.mask(0))
    assert "masks of" in sentence(tmp_path) and "may lie in labels and masks" in sentence(tmp_path)


def test_colours_in_no_table_are_counted(tmp_path: Path) -> None:
    sets.rgb(tmp_path)
    wrong = sets.colours(sets.mask(5))
    wrong[0, :7] = (1, 2, 3)
    path = tmp_path / "LabeledApproved_full/5_L.png"
    sets.save(path, wrong)
    text = sentence(tmp_path, split={"train": 1.0})
    assert f"{path} holds 1 colour (1,2,3 in 7 pixels) that no class owns; expected the 3 colours of the table" in text
    sets.save(path, sets.mask(5))
    assert f"{path} is grey (mode 'L'), and masks of colours were expected" in sentence(tmp_path, split={"train": 1.0})
    (tmp_path / "label_colors.txt").write_text("1 2 red\n")
    assert "line 1 of" in sentence(tmp_path) and "expected R G B NAME" in sentence(tmp_path)
    (tmp_path / "label_colors.txt").write_text("1 2 3 a\n1 2 3 b\n")
    assert "gives 'a' and 'b' one colour" in sentence(tmp_path)
    (tmp_path / "label_colors.txt").unlink()
    assert "masks of" in sentence(tmp_path) and "--colors FILE (data.colors)" in sentence(tmp_path)


def test_a_colour_mask_reads_the_same_from_a_palette(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    sets.save(path, sets.colours(sets.mask(0)))
    before = ColourFile(path).stored()
    picture = Image.fromarray(sets.mask(0))
    picture.putpalette(np.array(list(sets.COLOURS.values()), np.uint8).tobytes())
    picture.save(path)
    assert picture.mode == "P"
    assert (ColourFile(path).stored() == before).all() and len(np.unique(before)) == 3


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


@coco_tools
@pytest.mark.parametrize("place", COCO_FAULTS)
def test_faults_in_a_coco_file(place: str, tmp_path: Path) -> None:
    sets.save(tmp_path / "images/0.png", sets.image(0))
    content = sets.coco_content(range(1))
    *above, last = [int(part) if part.isdecimal() else part for part in place.strip().split(".")]
    inner: object = content
    for part in above:
        inner = inner[part]  # type: ignore[index]
    value, said = COCO_FAULTS[place]
    inner[last] = value  # type: ignore[index]
    sets.dump(tmp_path / "annotations.json", content)
    assert said in sentence(tmp_path, split={"train": 1.0})


def test_run_lengths_are_those_that_pycocotools_wrote_and_short_ones_are_refused(tmp_path: Path) -> None:
    """It decodes a text that ends early to pixels of memory that nobody wrote."""
    tools = pytest.importorskip("pycocotools.mask")
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


@coco_tools
def test_annotations_without_an_area_are_ordered_by_their_own(tmp_path: Path) -> None:
    sets.save(tmp_path / "images/0.png", sets.image(0))
    content = sets.coco_content(range(1))
    small, large = content["annotations"]
    large["segmentation"] = [sets.polygon((0, 0, 20, 24))]
    content["annotations"] = [{k: v for k, v in each.items() if k != "area"} for each in (small, large)]
    sets.dump(tmp_path / "annotations.json", content)
    data = open_data("coco", tmp_path, DataOptions(split={"train": 1.0}))
    assert pixels(data) == [0, 24, 24 * 20 - 24]


@coco_tools
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


@coco_tools
def test_a_category_without_an_image_and_an_image_that_no_file_lists_are_said(tmp_path: Path) -> None:
    sets.coco(tmp_path)
    for path in (tmp_path / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"].append({"id": 100, "name": "ghost"})
        path.write_text(json.dumps(content))
    sets.save(tmp_path / "train2017/99.png", sets.image(99))
    notes = check(tmp_path)["warnings"]
    assert any("1 class that no mask" in note and "ghost" in note for note in notes)
    assert f"1 image that no file lists, not used: {tmp_path / 'train2017/99.png'}" in notes


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


def test_masks_of_another_size_and_lists_of_what_is_not_there(tmp_path: Path) -> None:
    sets.listed(tmp_path)
    (tmp_path / "val.txt").write_text("8\n77.png\n")
    assert "val.txt lists '77.png' (1 such line), of which there is no pair" in sentence(tmp_path)
    (tmp_path / "val.txt").write_text("8\n")
    sets.save(tmp_path / "labels/8_mask.png", np.zeros((5, 5), np.uint8))
    assert "is 5x5 and its image 8.png is 24x20" in sentence(tmp_path)


def test_a_plugin_layout_of_one_argument_still_opens(tmp_path: Path) -> None:
    def own(root: Path) -> SegData:
        pairs = [Pair(id="0", image=root / "imgs/0.png", mask=root / "labels/0_mask.png")]
        base = open_data("flat", root)
        return SegData(**{**vars(base), "name": "own", "splits": {"train": pairs}, "kept": {}})

    sets.flat(tmp_path)
    DATASETS.add("own_of_test", own)
    try:
        data = open_data("own_of_test", tmp_path, DataOptions(label_map={"tree": "ignore"}))
    finally:
        del DATASETS._items["own_of_test"]
    assert data.class_names == ("background", "car") and pixels(data)[1] == 24
