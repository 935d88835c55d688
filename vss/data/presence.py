"""How often each class occurs in a split, and loss weights from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vss.core.errors import VssError, counted, listed, shown, unknown
from vss.data.base import Pair, SegData
from vss.data.contents import count_values

WEIGHT_MODES = ("median", "log", "none")


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Pixels of each class over a split.

    `pixels`: (K,) int64. `images`: (K,) int64, images that hold the class. `in_images`: (K,) int64, labelled pixels of
    those images. `ignored`: pixels that no class owns.
    """

    pixels: np.ndarray
    images: np.ndarray
    in_images: np.ndarray
    ignored: int

    @classmethod
    def of(cls, rows: np.ndarray, *, ignored: int) -> ClassCounts:
        """From (images, K) int64 pixel counts."""
        present = rows > 0
        labelled = rows.sum(axis=1, keepdims=True)
        return cls(
            pixels=rows.sum(axis=0),
            images=present.sum(axis=0),
            in_images=(present * labelled).sum(axis=0),
            ignored=ignored,
        )


def class_counts(data: SegData, pairs: Sequence[Pair]) -> np.ndarray:
    """(n, 256) int64: pixels of every class and of `ignore_index` in each mask at its own resolution.

    Masks are read once and remembered by their contents. Raises `VssError` for a bad mask.
    """
    rows = np.zeros((len(pairs), 256), np.int64)
    masks = [pair.mask for pair in pairs]
    for row, mask, (dtype, counts) in zip(rows, masks, count_values(masks), strict=True):
        stored = np.array([list(counts)], np.dtype(dtype))
        np.add.at(row, data.decoded(mask, stored)[0], list(counts.values()))
    return rows


def count_classes(data: SegData, split: str = "train") -> ClassCounts:
    """The pixels of every class over a split. Raises `VssError` for a bad mask."""
    rows = class_counts(data, data.pairs(split))
    return ClassCounts.of(rows[:, : data.num_classes], ignored=int(rows[:, data.ignore_index].sum()))


def class_frequencies(data: SegData, split: str = "train") -> np.ndarray:
    """(K,) float64: each class's share of the labelled pixels of a split, 0 for an absent class."""
    pixels = count_classes(data, split).pixels
    return pixels / max(1, pixels.sum())


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
    if mode == "none":
        return torch.ones(data.num_classes)
    return torch.from_numpy(weights_from_counts(count_classes(data, split), mode)).float()


# Whether the masks of the splits in use can teach and judge the classes: said before anything is computed.


@dataclass(frozen=True, eq=False)
class Present:
    """What the masks of a split hold: `pixels` (K,) of each class, `ignored` pixels, the stored `values`, `images`."""

    pixels: np.ndarray
    ignored: int
    values: frozenset[int]
    images: int

    @classmethod
    def of(cls, data: SegData, rows: np.ndarray, values: frozenset[int]) -> Present:
        """From (images, 256) counts of classes."""
        total = rows.sum(0, dtype=np.int64)
        return cls(total[: data.num_classes], int(total[data.ignore_index]), values, len(rows))


def check_labels(data: SegData, splits: Mapping[str, Sequence[Pair]]) -> list[str]:
    """What is doubtful about the masks of the splits in use, as sentences without a full stop.

    Raises:
        VssError: a mask with labels of no class, or what `refusals` says.
    """
    found = {}
    for split, pairs in splits.items():
        values = frozenset(value for _, counts in count_values([pair.mask for pair in pairs]) for value in counts)
        try:
            found[split] = Present.of(data, class_counts(data, pairs), values)
        except VssError as error:
            raise VssError(f"{error}{shifted(data, values)}") from error
    for sentence in refusals(data, found):
        raise VssError(f"{data.root}: {sentence}.")
    return doubts(data, found)


def shifted(data: SegData, values: frozenset[int]) -> str:
    """A hint where the stored values are 1..K in place of 0..K-1, else nothing."""
    inside = values - {data.ignore_index}
    if not inside or min(inside) != 1 or max(inside) != data.num_classes:
        return ""
    return (
        f" The values run from 1 to {data.num_classes}, as if shifted by one: the first class is stored as 0; subtract "
        "1 from the masks, or name what 0 is in a first line of the list of classes."
    )


def refusals(data: SegData, found: Mapping[str, Present]) -> list[str]:
    """Why these masks cannot be trained on or judged by, without a full stop."""
    sentences = []
    for split, present in found.items():
        if present.images and not present.pixels.sum():
            sentences.append(
                f"split {split!r} has no labelled pixel: {_all(present.images)} ignored throughout (stored "
                f"values {shown(sorted(present.values)[:8])}); give masks with classes, or remove the split"
            )
    train = found.get("train")
    if train and data.num_classes > 1 and (train.pixels > 0).sum() == 1:
        name = data.class_names[int(train.pixels.argmax())]
        sentences.append(
            f"the training masks hold one class alone, {shown(name)} of {data.num_classes}, so that nothing can be "
            f"learned{_ignored(data, train) or ': check how the masks were saved'}"
        )
    return sentences


def doubts(data: SegData, found: Mapping[str, Present]) -> list[str]:
    """What may be meant and may be a mistake, without a full stop."""
    held = {split: set(np.flatnonzero(present.pixels).tolist()) for split, present in found.items()}
    held = {split: classes for split, classes in held.items() if classes}
    if not held:
        return []
    train = held.get("train", set())
    hint = _ignored(data, found["train"]) if train else ""
    sentences = []
    nowhere = set(range(data.num_classes)).difference(*held.values())
    if nowhere:
        sentences.append(_lacking(data, list(held), nowhere))
    foreign = _foreign(data, held) if train else []
    sentences += foreign
    if sentences:
        sentences[0] += hint
    for split, classes in held.items():
        missing = set(range(data.num_classes)) - classes - nowhere
        if missing and split != "train" and not (foreign and _offset(train, classes)):
            sentences.append(_lacking(data, [split], missing))
    for split, classes in held.items():
        if classes == set(range(1, data.num_classes)) and data.num_classes in found[split].values:
            sentences.append(
                f"no {_masks([split])} holds the value 0 and all of 1 to {data.num_classes} occur: if the labels are "
                "shifted by one, subtract 1 from the masks"
            )
    return sentences


def _all(images: int) -> str:
    return "its one mask is" if images == 1 else f"all {images} masks are"


def _masks(splits: Sequence[str]) -> str:
    if len(splits) > 1:
        return f"mask of {listed(splits)}"
    return "training mask" if splits[0] == "train" else f"mask of {splits[0]!r}"


def _lacking(data: SegData, splits: Sequence[str], missing: set[int]) -> str:
    names = [data.class_names[index] for index in sorted(missing)]
    some = ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")
    return f"{counted(len(names), 'class', 'classes')} that no {_masks(splits)} holds: {some}"


def _offset(train: set[int], classes: set[int]) -> int:
    """1 or -1 where the classes are those of train moved by that, else 0."""
    return next((by for by in (1, -1) if len(train) > 1 and classes == {index + by for index in train}), 0)


def _foreign(data: SegData, held: Mapping[str, set[int]]) -> list[str]:
    """Classes that other splits hold and no training mask shows, one sentence for those of the same splits."""
    train, groups = held["train"], defaultdict[tuple[str, ...], list[str]](list)
    for index in sorted(set().union(*held.values()) - train):
        groups[tuple(split for split in held if index in held[split])].append(shown(data.class_names[index]))
    sentences = []
    for splits, names in groups.items():
        one, some = len(names) == 1, names if len(names) < 4 else [*names[:3], "more"]
        text = f"{'class' if one else 'classes'} {listed(some)} {'is' if one else 'are'} in {listed(splits)} and in no "
        moved = [split for split in splits if _offset(train, held[split])]
        if moved:
            ranges = [f"{split} holds {min(held[split])} to {max(held[split])}" for split in ("train", *moved)]
            why = f"the labels of {listed(moved)} look shifted by one against those of train ({', '.join(ranges)})"
        else:
            why = f"{'its' if one else 'their'} labels may be shifted"
        sentences.append(f"{text}training mask: {why}")
    return sentences


def _ignored(data: SegData, present: Present) -> str:
    """The hint for masks whose class is stored as 255."""
    if 255 not in present.values or data.meaning[2][255] != data.ignore_index:
        return ""
    share = 100 * present.ignored / max(1, present.ignored + int(present.pixels.sum()))
    names = "classes.txt" if data.name == "masks" else "the list of classes"
    which = f"class {shown(data.class_names[1])} as 1" if data.num_classes == 2 else f"it as its place in {names}"
    first = "" if data.num_classes == 2 else ", where the first is 0"
    return (
        f"; 255 is ignored in this layout, and {share:.1f} % of the pixels are: where 255 stands for a class (masks of "
        f"0 and 255), save {which}{first}"
    )
