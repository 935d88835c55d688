"""Writing a data set once more in the plain layout `masks`: images as hard links, masks as PNG of class indices.

Images that are far larger than what a network reads cost their decoding at every epoch; at the size that is needed they
are decoded and resized once.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from vss.core.errors import VssError, counted, shown
from vss.core.files import made_beside, write_error
from vss.data.base import IGNORE, Pair, SegData, check_sizes
from vss.data.images import Progress, open_rgb, read_header, thread_map

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)
"""Where a file system makes no hard link, the image is copied."""


def import_data(
    data: SegData, to: Path, *, fit: Sequence[int] | None = None, progress: Progress | None = None
) -> dict[str, int]:
    """Write `images/SPLIT/ID.*`, `masks/SPLIT/ID.png` and `classes.txt`; `to` appears when it is whole.

    Args:
        fit: H and W into which every image is shrunk with its mask, keeping its shape: as training resizes them
            (`vss.data.preprocess`), and kept as PNG. Smaller images stay as they are.

    Returns:
        `images`, and how many of them were `shrunk`, and `copied` since no link could be made.

    Raises:
        VssError: a folder that exists or lies in that of the data, a pair that cannot be read, a class that a line
            cannot hold, an image whose name leads out of the folder (COCO files may hold such).
    """
    if to.exists():
        raise VssError(f"{to} exists already; name a new folder, or remove it first.")
    if data.root.resolve() in to.resolve().parents:
        raise VssError(f"{to} lies in {data.root}, which would then hold every image twice; name a folder outside it.")
    bad = [name for name in data.class_names if name != name.strip() or len(name.splitlines()) != 1]
    if bad:
        raise VssError(f"class {shown(bad[0])} cannot be a line of classes.txt; rename it by data.label_map.")
    jobs = [(split, pair) for split, pairs in data.splits.items() for pair in pairs]
    if not jobs:
        raise VssError(f"{data.root} holds no pair of image and mask; `vss data check` says why.")
    for _, pair in jobs:
        if pair.id.startswith("/") or ".." in PurePosixPath(pair.id).parts:
            raise VssError(
                f"the image {pair.image} is listed as {shown(pair.id)}, which leads out of a folder; list it by a name "
                "below the folder of the images."
            )
    with made_beside(to) as temporary:
        folder = temporary / "data"
        (folder / "images").mkdir(parents=True)
        done = Counter(thread_map(partial(_write, data, folder, fit), jobs, progress=progress))
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in data.class_names), encoding="utf-8")
        folder.rename(to)
    return {"images": len(jobs), "shrunk": done["shrunk"], "copied": done["copied"]}


def _write(data: SegData, folder: Path, fit: Sequence[int] | None, job: tuple[str, Pair]) -> str:
    """One pair; whether its image was `linked`, `copied` or `shrunk`."""
    split, pair = job
    mask = data.read_mask(pair.mask)
    whole = (mask.shape[0], mask.shape[1])
    check_sizes(pair, image=read_header(pair.image), mask=whole)
    share = min(1.0, *(most / side for most, side in zip(fit or whole, whole, strict=True)))
    size = (max(1, round(whole[0] * share)), max(1, round(whole[1] * share)))
    suffix = pair.image.suffix if size == whole else ".png"
    image, labels = (folder / kind / split / f"{pair.id}{end}" for kind, end in (("images", suffix), ("masks", ".png")))
    for place in (image, labels):
        place.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST)
    palette = np.zeros((256, 3), np.uint8)
    palette[: data.num_classes], palette[IGNORE] = data.palette, (255, 255, 255)
    picture.putpalette(palette.tobytes())
    picture.save(labels)
    if size != whole:
        open_rgb(pair.image).resize(size[::-1], Image.Resampling.BILINEAR).save(image)
        return "shrunk"
    try:
        os.link(pair.image.resolve(), image)
        return "linked"
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise write_error(image, error) from error
    shutil.copyfile(pair.image, image)
    return "copied"


def sentence(data: SegData, done: dict[str, int], to: Path) -> str:
    """What was written."""
    more = f", {counted(done['shrunk'], 'image')} shrunk" if done["shrunk"] else ""
    more += f", {counted(done['copied'], 'image')} copied since no hard link could be made" if done["copied"] else ""
    return f"wrote {counted(done['images'], 'pair')} of {len(data.class_names)} classes to {to}{more}"
