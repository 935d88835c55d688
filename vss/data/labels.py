"""Class names, palettes, and tables from stored mask values to class indices."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vss.core.errors import VssError, counted, shown

IGNORE = 255


class UnknownLabelsError(VssError):
    """A mask holds values that no class owns; `values` lists them."""

    def __init__(self, values: Iterable[int], expected: str) -> None:
        self.values = sorted(int(value) for value in values)
        self.expected = expected
        listed = ", ".join(map(str, self.values[:8])) + (", ..." if len(self.values) > 8 else "")
        super().__init__(f"holds label values {listed} that no class owns; expected {expected}")


@dataclass(frozen=True, eq=False)
class LabelTable:
    """A table from stored mask values to class indices; calling it decodes a mask and refuses other values.

    `table`: (256,) uint8, class index or `IGNORE`. `known`: (256,) bool, which stored values are legal.
    """

    table: np.ndarray
    known: np.ndarray
    expected: str

    @classmethod
    def of(cls, pairs: Mapping[int, int], *, expected: str) -> LabelTable:
        """From {stored value: class index or IGNORE}."""
        table = np.full(256, IGNORE, np.uint8)
        known = np.zeros(256, np.bool_)
        table[list(pairs)] = list(pairs.values())
        known[list(pairs)] = True
        return cls(table=table, known=known, expected=expected)

    @classmethod
    def identity(cls, num_classes: int, *, void: Iterable[int] = (IGNORE,)) -> LabelTable:
        """0..num_classes-1 as they are, the `void` values to IGNORE."""
        void = sorted(set(void))
        pairs = {index: index for index in range(num_classes)} | dict.fromkeys(void, IGNORE)
        return cls.of(pairs, expected=f"0..{num_classes - 1} or {' or '.join(map(str, void))} (ignored)")

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        """(H, W) stored integers -> (H, W) uint8, 0..K-1 or IGNORE; raises `UnknownLabelsError`."""
        if stored.dtype != np.uint8:
            outside = np.unique(stored[(stored < 0) | (stored > 255)])
            if outside.size:
                raise UnknownLabelsError(outside, self.expected)
            stored = stored.astype(np.uint8)
        counts = np.bincount(stored.ravel(), minlength=256)
        unknown = np.flatnonzero((counts > 0) & ~self.known)
        if unknown.size:
            raise UnknownLabelsError(unknown, self.expected)
        return self.table[stored]


def folded(name: str) -> str:
    """A class name as it is compared: Unicode's composed form, single spaces, no difference of case."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def require_classes(source: str, theirs: Sequence[str], data: str, ours: Sequence[str], *, count: int = 0) -> None:
    """Refuse a network (or report, or bundle) whose classes are not those of the data, in their order.

    Names are compared by `folded`. A source that knows no names is judged by its `count` of classes alone, and not at
    all without one.

    Args:
        source: what carries the classes, as the sentence calls it.
        theirs: its class names in label order; empty where it has none.
        data: what it meets, as the sentence calls it.
        ours: class names there.
        count: how many classes the network has.
    """
    advice = "give the data that it was trained for, or a network trained for these classes."
    number = len(theirs) or count
    if number and number != len(ours):
        some = f" ({shown(list(theirs))})" if theirs else ""
        raise VssError(
            f"{source} has {counted(number, 'class', 'classes')}{some} and {data} has {len(ours)} "
            f"({shown(list(ours))}); {advice}"
        )
    differs = [i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if folded(a) != folded(b)]
    if not differs:
        return
    first = differs[0]
    same = sorted(map(folded, theirs)) == sorted(map(folded, ours))
    what = "the same names in another order" if same else f"{len(differs)} other names"
    raise VssError(
        f"the classes of {source} are not those of {data} ({what}): class {first} is {shown(theirs[first])} there and "
        f"{shown(ours[first])} here; {advice}"
    )


CAMVID_NAMES = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip
"""The 11 classes of the SegNet split of CamVid (Badrinarayanan et al., 2017); stored value 11 is void."""

CAMVID_PALETTE = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip

CITYSCAPES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
"""(name, labelId, colour) of the 19 train classes, in trainId order (cityscapesScripts, helpers/labels.py)."""

CITYSCAPES_LABEL_IDS = 34
"""labelIds run from 0 to 33; those that are no train class are ignored."""


def camvid_table() -> LabelTable:
    """0..10 as they are; 11 (void) and 255 ignored."""
    return LabelTable.identity(len(CAMVID_NAMES), void=(11, IGNORE))


def cityscapes_table(kind: str) -> LabelTable:
    """The table for `labelIds` or `labelTrainIds` files."""
    if kind == "labelTrainIds":
        return LabelTable.identity(len(CITYSCAPES))
    pairs = dict.fromkeys([*range(CITYSCAPES_LABEL_IDS), IGNORE], IGNORE)
    pairs |= {label_id: index for index, (_, label_id, _) in enumerate(CITYSCAPES)}
    return LabelTable.of(pairs, expected="labelIds 0..33 or 255 (ignored)")


def binary_table() -> LabelTable:
    """0 is background; 255 (or 1, as in files of one bit) is the defect."""
    return LabelTable.of({0: 0, 1: 1, 255: 1}, expected="0 (background) or 255 (defect)")


def generic_palette(num_classes: int) -> np.ndarray:
    """(K, 3) uint8: distinct colours by the bit-reversal rule of the Pascal VOC development kit."""
    index = np.arange(num_classes, dtype=np.int64)
    palette = np.zeros((num_classes, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return palette.astype(np.uint8)
