"""How often classes occur in a split: counts, loss weights, and the images that INT8 ranges are measured on."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vss.core.errors import VssError, unknown
from vss.core.files import sha256_json
from vss.data.base import Pair, SegData
from vss.data.images import READING, BadSampleError, count_values, sha256_files
from vss.data.preprocess import Preprocess

if TYPE_CHECKING:
    import torch

WEIGHT_MODES = ("median", "log", "none")


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """What the masks of a split hold.

    `rows`: (n, K) int64, pixels of each class in each mask at its own resolution. `void`: (n,) int64, those that no
    class owns. `values`: the stored values that occur.
    """

    rows: np.ndarray
    void: np.ndarray
    values: frozenset[int] = frozenset()

    @classmethod
    def of(cls, data: SegData, rows: np.ndarray, values: Iterable[int]) -> ClassCounts:
        """From (n, 256) int64 counts of decoded values."""
        return cls(rows[:, : data.num_classes], rows[:, data.ignore_index], frozenset(values))

    @property
    def ignored(self) -> int:
        """Pixels that no class owns."""
        return int(self.void.sum())

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """(K,) int64."""
        return self.rows.sum(0, dtype=np.int64)

    @property
    def images(self) -> np.ndarray:
        """(K,) int64: images that hold the class."""
        return (self.rows > 0).sum(0)

    @property
    def in_images(self) -> np.ndarray:
        """(K,) int64: labelled pixels of the images that hold the class."""
        return ((self.rows > 0) * self.rows.sum(1, keepdims=True)).sum(0)


def count_classes(data: SegData, pairs: Sequence[Pair]) -> ClassCounts:
    """Counts of every class; masks are read once and remembered. Raises `VssError` for a bad mask."""
    rows = np.zeros((len(pairs), 256), np.int64)
    found = count_values([pair.mask for pair in pairs])
    for row, pair, (dtype, counts) in zip(rows, pairs, found, strict=True):
        stored = np.array([list(counts)], np.dtype(dtype))
        try:
            classes = data.decoded(pair.mask, stored)[0]
        except BadSampleError:
            data.read_mask(pair.mask)  # says how many pixels are wrong
            raise
        np.add.at(row, classes, list(counts.values()))
    return ClassCounts.of(data, rows, {value for _, counts in found for value in counts})


def weights_from_counts(counts: ClassCounts, mode: str) -> np.ndarray:
    """(K,) float64 loss weights; an absent class, which no pixel can ask for, has weight 1.

    `median`: median frequency balancing (Eigen and Fergus, 2015, as in SegNet): median(f) / f(c), where f(c) is the
    share of c in the images that hold it. `log`: 1 / ln(1.02 + share of c) (Paszke et al., ENet, 2016). `none`: ones.
    """
    if mode not in WEIGHT_MODES:
        raise unknown("class weight mode", mode, WEIGHT_MODES)
    present = counts.pixels > 0
    weights = np.ones(len(counts.pixels))
    if mode == "median" and present.any():
        frequency = counts.pixels[present] / counts.in_images[present]
        weights[present] = np.median(frequency) / frequency
    elif mode == "log" and present.any():
        weights[present] = 1 / np.log(1.02 + counts.pixels[present] / counts.pixels.sum())
    return weights


def class_weights(data: SegData, split: str = "train", mode: str = "median") -> torch.Tensor:
    """(K,) float32 loss weights from the masks of a split; `mode` as in `weights_from_counts`."""
    import torch

    if mode == "none":
        return torch.ones(data.num_classes)
    return torch.from_numpy(weights_from_counts(count_classes(data, data.pairs(split)), mode)).float()


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Images of one split, chosen once, the same in every run.

    `pairs`: sorted by id. `files`: id -> hash of the image file. `images_per_class`: (K,) int64, how many of them show
    each class. `seed`: of the choice.
    """

    data: SegData
    split: str
    pairs: tuple[Pair, ...]
    files: dict[str, str]
    images_per_class: np.ndarray
    seed: int

    def __len__(self) -> int:
        return len(self.pairs)

    def sha256(self) -> str:
        """Hex SHA-256 over ids and contents of the images."""
        return sha256_json([READING, sorted(self.files.items())])

    def manifest(self) -> dict[str, Any]:
        """What is written beside everything that was calibrated: the list, its hash and how it was chosen."""
        return {
            "dataset": self.data.name,
            "split": self.split,
            "images": len(self),
            "seed": self.seed,
            "sha256": self.sha256(),
            "images_per_class": dict(zip(self.data.class_names, self.images_per_class.tolist(), strict=True)),
            "files": self.files,
        }

    def batches(self, preprocess: Preprocess, size: int = 1) -> Iterator[torch.Tensor]:
        """(n, 3, H, W) uint8 RGB, n at most `size`, in the order of `pairs`; nothing is kept."""
        import torch

        for start in range(0, len(self.pairs), size):
            images = [preprocess.image(self.data.read(pair)[0]) for pair in self.pairs[start : start + size]]
            yield torch.stack(images)


def choose_calibration(
    data: SegData,
    *,
    count: int = 64,
    seed: int = 0,
    split: str = "train",
    ids: Sequence[str] | None = None,
) -> CalibrationSet:
    """Choose images of the training split so that every class that occurs there is shown.

    Every class is owed count / (2 K) images, rounded up, or all it has; the rarest class is served first, and an image
    counts for every class it shows. The rest are drawn evenly. All draws are seeded.

    Args:
        count: how many images; all of a smaller split are taken.
        split: "train"; the others are refused.
        ids: take exactly these instead.

    Raises:
        VssError: another split, an id of another split or of none, an image that is also a test image, too few images
            to show every class, an empty set or one that shows a single class.
    """
    if split != "train":
        data.pairs(split)
        raise VssError(
            f"calibration was asked for on the {split} split; ranges come from training images alone, since every "
            "other split is there to judge the result: leave --split off."
        )
    pairs = data.pairs(split) if ids is None else _listed(data, ids)
    if not pairs or count < 1:
        raise VssError(f"the calibration set of {data.root} is empty; give at least one training image.")
    present = count_classes(data, pairs).rows > 0
    picked = list(range(len(pairs))) if ids is not None else _stratified(present, count, seed, data.class_names)
    chosen = tuple(pairs[index] for index in picked)
    shown = present[picked].sum(0)
    if (shown > 0).sum() < 2:
        names = [name for name, images in zip(data.class_names, shown, strict=True) if images] or ["no class at all"]
        raise VssError(
            f"the {len(chosen)} calibration images show {names[0]} alone; ranges would fit that class and cut off the "
            "others: give images of at least two classes."
        )
    files = dict(zip((p.id for p in chosen), sha256_files([p.image for p in chosen]), strict=True))
    _refuse_test_images(data, chosen, files)
    return CalibrationSet(data, split, chosen, files, shown, seed)


def _listed(data: SegData, ids: Sequence[str]) -> list[Pair]:
    """Training pairs by id; an id of the test split is refused as such."""
    known = {pair.id: pair for pair in data.pairs("train")}
    for other, pairs in data.splits.items():
        foreign = {pair.id for pair in pairs}
        if other != "train" and (caught := [key for key in ids if key not in known and key in foreign]):
            raise VssError(
                f"calibration image {caught[0]!r} belongs to the {other} split; ranges come from training images alone."
            )
    for key in ids:
        if key not in known:
            raise unknown(f"training image of {data.root}", key, list(known)[:5])
    return [known[key] for key in sorted(set(ids))]


def _stratified(present: np.ndarray, count: int, seed: int, names: Sequence[str]) -> list[int]:
    """Indices of `count` rows of (n, K) `present`, in order."""
    total, classes = present.shape
    if count >= total:
        return list(range(total))
    order = np.random.default_rng(seed).permutation(total)
    images = present.sum(0)
    owed = np.minimum(images, -(-count // (2 * classes)))
    taken: list[int] = []
    for label in np.argsort(images, kind="stable"):
        candidates = [index for index in order if present[index, label] and index not in taken]
        missing = int(owed[label] - present[taken, label].sum()) if taken else int(owed[label])
        taken += candidates[: max(0, missing)]
    if len(taken) > count:
        raise VssError(
            f"{count} calibration images cannot show every class of {', '.join(names)}; {len(taken)} can: raise the "
            "number of images."
        )
    rest = [index for index in order if index not in set(taken)]
    return sorted(int(index) for index in taken + rest[: count - len(taken)])


def _refuse_test_images(data: SegData, chosen: Sequence[Pair], files: dict[str, str]) -> None:
    """A test image under another name is found by its content; only files of equal size are read."""
    sizes = {pair.image.stat().st_size for pair in chosen}
    tests = [p.image for p in data.splits.get("test", []) if p.image.stat().st_size in sizes]
    found = dict(zip(sha256_files(tests), tests, strict=True))
    for pair in chosen:
        if files[pair.id] in found:
            raise VssError(
                f"calibration image {pair.image} is also the test image {found[files[pair.id]].name}; take it out of "
                "one of the two."
            )
