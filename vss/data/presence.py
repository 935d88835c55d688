"""Whether the masks of the splits in use can teach and judge the classes: said before anything is computed.

What would give a wrong result is refused: a split without one labelled pixel, and training masks of one class alone
(masks of 0 and 255, say, where 255 is ignored). What can be meant is said: a class that the training or the judging
masks do not hold or that training alone lacks, labels that look shifted by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vss.core.errors import VssError, counted, listed, shown
from vss.data.contents import count_values
from vss.data.segdata import Pair, SegData
from vss.data.stats import class_counts


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
