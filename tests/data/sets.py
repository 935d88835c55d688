"""One small set in every layout that is read as it is: 12 images of 24x20 with a `car`, every second with a `tree`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vss.core.config import DataOptions
from vss.core.errors import VssError
from vss.data import SegData, count_classes, open_data
from vss.data.base import generic_palette

HEIGHT, WIDTH, COUNT = 24, 20, 12
NAMES = ("background", "car", "tree")
COLOURS = {"background": (10, 10, 10), "car": (127, 0, 0), "tree": (0, 128, 1)}
CAR = sum(6 * (4 + i % 3) for i in range(COUNT))
TREE = 50 * (COUNT // 2)
PIXELS = [HEIGHT * WIDTH * COUNT - CAR - TREE, CAR, TREE]
"""Of every class over all images."""


def boxes(i: int) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(class, (left, top, right, bottom)) of the objects of an image; right and bottom are outside."""
    return [(1, (3, 2, 7 + i % 3, 8)), *([(2, (5, 12, 15, 17))] if i % 2 == 0 else [])]


def image(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def mask(i: int) -> np.ndarray:
    found = np.zeros((HEIGHT, WIDTH), np.uint8)
    for value, (left, top, right, bottom) in boxes(i):
        found[top:bottom, left:right] = value
    return found


def save(path: Path, array: np.ndarray, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if palette:
        picture.putpalette(generic_palette(256).tobytes())
    picture.save(path)


def colours(array: np.ndarray) -> np.ndarray:
    return np.array(list(COLOURS.values()), np.uint8)[array]


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def split_of(i: int) -> str:
    """8 train, 2 val, 2 test."""
    return "train" if i < 8 else "val" if i < 10 else "test"


def flat(root: Path) -> None:
    for i in range(COUNT):
        save(root / f"imgs/{i}.png", image(i))
        save(root / f"labels/{i}_mask.png", mask(i))
    (root / "classes.txt").write_text("\n".join(NAMES))


def split_folders(root: Path) -> None:
    for i in range(COUNT):
        save(root / split_of(i) / f"images/{i}.png", image(i))
        save(root / split_of(i) / f"gt/{i}_L.png", mask(i))
    (root / "classes.txt").write_text("\n".join(NAMES))


def listed(root: Path) -> None:
    flat(root)
    for split in ("train", "val", "test"):
        names = [f"imgs/{i}.png labels/{i}_mask.png" for i in range(COUNT) if split_of(i) == split]
        (root / f"{split}.txt").write_text("\n".join(names))


def one_folder(root: Path) -> None:
    for i in range(COUNT):
        save(root / f"{i}.png", image(i))
        save(root / f"{i}_mask.png", mask(i))
    (root / "classes.txt").write_text("\n".join(NAMES))


def rgb(root: Path) -> None:
    for i in range(COUNT):
        save(root / f"701_StillsRaw_full/{i}.png", image(i))
        save(root / f"LabeledApproved_full/{i}_L.png", colours(mask(i)))
    lines = [f"{r} {g} {b}\t\t{name}" for name, (r, g, b) in COLOURS.items()]
    (root / "label_colors.txt").write_text("\n".join(lines))


def kaggle(root: Path) -> None:
    for i in range(COUNT):
        save(root / split_of(i) / f"{i}.png", image(i))
        save(root / f"{split_of(i)}_labels" / f"{i}_L.png", colours(mask(i)))
    lines = ["name,r,g,b", *(f"{name},{r},{g},{b}" for name, (r, g, b) in COLOURS.items())]
    (root / "class_dict.csv").write_text("\n".join(lines))


def voc(root: Path) -> None:
    for i in range(COUNT):
        save(root / f"JPEGImages/{i}.png", image(i))
        save(root / f"SegmentationClass/{i}.png", mask(i), palette=True)
    save(root / "JPEGImages/unlabelled.png", image(99))
    for split in ("train", "val", "test"):
        path = root / f"ImageSets/Segmentation/{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(str(i) for i in range(COUNT) if split_of(i) == split))
    (root / "classes.txt").write_text("\n".join(NAMES))


def polygon(box: tuple[int, int, int, int]) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right, top, right, bottom, left, bottom]


def coco_content(numbers: range, *, ids: tuple[int, int] = (1, 2)) -> dict[str, Any]:
    found = [(i, value, box) for i in numbers for value, box in boxes(i)]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in numbers],
        "categories": [{"id": ids[value - 1], "name": NAMES[value]} for value in (1, 2)],
        "annotations": [
            {
                "id": n, "image_id": i, "category_id": ids[value - 1], "iscrowd": 0, "segmentation": [polygon(box)],
                "area": (box[2] - box[0]) * (box[3] - box[1]),
            }
            for n, (i, value, box) in enumerate(found)
        ],
    }  # fmt: skip


def coco(root: Path) -> None:
    for split, numbers in (("train", range(8)), ("val", range(8, 10)), ("test", range(10, 12))):
        for i in numbers:
            save(root / f"{split}2017/{i}.png", image(i))
        dump(root / f"annotations/instances_{split}2017.json", coco_content(numbers, ids=(7, 90)))


def roboflow(root: Path) -> None:
    for split, numbers in (("train", range(8)), ("valid", range(8, 10)), ("test", range(10, 12))):
        for i in numbers:
            save(root / split / f"{i}.png", image(i))
        dump(root / split / "_annotations.coco.json", coco_content(numbers))


def panoptic(root: Path) -> None:
    content = coco_content(range(COUNT))
    content["annotations"] = []
    for i in range(COUNT):
        save(root / f"images/{i}.png", image(i))
        numbers = {0: 1000, 1: 70_001, 2: 300}
        packed = np.vectorize(numbers.get)(mask(i)).astype(np.int64)
        channels = np.stack([packed & 255, packed >> 8 & 255, packed >> 16], -1).astype(np.uint8)
        save(root / f"annotations/panoptic/{i}.png", channels)
        segments = [{"id": numbers[v], "category_id": v or 3, "iscrowd": 0} for v in np.unique(mask(i)).tolist()]
        content["annotations"].append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
    content["categories"].append({"id": 3, "name": "background"})
    dump(root / "annotations/panoptic.json", content)


def labelme(root: Path) -> None:
    for i in range(COUNT):
        save(root / f"{i}.png", image(i))
        shapes: list[dict[str, Any]] = []
        for value, (left, top, right, bottom) in boxes(i):
            corners = [[left, top], [right - 1, top], [right - 1, bottom - 1], [left, bottom - 1]]
            kind = ("polygon", "rectangle", "mask")[i % 3]
            shape = {
                "label": NAMES[value],
                "shape_type": kind,
                "points": corners if kind == "polygon" else corners[::2],
            }
            if kind == "mask":
                buffer = io.BytesIO()
                Image.fromarray(np.ones((bottom - top, right - left), bool)).save(buffer, "PNG")
                shape["mask"] = base64.b64encode(buffer.getvalue()).decode()
            shapes.append(shape)
        size = {"imageWidth": WIDTH, "imageHeight": HEIGHT}
        dump(root / f"{i}.json", {"version": "5", "shapes": shapes, "imagePath": f"{i}.png", "imageData": None, **size})


def ade20k(root: Path) -> None:
    for i in range(COUNT):
        folder = {"train": "training", "val": "validation", "test": "testing"}[split_of(i)]
        save(root / f"images/{folder}/{i}.png", image(i))
        save(root / f"annotations/{folder}/{i}.png", mask(i) + 1)
    rows = [f"{n}\t0.1\t1\t1\t1\t{name}, other name" for n, name in enumerate(NAMES, start=1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]))


LAYOUTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "flat": ("flat", flat),
    "split_folders": ("flat", split_folders),
    "listed": ("flat", listed),
    "one_folder": ("flat", one_folder),
    "rgb": ("colours", rgb),
    "kaggle": ("colours", kaggle),
    "voc": ("voc", voc),
    "coco": ("coco", coco),
    "roboflow": ("coco", roboflow),
    "panoptic": ("coco", panoptic),
    "labelme": ("labelme", labelme),
    "ade20k": ("ade20k", ade20k),
}
"""Form -> (layout that it is, what writes it)."""


def anomaly(root: Path, *, supervised: bool = False) -> None:
    """MVTec's form: 6 sound training images; 3 sound test images and 3 of scratches."""
    for i in range(COUNT):
        split = "train" if i < 6 else "test"
        kind = "scratch" if i >= 9 or (supervised and i % 2) else "good"
        save(root / split / kind / f"{i:03d}.png", image(i))
        if kind != "good":
            save(root / "ground_truth" / kind / f"{i:03d}_mask.png", np.where(mask(i) == 1, 255, 0).astype(np.uint8))


def plain(root: Path) -> None:
    for i in range(COUNT):
        save(root / f"images/{split_of(i)}/{i}.png", image(i))
        save(root / f"masks/{split_of(i)}/{i}.png", mask(i))
    (root / "classes.txt").write_text("\n".join(NAMES))


def camvid(root: Path) -> None:
    for i in range(COUNT):
        save(root / f"{split_of(i)}/{i}.png", image(i))
        save(root / f"{split_of(i)}annot/{i}.png", mask(i))


def cityscapes(root: Path) -> None:
    """labelIds; the test split has none, as published."""
    for i in range(COUNT):
        split, name = split_of(i), f"city/city_{i:06d}_000019"
        save(root / f"leftImg8bit/{split}/{name}_leftImg8bit.png", image(i))
        if split != "test":
            save(root / f"gtFine/{split}/{name}_gtFine_labelIds.png", mask(i) + 7)


def ksdd2(root: Path) -> None:
    """No val, as published."""
    for i in range(COUNT):
        split = "test" if split_of(i) == "test" else "train"
        save(root / f"{split}/{i}.png", image(i))
        truth = np.where(mask(i) == 2, 255, 0).astype(np.uint8)
        save(root / f"{split}/{i}_GT.png", truth)


EVERY: dict[str, tuple[str, Callable[[Path], None]]] = LAYOUTS | {
    "anomaly": ("anomaly", anomaly), "masks": ("masks", plain), "camvid": ("camvid", camvid),
    "cityscapes": ("cityscapes", cityscapes), "ksdd2": ("ksdd2", ksdd2),
}  # fmt: skip
"""The same with those whose classes or splits are not those of `LAYOUTS`."""


# What reading one comes to.


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
