"""Layouts that people have: which one a folder is, which pixels are of which class, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import cli, refused
from tests.data import sets
from tests.data.sets import pixels, sentence
from vss.core.config import DataOptions
from vss.data import SegData, count_classes, guess_layout, open_data
from vss.data.base import Pair
from vss.data.check import check
from vss.data.classes import GROUPS
from vss.data.layouts import LAYOUTS
from vss.data.masks import ColourFile
from vss.data.readers import CAMVID_NAMES, DATASETS


@pytest.mark.parametrize("form", sets.LAYOUTS)
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
    text = sentence(tmp_path)
    assert "0_L.png holds 0,128,1; 10,10,10; 127,0,0), and" in text and "--colors FILE (data.colors)" in text


def test_colours_without_a_table_or_a_pair_and_of_a_lossy_kind_are_refused(tmp_path: Path) -> None:
    sets.rgb(tmp_path)
    (tmp_path / "label_colors.txt").unlink()
    for path in (tmp_path / "LabeledApproved_full").iterdir():
        path.rename(path.with_name(f"other_{path.name}"))
    assert "are in colours, and nothing says which" in sentence(tmp_path)
    for path in (tmp_path / "LabeledApproved_full").iterdir():
        Image.open(path).save(path.with_name(f"{path.name.removeprefix('other_').removesuffix('_L.png')}.jpg"))
        path.unlink()
    assert "0.jpg is a JPEG file, which does not keep colours" in sentence(tmp_path)


def test_a_void_colour_is_ignored_or_becomes_what_the_map_says(tmp_path: Path) -> None:
    sets.rgb(tmp_path)
    table = tmp_path / "label_colors.txt"
    table.write_text(table.read_text().replace("background", "Void"))
    for wanted in ({}, {"void": "ignore"}):
        data = open_data("colours", tmp_path, DataOptions(label_map=wanted))
        assert data.class_names == ("car", "tree") and pixels(data) == sets.PIXELS[1:]
    data = open_data("colours", tmp_path, DataOptions(label_map={"Void": "tree"}))
    assert data.class_names == ("car", "tree") and pixels(data) == [sets.CAR, sets.PIXELS[0] + sets.TREE]


def test_the_colours_of_camvid_become_its_eleven_groups(tmp_path: Path) -> None:
    """The published `label_colors.txt` names 32 classes; of each a pixel."""
    olds = [old for group in GROUPS["camvid11"].values() for old in group]
    colours = {name: (number, 255 - number, 7) for number, name in enumerate([*sorted(olds), "Void"])}
    for name in ("a", "b"):
        sets.save(tmp_path / f"701_StillsRaw_full/{name}.png", sets.image(len(name))[:1, :16].repeat(2, 1))
        sets.save(tmp_path / f"LabeledApproved_full/{name}_L.png", np.array([list(colours.values())], np.uint8))
    (tmp_path / "label_colors.txt").write_text("".join(f"{r} {g} {b}\t\t{n}\n" for n, (r, g, b) in colours.items()))
    data = open_data("colours", tmp_path, DataOptions(label_map="camvid11", split={"train": 1.0}))
    assert len(olds) == 31 and set(data.class_names) == set(CAMVID_NAMES)
    assert dict(zip(data.class_names, pixels(data), strict=True)) == {
        k: 2 * len(v) for k, v in GROUPS["camvid11"].items()
    }


def test_a_colour_mask_reads_the_same_from_a_palette(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    sets.save(path, sets.colours(sets.mask(0)))
    before = ColourFile(path).stored()
    picture = Image.fromarray(sets.mask(0))
    picture.putpalette(np.array(list(sets.COLOURS.values()), np.uint8).tobytes())
    picture.save(path)
    assert picture.mode == "P"
    assert (ColourFile(path).stored() == before).all() and len(np.unique(before)) == 3


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
