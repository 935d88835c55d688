"""Layouts of folders as people have them: images and masks by their usual names, VOC, anomaly sets, ADE20K."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vss.core.errors import VssError, counted
from vss.core.sections import DataOptions
from vss.data.base import (
    DEFECT_NAMES,
    DEFECT_PALETTE,
    IGNORE,
    LabelTable,
    Matcher,
    SegData,
    binary_table,
    by_stem,
    generic_palette,
    read_class_names,
    read_lines,
)
from vss.data.classes import colours_of, found_file, given_names, read_colours
from vss.data.images import BadSampleError, Mask, count_values, read_stored_mask, thread_map
from vss.data.layouts import (
    MASK_SUFFIXES,
    SOUND_NAMES,
    SPLITS,
    colour_table,
    find_places,
    folders_in,
    require_layout,
    split_folders,
)
from vss.data.masks import ColourFile, Sound, unpacked
from vss.data.pixels import READ_ERRORS, list_images
from vss.data.split import ALL, in_splits, listed_pairs

BINARY = ("background", "foreground")
COLOUR_MODES = ("RGB", "RGBA", "RGBX")
NAME_FILES = ("classes.txt", "class_names.txt", "labels.txt")
VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""Classes of Pascal VOC by value (Everingham et al., 2010)."""


def keyed(folder: Path, paths: Iterable[Path]) -> dict[str, Path]:
    """{path below the folder, without suffix: file}."""
    return by_stem(paths, lambda path: path.relative_to(folder).with_suffix("").as_posix().removesuffix("_leftImg8bit"))


def matched(images: Path, masks: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and masks of two folders, or of one, by the name of the image; usual suffixes of masks do not count."""
    files = list_images(images, recursive=True)
    if images == masks:
        stems = {path.with_suffix("") for path in files}
        marked = [
            path for path in files
            if any(path.stem.endswith(end) and path.with_name(path.stem.removesuffix(end)) in stems
                   for end in MASK_SUFFIXES)
        ]  # fmt: skip
        lone = set(marked)
        files, found = [path for path in files if path not in lone], marked
    else:
        found = list_images(masks, recursive=True)
    pictures = keyed(images, files)

    def key(path: Path) -> str:
        name = unicodedata.normalize("NFC", path.relative_to(masks).with_suffix("").as_posix())
        names = [name, *(name.removesuffix(end) for end in MASK_SUFFIXES if name.endswith(end))]
        return next((each for each in names if each in pictures), name)

    return pictures, by_stem(found, key)


def in_colours(paths: Sequence[Path], *, table: bool) -> bool:
    """Whether masks are colours, by the first that can be opened; a palette counts as such where there is a `table`."""
    for path in paths:
        try:
            with Image.open(path) as image:
                return image.mode in COLOUR_MODES or (table and image.mode == "P")
        except READ_ERRORS:
            continue  # named when it is read
    return False


def values_of(masks: Sequence[Mask]) -> set[int]:
    """The values that masks store, those that cannot be read left out: they are named when they are read."""

    def of_one(mask: Mask) -> set[int]:
        try:
            return set(count_values([mask])[0][1])
        except BadSampleError:
            return set()

    try:
        return {value for _, counts in count_values(masks) for value in counts}
    except BadSampleError:
        return set().union(*thread_map(of_one, masks))


def names_in(root: Path) -> tuple[str, ...]:
    """The names of classes in a file of the folder, () without one."""
    path = next((root / name for name in NAME_FILES if (root / name).is_file()), None)
    return read_class_names(path) if path else ()


def indices_of(root: Path, options: DataOptions, masks: Sequence[Mask]) -> tuple[tuple[str, ...], LabelTable]:
    """Names and table of index masks: from a file, the options, or, for masks of two values, by looking.

    Masks of 0 and 255 alone are of two classes, 255 the second; else 255 is ignored.
    """
    names = names_in(root) or given_names(options, root)
    numbers = isinstance(options.label_map, dict) and any(isinstance(old, int) for old in options.label_map)
    if not names and numbers:
        return (), LabelTable.of({IGNORE: IGNORE}, expected="the values of data.label_map or 255 (ignored)")
    values = values_of(masks) if len(names) in (0, 2) else set()
    if not names:
        if not values <= {0, 1, 255}:
            some = ", ".join(map(str, sorted(values)[:8])) + (", ..." if len(values) > 8 else "")
            raise VssError(
                f"the masks of {root} hold the values {some}, and nothing says which classes these are; write their "
                "names into classes.txt, one a line, the first for 0, or give --classes A,B,C (data.classes)."
            )
        names = BINARY
    if len(names) == 2 and values <= {0, 255} and 255 in values:
        return names, binary_table()
    return names, LabelTable.identity(len(names))


def lists_in(folder: Path) -> dict[str, Path]:
    """{split: file that lists its images} of a folder."""
    return {split: folder / f"{split}.txt" for split in SPLITS if (folder / f"{split}.txt").is_file()}


def _by_lists(data: SegData, folders: Sequence[Path], options: DataOptions) -> SegData:
    """The splits of lists in one of the folders, unless the options say others."""
    lists = next((found for folder in folders if "train" in (found := lists_in(folder))), {})
    if options.split or not lists:
        return data
    pairs = data.splits[ALL]
    return in_splits(data, {split: listed_pairs(pairs, path) for split, path in lists.items()})


def flat(root: Path, options: DataOptions) -> SegData:
    """Images and masks in folders by their usual names, of indices or colours, with or without splits."""
    places = find_places(root)
    if not places:
        require_layout(root, "flat")
    matcher, found = Matcher(sound=options.missing_mask == "sound"), []
    file = colour_table(root)
    for place in places:
        images, masks = matched(place.images, place.masks)
        found.append((place.split or ALL, images, masks))
    paths = [path for _, _, masks in found for path in masks.values()]
    coloured = bool(options.colors) or in_colours(paths, table=bool(file))
    for split, images, masks in found:
        table: dict[str, Mask] = {key: ColourFile(path) if coloured else path for key, path in masks.items()}
        matcher.add(split, images=images, masks=table)
    return _by_lists(_assembled("flat", root, options, matcher, coloured), [root, root / "splits"], options)


def _held(matcher: Matcher) -> str:
    """The colours of the first mask of a pair, for a sentence. Raises `BadSampleError` for one that holds none."""
    masks = [pair.mask for pairs in matcher.splits.values() for pair in pairs if not isinstance(pair.mask, Sound)]
    if not masks:
        return ""
    held = [unpacked(value) for value in np.unique(read_stored_mask(masks[0])).tolist()]
    return f" ({masks[0]} holds {'; '.join(held[:6])}{' and more' if held[6:] else ''})"


def _assembled(name: str, root: Path, options: DataOptions, matcher: Matcher, coloured: bool) -> SegData:
    """The data set of matched files, of colours or indices."""
    name = "colours" if coloured and name == "flat" else name
    if coloured:
        given = options.colors or colour_table(root)
        if not given:
            raise VssError(
                f"the masks of {root} are in colours{_held(matcher)}, and nothing says which classes these are; write "
                "label_colors.txt (R G B NAME, one a line) into it, or give --colors FILE (data.colors)."
            )
        if isinstance(given, str):
            given = found_file(given, root, "data.colors")
        table = given if isinstance(given, dict) else read_colours(given)
        names, palette, decode = colours_of(table, options.label_map if isinstance(options.label_map, dict) else ())
        kept = {"colors": {name: list(colour) for name, colour in table.items()}}
        said = f"{counted(len(names), 'class', 'classes')} by colour"
        return matcher.data(name, root, names, decode, said, palette=palette, numbered=False, kept=kept)
    masks = [pair.mask for pairs in matcher.splits.values() for pair in pairs]
    names, indices = indices_of(root, options, [mask for mask in masks if not isinstance(mask, Sound)])
    what = "255 ignored" if indices.pairs[IGNORE] == IGNORE else f"0 is {names[0]} and 255 {names[1]}"
    return matcher.data(name, root, names, indices, f"{counted(len(names), 'class', 'classes')}, {what}")


def voc(root: Path, options: DataOptions) -> SegData:
    """Pascal VOC: palette masks in `SegmentationClass`, lists in `ImageSets/Segmentation`.

    Images without a mask are no fault (VOC has many) unless a list names them. A split of which no image has a mask,
    as the published test split, is left out. Names: `labelmap.txt`, `classes.txt`, `data.classes`, or those of VOC
    where the folder is called VOC20xx.
    """
    require_layout(root, "voc")
    images, masks = by_stem(list_images(root / "JPEGImages")), by_stem(list_images(root / "SegmentationClass"))
    lists = lists_in(root / "ImageSets/Segmentation")
    lists = {s: path for s, path in lists.items() if s != "test" or {*read_lines(path, "one image a line")} & {*masks}}
    wanted = {line.split()[0] for path in lists.values() for line in read_lines(path, "one image a line") if line}
    sound = options.missing_mask == "sound"
    images = {key: path for key, path in images.items() if key in masks or key in wanted or (sound and not lists)}
    coloured = bool(options.colors) or in_colours(list(masks.values()), table=bool(colour_table(root)))
    matcher = Matcher(sound=sound)
    table: dict[str, Mask] = {key: ColourFile(path) if coloured else path for key, path in masks.items()}
    matcher.add(ALL, images=images, masks=table)
    published = root.resolve().name.upper().startswith("VOC20")
    if published and not options.classes and not options.colors and not names_in(root) and not colour_table(root):
        own = {name: tuple(int(c) for c in colour) for name, colour in zip(VOC, generic_palette(21), strict=True)}
        said = {"colors": own | {"void": (224, 224, 192)}} if coloured else {"classes": VOC}
        options = options.model_copy(update=said)
    data = _assembled("voc", root, options, matcher, coloured)
    return _by_lists(data, [root / "ImageSets/Segmentation"], options)


def ade20k(root: Path, options: DataOptions) -> SegData:
    """ADE20K of scene parsing: 0 is unlabelled, class k is stored as k + 1; names are in `objectInfo150.txt`."""
    require_layout(root, "ade20k")
    names = _object_names(root) or names_in(root) or given_names(options, root)
    if not names:
        raise VssError(f"{root} has no objectInfo150.txt or classes.txt; add one, the first name for value 1, or give "
                       "--classes A,B,C (data.classes).")  # fmt: skip
    matcher = Matcher(sound=options.missing_mask == "sound")
    folders = split_folders(root / "images"), split_folders(root / "annotations")
    for split in [split for split in SPLITS if split in folders[0] and split in folders[1]]:
        images, masks = matched(folders[0][split], folders[1][split])
        matcher.add(split, images=images, masks=masks)
    table = {0: IGNORE, IGNORE: IGNORE} | {index + 1: index for index in range(len(names))}
    decode = LabelTable.of(table, expected=f"0 (ignored) or 1..{len(names)}")
    return matcher.data("ade20k", root, names, decode, f"{len(names)} classes, 0 ignored")


def _object_names(root: Path) -> tuple[str, ...]:
    """The first synonym of every class in `objectInfo150.txt` (tabs between, a head, the names last)."""
    path = root / "objectInfo150.txt"
    if not path.is_file():
        return ()
    full = [line.split("\t")[-1].strip() for line in read_lines(path, "one class a line")[1:] if line]
    first = [name.partition(",")[0] for name in full]
    return tuple(first if len(set(first)) == len(first) else full)


def anomaly(root: Path, options: DataOptions) -> SegData:
    """Anomaly sets as MVTec AD: `SPLIT/good`, `SPLIT/KIND`, and `ground_truth/KIND/NAME_mask.png`.

    The published ones train on sound images alone: to teach a network what a defect is, share the images out anew with
    `data.split`. Ids are KIND/NAME.
    """
    require_layout(root, "anomaly")
    matcher = Matcher()
    for split, folder in split_folders(root).items():
        images: dict[str, Path] = {}
        masks: dict[str, Mask] = {}
        for kind, path in folders_in(folder).items():
            truth = next((p for p in (root / "ground_truth" / split / path.name, root / "ground_truth" / path.name)
                          if p.is_dir()), root / "ground_truth" / path.name)  # fmt: skip
            pictures, regions = matched(path, truth)
            if kind in SOUND_NAMES or options.missing_mask == "sound":
                regions = {key: mask for key, mask in regions.items() if key in pictures}
                masks |= {f"{path.name}/{key}": Sound(image) for key, image in pictures.items()}
            images |= {f"{path.name}/{key}": image for key, image in pictures.items()}
            masks |= {f"{path.name}/{key}": mask for key, mask in regions.items() if key in pictures}
        matcher.add(split, images=images, masks=masks)
    return matcher.data("anomaly", root, DEFECT_NAMES, binary_table(), "background and defect", palette=DEFECT_PALETTE)
