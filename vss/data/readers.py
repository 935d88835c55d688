"""Folders of images and masks: which files belong together, and what the stored mask values mean.

A dataset is one function `open(root, options) -> SegData`, or `open(root)`, in the registry `DATASETS`. It lists and
matches files and reads no pixels, unless it must look at masks to know what they are. `open_data` adds classes and
splits of the options and the checks that a run needs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vss.core.errors import VssError, counted
from vss.core.registry import Registry
from vss.core.sections import DataOptions
from vss.data.base import (
    DEFECT_NAMES,
    DEFECT_PALETTE,
    IGNORE,
    LabelTable,
    Matcher,
    Pair,
    SegData,
    binary_table,
    by_stem,
    check_sizes,
    read_class_names,
)
from vss.data.classes import with_classes
from vss.data.images import BadSampleError, count_values, read_header, read_stored_mask, thread_map
from vss.data.layouts import DRAWINGS, SPLITS, guess_layout, require_layout
from vss.data.pixels import list_images
from vss.data.split import with_splits

__all__ = ["DATASETS", "Pair", "SegData", "guess_layout", "open_data", "open_root"]

log = logging.getLogger(__name__)

VAL_FRACTION = 0.15
COPY = re.compile(r" \(copy( \d+)?\)$| - Copy( \(\d+\))?$", re.IGNORECASE)


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


DATASETS: Registry[Callable[..., SegData]] = Registry("dataset")
DATASETS.later("flat", "vss.data.folders:flat")
DATASETS.later("colours", "vss.data.folders:flat")
DATASETS.later("voc", "vss.data.folders:voc")
DATASETS.later("ade20k", "vss.data.folders:ade20k")
DATASETS.later("anomaly", "vss.data.folders:anomaly")
DATASETS.later("coco", "vss.data.shapes:coco")
DATASETS.later("labelme", "vss.data.shapes:labelme")
AUTO = "auto"
"""In place of a layout's name: the one that the folder has."""


@DATASETS.register("camvid")
def camvid(root: Path, options: DataOptions) -> SegData:
    """CamVid in the layout of SegNet: `{train,val,test}/NAME.*`, `{train,val,test}annot/NAME.png`, 0..10 and 11 = void.

    An optional `classes.txt` (11 names, or 12 with void last) gives other names.
    """
    require_layout(root, "camvid")
    names: tuple[str, ...] = CAMVID_NAMES
    if (root / "classes.txt").is_file():
        given = read_class_names(root / "classes.txt")
        if len(given) not in (11, 12):
            raise VssError(
                f"{root / 'classes.txt'} names {len(given)} classes; the camvid layout has 11 and void: use the "
                "'masks' layout for other classes."
            )
        names = given[:11]
    matcher = Matcher(sound=options.missing_mask == "sound")
    for split in SPLITS:
        if (root / split).is_dir() or (root / f"{split}annot").is_dir():
            images, masks = by_stem(list_images(root / split)), by_stem(list_images(root / f"{split}annot"))
            matcher.add(split, images=images, masks=masks)
    palette = np.array(CAMVID_PALETTE, np.uint8)
    classes = "11 classes, void ignored"
    return matcher.data("camvid", root, names, camvid_table(), classes, palette=palette, layout="CamVid")


def _cityscapes_masks(root: Path, split: str, kind: str) -> dict[str, Path]:
    suffix = f"_gtFine_{kind}"
    found = (path for path in list_images(root / "gtFine" / split, recursive=True) if path.stem.endswith(suffix))
    return by_stem(found, lambda path: path.stem.removesuffix(suffix))


def _is_placeholder(pair: Pair, decode: LabelTable) -> bool:
    """Whether a mask holds ignored values only, as the published test masks do."""
    try:
        return bool((decode(read_stored_mask(pair.mask)) == IGNORE).all())
    except VssError as error:  # a damaged mask is no placeholder; it is refused, by name, when it is read
        log.warning("%s: %s", pair.mask, error)
        return False


@DATASETS.register("cityscapes")
def cityscapes(root: Path, options: DataOptions) -> SegData:
    """Cityscapes, 19 train classes, from `labelTrainIds` files where every image has one, else from `labelIds`.

    The test split is left out when it has no masks or the published placeholders.
    """
    require_layout(root, "cityscapes")
    images = {
        split: by_stem(
            list_images(root / "leftImg8bit" / split, recursive=True),
            lambda path: path.stem.removesuffix("_leftImg8bit"),
        )
        for split in SPLITS
        if (root / "leftImg8bit" / split).is_dir()
    }
    masks = {
        kind: {split: _cityscapes_masks(root, split, kind) for split in images}
        for kind in ("labelTrainIds", "labelIds")
    }
    covered = {
        kind: sum(len(images[split].keys() & found[split].keys()) for split in images if split != "test")
        for kind, found in masks.items()
    }
    kind = "labelTrainIds" if covered["labelTrainIds"] >= covered["labelIds"] else "labelIds"
    decode = cityscapes_table(kind)
    matcher = Matcher(sound=options.missing_mask == "sound")
    for split, found in images.items():
        if split == "test" and not masks[kind][split]:
            log.info("%s: the test split has no masks and is left out", root)
            continue
        matcher.add(split, images=found, masks=masks[kind][split])
    test = matcher.splits.get("test")
    if test and _is_placeholder(test[0], decode):
        log.info("%s: the masks of the test split are placeholders; the split is left out", root)
        del matcher.splits["test"]
    names = tuple(name for name, _, _ in CITYSCAPES)
    palette = np.array([colour for _, _, colour in CITYSCAPES], np.uint8)
    classes = f"19 train classes from {kind}, the rest ignored"
    return matcher.data("cityscapes", root, names, decode, classes, palette=palette, layout="Cityscapes")


def _has_defect(pair: Pair) -> bool:
    try:
        return bool(read_stored_mask(pair.mask).any())
    except BadSampleError as error:  # the pair stays in its split and is refused, by name, when it is read
        log.warning("%s", error)
        return False


def _defective(pairs: list[Pair]) -> list[bool]:
    """Which masks hold another value than 0: remembered where all can be read, else one by one."""
    try:
        return [bool(counts.keys() - {0}) for _, counts in count_values([pair.mask for pair in pairs])]
    except BadSampleError:
        return list(thread_map(_has_defect, pairs))


def carve_val(
    pairs: list[Pair], defective: list[bool], *, fraction: float = VAL_FRACTION, seed: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """(train, val): `fraction` of the defective and of the sound pairs, chosen by the SHA-256 of seed and id.

    The choice is a pure function of the ids and the seed. A kind with two pairs or more gives one or more to each side.
    """
    chosen: set[str] = set()
    for kind in (True, False):
        ids = [pair.id for pair, is_defective in zip(pairs, defective, strict=True) if is_defective is kind]
        ids.sort(key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
        count = max(1, round(fraction * len(ids))) if len(ids) > 1 else 0
        chosen.update(ids[:count])
    return [pair for pair in pairs if pair.id not in chosen], [pair for pair in pairs if pair.id in chosen]


@DATASETS.register("ksdd2", aliases=["ksdd"])
def ksdd2(root: Path, options: DataOptions) -> SegData:
    """Surface defects in the layout of KolektorSDD2: `{train,test}/NAME.png`, `NAME_GT.png` with 0 and 255.

    There is no published validation split: unless there is a folder `val`, 15 % of train become it, defective and sound
    alike, deterministically; test is untouched. Stray `NAME (copy).png` files are named in a warning and left out.
    """
    require_layout(root, "ksdd2")
    matcher = Matcher(sound=options.missing_mask == "sound")
    for split in SPLITS:
        if not (root / split).is_dir():
            continue
        files = list_images(root / split)
        strays = [path for path in files if COPY.search(path.stem)]
        matcher.strays += strays
        files = [path for path in files if path not in strays]
        images = by_stem(path for path in files if not path.stem.endswith("_GT"))
        masks = by_stem(
            (path for path in files if path.stem.endswith("_GT")), lambda path: path.stem.removesuffix("_GT")
        )
        matcher.add(split, images=images, masks=masks)
    if matcher.strays:
        log.warning("left out stray copies: %s", ", ".join(str(path) for path in matcher.strays))
    if len(matcher.splits.get("train", [])) > 1 and "val" not in matcher.splits:
        train = matcher.splits["train"]
        kept, val = carve_val(train, _defective(train))
        tail = {split: pairs for split, pairs in matcher.splits.items() if split != "train"}
        matcher.splits = {"train": kept, "val": val, **tail}
    classes = "background and defect, val carved from train by id"
    return matcher.data("ksdd2", root, DEFECT_NAMES, binary_table(), classes, palette=DEFECT_PALETTE, layout="KSDD2")


def _by_relative_path(folder: Path) -> dict[str, Path]:
    paths = list_images(folder, recursive=True)
    return by_stem(paths, lambda path: path.relative_to(folder).with_suffix("").as_posix())


@DATASETS.register("masks")
def masks(root: Path, options: DataOptions) -> SegData:
    """Your own data: `images/SPLIT/**`, `masks/SPLIT/**` with the same names, `classes.txt` with one name a line.

    Mask values are line numbers from 0; 255 is ignored.
    """
    if not all((root / kind).is_dir() for kind in ("images", "masks")):
        require_layout(root, "masks")
    if not (root / "classes.txt").exists():
        raise VssError(f"{root} has no classes.txt; {DRAWINGS['masks']}.")
    names = read_class_names(root / "classes.txt")
    matcher = Matcher(sound=options.missing_mask == "sound")
    splits = sorted({path.name for kind in ("images", "masks") for path in (root / kind).iterdir() if path.is_dir()})
    for split in sorted(splits, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name)):
        images, annotations = (_by_relative_path(root / kind / split) for kind in ("images", "masks"))
        matcher.add(split, images=images, masks=annotations)
    classes = f"{counted(len(names), 'class', 'classes')}, 255 ignored"
    return matcher.data("masks", root, names, LabelTable.identity(len(names)), classes)


def require_root(name: str, root: Path | str) -> Path:
    """The folder of a dataset; raises `VssError` for a name that does not exist, and for what is no folder."""
    root = Path(root)
    if name != AUTO:
        DATASETS.canonical(name)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        which = "images and masks" if name == AUTO else f"the {name!r} data"
        raise VssError(f"data root {root} {what}; give the folder that holds {which}.")
    return root


def layout_of(root: Path) -> str:
    """The layout that a folder has. Raises `VssError` for one of no known layout, or of two."""
    name = guess_layout(root)
    if name is None:
        raise VssError(
            f"the layout of {root} is not known; name the dataset, or give the folder that holds the splits. Your own "
            f"data goes like this: {DRAWINGS['masks']}. `vss data layouts` draws the others."
        )
    return name


def as_found(name: str, root: Path | str, options: DataOptions) -> SegData:
    """The dataset in the splits that its reader finds, `vss.data.split.ALL` where there are none; see `open_root`."""
    root = require_root(name, root)
    name = layout_of(root) if name == AUTO else name
    reader = DATASETS[name]
    try:
        data = reader(root, options) if len(inspect.signature(reader).parameters) > 1 else reader(root)
        return with_classes(data, options)
    except OSError as error:
        raise VssError(f"{error.filename or root} cannot be listed ({error.strerror or error}).") from error


def open_root(name: str, root: Path | str, options: DataOptions | None = None) -> SegData:
    """The dataset as its reader finds it, with the classes and splits of the options, orphans included.

    Raises `VssError` for a wrong name or folder, and for options that do not fit.
    """
    options = options or DataOptions()
    data = with_splits(as_found(name, root, options), options)
    names = {"classes": list(data.class_names)} if options.classes else {}
    return dataclasses.replace(data, kept={**options.given(), **data.kept, **names})


def _header_problem(pair: Pair) -> BadSampleError | None:
    try:
        check_sizes(pair, image=read_header(pair.image), mask=read_header(pair.mask, mask=True))
    except BadSampleError as error:
        return error
    return None


def open_data(name: str, root: Path | str, options: DataOptions | None = None) -> SegData:
    """Open a dataset for use: every image has a mask of its size, no split is empty. Raises `VssError` otherwise.

    Reads the headers of all files, not their pixels; label values are checked when a mask is read, and all at once by
    `vss.data.check`.
    """
    data = open_root(name, root, options)
    if data.orphans.images_without_mask:
        first, count = data.orphans.images_without_mask[0], len(data.orphans.images_without_mask)
        raise VssError(
            f"image {first} has no mask ({counted(count, 'such image')} in {data.root}); expected one "
            "mask per image with the same name: add the masks or move the images away; where no mask means nothing to "
            "mark, give --missing-mask sound (data.missing_mask)."
        )
    if data.orphans.masks_without_image:
        shown = ", ".join(str(path) for path in data.orphans.masks_without_image[:3])
        count = len(data.orphans.masks_without_image)
        log.warning("%s without an image, not used: %s", counted(count, "mask"), shown)
    empty = [split for split, pairs in data.splits.items() if not pairs]
    if empty or not data.splits:
        what = f"split {empty[0]!r}" if empty else "every split"
        loose = "" if data.splits else f" {DRAWINGS.get(data.name, '')}".rstrip()
        raise VssError(f"{what} of {data.root} is empty; expected images with masks ({name} layout): add them.{loose}")
    for problem in thread_map(_header_problem, [pair for pairs in data.splits.values() for pair in pairs]):
        if problem is not None:
            raise problem
    return data
