"""Real sets rearranged as people have them: is every pixel of the class it was of?

CamVid as VOC, colours, COCO polygons and flat folders with lists; KolektorSDD (resized, `ksdd1_230`) as flat folders
without the masks of sound images and as anomaly folders. Of each: pixels of every class, IoU of every class against the
original arrangement, with `--ckpt` and `--defect-ckpt` what a checkpoint scores on the test split. COCO polygons are
the outlines of the regions of each class, halfway between pixel centres (contourpy); all else keeps every pixel.

    python benchmarks/bench_layouts.py --camvid CAMVID --ksdd KSDD1_230 --write

One of the two sets alone has a result of its own, `layouts-ksdd`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from contourpy import contour_generator
from measure import facts, write
from PIL import Image

from vss.core.config import DataOptions
from vss.data import SegData, open_data
from vss.data.base import Pair, generic_palette
from vss.data.images import thread_map

VOID, VOID_COLOUR = 255, (0, 0, 0)


def pairs_of(data: SegData) -> Iterator[tuple[str, str, Pair]]:
    """(split, name, pair) of every pair."""
    for split, pairs in data.splits.items():
        for pair in pairs:
            yield split, Path(pair.image).stem, pair


def put_image(pair: Pair, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(pair.image, folder / f"{name}{pair.image.suffix}")


def put_mask(array: np.ndarray, path: Path, palette: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if palette is not None:
        picture.putpalette(palette.tobytes())
    picture.save(path)


def put_lists(data: SegData, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in data.splits.items():
        (folder / f"{split}.txt").write_text("".join(f"{Path(pair.image).stem}\n" for pair in pairs))


def as_voc(data: SegData, root: Path) -> dict[str, Any]:
    palette = generic_palette(256)
    for _, name, pair in pairs_of(data):
        put_image(pair, root / "JPEGImages", name)
        put_mask(data.read_mask(pair.mask), root / f"SegmentationClass/{name}.png", palette)
    put_lists(data, root / "ImageSets/Segmentation")
    (root / "classes.txt").write_text("\n".join(data.class_names))
    return {}


def as_flat(data: SegData, root: Path) -> dict[str, Any]:
    for _, name, pair in pairs_of(data):
        put_image(pair, root / "imgs", name)
        put_mask(data.read_mask(pair.mask), root / f"labels/{name}_mask.png")
    put_lists(data, root)
    (root / "classes.txt").write_text("\n".join(data.class_names))
    return {}


def as_colours(data: SegData, root: Path) -> dict[str, Any]:
    colours = np.zeros((256, 3), np.uint8)
    colours[: data.num_classes], colours[VOID] = data.palette, VOID_COLOUR
    for split, name, pair in pairs_of(data):
        put_image(pair, root / split, name)
        put_mask(colours[data.read_mask(pair.mask)], root / f"{split}_labels/{name}_L.png")
    names = zip([*data.palette.tolist(), VOID_COLOUR], [*data.class_names, "Void"], strict=True)
    (root / "label_colors.txt").write_text("".join(f"{r} {g} {b}\t{name}\n" for (r, g, b), name in names))
    return {}


def outlines(region: np.ndarray) -> Iterator[tuple[list[float], float]]:
    """(x, y, ... of the outer outline in corner coordinates, its area) of every connected part of an (H, W) bool."""
    lines: Any = contour_generator(z=np.pad(region, 1).astype(np.float32)).lines(0.5)
    for line in lines:
        x, y = (line - 0.5).T  # less the padding, plus half a pixel from centre to corner
        area = float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2
        if area > 0:  # holes turn the other way; what lies in them is drawn on top, being smaller
            yield np.stack([x[:-1], y[:-1]], -1).ravel().tolist(), area


def as_coco(data: SegData, root: Path) -> dict[str, Any]:
    names = [*data.class_names, "void"]
    values = [*range(data.num_classes), VOID]
    for split, pairs in data.splits.items():
        content: dict[str, Any] = {"images": [], "annotations": []}
        content["categories"] = [{"id": number + 1, "name": name} for number, name in enumerate(names)]
        for index, pair in enumerate(pairs):
            put_image(pair, root / split, Path(pair.image).stem)
            mask = data.read_mask(pair.mask)
            height, width = mask.shape
            file = f"{Path(pair.image).stem}{pair.image.suffix}"
            content["images"].append({"id": index, "file_name": file, "height": height, "width": width})
            for number, value in enumerate(values):
                for outline, area in outlines(mask == value):
                    about: dict[str, Any] = {"image_id": index, "category_id": number + 1, "iscrowd": 0, "area": area}
                    content["annotations"].append(
                        {"id": len(content["annotations"]), "segmentation": [outline]} | about
                    )
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return {"label_map": {"void": "ignore", "background": "ignore"}}


def as_flat_without_sound(data: SegData, root: Path) -> dict[str, Any]:
    for split, name, pair in pairs_of(data):
        put_image(pair, root / split / "images", name)
        mask = data.read_mask(pair.mask)
        if mask.any():
            put_mask(mask * 255, root / split / f"masks/{name}_mask.png")
    return {"missing_mask": "sound", "classes": data.class_names}


def as_anomaly(data: SegData, root: Path) -> dict[str, Any]:
    for split, name, pair in pairs_of(data):
        mask = data.read_mask(pair.mask)
        put_image(pair, root / split / ("crack" if mask.any() else "good"), name)
        if mask.any():
            put_mask(mask * 255, root / f"ground_truth/crack/{name}_mask.png")
    return {}


CASES: dict[str, tuple[str, str, Callable[[SegData, Path], dict[str, Any]]]] = {
    "camvid as voc": ("camvid", "voc", as_voc),
    "camvid as flat": ("camvid", "flat", as_flat),
    "camvid as colours": ("camvid", "colours", as_colours),
    "camvid as coco": ("camvid", "coco", as_coco),
    "ksdd as flat without sound masks": ("ksdd", "flat", as_flat_without_sound),
    "ksdd as anomaly": ("ksdd", "anomaly", as_anomaly),
}


def confusion(first: SegData, second: SegData) -> np.ndarray:
    """(K + 1, K + 1) int64 pixels: classes of the first, void last, against those of the second."""
    if first.class_names != second.class_names:
        raise SystemExit(f"classes differ: {first.class_names} and {second.class_names}")
    k = first.num_classes
    wanted = {(split, name): pair for split, name, pair in pairs_of(first)}
    found = {(split, name): pair for split, name, pair in pairs_of(second)}
    if wanted.keys() != found.keys():
        raise SystemExit(f"{len(wanted.keys() ^ found.keys())} pairs differ")

    def of_one(key: tuple[str, str]) -> np.ndarray:
        a, b = (np.minimum(d.read(p[key])[1], k).astype(np.int64) for d, p in ((first, wanted), (second, found)))
        return np.bincount((a * (k + 1) + b).ravel(), minlength=(k + 1) ** 2)

    return sum(thread_map(of_one, sorted(wanted)), np.zeros((k + 1) ** 2, np.int64)).reshape(k + 1, k + 1)


def limited(data: SegData, count: int) -> SegData:
    """The same set with at most so many images of a split, evenly over it."""
    splits = {split: pairs[:: -(-len(pairs) // count)] for split, pairs in data.splits.items()}
    return dataclasses.replace(data, splits=splits)


def row_of(first: SegData, second: SegData, seconds: float) -> dict[str, Any]:
    table = confusion(first, second)
    union = table.sum(0) + table.sum(1) - table.diagonal()
    names = [*first.class_names, "void"]
    iou = {name: float(table[i, i] / union[i]) for i, name in enumerate(names) if union[i]}
    return {
        "pairs": {split: len(pairs) for split, pairs in second.splits.items()},
        "pixels": int(table.sum()),
        "pixels_that_differ": int(table.sum() - table.trace()),
        "iou_min": min(iou.values()),
        "iou": iou,
        "class_pixels": {n: [int(table[i].sum()), int(table[:, i].sum())] for i, n in enumerate(names)},
        "open_s": seconds,
    }


def score(data: SegData, ckpt: Path) -> dict[str, float]:
    """What a checkpoint scores on the test split."""
    from vss.core.config import Recipe
    from vss.run.inputs import recipe_around
    from vss.run.project import Project

    recipe, preprocess = recipe_around(ckpt, data_root=str(data.root), dataset=data.name, recipe=Recipe())
    project = Project(recipe, data, preprocess)
    found = project.score_net(project.load(ckpt), split="test")
    return {key: found[key] for key in ("miou_pct", "pixel_acc_pct", "ap_pct", "fn", "fp") if key in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--camvid", type=Path)
    parser.add_argument("--ksdd", type=Path)
    parser.add_argument("--ckpt", type=Path, help="checkpoint of CamVid")
    parser.add_argument("--defect-ckpt", type=Path, help="checkpoint of KolektorSDD")
    parser.add_argument("--limit", type=int, default=1 << 30, help="images of a split, evenly over it")
    parser.add_argument("--write", action="store_true", help="keep the file")
    given = parser.parse_args()
    roots = {name: root for name, root in (("camvid", given.camvid), ("ksdd", given.ksdd)) if root}
    layouts = {"camvid": "camvid", "ksdd": "ksdd2"}
    sources = {name: limited(open_data(layouts[name], root), given.limit) for name, root in roots.items()}
    ckpts = {name: path for name, path in (("camvid", given.ckpt), ("ksdd", given.defect_ckpt)) if path}
    rows: dict[str, Any] = {name: score(sources[name], path) for name, path in ckpts.items()}
    print(rows, flush=True)
    for name, (source, layout, arrange) in CASES.items():
        if source not in sources:
            continue
        with tempfile.TemporaryDirectory(prefix="vss-layouts-") as folder:
            options = DataOptions.model_validate(arrange(sources[source], Path(folder)))
            start = time.perf_counter()
            data = open_data(layout, folder, options)
            rows[name] = row_of(sources[source], data, time.perf_counter() - start)
            if source in ckpts:
                rows[name] |= score(data, ckpts[source])
            print(name, {k: v for k, v in rows[name].items() if k not in ("class_pixels", "iou")}, flush=True)
    if given.write:
        suite = "layouts" if len(sources) == len(layouts) else f"layouts-{'-'.join(sources)}"
        print("wrote", write(suite, "cpu", facts("cpu"), {"rows": rows}))


if __name__ == "__main__":
    main()
