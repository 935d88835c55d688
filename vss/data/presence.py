"""Whether the masks of the splits in use can teach and judge the classes: said before anything is computed.

What would give a wrong result is refused: a split without one labelled pixel, and training masks of one class alone
(masks of 0 and 255, say, where 255 is ignored). What can be meant is said: a class that the training or the judging
masks do not hold, labels that look shifted by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vss.data.contents import count_values
from vss.data.segdata import Pair, SegData
from vss.data.stats import class_counts
from vss.errors import VssError, shown


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
                f"split {split!r} has no labelled pixel: all {present.images} masks are ignored throughout (stored "
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
    sentences = []
    for split, present in found.items():
        absent = [name for name, count in zip(data.class_names, present.pixels, strict=True) if not count]
        if absent and present.images and present.pixels.sum():
            some = ", ".join(absent[:3]) + (" and more" if len(absent) > 3 else "")
            of, then = ("training mask", _ignored(data, present)) if split == "train" else (f"mask of {split!r}", "")
            sentences.append(f"{len(absent)} classes that no {of} holds: {some}{then}")
    train = found.get("train")
    if train and not train.pixels[0] and (train.pixels[1:] > 0).all() and data.num_classes in train.values:
        sentences.append(
            f"no training mask holds the value 0 and all of 1 to {data.num_classes} occur: if the labels are shifted "
            "by one, subtract 1 from the masks"
        )
    return sentences


def _ignored(data: SegData, present: Present) -> str:
    """The hint for masks whose class is stored as 255."""
    if 255 not in present.values or data.meaning[2][255] != data.ignore_index:
        return ""
    share = 100 * present.ignored / max(1, present.ignored + int(present.pixels.sum()))
    which = f"class {shown(data.class_names[1])} as 1" if data.num_classes == 2 else "it as its line number from 0"
    return (
        f"; 255 is ignored in this layout, and {share:.1f} % of the pixels are: where 255 stands for a class (masks of "
        f"0 and 255), save {which}"
    )
