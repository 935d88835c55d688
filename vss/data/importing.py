"""Writing a data set once more in the plain layout `masks`: images as hard links, masks as PNG of class indices."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from vss.core.errors import VssError, counted, shown
from vss.core.files import made_beside, write_error
from vss.data.base import IGNORE, Pair, SegData, check_sizes
from vss.data.images import Progress, read_header, thread_map

NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)
"""Where a file system makes no hard link, the image is copied."""


def import_data(data: SegData, to: Path, *, progress: Progress | None = None) -> dict[str, int]:
    """Write `images/SPLIT/ID.*`, `masks/SPLIT/ID.png` and `classes.txt`; `to` appears when it is whole.

    Returns:
        `images`, and how many of them were `copied` since no link could be made.

    Raises:
        VssError: a folder that exists, a pair that cannot be read, a class that a line cannot hold.
    """
    if to.exists():
        raise VssError(f"{to} exists already; name a new folder, or remove it first.")
    bad = [name for name in data.class_names if name != name.strip() or len(name.splitlines()) != 1]
    if bad:
        raise VssError(f"class {shown(bad[0])} cannot be a line of classes.txt; rename it by data.label_map.")
    jobs = [(split, pair) for split, pairs in data.splits.items() for pair in pairs]
    if not jobs:
        raise VssError(f"{data.root} holds no pair of image and mask; `vss data check` says why.")
    palette = np.zeros((256, 3), np.uint8)
    palette[: data.num_classes], palette[IGNORE] = data.palette, (255, 255, 255)
    with made_beside(to) as temporary:
        folder = temporary / "data"
        (folder / "images").mkdir(parents=True)
        copied = sum(thread_map(lambda job: _write(data, folder, palette, *job), jobs, progress=progress))
        (folder / "classes.txt").write_text("".join(f"{name}\n" for name in data.class_names), encoding="utf-8")
        folder.rename(to)
    return {"images": len(jobs), "copied": copied}


def _write(data: SegData, folder: Path, palette: np.ndarray, split: str, pair: Pair) -> bool:
    """One pair; whether the image was copied."""
    mask = data.read_mask(pair.mask)
    check_sizes(pair, image=read_header(pair.image), mask=(mask.shape[0], mask.shape[1]))
    places = folder / "images" / split / f"{pair.id}{pair.image.suffix}", folder / "masks" / split / f"{pair.id}.png"
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask)
    picture.putpalette(palette.tobytes())
    picture.save(places[1])
    try:
        os.link(pair.image.resolve(), places[0])
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise write_error(places[0], error) from error
    shutil.copyfile(pair.image, places[0])
    return True


def sentence(data: SegData, done: dict[str, int], to: Path) -> str:
    """What was written."""
    copies = f", {counted(done['copied'], 'image')} copied since no hard link could be made" if done["copied"] else ""
    return f"wrote {counted(done['images'], 'pair')} of {len(data.class_names)} classes to {to}{copies}"
