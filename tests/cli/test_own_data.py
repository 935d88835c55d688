"""Folders of one's own from the command line: check, run to a report, and what a later command need not repeat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import cli, refused
from tests.data import sets
from vss.core.config import DataOptions
from vss.core.yaml12 import dump
from vss.data import Preprocess, SegSplit, count_classes, open_data
from vss.data.images import read_header
from vss.data.layouts import LAYOUTS
from vss.data.readers import CAMVID_NAMES, CITYSCAPES
from vss.run.page.panels import overlay
from vss.train.header import header

FIT = {"epochs": 1, "batch_size": 4, "lr": 0.05, "precision": "32-true", "accelerator": "cpu"}
RECIPE = {
    "name": "own",
    "model": {"name": "unet", "options": {"width": 8, "depth": 0}},
    "train": FIT,
    "prune": {"batches": 2, "batch_size": 4, "recalibrate": 2},
    "finetune": FIT,
    "control": False,
    "gate": {"max_drop_from_baseline": None},
    "bench": {"min_seconds": 0.05, "max_seconds": 1.0, "images": 2, "spread": 50},
    "panels": 1,
}
TRAIN = ["--epochs", 1, "--batch-size", 4, "--input-size", "16,16", "--option", "width=8", "--option", "depth=0"]


CHECKED: dict[str, tuple[list[str], dict[str, int], dict[str, int]]] = {
    "masks": (list(sets.NAMES), {"train": 8, "val": 2, "test": 2}, dict(zip(sets.NAMES, sets.PIXELS, strict=True))),
    "camvid": (
        list(CAMVID_NAMES), {"train": 8, "val": 2, "test": 2},
        dict(zip(CAMVID_NAMES, [*sets.PIXELS, *[0] * 8], strict=True)),
    ),
    "cityscapes": (
        [name for name, _, _ in CITYSCAPES], {"train": 8, "val": 2},
        {"road": sum(int((sets.mask(i) == 0).sum()) for i in range(10)),
         "sidewalk": sum(int((sets.mask(i) == 1).sum()) for i in range(10)), "building": 0},
    ),
    "ksdd2": (["background", "defect"], {"train": 8, "val": 2, "test": 2},
              {"background": sum(sets.PIXELS[:2]), "defect": sets.TREE}),
    "anomaly": (["background", "defect"], {"train": 8, "val": 2, "test": 2}, {"defect": 6 * (4 + 5 + 6)}),
}  # fmt: skip
"""Form -> (classes, pairs of every split, pixels over all splits), where they are not those of `sets.LAYOUTS`."""


@pytest.mark.parametrize("form", sets.EVERY)
def test_check_names_layout_classes_and_counts_of_every_form(form: str, tmp_path: Path) -> None:
    """The pixels are those that `sets.mask` draws, whatever holds them on disk."""
    root, report = tmp_path / form, tmp_path / "check.json"
    layout, write = sets.EVERY[form]
    write(root)
    flags = ["--data-split", "train=0.7,val=0.15,test=0.15"] if form == "anomaly" else []
    if flags:
        refused(cli("data", "check", root), "2 problems; mend before training")
    done = cli("data", "check", root, "--report", report, *flags)
    assert done.returncode == 0, done.stderr
    names, pairs, pixels = CHECKED.get(form, CHECKED["masks"])
    text = " ".join(done.stdout.split())
    assert text.startswith(f"layout: {layout} read as: {form} (") and text.endswith(f"ok: {layout}")
    assert all(f" not {other}: " in text for other in LAYOUTS if other != layout) and f" not {layout}: " not in text
    size = f"all {sets.HEIGHT}x{sets.WIDTH} (height x width)"
    assert all(f"{split}: {number} pairs, {size}" in text for split, number in pairs.items())
    found = json.loads(report.read_text())
    assert found["dataset"] == layout and sorted(found["classes"]) == sorted(names) and all(n in text for n in names)
    assert {split: part["pairs"] for split, part in found["splits"].items()} == pairs
    total = {name: sum(part["classes"][name]["pixels"] for part in found["splits"].values()) for name in pixels}
    assert total == pixels


def test_colours_run_to_a_report_and_the_checkpoint_knows_how_they_were_read(tmp_path: Path) -> None:
    root, out = tmp_path / "rgb", tmp_path / "out"
    sets.rgb(root)
    data = {
        "dataset": "auto", "root": str(root), "size": [16, 16], "label_map": {"tree": "plant", "background": "ignore"},
        "split": {"train": 0.5, "val": 0.25, "test": 0.25},
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(dump(RECIPE | {"data": data}))
    done = cli("run", tmp_path / "own.yaml", "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((out / "report.json").read_text())
    info = header(out / "finetuned.safetensors")
    assert info.classes == ["car", "plant"] and info.info["dataset"] == "colours"
    kept = info.info["data"]
    assert kept["label_map"] == data["label_map"] and kept["split"] == data["split"]
    assert kept["colors"] == {name: list(colour) for name, colour in sets.COLOURS.items()}
    (root / "label_colors.txt").unlink()  # the checkpoint has it
    words = ["evaluate", "--ckpt", out / "finetuned.safetensors", "--data-root", root]
    done = cli(*words, "--report", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr[-2000:]
    [row] = json.loads((tmp_path / "e.json").read_text())["rows"]
    expected = next(row for row in report["rows"] if row["name"] == "finetuned")
    assert row["miou_pct"] == pytest.approx(expected["miou_pct"], abs=1e-6)
    sets.save(root / "LabeledApproved_full/0_L.png", sets.mask(0))
    refused(cli(*words), "0_L.png is grey")


def test_import_writes_the_plain_layout_once(tmp_path: Path) -> None:
    root, to = tmp_path / "labelme", tmp_path / "plain"
    sets.labelme(root)
    done = cli("data", "import", root, to, "--label-map", "tree=ignore")
    assert done.returncode == 0 and "wrote 12 pairs of 2 classes" in done.stdout, done.stderr
    assert sorted(path.name for path in to.iterdir()) == ["classes.txt", "images", "masks"]
    assert (to / "classes.txt").read_text() == "background\ncar\n"
    before, after = open_data("labelme", root, DataOptions(label_map={"tree": "ignore"})), open_data("masks", to)
    for split, pairs in before.splits.items():
        assert [pair.id for pair in pairs] == [pair.id for pair in after.pairs(split)]
        for old, new in zip(pairs, after.pairs(split), strict=True):
            assert (before.read(old)[1] == after.read(new)[1]).all() and old.image.samefile(new.image)
            with Image.open(str(new.mask)) as picture:
                assert picture.mode == "P"
    assert count_classes(after, after.pairs("train")).ignored > 0
    refused(cli("data", "import", root, to), "exists already; name a new folder")
    (root / "0.png").write_bytes(b"no image")
    refused(cli("data", "import", root, tmp_path / "other"), "0.png cannot be read")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labelme", "plain"]


def test_images_shrunk_once_are_those_that_training_would_resize(tmp_path: Path) -> None:
    """Wide and tall images keep their shape and fit; pixels and labels are those of the preprocessing, to the bit."""
    root, to, rng = tmp_path / "flat", tmp_path / "small", np.random.default_rng(0)
    sets.split_folders(root)
    for split, wide in (("train", True), ("val", False)):
        for pair in open_data("flat", root).pairs(split):
            shape = (48, 100) if wide else (100, 48)
            sets.save(pair.image, rng.integers(0, 256, (*shape, 3), np.uint8))
            sets.save(Path(str(pair.mask)), rng.integers(0, 3, shape, np.uint8))
    done = cli("data", "import", root, to, "--fit", "24,50")
    assert done.returncode == 0 and "10 images shrunk" in done.stdout, done.stderr
    before, after = open_data("flat", root), open_data("masks", to)
    for split, size in {"train": (24, 50), "val": (24, 12), "test": sets.mask(0).shape}.items():
        old, new = (SegSplit(data, split, Preprocess(size=size)) for data in (before, after))
        for index, pair in enumerate(after.pairs(split)):
            assert read_header(pair.image) == size and len(old) == len(new)
            assert all((old[index][key] == new[index][key]).all() for key in ("image", "mask"))
    refused(cli("data", "import", root, tmp_path / "other", "--fit", "24"), "--fit takes H,W")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flat", "small"]


@pytest.mark.parametrize("name", ["../out.png", "{root}/9.png"])
def test_import_writes_nothing_outside_its_folder(tmp_path: Path, name: str) -> None:
    """COCO files list images by paths; a whole path would be written over the image itself."""
    root, to = tmp_path / "coco", tmp_path / "plain"
    outside = root / "images" / name.format(root=tmp_path)
    content = sets.coco_content(range(4))
    content["images"][3]["file_name"] = name.format(root=tmp_path)
    for i in range(3):
        sets.save(root / f"images/{i}.png", sets.image(i))
    sets.save(outside, sets.image(3))
    sets.dump(root / "annotations.json", content)
    before = outside.read_bytes()
    for words in ([], ["--fit", "12,12"]):
        refused(cli("data", "import", root, to, *words), "which leads out of a folder; list it by a name below")
    assert outside.read_bytes() == before and not to.exists()
    refused(cli("data", "import", root, root / "images/plain"), "would then hold every image twice")
    assert not (root / "images/plain").exists()


def test_a_page_of_overlays_shows_every_class_and_every_finding(tmp_path: Path) -> None:
    root, page = tmp_path / "flat", tmp_path / "page.html"
    sets.flat(root)
    (root / "labels/3_mask.png").unlink()
    done = cli("data", "view", root, "--save", page, "--images", 4)
    assert done.returncode == 0 and "wrote" in done.stdout, done.stderr
    text = page.read_text()
    assert text.count('alt="mask on') == 4 and text.count("data:image/jpeg;base64,") == 8 and 'src="http' not in text
    assert all(f"</i> {name}</th>" in text for name in sets.NAMES) and "1 image without a mask" in text
    assert "background, car, tree" in text


def test_every_bad_mask_is_named_and_the_rest_shown_where_images_cannot_be_shared_out(tmp_path: Path) -> None:
    root, page = tmp_path / "rgb", tmp_path / "page.html"
    sets.rgb(root)
    for i in (3, 5):
        wrong = sets.colours(sets.mask(i))
        wrong[0, : i + 4] = (1, 2, 3)
        sets.save(root / f"LabeledApproved_full/{i}_L.png", wrong)
    done = cli("data", "check", root)
    refused(done, "rgb has 1 problem; mend before training")
    text = " ".join(done.stdout.split())
    assert (
        "all: 12 pairs" in text
        and "problem: 2 masks with labels outside the classes" in text
        and "no split" not in text
    )
    assert all(f"{i}_L.png holds 1 colour (1,2,3 in {i + 4} pixels)" in text for i in (3, 5))
    done = cli("data", "view", root, "--save", page)
    assert done.returncode == 0 and page.read_text().count('alt="mask on') == 10, done.stderr


def test_an_overlay_is_grey_under_the_colour_of_the_class() -> None:
    image = Image.fromarray(np.full((2, 2, 3), 100, np.uint8))
    mask = np.array([[0, 1], [255, 1]], np.uint8)
    found = np.asarray(overlay(image, mask, np.array([(0, 0, 0), (200, 0, 0)], np.uint8)))
    assert found[0, 0].tolist() == [45, 45, 45] and found[0, 1].tolist() == [155, 45, 45]
    assert found[1, 0].tolist() == [int(0.55 * 36 + 45)] * 3


def test_polygons_and_sound_images_train_by_flags(tmp_path: Path) -> None:
    root = tmp_path / "labelme"
    sets.labelme(root)
    (root / "3.json").unlink()
    flags = ["--dataset", "labelme", "--data-root", root, "--missing-mask", "sound"]
    flags += ["--data-split", "train=0.5,val=0.25,test=0.25", "--label-map", "tree=car", "--classes", "background,car"]
    done = cli("train", *flags, *TRAIN, "--save", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    best = header(tmp_path / "out/best.safetensors")
    assert best.classes == ["background", "car"] and best.info["data"] == {
        "classes": ["background", "car"], "label_map": {"tree": "car"}, "missing_mask": "sound",
        "split": {"test": 0.25, "train": 0.5, "val": 0.25},
    }  # fmt: skip
    words = ["evaluate", "--ckpt", tmp_path / "out/best.safetensors", "--data-root", root]
    assert cli(*words).returncode == 0
    refused(cli(*words, "--missing-mask", "refuse"), "3.png has no mask")
    refused(cli(*words, "--label-map", "tree=bush"), "data.classes leaves out 'bush'")


def test_training_and_runs_refuse_images_that_two_splits_hold_before_anything_is_written(tmp_path: Path) -> None:
    root, recipe, out = tmp_path / "set", tmp_path / "own.yaml", tmp_path / "out"
    sets.split_folders(root)
    (root / "test/images/10.png").write_bytes((root / "train/images/3.png").read_bytes())
    said = "1 training image is in another split as well, by content (train/3 = test/10)"
    refused(cli("train", "--dataset", "flat", "--data-root", root, *TRAIN, "--save", out), said)
    recipe.write_text(dump(RECIPE | {"data": {"dataset": "flat", "root": str(root), "size": [16, 16]}}))
    refused(cli("run", recipe, "--out", out), said, "--data-split train=0.7")
    refused(cli("data", "check", root), "1 problem")
    refused(cli("init", root, "--save", tmp_path / "new.yaml"), "1 image that is in more than one split")
    assert not list(out.rglob("*.safetensors")) and not (tmp_path / "new.yaml").exists()
