"""The nouns of this room: label tables, pairs, and data sets.

A data set's classes are in one order everywhere, and `IGNORE` is what no class owns.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vss.core.errors import VssError, counted, shown, unknown
from vss.core.files import MAX_JSON, require_file
from vss.data.images import BadSampleError, Mask, open_rgb, read_stored_mask
from vss.data.layouts import SPLITS, absent_split
from vss.data.masks import Sound, unpacked

IGNORE = 255


class UnknownLabelsError(VssError):
    """A mask holds values that no class owns; `values` lists them."""

    def __init__(self, values: Iterable[int], expected: str, *, what: str = "") -> None:
        self.values = sorted(int(value) for value in values)
        self.expected = expected
        listed = ", ".join(map(str, self.values[:8])) + (", ..." if len(self.values) > 8 else "")
        super().__init__(f"holds {what or f'label values {listed}'} that no class owns; expected {expected}")


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

    @property
    def pairs(self) -> dict[int, int]:
        """{stored value: class index or IGNORE} of the legal values."""
        return {int(value): int(self.table[value]) for value in np.flatnonzero(self.known)}

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        """(H, W) stored integers -> (H, W) uint8, 0..K-1 or IGNORE; raises `UnknownLabelsError`."""
        if stored.dtype != np.uint8:
            outside = np.unique(stored[(stored < 0) | (stored > 255)])
            if outside.size:
                raise UnknownLabelsError(outside, self.expected)
            stored = stored.astype(np.uint8)
        values = bytearray(stored.tobytes())  # bytes are looked up several times as fast as arrays
        if unknown := values.translate(None, np.flatnonzero(self.known).astype(np.uint8).tobytes()):
            raise UnknownLabelsError(np.unique(np.frombuffer(unknown, np.uint8)), self.expected)
        return np.frombuffer(values.translate(self.table.tobytes()), np.uint8).reshape(stored.shape)


@dataclass(frozen=True, eq=False)
class ValueTable:
    """As `LabelTable`, for values beyond 255; with `colours` they are those of `ColourFile`."""

    pairs: dict[int, int]
    expected: str
    colours: bool = False

    def __call__(self, stored: np.ndarray) -> np.ndarray:
        """(H, W) stored integers -> (H, W) uint8, 0..K-1 or IGNORE; raises `UnknownLabelsError`."""
        keys = np.array(sorted(self.pairs), np.int64)
        classes = np.array([self.pairs[int(key)] for key in keys], np.uint8)
        index = np.minimum(np.searchsorted(keys, stored), len(keys) - 1)
        if (bad := keys[index] != stored).any():
            values, counts = np.unique(stored[bad], return_counts=True)
            raise UnknownLabelsError(values, self.expected, what=self._named(values, counts) if self.colours else "")
        return classes[index]

    @staticmethod
    def _named(values: np.ndarray, counts: np.ndarray) -> str:
        """The most frequent of unknown colours."""
        order = np.argsort(-counts, kind="stable")[:4]
        some = "; ".join(f"{unpacked(int(values[i]))} in {counted(int(counts[i]), 'pixel')}" for i in order)
        return f"{counted(len(values), 'colour')} ({some}{'; ...' if len(values) > 4 else ''})"


def table_of(pairs: Mapping[int, int], *, expected: str, colours: bool = False) -> LabelTable | ValueTable:
    """A table from {stored value: class index or IGNORE}."""
    if colours or max(pairs) > 255:
        return ValueTable(dict(pairs), expected, colours)
    return LabelTable.of(pairs, expected=expected)


def binary_table() -> LabelTable:
    """0 is background; 255 (or 1, as in files of one bit) is the defect."""
    return LabelTable.of({0: 0, 1: 1, 255: 1}, expected="0 (background) or 255 (defect)")


DEFECT_NAMES, DEFECT_PALETTE = ("background", "defect"), np.array([(0, 0, 0), (255, 64, 64)], np.uint8)


def generic_palette(num_classes: int) -> np.ndarray:
    """(K, 3) uint8: distinct colours by the bit-reversal rule of the Pascal VOC development kit."""
    index = np.arange(num_classes, dtype=np.int64)
    palette = np.zeros((num_classes, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
    return palette.astype(np.uint8)


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


@dataclass(frozen=True)
class Pair:
    """One image and its mask; `id` is unique within the split."""

    id: str
    image: Path
    mask: Mask


@dataclass(frozen=True)
class Orphans:
    """Files of a data root that belong to no pair.

    `strays` are copies such as `NAME (copy).png`. `unlisted` lie among images that a file lists.
    """

    images_without_mask: tuple[Path, ...] = ()
    masks_without_image: tuple[Path, ...] = ()
    strays: tuple[Path, ...] = ()
    unlisted: tuple[Path, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class SegData:
    """A segmentation data set on disk.

    `class_names`: K names. `palette`: (K, 3) uint8 RGB. `splits`: name -> pairs sorted by id. `decode`: (H, W) stored
    mask values -> (H, W) uint8 in 0..K-1 or `ignore_index`, every pixel by its value alone, raising `VssError` for
    other values. `protocol`: the sentence to print beside every number. `orphans`: files that found
    no partner, listed by `check`, refused by `open_data`. `numbered`: stored values are the numbers that users know.
    `kept`: options by which the folder was read, see `DataOptions`; they go into checkpoints.
    """

    name: str
    root: Path
    class_names: tuple[str, ...]
    ignore_index: int = IGNORE
    palette: np.ndarray
    splits: dict[str, list[Pair]]
    decode: Callable[[np.ndarray], np.ndarray]
    protocol: str
    orphans: Orphans = field(default_factory=Orphans)
    numbered: bool = True
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def pairs(self, split: str) -> list[Pair]:
        """The pairs of one split; raises `VssError` when there is no such split."""
        if split not in self.splits:
            if split in SPLITS:
                raise VssError(f"{self.root} has {absent_split(self.name, split, self.splits)}.")
            raise unknown(f"split of {self.root}", split, self.splits)
        return self.splits[split]

    def read_mask(self, path: Mask) -> np.ndarray:
        """(H, W) uint8, 0..K-1 or `ignore_index`. Raises `BadSampleError` with the file name."""
        return self.decoded(path, read_stored_mask(path))

    def decoded(self, path: Mask, stored: np.ndarray) -> np.ndarray:
        """The stored values of the mask `path` as classes, each by itself. Raises `BadSampleError` with the name."""
        try:
            return self.decode(stored)
        except VssError as error:
            raise BadSampleError(f"mask {path} {error}: fix the mask or the list of classes.") from error

    @functools.cached_property
    def meaning(self) -> list[object]:
        """JSON-able: the classes in order, and which class each stored value is: a list over 0..255, None where no
        class owns it, or the table of values beyond those."""
        owners: list[object] = [self.owner(value) for value in range(256)]
        if isinstance(self.decode, ValueTable):
            owners = [*sorted(self.decode.pairs.items())]
        return [list(self.class_names), self.ignore_index, owners]

    def owner(self, value: int) -> int | None:
        """The class index (or `ignore_index`) of a stored value 0..255, None where no class owns it."""
        try:
            return int(self.decode(np.full((1, 1), value, np.uint8))[0, 0])
        except VssError:
            return None

    def read(self, pair: Pair) -> tuple[Image.Image, np.ndarray]:
        """(8-bit RGB image, decoded mask) of one size. Raises `BadSampleError` with the file name."""
        image, mask = open_rgb(pair.image), self.read_mask(pair.mask)
        check_sizes(pair, image=(image.height, image.width), mask=(mask.shape[0], mask.shape[1]))
        return image, mask


def check_sizes(pair: Pair, *, image: tuple[int, int], mask: tuple[int, int]) -> None:
    """Refuse a mask of another size (H, W) than its image."""
    if image != mask:
        raise BadSampleError(
            f"mask {pair.mask} is {mask[0]}x{mask[1]} and its image {pair.image.name} is {image[0]}x{image[1]} "
            "(height x width); expected equal sizes: export the mask again at the size of the image."
        )


@dataclass
class Matcher:
    """Collects pairs over the splits, with the files that found no partner.

    `sound`: an image without a mask is a pair all the same, see `Sound`.
    """

    sound: bool = False
    splits: dict[str, list[Pair]] = field(default_factory=dict)
    images_without_mask: list[Path] = field(default_factory=list)
    masks_without_image: list[Path] = field(default_factory=list)
    strays: list[Path] = field(default_factory=list)

    def add(self, split: str, *, images: Mapping[str, Path], masks: Mapping[str, Mask]) -> None:
        """Match two {stem: file} tables into one split."""
        alone = sorted(images.keys() - masks.keys())
        if self.sound:
            masks = {**masks, **{key: Sound(images[key]) for key in alone}}
        else:
            self.images_without_mask += [images[key] for key in alone]
        both = sorted(images.keys() & masks.keys())
        self.splits[split] = [Pair(id=key, image=images[key], mask=masks[key]) for key in both]
        lone = [masks[key] for key in sorted(masks.keys() - images.keys())]
        self.masks_without_image += [mask if isinstance(mask, Path) else Path(str(mask)) for mask in lone]

    def data(
        self,
        name: str,
        root: Path,
        class_names: tuple[str, ...],
        decode: LabelTable | ValueTable,
        classes: str,
        *,
        palette: np.ndarray | None = None,
        layout: str = "",
        numbered: bool = True,
        kept: dict[str, Any] | None = None,
    ) -> SegData:
        """The data set of what was collected; `classes` and `layout`, by default its name, go into its protocol."""
        return SegData(
            name=name,
            root=root,
            class_names=class_names,
            palette=generic_palette(len(class_names)) if palette is None else palette,
            splits=self.splits,
            decode=decode,
            protocol=(
                f"{root.resolve().name} ({layout or name} layout): {classes}, {counts_of(self.splits)} images, "
                "one confusion matrix over the whole split, at the stated resolution"
            ),
            orphans=Orphans(tuple(self.images_without_mask), tuple(self.masks_without_image), tuple(self.strays)),
            numbered=numbered,
            kept=kept or {},
        )


def by_stem(paths: Iterable[Path], key: Callable[[Path], str] = lambda path: path.stem) -> dict[str, Path]:
    """{key: path}; two files with one key (`a.jpg` and `a.png`) are a `VssError`.

    Keys are in Unicode's composed form (NFC): archives made on macOS spell letters with accents otherwise.
    """
    table: dict[str, Path] = {}
    for path in paths:
        name = unicodedata.normalize("NFC", key(path))
        if name in table:
            other = path.name if path.parent == table[name].parent else path
            raise VssError(f"{table[name]} and {other} share one name; keep one of the two files.")
        table[name] = path
    return table


def counts_of(splits: Mapping[str, Sequence[Pair]]) -> str:
    """As a protocol counts images.

    >>> counts_of({"train": [], "val": []})
    '0 train, 0 val'
    """
    return ", ".join(f"{len(pairs)} {name}" for name, pairs in splits.items())


def read_lines(path: Path, expected: str) -> list[str]:
    """Stripped lines of a text file in UTF-8, with or without a byte order mark, in composed form (NFC)."""
    if path.exists():
        require_file(path, kind="text", limit=MAX_JSON)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VssError(f"{path} cannot be read ({reason}); expected a text file in UTF-8 with {expected}.") from error
    return [line.strip() for line in unicodedata.normalize("NFC", text).splitlines()]


def read_class_names(path: Path) -> tuple[str, ...]:
    """One class name a line, the first that of value 0; blank lines may stand at the end alone, since they count."""
    lines = read_lines(path, "one class name a line, the first for mask value 0")
    while lines and not lines[-1]:
        lines.pop()
    if "" in lines:
        raise VssError(
            f"line {lines.index('') + 1} of {path} is blank, and mask values are line numbers from 0; name the class, "
            "or remove the line if the masks count without it."
        )
    different = len({folded(name) for name in lines})
    if not lines or different != len(lines) or len(lines) > IGNORE:
        raise VssError(f"{path} holds {len(lines)} names, {different} different; expected 1..255 different names.")
    return tuple(lines)
