"""Write generated data sets to disk: a street set in the CamVid layout and a defect set in the KSDD2 layout.

Every image is a pure function of (seed, split, number), so a set is the same on every run and for any number of
threads; masks are byte-identical for one version of Pillow. The folder appears whole or not at all.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vss.core.errors import VssError
from vss.core.files import read_json, write_json
from vss.data.defects import draw_surface
from vss.data.images import thread_map
from vss.data.labels import CAMVID_NAMES
from vss.data.stats import Progress
from vss.data.street import draw_street

log = logging.getLogger(__name__)

KIND, SCHEMA, MANIFEST = "vss.synthetic", 1, "synthetic.json"
GENERATOR = 1
"""Raise this when the drawing changes: sets of older generators are then not taken for new ones."""

STREET_COUNTS = {"train": 200, "val": 40, "test": 60}
DEFECT_COUNTS = {"train": 240, "test": 100}
Range = int | tuple[int, int]


def _draw_size(rng: np.random.Generator, size: tuple[Range, Range]) -> tuple[int, int]:
    low_high = [(side, side) if isinstance(side, int) else side for side in size]
    height, width = (int(rng.integers(low, high + 1)) for low, high in low_high)
    return height, width


def _check_arguments(counts: Mapping[str, int], size: tuple[Range, Range], splits: tuple[str, ...]) -> None:
    wrong = [name for name in counts if name not in splits]
    if wrong or not counts or min(counts.values()) < 1:
        raise VssError(
            f"counts {dict(counts)} came; expected at least 1 image for each of some of {', '.join(splits)}."
        )
    for side in size:
        low, high = (side, side) if isinstance(side, int) else side
        if not 32 <= low <= high:
            raise VssError(f"size {size} came; expected (H, W), each a number or a (low, high) range of at least 32.")


def _is_there(root: Path, manifest: Mapping[str, Any]) -> bool:
    """True when `root` is this very set; raises when it holds something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if (root / MANIFEST).is_file() and read_json(root / MANIFEST, kind=KIND, schema=SCHEMA) == manifest:
        return True
    raise VssError(f"{root} exists and holds something else; choose a new folder for the generated set, or remove it.")


def _write_set(
    root: Path,
    manifest: dict[str, Any],
    *,
    jobs: list[tuple[Any, ...]],
    write: Callable[[Path, tuple[Any, ...]], None],
    workers: int | None,
    progress: Progress | None,
) -> Path:
    """Run `write(folder, job)` for all jobs in a temporary folder beside `root`, then rename it to `root`."""
    if _is_there(root, manifest):
        log.info("%s holds this generated set already", root)
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    except OSError as error:
        raise VssError(f"{root} cannot be written ({error.strerror}); choose another place.") from error
    try:
        for done, _ in enumerate(thread_map(lambda job: write(partial, job), jobs, workers), start=1):
            if progress is not None:
                progress(done, len(jobs))
        write_json(partial / MANIFEST, manifest)
        partial.chmod(0o755)
        if root.exists():
            root.rmdir()
        partial.rename(root)
    except OSError as error:
        raise VssError(f"{root} cannot be written ({error.strerror or error}); free some space.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _save(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def _manifest(what: str, seed: int, counts: Mapping[str, int], size: tuple[Range, Range]) -> dict[str, Any]:
    sides = [side if isinstance(side, int) else list(side) for side in size]
    head = {"kind": KIND, "schema": SCHEMA, "generator": GENERATOR, "set": what}
    return head | {"seed": seed, "counts": dict(counts), "size": sides}


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
    splits = ("train", "val", "test")
    _check_arguments(counts, size, splits)

    def write(folder: Path, job: tuple[Any, ...]) -> None:
        split, number = job
        rng = np.random.default_rng([seed, splits.index(split), number])
        image, labels = draw_street(rng, _draw_size(rng, size))
        name = f"street_{split}_{number:05d}"
        _save(folder / split / f"{name}.jpg", image, quality=92, subsampling=0)
        _save(folder / f"{split}annot" / f"{name}.png", labels, compress_level=6)
        if number == 0:
            (folder / "classes.txt").write_text("\n".join([*CAMVID_NAMES, "Unlabelled"]) + "\n")

    jobs = [(split, number) for split in splits for number in range(counts.get(split, 0))]
    manifest = _manifest("street", seed, counts, size)
    return _write_set(Path(root), manifest, jobs=jobs, write=write, workers=workers, progress=progress)


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
    first = {"train": 10000, "test": 20000}
    _check_arguments(counts, size, tuple(first))
    if not 0 < positives < 1:
        raise VssError(f"positives is {positives}; expected a share between 0 and 1.")

    def write(folder: Path, job: tuple[Any, ...]) -> None:
        split, number, defective = job
        rng = np.random.default_rng([seed, 10 + list(first).index(split), number])
        image, mask = draw_surface(rng, _draw_size(rng, size), defective=defective)
        _save(folder / split / f"{first[split] + number}.png", image, compress_level=3)
        _save(folder / split / f"{first[split] + number}_GT.png", mask, compress_level=6)

    jobs = []
    for index, (split, count) in enumerate(counts.items()):
        order = np.random.default_rng([seed, 20 + index]).permutation(count)
        chosen = set(order[: max(1, round(positives * count))].tolist())
        jobs += [(split, number, number in chosen) for number in range(count)]
    manifest = _manifest("defects", seed, counts, size) | {"positives": positives}
    return _write_set(Path(root), manifest, jobs=jobs, write=write, workers=workers, progress=progress)
