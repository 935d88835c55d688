"""What is wrong with a folder of images and masks: every file of it at once."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vss.core.errors import VssError, counted, steadily
from vss.core.sections import DataOptions
from vss.data.base import Pair, SegData, UnknownLabelsError
from vss.data.counts import ClassCounts
from vss.data.doubts import doubts, mixed_depths, refusals, shifted
from vss.data.images import BadSampleError, Progress, open_rgb, read_stored_mask, thread_map
from vss.data.layouts import DRAWINGS, absent_split, others_lack
from vss.data.readers import AUTO, as_found, open_root
from vss.data.split import ALL

NEAR_BITS = 2
"""Two images are near duplicates when their 64-bit difference hashes differ in at most this many bits."""


@dataclass
class Finding:
    """What one pair holds."""

    pair: Pair
    split: str
    size: tuple[int, int] | None = None
    counts: np.ndarray | None = None
    dtype: str = ""
    values: frozenset[int] = frozenset()
    content: str | None = None
    hash64: int = 0
    corrupt: list[str] = field(default_factory=list)
    mismatch: str | None = None
    unknown: list[int] = field(default_factory=list)
    bad_mask: str | None = None


def difference_hash(image: Image.Image) -> int:
    """64 bits: is each of 8 x 8 grey cells darker than its right neighbour (dHash)."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BILINEAR), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def inspect(data: SegData, split: str, pair: Pair) -> Finding:
    """Decode both files of a pair and note what they hold; damage is noted, not raised."""
    found = Finding(pair=pair, split=split)
    try:
        image = open_rgb(pair.image)
        found.size = (image.height, image.width)
        found.content = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        found.hash64 = difference_hash(image)
    except BadSampleError as error:
        found.corrupt.append(str(error))
    try:
        stored = read_stored_mask(pair.mask)
    except BadSampleError as error:
        found.corrupt.append(str(error))
        return found
    if found.size is not None and stored.shape != found.size:
        sizes = [f"{height}x{width}" for height, width in (stored.shape, found.size)]
        found.mismatch = f"mask {pair.mask} is {sizes[0]}, its image {sizes[1]} (height x width)"
        return found
    found.values, found.dtype = frozenset(np.unique(stored).tolist()), stored.dtype.name
    try:
        found.counts = np.bincount(data.decode(stored).ravel(), minlength=256)
    except UnknownLabelsError as error:
        found.unknown, found.bad_mask = error.values, f"mask {pair.mask} {error}"
    except VssError as error:
        found.bad_mask = f"mask {pair.mask} {error}"
    return found


def _counts(data: SegData, findings: list[Finding]) -> ClassCounts:
    """What the masks hold, as far as they can be read."""
    usable = [found for found in findings if found.counts is not None]
    rows = np.array([found.counts for found in usable], np.int64).reshape(-1, 256)
    return ClassCounts.of(data, rows, {value for found in usable for value in found.values})


def _split_report(data: SegData, findings: list[Finding], counts: ClassCounts) -> dict[str, Any]:
    sides = [found.size for found in findings if found.size]
    sizes = Counter(f"{height}x{width}" for height, width in sides)
    total = max(1, int(counts.pixels.sum()))
    return {
        "pairs": len(findings),
        "sizes": {
            "distinct": len(sizes),
            "height": [min(side[0] for side in sides), max(side[0] for side in sides)] if sides else [],
            "width": [min(side[1] for side in sides), max(side[1] for side in sides)] if sides else [],
            "common": dict(sizes.most_common(5)),
        },
        "classes": {
            name: {"pixels": int(pixels), "pixels_pct": 100 * int(pixels) / total, "images": int(images)}
            for name, pixels, images in zip(data.class_names, counts.pixels, counts.images, strict=True)
        },
        "ignored_pct": 100 * counts.ignored / max(1, total + counts.ignored),
    }


def duplicates(findings: Iterable[Finding]) -> list[list[str]]:
    """Groups of images with equal pixels that lie in more than one split, as `split/id`."""
    groups: dict[str, list[Finding]] = defaultdict(list)
    for found in findings:
        if found.content is not None:
            groups[found.content].append(found)
    return [
        [f"{found.split}/{found.pair.id}" for found in group]
        for group in groups.values()
        if len({found.split for found in group}) > 1
    ]


def near_duplicates(findings: list[Finding], *, bits: int = NEAR_BITS) -> list[list[str]]:
    """Pairs of images from different splits whose difference hashes differ in at most `bits` bits, as `split/id`."""
    usable = [found for found in findings if found.content is not None]
    hashes = np.array([found.hash64 for found in usable], np.uint64)
    pairs = []
    for index, found in enumerate(usable):
        distance = np.bitwise_count(hashes[index + 1 :] ^ hashes[index])
        for offset in np.flatnonzero(distance <= bits):
            other = usable[index + 1 + int(offset)]
            if other.split != found.split and other.content != found.content:
                pairs.append([f"{found.split}/{found.pair.id}", f"{other.split}/{other.pair.id}"])
    return pairs


def _summaries(*kinds: tuple[str, str, list[str]]) -> list[str]:
    """How many there are of every kind (singular, plural, items), with the first three."""
    return [
        f"{counted(len(items), one, many)}: {'; '.join(items[:3])}{' and more' if len(items) > 3 else ''}"
        for one, many, items in kinds
        if items
    ]


def _problems(
    data: SegData, report: dict[str, Any], findings: list[Finding], counts: Mapping[str, ClassCounts]
) -> list[str]:
    sizes = [found.mismatch for found in findings if found.mismatch]
    labels = [found.bad_mask for found in findings if found.bad_mask]
    equal = [" = ".join(group) for group in report["duplicates"]]
    problems = _summaries(
        ("image without a mask", "images without a mask", report["images_without_mask"]),
        ("file that cannot be read", "files that cannot be read", report["corrupt"]),
        ("mask of another size than its image", "masks of another size than their image", sizes),
        ("mask with labels outside the classes", "masks with labels outside the classes", labels),
        ("image that is in more than one split", "images that are in more than one split", equal),
    )
    if report["images_without_mask"]:
        problems[0] += "; where none means nothing to mark, give --missing-mask sound (data.missing_mask)"
    values = frozenset(value for found in findings for value in found.values)
    if report["unknown_labels"] and (hint := shifted(data, values)):
        problems.append(hint.strip())
    problems += [f"split {split!r} is empty" for split, pairs in data.splits.items() if not pairs]
    problems += refusals(data, counts)
    if not data.splits:
        return [*problems, f"there is no split; {DRAWINGS.get(data.name, 'expected one')}"]
    return problems + _absent(data, "train", "val")


def _absent(data: SegData, *splits: str) -> list[str]:
    if ALL in data.splits:  # they are made once the masks can be read
        return []
    return [absent_split(data.name, split, data.splits) for split in splits if split not in data.splits]


def _warnings(
    data: SegData, report: dict[str, Any], findings: list[Finding], counts: Mapping[str, ClassCounts]
) -> list[str]:
    near = [" ~ ".join(group) for group in report.get("near_duplicates", [])]
    warnings = _summaries(
        ("mask without an image, not used", "masks without an image, not used", report["masks_without_image"]),
        ("stray copy, not used", "stray copies, not used", report["strays"]),
        ("image that no file lists, not used", "images that no file lists, not used", report["images_unlisted"]),
        ("near duplicate over splits", "near duplicates over splits", near),
    )
    if data.splits:
        warnings += _absent(data, "test")
    return warnings + mixed_depths((f.pair, f.dtype) for f in findings if f.dtype) + doubts(data, counts)


def open_to_look(name: str, root: Path | str, options: DataOptions | None = None) -> SegData:
    """As `open_root`; images that a bad mask keeps from being shared out over splits are given as they lie."""
    try:
        return open_root(name, root, options)
    except BadSampleError:
        return as_found(name, root, options or DataOptions())


def check(
    data: SegData | Path | str,
    name: str | None = None,
    *,
    options: DataOptions | None = None,
    near: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read every image and mask and report, as a JSON-able dict.

    Keys: `dataset root classes protocol`; `not_layouts` (name -> why not); `splits`, per split: `pairs`, `sizes`
    (`distinct height width common`), `classes` (per name: `pixels pixels_pct images`), `ignored_pct`; the lists
    `images_without_mask masks_without_image strays images_unlisted corrupt size_mismatches unknown_labels duplicates`
    (and `near_duplicates` with `near`); `problems` and `warnings` (sentences); `ok` (no problem). With a folder, `name`
    is the dataset, or else the layout is guessed. Raises `VssError` for a folder of no known layout.
    """
    if not isinstance(data, SegData):
        data = open_to_look(name or AUTO, data, options)
    jobs = [(split, pair) for split, pairs in data.splits.items() for pair in pairs]
    opened: SegData = data
    found = thread_map(lambda job: inspect(opened, *job), jobs, workers, progress)
    findings = list(steadily(found, "looking at images and masks", len(jobs)))
    by_split = {split: [found for found in findings if found.split == split] for split in data.splits}
    counts = {split: _counts(data, found) for split, found in by_split.items()}
    report: dict[str, Any] = {
        "dataset": data.name,
        "root": str(data.root),
        "classes": list(data.class_names),
        "protocol": data.protocol,
        "not_layouts": others_lack(data.root, data.name),
        "splits": {s: _split_report(data, found, counts[s]) for s, found in by_split.items()},
        "images_without_mask": [str(path) for path in data.orphans.images_without_mask],
        "masks_without_image": [str(path) for path in data.orphans.masks_without_image],
        "strays": [str(path) for path in data.orphans.strays],
        "images_unlisted": [str(path) for path in data.orphans.unlisted],
        "corrupt": [sentence for found in findings for sentence in found.corrupt],
        "size_mismatches": [str(found.pair.mask) for found in findings if found.mismatch],
        "unknown_labels": [{"mask": str(f.pair.mask), "values": f.unknown} for f in findings if f.bad_mask],
        "duplicates": duplicates(findings),
    }
    if near:
        report["near_duplicates"] = near_duplicates(findings)
    report["problems"] = _problems(data, report, findings, counts)
    report["warnings"] = _warnings(data, report, findings, counts)
    return report | {"ok": not report["problems"]}
