"""What reading a sample costs, beside torchvision's own decoding and resizing, and what a large set takes of memory.

Times are of the CPU: one process, one image and its mask, interleaved with torchvision (`decode_image`, `resize` with
antialiasing, masks to the nearest pixel); JPEG of CamVid and PNG of Cityscapes, and CamVid's masks as index files,
colours and COCO polygons at their own size. Memory: `--count` images of 2048x1024 (a small Cityscapes, hard-linked),
opened, checked as training checks them, and read once in batches, in a process of its own; a tenth as many beside.
Cityscapes is also read after `vss data import --fit`, from files that were shrunk once.

    python benchmarks/bench_loader.py --camvid CAMVID --cityscapes CITYSCAPES --write
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_layouts import as_coco, as_colours, as_voc, limited
from measure import facts, resident, write
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from vss.core.config import DataOptions
from vss.data import Augment, Preprocess, SegData, SegSplit, check_labels, make_loader, open_data
from vss.data.base import Pair
from vss.data.importing import import_data

ROUNDS = 5
BATCH = 4


def torchvision_sample(pair: Pair, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a script of one's own does, without a check."""
    image = decode_image(str(pair.image), ImageReadMode.RGB)
    mask = decode_image(str(pair.mask), ImageReadMode.UNCHANGED)
    nearest = resize(mask, list(size), InterpolationMode.NEAREST_EXACT)
    return resize(image, list(size), antialias=True), nearest[0].long()


def interleaved(calls: dict[str, Callable[[int], object]], count: int) -> dict[str, Any]:
    """CPU ms a sample of every call: medians over rounds of `count` samples; ratios of one round, over the first."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.process_time()
            for index in range(count):
                call(index)
            if number:  # the first one warms up
                times[name].append((time.process_time() - start) / count * 1e3)
    first = next(iter(calls))
    row: dict[str, Any] = {f"{name}_ms_p50": statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        if name != first:
            ratios = [other / own for own, other in zip(times[first], values, strict=True)]
            row |= {f"{name}_over_{first}": statistics.median(ratios)}
            row |= {f"{name}_over_{first}_range": [min(ratios), max(ratios)]}
    return row | {"samples": count, "rounds": ROUNDS}


def sample_row(data: SegData, size: tuple[int, int], count: int) -> dict[str, Any]:
    plain = SegSplit(data, "train", Preprocess(size=size), limit=count)
    trained = SegSplit(data, "train", Preprocess(size=size), Augment(), limit=count)
    return {"size": list(size)} | interleaved(
        {
            "vss": plain.__getitem__,
            "torchvision": lambda index: torchvision_sample(plain.pairs[index], size),
            "vss_augmented": trained.__getitem__,
        },
        len(plain),
    )


def mask_row(camvid: SegData, count: int) -> dict[str, Any]:
    """ms of reading a mask in each form, the image left out."""
    with tempfile.TemporaryDirectory(prefix="vss-masks-") as folder:
        few = limited(camvid, count)
        opened = {}
        for name, (arrange, layout) in {
            "index": (as_voc, "voc"), "colours": (as_colours, "colours"), "polygons": (as_coco, "coco"),
        }.items():  # fmt: skip
            options = DataOptions.model_validate(arrange(few, Path(folder) / name))
            opened[name] = open_data(layout, Path(folder) / name, options)
        pairs = {name: data.pairs("train") for name, data in opened.items()}
        calls = {name: lambda i, n=name: opened[n].read_mask(pairs[n][i].mask) for name in opened}
        shapes = [len(getattr(pair.mask, "shapes", ())) for pair in pairs["polygons"]]
        return {"polygons_an_image": statistics.mean(shapes)} | interleaved(calls, len(shapes))


def link_many(source: SegData, root: Path, count: int) -> None:
    """A Cityscapes of `count` training images and a tenth as many to validate on, of a file that training has not."""
    pairs = source.pairs("train")
    for split, files, number in (("train", pairs[:-1], count), ("val", pairs[-1:], max(1, count // 10))):
        for index in range(number):
            pair, name = files[index % len(files)], f"city/city_{index:06d}_000019"
            for path, place in (
                (pair.image, f"leftImg8bit/{split}/{name}_leftImg8bit.png"),
                (Path(str(pair.mask)), f"gtFine/{split}/{name}_gtFine_labelTrainIds.png"),
            ):
                (root / place).parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, root / place)
                except OSError:  # another file system
                    (root / place).symlink_to(path)


def memory_of(root: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Peak resident MiB of this process after each stage, and what the stages took; run in a process of its own."""
    peak = {"imports": resident("VmHWM") / 2**20}
    took = {}
    start = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal start
        peak[stage], took[stage] = resident("VmHWM") / 2**20, time.perf_counter() - start
        start = time.perf_counter()

    data = open_data("cityscapes", root)
    done("opened")
    check_labels(data, {split: data.pairs(split) for split in ("train", "val")})
    done("checked")
    check_labels(data, {split: data.pairs(split) for split in ("train", "val")})
    done("checked again")
    split = SegSplit(data, "train", Preprocess(size=size), Augment())
    loader = make_loader(split, batch_size=BATCH, shuffle=True)
    seen = sum(len(batch["image"]) for batch in loader)
    done("read")
    return {"images": seen, "batch": BATCH, "size": list(size), "peak_mib": peak, "seconds": took}


def memory_rows(source: SegData, count: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    rows = []
    for images in (count // 10, count):
        with tempfile.TemporaryDirectory(prefix="vss-large-") as folder:
            link_many(source, Path(folder), images)
            words = [sys.executable, __file__, "--child", folder, "--size", ",".join(map(str, size))]
            environment = os.environ | {"VSS_CACHE": f"{folder}/cache"}
            done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    return rows


def times(camvid: SegData, cityscapes: SegData, count: int) -> dict[str, Any]:
    """The rows of samples and of masks."""
    samples: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="vss-shrunk-") as folder:
        largest, exact = Path(folder) / "largest", Path(folder) / "exact"
        few = limited(cityscapes, count)
        import_data(few, largest, fit=(768, 1536))  # 1.5 times the size, as much as training scales
        import_data(few, exact, fit=(512, 1024))
        for name, data, size in (
            ("camvid JPEG 480x360", camvid, (112, 160)), ("camvid JPEG 480x360, own size", camvid, (360, 480)),
            ("cityscapes PNG 2048x1024", cityscapes, (512, 1024)),
            ("cityscapes shrunk once to 1536x768", open_data("masks", largest), (512, 1024)),
            ("cityscapes shrunk once to 1024x512", open_data("masks", exact), (512, 1024)),
        ):  # fmt: skip
            samples[name] = sample_row(data, size, count)
            print(name, samples[name], flush=True)
    masks = mask_row(camvid, count)
    print("masks", masks, flush=True)
    return {"samples": samples, "masks": masks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--camvid", type=Path)
    parser.add_argument("--cityscapes", type=Path, help="a small one, of full size")
    parser.add_argument("--count", type=int, default=2000, help="images of the large set")
    parser.add_argument("--samples", type=int, default=24, help="images that are timed")
    parser.add_argument("--size", default="512,1024", help="H,W of the large set's samples")
    parser.add_argument("--memory-only", action="store_true", help="leave the times out: a result of its own")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="keep the file")
    given = parser.parse_args()
    height, width = map(int, given.size.split(","))
    if given.child:
        print(json.dumps(memory_of(given.child, (height, width))))
        return
    torch.set_num_threads(1)
    cityscapes = open_data("cityscapes", given.cityscapes)
    body: dict[str, Any] = (
        {} if given.memory_only else times(open_data("camvid", given.camvid), cityscapes, given.samples)
    )
    body["memory"] = memory_rows(cityscapes, given.count, (height, width))
    if given.write:
        print("wrote", write("loader-memory" if given.memory_only else "loader", "cpu", facts("cpu"), body))


if __name__ == "__main__":
    main()
