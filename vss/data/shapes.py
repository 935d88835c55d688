"""Layouts whose masks are drawn: COCO (instances and panoptic) and labelme."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vss.core.errors import VssError, counted, need, shown
from vss.core.files import parse_json, read_text
from vss.core.sections import DataOptions
from vss.data.base import (
    IGNORE,
    LabelTable,
    Matcher,
    SegData,
    folded,
)
from vss.data.folders import names_in
from vss.data.images import Mask
from vss.data.layouts import SPLIT_NAMES, coco_files, labelme_files, require_layout
from vss.data.masks import CROWD, Drawn, PanopticFile, Shape, runs_of
from vss.data.pixels import list_images
from vss.data.split import ALL

BACKGROUND = "background"
MAX_ANNOTATIONS = 2 << 30  # bytes of a JSON file; instances_train2017.json of COCO has 448 MB
OUTSIDE = 2.0
"""Pixels that a point may lie outside its image: exports round, and some count from 1."""
LABELME_SHAPES = ("polygon", "rectangle", "circle", "mask")
LABELME_IGNORED, LABELME_BACKGROUND = "__ignore__", "_background_"


def coco(root: Path, options: DataOptions) -> SegData:
    """COCO: categories in order of their ids behind `background`, which is what no annotation covers.

    Where annotations overlap the smaller is on top; those of `iscrowd` are ignored. An image that a file lists and that
    has no annotation is background throughout; an image on disk that no file lists is not used.
    """
    require_layout(root, "coco")
    files = [CocoFile.read(path) for path in coco_files(root)]
    by_split: dict[str, list[CocoFile]] = defaultdict(list)
    for file in files:
        by_split[split_of(file.path, root)].append(file)
    if len(by_split) > 1 and ALL in by_split:
        path = by_split[ALL][0].path
        raise VssError(f"{path} names no split, and other files of {root} do; put train, val or test into its name, or "
                       "move it away.")  # fmt: skip
    names = _one_list(files)
    matcher = Matcher()
    for split in [name for name in (*dict.fromkeys(SPLIT_NAMES.values()), ALL) if name in by_split]:
        images: dict[str, Path] = {}
        masks: dict[str, Mask] = {}
        for file in by_split[split]:
            file.add(root, images, masks)
        matcher.add(split, images=images, masks=masks)
    data = _drawn("coco", root, (BACKGROUND, *names), matcher)
    used = {pair.image for pairs in data.splits.values() for pair in pairs}
    folders = sorted({path.parent for path in used})
    unlisted = tuple(path for folder in folders for path in list_images(folder) if path not in used)
    return dataclasses.replace(data, orphans=dataclasses.replace(data.orphans, unlisted=unlisted))


def split_of(path: Path, root: Path) -> str:
    """The split in the name of a file, or in that of its folder, `ALL` without one."""
    for name in (path.stem, *(part for part in reversed(path.relative_to(root).parts[:-1]))):
        for word in re.split(r"[^a-z]+", name.casefold()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return ALL


def _one_list(files: Sequence[CocoFile]) -> list[str]:
    """The names of the categories, which all files must agree on."""
    first = files[0]
    for other in files[1:]:
        if other.categories != first.categories:
            raise VssError(
                f"{first.path} and {other.path} list other categories ({shown(list(first.categories.values()))}, "
                f"{shown(list(other.categories.values()))}); write the same list into both."
            )
    return [first.categories[key] for key in sorted(first.categories) if folded(first.categories[key]) != BACKGROUND]


def _drawn(name: str, root: Path, names: tuple[str, ...], matcher: Matcher) -> SegData:
    if len(names) >= CROWD:
        raise VssError(f"{root} has {len(names)} classes; expected at most {CROWD - 1}.")
    expected = f"0..{len(names) - 1} or {CROWD} (ignored)"
    decode = LabelTable.of({i: i for i in range(len(names))} | {CROWD: IGNORE}, expected=expected)
    return matcher.data(name, root, names, decode, counted(len(names), "class", "classes"), numbered=False)


@dataclass
class CocoFile:
    """A file of COCO. `categories`: id -> name. `annotations`: image id -> its annotations, as the file has them."""

    path: Path
    images: list[dict[str, Any]]
    categories: dict[int, str]
    annotations: dict[Any, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def read(cls, path: Path) -> CocoFile:
        """Raises `VssError` for a file of another structure, and for what it refers to and does not hold."""
        content = json_of(path, "COCO")
        try:
            categories = {int(each["id"]): str(each["name"]) for each in content["categories"]}
            file = cls(path, list(content["images"]), categories)
            known = {each["id"] for each in file.images}
            for kind, listed, ids in (
                ("images", file.images, known),
                ("categories", content["categories"], categories),
            ):
                if len(ids) < len(listed):
                    raise VssError(f"{path} lists {len(listed)} {kind} of {len(ids)} different ids; give each an id of "
                                   "its own.")  # fmt: skip
            for each in content["annotations"]:
                if each["image_id"] not in known:
                    raise VssError(f"an annotation in {path} is of image {each['image_id']}, which the file does not "
                                   "list; export it again.")  # fmt: skip
                file.annotations[each["image_id"]].append(each)
        except VssError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise VssError(f"{path} is no COCO file ({type(error).__name__} {error}); export it again.") from error
        names = [folded(name) for name in categories.values()]
        if len(set(names)) < len(names) or not names:
            raise VssError(f"{path} lists {len(names)} categories, {len(set(names))} of different names; expected one "
                           "or more, each name once.")  # fmt: skip
        return file

    def add(self, root: Path, images: dict[str, Path], masks: dict[str, Mask]) -> None:
        """Put every image that the file lists, and its mask, into the tables."""
        named = [key for key in sorted(self.categories) if folded(self.categories[key]) != BACKGROUND]
        values = dict.fromkeys(self.categories, 0) | {key: value for value, key in enumerate(named, start=1)}
        places = _places(root, self.path)
        folders = {folder: {path.name: path for path in list_images(folder)} for folder in places}
        panoptic = any("segments_info" in each for found in self.annotations.values() for each in found)
        if not panoptic:
            need("pycocotools.mask", "reading COCO files")  # at once, and not when the first mask is drawn
        for image in self.images:
            try:
                name, width, height = str(image["file_name"]), int(image["width"]), int(image["height"])
                found = self.annotations.get(image["id"], [])
                path = self._image(name, folders)
                key = PurePosixPath(name).with_suffix("").as_posix()
                if key in images:
                    raise VssError(f"{self.path} lists the image {name} twice; list it once.")
                images[key] = path
                if panoptic:
                    if len(found) != 1:
                        raise VssError(f"{self.path} has {counted(len(found), 'annotation')} of the image {name}; a "
                                       "panoptic file has one of each.")  # fmt: skip
                    masks[key] = self._panoptic(found[0], values)
                else:
                    masks[key] = Drawn(self.path, name, height, width, self._shapes(found, values, name, width, height))
            except VssError:
                raise
            except (KeyError, TypeError, ValueError) as error:
                raise VssError(
                    f"{self.path} describes the image {shown(image)} wrongly ({type(error).__name__} {error}); export "
                    "the file again."
                ) from error

    def _image(self, name: str, folders: Mapping[Path, Mapping[str, Path]]) -> Path:
        path = PurePosixPath(name)
        for folder, files in folders.items():
            if path.name in files and (len(path.parts) == 1 or (folder / name).is_file()):
                return files[path.name]
            if len(path.parts) > 1 and (folder / name).is_file():
                return folder / name
        places = ", ".join(folder.name or str(folder) for folder in list(folders)[:4])
        raise VssError(f"{self.path} lists the image {name}, which is not there (looked in {places}); put it there, or "
                       "take it out of the file.")  # fmt: skip

    def _category(self, each: Mapping[str, Any], values: Mapping[int, int], name: str) -> int:
        if each["category_id"] not in values:
            raise VssError(f"an annotation of {name} in {self.path} is of category {each['category_id']}, which the "
                           f"file does not list ({shown(list(self.categories.items())[:6])}); add it.")  # fmt: skip
        return CROWD if each.get("iscrowd") else values[each["category_id"]]

    def _panoptic(self, each: Mapping[str, Any], values: Mapping[int, int]) -> PanopticFile:
        name = str(each["file_name"])
        folders = (self.path.with_suffix(""), self.path.parent.parent / self.path.stem, self.path.parent)
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            raise VssError(f"{self.path} lists the mask {name}, which is not in {folders[0]}; put it there.")
        segments = {int(s["id"]): self._category(s, values, name) for s in each["segments_info"]}
        if len(segments) < len(each["segments_info"]):
            raise VssError(f"{self.path} lists a segment of the mask {name} twice; export the file again.")
        return PanopticFile(path, segments)

    def _shapes(
        self, found: list[dict[str, Any]], values: Mapping[int, int], name: str, width: int, height: int
    ) -> tuple[Shape, ...]:
        """Larger annotations first, crowds before all."""
        shapes = []
        for each in found:
            value, outline = self._category(each, values, name), each.get("segmentation")
            what = f"annotation {shown(each.get('id'))} of {name} in {self.path}"
            if not outline:
                raise VssError(f"{what} has no segmentation (a box alone teaches no pixels); export polygons or masks.")
            read = _runs if isinstance(outline, dict) else _polygons
            shape, area = read(value, outline, width, height, what)
            shapes.append((bool(each.get("iscrowd")), float(each.get("area") or area), shape))
        return tuple(shape for _, _, shape in sorted(shapes, key=lambda one: (not one[0], -one[1])))


def _runs(value: int, outline: Mapping[str, Any], width: int, height: int, what: str) -> tuple[Shape, float]:
    """The shape of run lengths, and its pixels."""
    if list(outline["size"]) != [height, width]:
        raise VssError(f"the run lengths of {what} are of {shown(outline['size'])} pixels, its image of "
                       f"{[height, width]} (height, width); export both again.")  # fmt: skip
    try:
        runs = runs_of(outline["counts"])
    except ValueError as error:
        raise VssError(f"the run lengths of {what} cannot be read ({error}); export the file again.") from error
    total = height * width
    wrong = runs[(runs < 0) | (runs > total)]
    if len(wrong) or runs.sum() != total:
        said = f"hold a run of {wrong[0]}" if len(wrong) else f"add up to {runs.sum()}"
        raise VssError(f"the run lengths of {what} {said} pixels, its image has {total}; export the file again.")
    return Shape(value, "rle", outline), float(runs[1::2].sum())


def _polygons(value: int, outline: Any, width: int, height: int, what: str) -> tuple[Shape, float]:
    """The shape of polygons, and the area that they enclose."""
    polygons, area = [np.asarray(polygon, np.float64) for polygon in outline], 0.0
    for polygon in polygons:
        if polygon.size % 2:
            raise VssError(f"a polygon of {what} is {shown(polygon.tolist())}; expected x,y,x,y and so on.")
        points = polygon.reshape(-1, 2)
        refuse_outside(points, width, height, f"a polygon of {what}")
        if len(points) < 3:
            raise VssError(f"a polygon of {what} has {counted(len(points), 'point')}; expected 3 or more.")
        x, y = points.T
        area += abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
    return Shape(value, "polygons", polygons), area


def refuse_outside(points: np.ndarray, width: int, height: int, what: str) -> None:
    """Refuse points that lie more than `OUTSIDE` pixels outside an image."""
    x, y = points.T
    far = points[(x < -OUTSIDE) | (y < -OUTSIDE) | (x > width + OUTSIDE) | (y > height + OUTSIDE)]
    if len(far):
        raise VssError(
            f"{what} reaches the point {far[0][0]:g},{far[0][1]:g}, outside its image of {width}x{height} (width x "
            "height); correct the polygon, or the size that the file gives."
        )


def _places(root: Path, path: Path) -> list[Path]:
    """Where the images of a COCO file may lie: beside it, in folders called like its splits, in any of images."""
    words = [word for word in re.split(r"[^a-z0-9]+", path.stem.casefold()) if word not in ("instances", "panoptic")]
    tops = [folder for folder in sorted(root.rglob("*")) if folder.is_dir() and not folder.name.startswith(".")]
    named = [folder for folder in tops if folder.name.casefold() in words]
    return list(dict.fromkeys([path.parent, *named, root / "images", root, *tops]))


def json_of(path: Path, kind: str) -> Any:
    """The content of a JSON file. Raises `VssError` for one that is none."""
    text = read_text(path, kind=kind, limit=MAX_ANNOTATIONS)
    return parse_json(text, source=str(path), kind=kind)


def labelme(root: Path, options: DataOptions) -> SegData:
    """labelme: one JSON file an image, beside it or in a folder of its own; later shapes lie over earlier ones.

    Classes are those of `labels.txt` or `classes.txt`, else `background` and the labels in order of their names;
    `__ignore__` is ignored. An image without a file is judged by `data.missing_mask`.
    """
    require_layout(root, "labelme")
    files = list(labelme_files(root))
    contents = {path: _labelme_content(path) for path in files}
    labels = {label for shapes, _, _ in contents.values() for label, _, _ in shapes}
    names = _labelme_names(root, labels - {LABELME_IGNORED})
    values = {folded(name): index for index, name in enumerate(names)} | {LABELME_IGNORED: CROWD}
    images = {path: path.relative_to(root).with_suffix("").as_posix() for path in list_images(root, recursive=True)}
    matcher = Matcher(sound=options.missing_mask == "sound")
    by_split: dict[str, tuple[dict[str, Path], dict[str, Mask]]] = defaultdict(lambda: ({}, {}))
    for image, key in images.items():
        by_split[split_of(image, root)][0][key] = image
    stems: dict[str, list[str]] = defaultdict(list)
    for key in images.values():
        stems[PurePosixPath(key).name].append(key)
    for path, (shapes, width, height) in contents.items():
        own = path.relative_to(root).with_suffix("").as_posix()
        keys = [own] if own in images.values() else stems.get(path.stem, [own])
        if len(keys) > 1:
            raise VssError(f"{path} may be of {shown(keys[:3])}; put it beside its image.")
        drawn = tuple(Shape(values[folded(label)], kind, data) for label, kind, data in shapes)
        split = split_of(root / f"{keys[0]}.json", root)
        by_split[split][1][keys[0]] = Drawn(path, keys[0], height, width, drawn)
    for split in [name for name in (*dict.fromkeys(SPLIT_NAMES.values()), ALL) if name in by_split]:
        matcher.add(split, images=by_split[split][0], masks=by_split[split][1])
    return _drawn("labelme", root, names, matcher)


def _labelme_names(root: Path, labels: set[str]) -> tuple[str, ...]:
    given = [name for name in names_in(root) if name != LABELME_IGNORED]
    if given:
        given = [BACKGROUND if name == LABELME_BACKGROUND else name for name in given]
        names = given if folded(given[0]) == BACKGROUND else [BACKGROUND, *given]
    else:
        names = [BACKGROUND, *sorted(labels - {BACKGROUND, LABELME_BACKGROUND})]
    missing = sorted(labels - {LABELME_BACKGROUND} - {*names})
    if missing := [name for name in missing if folded(name) not in map(folded, names)]:
        raise VssError(f"the shapes of {root} have the label {shown(missing[0])}, which its list of classes does not "
                       f"name ({shown(names[:6])}); add it.")  # fmt: skip
    return tuple(names)


def _labelme_content(path: Path) -> tuple[list[tuple[str, str, Any]], int, int]:
    """(label, kind, data) of every shape, and width and height of the image."""
    content = json_of(path, "labelme")
    try:
        width, height = int(content["imageWidth"]), int(content["imageHeight"])
        return list(_labelme_shapes(path, content["shapes"], width, height)), width, height
    except VssError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise VssError(f"{path} is no labelme file ({type(error).__name__} {error}); save it again.") from error


def _labelme_shapes(
    path: Path, shapes: list[dict[str, object]], width: int, height: int
) -> Iterator[tuple[str, str, Any]]:
    for shape in shapes:
        kind, label = str(shape.get("shape_type") or "polygon"), str(shape["label"])
        if kind not in LABELME_SHAPES:
            raise VssError(f"{path} holds a {kind} ({shown(label)}), which covers no area; expected "
                           f"{', '.join(LABELME_SHAPES)}: draw it as one of these or delete it.")  # fmt: skip
        points = np.asarray(shape["points"], np.float64).reshape(-1, 2)
        if kind != "circle":
            refuse_outside(points, width, height, f"a {kind} in {path}")
        label = BACKGROUND if label == LABELME_BACKGROUND else label
        yield label, kind, [*points.tolist(), *([str(shape["mask"])] if kind == "mask" else [])]
