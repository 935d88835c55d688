"""Generated data sets: streets in the CamVid layout, and grey textured surfaces with defects in the KSDD2 layout."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vss.core.errors import VssError
from vss.core.files import made_beside, read_json, write_json
from vss.data.images import Progress, thread_map
from vss.data.readers import CAMVID_NAMES
from vss.data.street import Point, draw_street, smooth_noise

log = logging.getLogger(__name__)

KIND, SCHEMA, MANIFEST = "vss.synthetic", 1, "synthetic.json"
GENERATOR = 1
"""Raise this when the drawing changes: sets of older generators are then not taken for new ones."""

STREET_COUNTS = {"train": 200, "val": 40, "test": 60}
DEFECT_COUNTS = {"train": 240, "test": 100}
STREETS, DEFECTS = {"train": 0, "val": 1, "test": 2}, {"train": 10, "test": 11}
"""Split -> number of its stream of random numbers."""
Range = int | tuple[int, int]
Files = dict[str, tuple[np.ndarray, dict[str, Any]]]
"""Path in the set -> pixels and how Pillow saves them."""


def _surface(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32 grey: slow shading, stains, machining lines and grain."""
    height, width = size
    grey = np.full(size, rng.uniform(85, 165), np.float32)
    grey += rng.uniform(3, 10) * smooth_noise(rng, size, (4, 3))
    grey += rng.uniform(2, 6) * smooth_noise(rng, size, (height // 12 + 2, width // 12 + 2))
    lines = (height // 2, 3) if rng.random() < 0.5 else (3, width // 2)
    grey += rng.uniform(1, 6) * smooth_noise(rng, size, lines)
    grey += rng.uniform(2, 6) * rng.standard_normal(size, dtype=np.float32)
    edge = np.abs(np.linspace(-1, 1, width, dtype=np.float32)) ** 6
    return grey - rng.uniform(0, 45) * edge


def _walk(
    rng: np.random.Generator, start: Point, heading: float, steps: int, stride: float, bend: float
) -> list[Point]:
    points = [start]
    for _ in range(steps):
        heading += rng.normal() * bend
        x, y = points[-1]
        points.append((x + stride * float(np.cos(heading)), y + stride * float(np.sin(heading))))
    return points


def _scratch(rng: np.random.Generator, draw: ImageDraw.ImageDraw, start: Point, unit: float) -> None:
    path = _walk(rng, start, rng.uniform(0, 2 * np.pi), int(rng.integers(6, 14)), unit * rng.uniform(0.04, 0.09), 0.12)
    draw.line(path, fill=255, width=int(rng.integers(2, 4)))


def _crack(rng: np.random.Generator, draw: ImageDraw.ImageDraw, start: Point, unit: float) -> None:
    heading = rng.uniform(0, 2 * np.pi)
    path = _walk(rng, start, heading, int(rng.integers(12, 26)), unit * 0.03, 0.55)
    draw.line(path, fill=255, width=int(rng.integers(2, 4)))
    for _ in range(int(rng.integers(1, 4))):
        fork = path[int(rng.integers(2, len(path)))]
        branch = _walk(rng, fork, heading + rng.uniform(-1.4, 1.4), int(rng.integers(4, 10)), unit * 0.03, 0.5)
        draw.line(branch, fill=255, width=2)


def _blob(rng: np.random.Generator, draw: ImageDraw.ImageDraw, start: Point, unit: float) -> None:
    radius = unit * rng.uniform(0.03, 0.1)
    angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    radii = radius * rng.uniform(0.7, 1.3, angles.size)
    stretch = rng.uniform(0.6, 1.6)
    points = zip(start[0] + stretch * radii * np.cos(angles), start[1] + radii * np.sin(angles), strict=True)
    draw.polygon([(float(x), float(y)) for x, y in points], fill=255)


KINDS: tuple[Callable[[np.random.Generator, ImageDraw.ImageDraw, Point, float], None], ...] = (_scratch, _crack, _blob)


def _marks(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """An 8-bit mask with one to three defects; it is never empty."""
    height, width = size
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    kind = KINDS[int(rng.integers(len(KINDS)))]
    for _ in range(int(rng.integers(1, 4))):
        start = (float(rng.uniform(0.15, 0.85) * width), float(rng.uniform(0.15, 0.85) * height))
        kind(rng, draw, start, float(min(2 * width, height)))
    return mask


def draw_surface(rng: np.random.Generator, size: tuple[int, int], *, defective: bool) -> tuple[np.ndarray, np.ndarray]:
    """One surface: (H, W, 3) uint8 grey as RGB, and its mask (H, W) uint8, 0 or 255.

    Sound and defective surfaces both carry harmless stains with soft edges; defects have sharp edges, inside which the
    grey value is shifted by 25..70 of 255, mostly to dark.
    """
    grey = _surface(rng, size)
    for _ in range(int(rng.integers(0, 3))):
        stain = _marks(rng, size).filter(ImageFilter.GaussianBlur(rng.uniform(5, 9)))
        grey += rng.uniform(-28, 28) * np.asarray(stain, np.float32) / 255
    mask = np.zeros(size, np.uint8)
    if defective:
        marks = _marks(rng, size)
        soft = np.asarray(marks.filter(ImageFilter.GaussianBlur(0.7)), np.float32) / 255
        shift = rng.uniform(25, 70) * (1 if rng.random() < 0.25 else -1)
        grey += soft * (shift + 8 * rng.standard_normal(size, dtype=np.float32))
        mask = np.asarray(marks)
    picture = np.clip(grey, 0, 255).astype(np.uint8)
    return np.repeat(picture[..., None], 3, axis=2), mask


def _ranges(size: tuple[Range, Range]) -> list[tuple[int, int]]:
    return [(side, side) if isinstance(side, int) else side for side in size]


def _check_arguments(counts: Mapping[str, int], size: tuple[Range, Range], splits: Mapping[str, int]) -> None:
    if counts.keys() - splits or not counts or min(counts.values()) < 1:
        raise VssError(
            f"counts {dict(counts)} came; expected at least 1 image for each of some of {', '.join(splits)}."
        )
    if not all(32 <= low <= high for low, high in _ranges(size)):
        raise VssError(f"size {size} came; expected (H, W), each a number or a (low, high) range of at least 32.")


def _is_there(root: Path, manifest: Mapping[str, object]) -> bool:
    """True when `root` is this very set; raises when it holds something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if (root / MANIFEST).is_file() and read_json(root / MANIFEST, kind=KIND, schema=SCHEMA) == manifest:
        return True
    raise VssError(f"{root} exists and holds something else; choose a new folder for the generated set, or remove it.")


def _write_set(
    root: Path,
    manifest: Mapping[str, Any],
    draw: Callable[[np.random.Generator, tuple[int, int], str, int], Files],
    *,
    streams: Mapping[str, int],
    size: tuple[Range, Range],
    workers: int | None,
    progress: Progress | None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write what `draw(rng, (H, W), split, number)` gives into a temporary folder beside `root`, then rename it."""
    counts, sides = manifest["counts"], [side if isinstance(side, int) else list(side) for side in size]
    manifest = {"kind": KIND, "schema": SCHEMA, "generator": GENERATOR, **manifest, "size": sides}
    if _is_there(root, manifest):
        log.info("%s holds this generated set already", root)
        return root

    def write(job: tuple[str, int]) -> None:
        split, number = job
        rng = np.random.default_rng([manifest["seed"], streams[split], number])
        height, width = (int(rng.integers(low, high + 1)) for low, high in _ranges(size))
        for name, (pixels, options) in draw(rng, (height, width), split, number).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name, **options)

    with made_beside(root) as temporary:
        folder = temporary / "data"
        folder.mkdir()
        jobs = [(split, number) for split, count in counts.items() for number in range(count)]
        for _ in thread_map(write, jobs, workers, progress):
            pass
        for name, text in (texts or {}).items():
            (folder / name).write_text(text)
        write_json(folder / MANIFEST, manifest)
        if root.exists():
            root.rmdir()
        folder.rename(root)
    return root


def write_street(
    root: Path | str,
    *,
    seed: int = 0,
    counts: Mapping[str, int] | None = None,
    size: tuple[Range, Range] = ((168, 192), (224, 256)),
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a street set in the CamVid layout (JPEG images, 8-bit grey masks, `classes.txt`) and return `root`.

    `counts`: images per split (train, val, test). `size`: (H, W) of the images, each a number or an inclusive range. A
    folder that holds this very set is left as it is; one that holds anything else is refused.
    """
    counts = dict(STREET_COUNTS if counts is None else counts)
    _check_arguments(counts, size, STREETS)

    def draw(rng: np.random.Generator, size: tuple[int, int], split: str, number: int) -> Files:
        image, labels = draw_street(rng, size)
        name = f"street_{split}_{number:05d}"
        return {
            f"{split}/{name}.jpg": (image, {"quality": 92, "subsampling": 0}),
            f"{split}annot/{name}.png": (labels, {"compress_level": 6}),
        }

    manifest = {"set": "street", "seed": seed, "counts": counts}
    texts = {"classes.txt": "\n".join([*CAMVID_NAMES, "Unlabelled"]) + "\n"}
    return _write_set(
        Path(root), manifest, draw, streams=STREETS, size=size, workers=workers, progress=progress, texts=texts
    )


def write_defects(
    root: Path | str,
    *,
    seed: int = 0,
    counts: Mapping[str, int] | None = None,
    size: tuple[Range, Range] = ((300, 330), (112, 120)),
    positives: float = 0.13,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write a defect set in the KSDD2 layout (`NAME.png`, `NAME_GT.png` with 0 and 255) and return `root`.

    `counts`: images per split (train, test). `positives`: share of defective images, at least one a split. Otherwise as
    `write_street`.
    """
    counts = dict(DEFECT_COUNTS if counts is None else counts)
    _check_arguments(counts, size, DEFECTS)
    if not 0 < positives < 1:
        raise VssError(f"positives is {positives}; expected a share between 0 and 1.")
    chosen = {}
    for index, (split, count) in enumerate(counts.items()):
        order = np.random.default_rng([seed, 20 + index]).permutation(count)
        chosen[split] = set(order[: max(1, round(positives * count))].tolist())

    def draw(rng: np.random.Generator, size: tuple[int, int], split: str, number: int) -> Files:
        image, mask = draw_surface(rng, size, defective=number in chosen[split])
        name = f"{split}/{(10000 if split == 'train' else 20000) + number}"
        return {f"{name}.png": (image, {"compress_level": 3}), f"{name}_GT.png": (mask, {"compress_level": 6})}

    manifest = {"set": "defects", "seed": seed, "counts": counts, "positives": positives}
    return _write_set(Path(root), manifest, draw, streams=DEFECTS, size=size, workers=workers, progress=progress)
