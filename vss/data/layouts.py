"""Which layout a folder has, told from the names in it, and a drawing of each."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vss.core.errors import VssError, listed
from vss.data.pixels import holds_images, list_images

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
"""What folders of splits are called -> the split."""

IMAGE_NAMES = frozenset({"images", "image", "imgs", "img", "inputs", "frames", "rgb", "raw", "701_stillsraw_full"})
MASK_NAMES = frozenset({
    "masks", "mask", "labels", "label", "annotations", "annotation", "annots", "annot", "gt", "gts", "ground_truth",
    "groundtruth", "targets", "labeledapproved_full",
})  # fmt: skip
MASK_SUFFIXES = ("_mask", "-mask", "_masks", "_GT", "_gt", "_L", "_labelIds", "_label", "_labels", "_seg", "_annot")
COLOUR_TABLES = (
    "label_colors.txt", "label_colours.txt", "labelmap.txt", "class_dict.csv", "classes.csv", "label_colors.csv",
)  # fmt: skip
"""Files with one class and its colour a line, where folders keep one."""

SOUND_NAMES = ("good", "ok", "normal", "sound")
COCO_KEYS = (b'"images"', b'"annotations"', b'"categories"')
LABELME_KEYS = (b'"shapes"', b'"imagePath"')


@dataclass(frozen=True)
class Place:
    """Where images and masks of a split lie; None: the folder has no splits."""

    split: str | None
    images: Path
    masks: Path


def folders_in(root: Path) -> dict[str, Path]:
    """{name in lower case: folder} of the visible folders in another."""
    if not root.is_dir():
        return {}
    return {p.name.casefold(): p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")}


def split_folders(root: Path) -> dict[str, Path]:
    """{split: folder} of the folders in `root` that are called like one."""
    found: dict[str, Path] = {}
    for name, path in folders_in(root).items():
        if name in SPLIT_NAMES:
            if SPLIT_NAMES[name] in found:
                raise VssError(f"{found[SPLIT_NAMES[name]]} and {path.name} are both a split {SPLIT_NAMES[name]!r}; "
                               "keep one of the two folders.")  # fmt: skip
            found[SPLIT_NAMES[name]] = path
    return {split: found[split] for split in SPLITS if split in found}


def _beside(root: Path) -> list[Place]:
    """A folder of images and one of masks, each with or without the splits inside; [] where there is no such pair."""
    inside = folders_in(root)
    images = [path for name, path in inside.items() if name in IMAGE_NAMES and holds_images(path)]
    masks = [path for name, path in inside.items() if name in MASK_NAMES and holds_images(path)]
    if not images or not masks:
        return []
    for kind, found in (("images", images), ("masks", masks)):
        if len(found) > 1:
            said = listed([path.name for path in found])
            raise VssError(f"{kind} of {root} may lie in {said}; rename or move all but one of these folders.")
    parts = split_folders(images[0]), split_folders(masks[0])
    if not all(parts):
        return [Place(None, images[0], masks[0])]
    names = [split for split in SPLITS if split in parts[0] or split in parts[1]]
    return [Place(s, parts[0].get(s, images[0] / s), parts[1].get(s, masks[0] / s)) for s in names]


def _in_one(folder: Path) -> bool:
    """Whether masks lie among their images, told by a suffix of their names."""
    stems = {path.stem for path in list_images(folder)}
    return any(stem.endswith(end) and stem.removesuffix(end) in stems for stem in stems for end in MASK_SUFFIXES)


def find_places(root: Path) -> list[Place]:
    """Where images and masks lie, by the usual names of folders; [] where none fit.

    Raises:
        VssError: two folders that may both hold the images, or the masks.
    """
    if found := _beside(root):
        return found
    splits, inside = split_folders(root), folders_in(root)
    for split, path in splits.items():
        names = [f"{path.name.casefold()}{sep}{name}" for sep in ("_", "-") for name in MASK_NAMES]
        masks = [inside[name] for name in names if name in inside]
        if masks:
            found.append(Place(split, path, masks[0]))
        elif pair := _beside(path):
            found.append(Place(split, pair[0].images, pair[0].masks))
        elif _in_one(path):
            found.append(Place(split, path, path))
    if found:
        return found
    folders = [root, *(path for name, path in inside.items() if name in IMAGE_NAMES)]
    return next(([Place(None, folder, folder)] for folder in folders if _in_one(folder)), [])


def colour_table(root: Path) -> Path | None:
    """The file that says the colours of masks, if the folder has one."""
    return next((root / name for name in COLOUR_TABLES if (root / name).is_file()), None)


def _mentions(path: Path, keys: Iterable[bytes]) -> bool:
    """Whether a file holds all of these texts, without reading it whole."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return all(text.find(key) >= 0 for key in keys)


def coco_files(root: Path) -> list[Path]:
    """The COCO files of a folder: in it, in a folder of annotations, or in folders of splits."""
    inside = folders_in(root)
    places = [root, *(path for name, path in inside.items() if name in MASK_NAMES or name in SPLIT_NAMES)]
    files = [path for place in places for path in sorted(place.glob("*.json"))]
    return [path for path in files if _mentions(path, COCO_KEYS)]


def labelme_files(root: Path) -> Iterator[Path]:
    """The files of labelme in a folder and below it."""
    return (path for path in sorted(root.rglob("*.json")) if _mentions(path, LABELME_KEYS))


def _lacks_folders(*names: str) -> Callable[[Path], str]:
    """A test for folders that must all be there."""

    def lacks(root: Path) -> str:
        return next((f"there is no folder {name}" for name in names if not (root / name).is_dir()), "")

    return lacks


def _lacks_masks(root: Path) -> str:
    if missing := _lacks_folders("images", "masks")(root):
        return missing
    parts = [split_folders(root / kind) for kind in ("images", "masks")]
    if (root / "classes.txt").is_file() and not colour_table(root) and any(folders_in(root / "images")):
        return ""
    if any(parts) or holds_images(root / "images"):
        return "images/SPLIT, masks/SPLIT and classes.txt are not all there"
    return ""


def _lacks_ksdd2(root: Path) -> str:
    found = any(next((root / split).glob("*_GT*.*"), None) is not None for split in SPLITS)
    return "" if found else "no file in train, val or test ends in _GT"


def _lacks_camvid(root: Path) -> str:
    found = any((root / f"{split}annot").is_dir() for split in SPLITS)
    return "" if found else "there is no folder trainannot, valannot or testannot"


STRICTER = ("masks", "camvid", "ksdd2", "ade20k", "voc")


def _lacks_flat(root: Path) -> str:
    places = find_places(root)
    if not places:
        return "there are no two folders of images and masks by their usual names"
    if any(_mentions(path, (b'"segments_info"',)) for place in places for path in place.masks.glob("*.json")):
        return "its masks belong to a panoptic file"
    return next((f"it is {name}" for name in STRICTER if not LAYOUTS[name].lacks(root)), "")


def _lacks_anomaly(root: Path) -> str:
    if not any((root / "train" / name).is_dir() for name in SOUND_NAMES):
        return "there is no folder train/good"
    return "" if (root / "test").is_dir() else "there is no folder test"


@dataclass(frozen=True)
class Layout:
    """One way to lay out a data set.

    `lacks`: "" for a folder that looks like it, else why not. `parts`: what it consists of, for sentences. `place`:
    where the split {0} lies. `drawing`: the tree.
    """

    lacks: Callable[[Path], str]
    parts: str
    place: str
    drawing: str


LAYOUTS: dict[str, Layout] = {
    "cityscapes": Layout(
        _lacks_folders("leftImg8bit"),
        "leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png and gtFine/...",
        "leftImg8bit/{0} and gtFine/{0} with labels",
        "leftImg8bit/{train,val,test}/CITY/NAME_leftImg8bit.png\n"
        "gtFine/{train,val,test}/CITY/NAME_gtFine_labelIds.png (or labelTrainIds)",
    ),
    "masks": Layout(
        _lacks_masks,
        "images/SPLIT/, masks/SPLIT/ and classes.txt",
        "images/{0} and masks/{0}",
        "images/{train,val,test}/NAME.jpg\nmasks/{train,val,test}/NAME.png   values 0..K-1, 255 is ignored\n"
        "classes.txt                        K names, one a line, the first for 0",
    ),
    "camvid": Layout(
        _lacks_camvid,
        "{train,val,test}/NAME.* and {train,val,test}annot/NAME.png",
        "{0} and {0}annot",
        "{train,val,test}/NAME.jpg\n{train,val,test}annot/NAME.png      values 0..10, 11 is ignored",
    ),
    "ksdd2": Layout(
        _lacks_ksdd2,
        "{train,test}/NAME.png and {train,test}/NAME_GT.png",
        "{0}/NAME.png and {0}/NAME_GT.png",
        "{train,test}/NAME.png\n{train,test}/NAME_GT.png           0, and 255 for the defect",
    ),
    "flat": Layout(
        lambda root: _lacks_flat(root) or ("there is a table of colours" if colour_table(root) else ""),
        "a folder of images and one of masks by their usual names, such as images/ and masks/",
        "images/{0} and masks/{0}",
        "images/NAME.jpg     or imgs, frames; images/train/..., train/images/..., or train/ and train_labels/\n"
        "masks/NAME.png      or labels, annotations, gt; NAME_mask, NAME_GT, NAME_L, NAME_labelIds\n"
        "classes.txt         K names, one a line; not needed for masks of 0 and 255\n"
        "train.txt, val.txt, test.txt   may list the names; else splits are made by a hash of them",
    ),
    "colours": Layout(
        lambda root: _lacks_flat(root) or ("" if colour_table(root) else "there is no table of colours"),
        "a folder of images, one of masks in colours, and label_colors.txt, labelmap.txt or class_dict.csv",
        "images/{0} and masks/{0}",
        "images/NAME.jpg     folders and names as for flat; 701_StillsRaw_full and LabeledApproved_full, too\n"
        "masks/NAME.png      R,G,B of the class\n"
        "label_colors.txt    R G B NAME, one a line; or class_dict.csv, classes.csv (name,r,g,b), labelmap.txt",
    ),
    "voc": Layout(
        _lacks_folders("JPEGImages", "SegmentationClass"),
        "JPEGImages, SegmentationClass and ImageSets/Segmentation",
        "ImageSets/Segmentation/{0}.txt",
        "JPEGImages/NAME.jpg\nSegmentationClass/NAME.png                palette, 255 is ignored\n"
        "ImageSets/Segmentation/{train,val,test}.txt   names\nlabelmap.txt or classes.txt    unless it is VOC20xx",
    ),
    "coco": Layout(
        lambda root: "" if coco_files(root) else "there is no JSON file of COCO",
        "a JSON file of COCO (instances or panoptic) and the images that it names",
        "a JSON file with {0} in its name",
        "annotations/instances_{train,val}2017.json    or annotations.json, {train,valid}/_annotations.coco.json,\n"
        "                                              or panoptic_train2017.json with panoptic_train2017/*.png\n"
        "train2017/NAME.jpg, images/NAME.jpg           as the file names them",
    ),
    "labelme": Layout(
        lambda root: "" if next(labelme_files(root), None) else "there is no JSON file of labelme",
        "images with a JSON file of labelme each",
        "{0}/NAME.json",
        "NAME.jpg, NAME.json     or {train,val,test}/NAME.jpg, or images/ and annotations/\n"
        "labels.txt              may give the order of the classes",
    ),
    "anomaly": Layout(
        _lacks_anomaly,
        "train/good, test/KIND and ground_truth/KIND, as MVTec AD has them",
        "{0}/good and {0}/KIND",
        "train/good/NAME.png\ntest/{good,KIND}/NAME.png\nground_truth/KIND/NAME_mask.png   0, and 255 for the defect",
    ),
    "ade20k": Layout(
        _lacks_folders("images/training", "annotations/training"),
        "images/{training,validation}, annotations/{training,validation} and the names of the classes",
        "the same under {0}",
        "images/{training,validation}/NAME.jpg\nannotations/{training,validation}/NAME.png   0 is ignored, 1 is the "
        "first class\nobjectInfo150.txt or classes.txt",
    ),
}  # fmt: skip
"""Layout name -> how it looks; its reader has the same name in `vss.data.readers.DATASETS`."""

DRAWINGS = {name: f"expected {layout.parts}" for name, layout in LAYOUTS.items()} | {
    "masks": "expected images/train/NAME.*, images/val/NAME.*, images/test/NAME.*, the same names as PNG below "
    "masks/train, masks/val and masks/test (8-bit grey or palette, values 0..K-1, 255 is ignored), and classes.txt "
    "with K names, one a line, the first for 0"
}
"""Layout name -> what to put where, for sentences."""


def absent_split(layout: str, split: str, known: Iterable[str]) -> str:
    """Half a sentence about one of `SPLITS` that a data set does not have: what there is, what to add or to change."""
    known = list(known)
    place = LAYOUTS[layout].place.format(split) if layout in LAYOUTS else f"images and masks for {split!r}"
    needs = {"train": f"training needs {place}", "val": f"training (and --split val) needs {place}"}
    other = ", or report on val with --split val (in a recipe, split: val)" if "val" in known else ""
    return f"no split {split!r} (it has {', '.join(known) or 'none'}); " + needs.get(
        split, f"the scores that are reported need {place}{other}"
    )


def fitting(root: Path) -> list[str]:
    """The layouts that a folder looks like."""
    return [name for name, layout in LAYOUTS.items() if root.is_dir() and not layout.lacks(root)]


def guess_layout(root: Path | str) -> str | None:
    """The name of the built-in layout that a folder looks like, or None; two that fit are refused."""
    found = fitting(Path(root))
    if len(found) > 1:
        raise VssError(
            f"{root} fits the layouts {listed(found)}; say which is meant: --dataset {found[0]} (data.dataset)."
        )
    return found[0] if found else None


def others_lack(root: Path, name: str) -> dict[str, str]:
    """{layout: why it is not that of the folder} for all but `name`."""
    return {other: layout.lacks(root) for other, layout in LAYOUTS.items() if other != name}


def require_layout(root: Path, name: str) -> None:
    """Refuse a folder that does not look like the layout `name`; says what it looks like instead."""
    layout = LAYOUTS[name]
    if not layout.lacks(root):
        return
    others = fitting(root)
    inside = [child for child in sorted(root.iterdir()) if child.is_dir() and fitting(child)]
    if others:
        advice = f"it looks like {others[0]!r}: choose that dataset"
    elif inside:
        advice = f"{inside[0]} inside it looks like {fitting(inside[0])[0]!r}: give that folder"
    else:
        advice = f"give the folder that holds these, or one of another layout ({', '.join(LAYOUTS)})"
    raise VssError(f"{root} is not laid out as {name!r} ({layout.parts}); {advice}.")
