"""From a folder to a report in two commands, in every layout; and what `vss init` refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.command import cli, refused
from tests.data import sets
from vss.core.config import load_recipe
from vss.core.yaml12 import read_yaml
from vss.run.init import Machine, fitted_size

SHORT = [
    "train.epochs=1", "train.val_every=1", "finetune.epochs=1", "finetune.val_every=1", "prune.batches=1",
    "prune.recalibrate=1", "prune.budget.align=1", "control=false", "panels=1", "bench.min_seconds=0.01",
    "bench.max_seconds=60",
    "bench.images=2", "bench.spread=50", "gate.max_drop_from_baseline=null", "gate.max_fnr_increase=null",
    "gate.max_ap_drop=null", "gate.max_drop=100",
]  # fmt: skip
UNET, SEGDECNET = "model.options={width: 4, depth: 0}", "model.options={widths: [4, 4, 4, 4, 16]}"
RUN = {*{layout: form for form, (layout, _) in sets.EVERY.items()}.values()} - {"ksdd2"}
"""One form of each layout; `ksdd2` is run by the goldens."""


def finite(value: Any) -> bool:
    """Whether every number below a value is one."""
    if isinstance(value, dict | list):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("form", sets.EVERY)
def test_every_form_has_a_recipe_and_every_layout_ends_in_a_report(form: str, tmp_path: Path) -> None:
    root, recipe, out = tmp_path / form, tmp_path / "own.yaml", tmp_path / "out"
    layout, write = sets.EVERY[form]
    write(root)
    done = cli("init", root, "--save", recipe)
    assert done.returncode == 0, done.stderr[-2000:]
    made, text = load_recipe(str(recipe)), recipe.read_text()
    decides = form in ("anomaly", "ksdd2")
    assert f"layout: {layout}" in done.stdout and made.data.dataset == layout
    assert made.model.name == ("segdecnet" if decides else "unet")
    assert made.split == ("val" if form == "cityscapes" else "test")
    lines = [line.strip() for line in text.splitlines()]
    keys = [i for i, line in enumerate(lines) if line and line[0] != "#" and not line.endswith(":")]
    assert all(lines[i - 1].startswith("#") for i in keys), "a key without a reason"
    if form not in RUN:
        return
    small = SEGDECNET if decides else UNET
    done = cli("run", recipe, "--out", out, *(word for change in (*SHORT, small) for word in ("--set", change)))
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((out / "report.json").read_text())
    score = "ap_pct" if decides else "miou_pct"
    assert [row["name"] for row in report["rows"] if 0 <= row[score] <= 100] == [
        "baseline", "pruned", "finetuned", "engine baseline", "engine pruned",
    ]  # fmt: skip
    assert not decides or "; splits are made by a hash of the ids" in report["protocol"]
    assert finite(report["rows"]) and (out / "report.html").stat().st_size > 20_000


def test_a_recipe_holds_what_was_found_and_what_was_given(tmp_path: Path) -> None:
    root, recipe = tmp_path / "photos", tmp_path / "own.yaml"
    sets.flat(root)
    (root / "labels/3_mask.png").unlink()
    words = ["init", root, "--save", recipe]
    refused(cli(*words), "1 image without a mask", "imgs/3.png", "--missing-mask sound")
    assert not recipe.exists()
    done = cli(*words, "--missing-mask", "sound", "--label-map", "tree=car", "--model", "unet")
    assert done.returncode == 0, done.stderr
    found = read_yaml(recipe, kind="recipe")
    assert found["data"]["missing_mask"] == "sound" and found["data"]["label_map"] == {"tree": "car"}
    assert found["data"]["split"] == {"train": 0.7, "val": 0.15, "test": 0.15} and found["model"] == {
        "name": "unet", "options": {"width": 16, "depth": 2},
    }  # fmt: skip
    assert "# as it was given to vss init\n  name: unet" in recipe.read_text()
    assert found["train"]["epochs"] == 80 and found["gate"] == {"max_drop_from_baseline": 1.0}
    total = sets.HEIGHT * sets.WIDTH * sets.COUNT
    car = 100 * (sets.PIXELS[1] + sets.PIXELS[2] - 24) / total
    assert f"car         {car:7.2f}       11" in recipe.read_text()
    before = recipe.read_bytes()
    refused(cli(*words, "--missing-mask", "sound"), "own.yaml exists already; give --force")
    assert recipe.read_bytes() == before
    assert cli(*words, "--missing-mask", "sound", "--force").returncode == 0 and recipe.read_bytes() != before


def test_what_is_no_set_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    (tmp_path / "empty").mkdir()
    refused(cli("init", tmp_path / "empty", "--save", recipe), "the layout of", "is not known")
    two = tmp_path / "two"
    sets.voc(two)
    sets.coco(two)
    refused(cli("init", two, "--save", recipe), "fits the layouts", "--dataset")
    bad = tmp_path / "bad"
    sets.flat(bad)
    Image.new("L", (20, 24), 9).save(bad / "labels/2_mask.png")
    refused(cli("init", bad, "--save", recipe), "2_mask.png holds label values 9")
    refused(cli("init", tmp_path / "bad", "--save", tmp_path / "own"), "give NAME.yaml")
    (bad / "labels/2_mask.png").unlink()
    (bad / "imgs/2.png").unlink()
    refused(cli("init", bad, "--save", recipe, "--label-map", "tree=ignore,car=ignore"), "there is one class alone")
    refused(cli("init", tmp_path / "nowhere", "--save", recipe), "does not exist")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "empty", "two"]


def test_a_split_of_the_folder_that_has_no_fraction_stays(tmp_path: Path) -> None:
    """Test images that the folder has are tested on, and the training images give some to validate on."""
    recipe = tmp_path / "own.yaml"
    sets.split_folders(tmp_path / "set")
    for path in (tmp_path / "set/val").rglob("*.png"):
        path.unlink()
    assert cli("init", tmp_path / "set", "--save", recipe).returncode == 0
    found = load_recipe(str(recipe)).data
    assert found.split == {"train": 0.85, "val": 0.15}
    done = cli("data", "check", tmp_path / "set", "--data-split", "train=0.85,val=0.15")
    assert "train: 7 pairs" in done.stdout and "val: 1 pair" in done.stdout and "test: 2 pairs" in done.stdout


def test_the_size_is_that_of_the_images_or_what_the_machine_trains() -> None:
    assert fitted_size((720, 960), 17_920, 16) == (112, 144) and fitted_size((100, 130), 17_920, 16) == (96, 128)
    assert fitted_size((580, 230), 38_400, 8, least=64) == (304, 120)
    height, width = fitted_size((24, 20), 38_400, 8, least=64)
    assert (height // 64) * (width // 64) >= 2
    assert Machine(2).pixels(17_920) == 17_920 and Machine(8).pixels(17_920) == 4 * 17_920
    assert Machine(8, 24 << 30).pixels(17_920) == 24 * 32_768 and Machine(8, 141 << 30).pixels(17_920) == 2048 * 1024
