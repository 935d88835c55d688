"""What is wrong or doubtful about the images and labels of the splits that a run uses."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from vss.core.errors import VssError, counted, listed, shown
from vss.data.base import Pair, SegData, folded
from vss.data.classes import VOID_NAMES
from vss.data.counts import ClassCounts, count_classes
from vss.data.images import count_values
from vss.data.layouts import SPLITS
from vss.data.split import shared_images


def check_labels(data: SegData, splits: Mapping[str, Sequence[Pair]]) -> list[str]:
    """What is doubtful about the splits in use, as sentences without a full stop.

    Raises:
        VssError: a training image that is in another split, a mask with labels of no class, or what `refusals` says.
    """
    notes = _shared(data, splits)
    found, dtypes = {}, []
    for split, pairs in splits.items():
        try:
            found[split] = count_classes(data, pairs)
        except VssError as error:
            values = {value for _, counts in count_values([pair.mask for pair in pairs]) for value in counts}
            raise VssError(f"{error}{shifted(data, frozenset(values))}") from error
        kinds = count_values([pair.mask for pair in pairs])
        dtypes += [(pair, dtype) for pair, (dtype, _) in zip(pairs, kinds, strict=True)]
    for sentence in refusals(data, found):
        raise VssError(f"{data.root}: {sentence}.")
    return notes + mixed_depths(dtypes) + doubts(data, found)


def _shared(data: SegData, splits: Mapping[str, Sequence[Pair]]) -> list[str]:
    """Refuses images that are trained on and judged by, also in a split that only later commands use; without training,
    or where other splits share them, nothing or a sentence."""
    if "train" not in splits:
        return []
    others = {split: pairs for split, pairs in data.splits.items() if split in SPLITS}
    groups = [[f"{split}/{pair.id}" for split, pair in group] for group in shared_images({**others, **splits})]
    trained = [group for group in groups if any(name.startswith("train/") for name in group)]
    if trained:
        many, more = len(trained) > 1, "; ..." if trained[3:] else ""
        raise VssError(
            f"{data.root}: {counted(len(trained), 'training image is', 'training images are')} in another split as "
            f"well, by content ({'; '.join(' = '.join(group) for group in trained[:3])}{more}), and scores on what was "
            f"trained on say nothing; take {'them' if many else 'it'} out of one of the two, or share all images out "
            "anew, which keeps equal ones together: --data-split train=0.7,val=0.15,test=0.15 (data.split)."
        )
    if not groups:
        return []
    return [
        f"{counted(len(groups), 'image is', 'images are')} in val and test alike ({' = '.join(groups[0])}): figures of "
        "images that training chose by are kinder"
    ]


def mixed_depths(masks: Iterable[tuple[Pair, str]]) -> list[str]:
    """A sentence where some masks have more bits a pixel than others, which exports of one kind do not."""
    first: dict[int, Pair] = {}
    number: Counter[int] = Counter()
    for pair, dtype in masks:
        if isinstance(pair.mask, Path):
            bits = 8 * np.dtype(dtype).itemsize
            first.setdefault(bits, pair)
            number[bits] += 1
    if len(first) < 2:
        return []
    some = listed([f"{counted(number[bits], 'mask')} of {bits} bits ({first[bits].mask})" for bits in sorted(first)])
    return [f"{some} in one set: look whether their values mean the same classes"]


def shifted(data: SegData, values: frozenset[int]) -> str:
    """A hint where the stored values are 1..K in place of 0..K-1, else nothing."""
    inside = values - {data.ignore_index}
    if not data.numbered or not inside or min(inside) != 1 or max(inside) != data.num_classes:
        return ""
    return (
        f" The values run from 1 to {data.num_classes}, as if shifted by one: the first class is stored as 0; subtract "
        "1 from the masks, or name what 0 is in a first line of the list of classes."
    )


def refusals(data: SegData, found: Mapping[str, ClassCounts]) -> list[str]:
    """Why these masks cannot be trained on or judged by, without a full stop."""
    sentences = []
    for split, present in found.items():
        if len(present.rows) and not present.pixels.sum():
            sentences.append(
                f"split {split!r} has no labelled pixel: {_all(len(present.rows))} ignored throughout (stored "
                f"values {shown(sorted(present.values)[:8])}); give masks with classes, or remove the split"
            )
    if apart := _one_or_255(data, found):
        sentences.append(apart)
    train = found.get("train")
    if train and data.num_classes == 1:
        sentences.append(
            f"there is one class alone, {shown(data.class_names[0])}, so that nothing can be learned: two or more are "
            "needed, of which one may be what is nothing else (data.classes, data.label_map)"
        )
    if train and data.num_classes > 1 and (train.pixels > 0).sum() == 1:
        name = data.class_names[int(train.pixels.argmax())]
        sentences.append(
            f"the training masks hold one class alone, {shown(name)} of {data.num_classes}, so that nothing can be "
            f"learned{_ignored(data, train) or ': check how the masks were saved'}"
        )
    return sentences


def _one_or_255(data: SegData, found: Mapping[str, ClassCounts]) -> str:
    """Masks of one bit among masks of 0 and 255: some hold the second class and no ignored pixel, the others ignored
    pixels and no second class. Said explicitly, by `data.label_map`, it is meant."""
    said = data.kept.get("label_map", {})
    if (
        not found
        or data.num_classes != 2
        or not data.numbered
        or data.owner(255) != data.ignore_index
        or {255, "255"} & {*said}
    ):
        return ""
    second = np.concatenate([present.rows[:, 1] > 0 for present in found.values()])
    void = np.concatenate([present.void > 0 for present in found.values()])
    stored = set().union(*(present.values for present in found.values()))
    if not second.any() or not void.any() or (second & void).any() or 255 not in stored:
        return ""
    name = shown(data.class_names[1])
    return (
        f"{counted(int(second.sum()), 'mask')} of two classes mark {name} as 1, {int(void.sum())} hold 255, which is "
        f"ignored, and none holds both, as if saved in two ways; where 255 is {name}, give --label-map 255={name} "
        "(data.label_map), else 255=ignore"
    )


def doubts(data: SegData, found: Mapping[str, ClassCounts]) -> list[str]:
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
        sentences.append(_lacking(data, list(held), nowhere) + _covered(data, nowhere))
    foreign = _foreign(data, held) if train else []
    sentences += foreign
    if sentences:
        sentences[0] += hint
    for split, classes in held.items():
        missing = set(range(data.num_classes)) - classes - nowhere
        if missing and split != "train" and not (foreign and _offset(train, classes)):
            sentences.append(_lacking(data, [split], missing))
    void = [name for name in data.class_names if folded(name) in VOID_NAMES]
    if void and data.num_classes > 2:
        sentences.append(
            f"{listed([shown(name) for name in void])} counts as any class does; where it means nothing, give "
            f"--label-map {void[0]}=ignore (data.label_map)"
        )
    for split, classes in held.items():
        if data.numbered and classes == set(range(1, data.num_classes)) and data.num_classes in found[split].values:
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


def _covered(data: SegData, nowhere: set[int]) -> str:
    """The way out where every pixel belongs to a shape, and `background` was made for those that do not."""
    if data.numbered or nowhere != {0} or folded(data.class_names[0]) != "background":
        return ""
    return ": every pixel is of another one; --label-map background=ignore (data.label_map) leaves it out"


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


def _ignored(data: SegData, present: ClassCounts) -> str:
    """The hint for masks whose class is stored as 255."""
    if not data.numbered or 255 not in present.values or data.owner(255) != data.ignore_index:
        return ""
    share = 100 * present.ignored / max(1, present.ignored + int(present.pixels.sum()))
    names = "classes.txt" if data.name == "masks" else "the list of classes"
    crack = shown(data.class_names[1]) if data.num_classes == 2 else "NAME"
    which = f"class {crack} as 1" if data.num_classes == 2 else f"it as its place in {names}"
    first = "" if data.num_classes == 2 else ", where the first is 0"
    return (
        f"; 255 is ignored in this layout, and {share:.1f} % of the pixels are: where 255 stands for a class (masks of "
        f"0 and 255), save {which}{first}, or give --label-map 255={crack} (data.label_map)"
    )
