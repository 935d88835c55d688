"""Masks that are no files of class indices: colours, panoptic segments, polygons, and images without a mask.

Each is a `MaskSource`: what it stores is integers like those of an index mask, and one table decodes them.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from vss.core.errors import need, shown
from vss.data import pixels
from vss.data.images import LOSSY, BadSampleError, MaskSource, open_rgb, read_header
from vss.data.pixels import READ_ERRORS

CROWD = 255
"""What is stored where COCO says "crowd", or a labelme shape is called `__ignore__`: ignored."""


def packed(colour: tuple[int, int, int]) -> int:
    """One integer for a colour, as `ColourFile` stores it."""
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def unpacked(value: int) -> str:
    """A packed colour as R,G,B."""
    return f"{value >> 16},{value >> 8 & 255},{value & 255}"


def _colours(path: Path) -> np.ndarray:
    """(H, W, 3) int32, upright. Raises `BadSampleError` for lossy files and for grey ones, which hold no colours."""
    read_header(path)  # refuses what cannot be read
    with Image.open(path) as image:
        if image.format in LOSSY:
            raise BadSampleError(
                f"mask {path} is a {image.format} file, which does not keep colours as they were; export the mask "
                "again as PNG from its source."
            )
        if image.mode in ("1", "L", "LA"):
            raise BadSampleError(
                f"mask {path} is grey (mode {image.mode!r}), and masks of colours were expected; save all masks in "
                "one form, or leave the table of colours off (--dataset flat without data.colors)."
            )
    return np.asarray(open_rgb(path), np.int32)


@dataclass(frozen=True)
class _OneFile(MaskSource):
    """A mask of the size of an image file."""

    file: Path

    def __str__(self) -> str:
        return str(self.file)

    def size(self) -> tuple[int, int]:
        return read_header(self.file)


@dataclass(frozen=True)
class ColourFile(_OneFile):
    """A mask of colours. Stored values are `packed`."""

    def stored(self) -> np.ndarray:
        rgb = _colours(self.file)
        return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


@dataclass(frozen=True)
class PanopticFile(ColourFile):
    """A PNG of COCO panoptic: the number of a segment is R + 256 G + 256^2 B; 0 is no segment."""

    segments: Mapping[int, int]  # number -> stored value

    def stored(self) -> np.ndarray:
        rgb = _colours(self.file)
        numbers, inverse = np.unique(rgb[..., 0] | rgb[..., 1] << 8 | rgb[..., 2] << 16, return_inverse=True)
        table = {0: CROWD, **self.segments}
        missing = [int(number) for number in numbers if int(number) not in table]
        if missing:
            raise BadSampleError(
                f"mask {self.file} holds segment {missing[0]} ({len(missing)} such), which its JSON file does not "
                "list; export both again."
            )
        values = np.array([table[int(number)] for number in numbers], np.uint8)
        return values[inverse].reshape(rgb.shape[:2])

    def about(self) -> object:
        return sorted(self.segments.items())


@dataclass(frozen=True)
class Sound(_OneFile):
    """The mask of an image that has none and needs none: 0 throughout."""

    def __str__(self) -> str:
        return f"(none) of {self.file}"

    def stored(self) -> np.ndarray:
        image = open_rgb(self.file)
        return np.zeros((image.height, image.width), np.uint8)


class Shape(NamedTuple):
    """One region. `kind`: polygons (arrays of flat x, y), rle (COCO) or a shape of labelme, as files have them."""

    value: int
    kind: str
    data: Any

    def plain(self) -> Shape:
        """The same, JSON-able."""
        return self._replace(data=[each.tolist() for each in self.data]) if self.kind == "polygons" else self


@dataclass(frozen=True)
class Drawn(MaskSource):
    """A mask drawn from shapes, later ones over earlier ones; 0 where there is none."""

    path: Path
    image: str
    height: int
    width: int
    shapes: tuple[Shape, ...]
    file: None = field(default=None, init=False)

    def __str__(self) -> str:
        return f"{self.path} ({self.image})"

    def stored(self) -> np.ndarray:
        values = np.zeros((self.height, self.width), np.uint8, order="F")  # as pycocotools orders pixels
        for shape in self.shapes:
            region, top, left = self._region(shape)
            part = values[top : top + region.shape[0], left : left + region.shape[1]]
            np.copyto(part, np.uint8(shape.value), where=region)
        return np.ascontiguousarray(values)

    def _region(self, shape: Shape) -> tuple[np.ndarray, int, int]:
        """((h, w) bool, row, column): the part of the mask from that row and column on."""
        try:
            if shape.kind == "polygons":
                return polygon_region(shape.data, self.height, self.width)
            if shape.kind == "rle":
                return run_region(shape.data, self.height, self.width), 0, 0
            return labelme_region(shape, self.height, self.width), 0, 0
        except (ValueError, TypeError, IndexError, KeyError, *READ_ERRORS, binascii.Error) as error:
            raise BadSampleError(
                f"{self} holds a {shape.kind} that cannot be drawn ({shown(str(error))}); export the file again."
            ) from error

    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def about(self) -> object:
        return [self.height, self.width, [list(shape.plain()) for shape in self.shapes]]


POLYGON_GRID = 5
"""pycocotools rounds points to fifths of a pixel (`rleFrPoly` in maskApi.c)."""


def polygon_region(polygons: Sequence[np.ndarray], height: int, width: int) -> tuple[np.ndarray, int, int]:
    """((h, w) bool, row, column): the pixels of flat (x, y, ...) polygons together, by pycocotools.

    They are drawn on a canvas of their own size, where an image of many small ones costs a tenth of the time. Rounding
    before the move gives the points that the whole image would.
    """
    tools = need("pycocotools.mask", "reading COCO files")
    corners = [np.trunc(POLYGON_GRID * flat.reshape(-1, 2) + 0.5) / POLYGON_GRID for flat in polygons]
    every = np.concatenate(corners)
    low = np.floor(every.min(0))
    w, h = (np.ceil(every.max(0)) + 1 - low).astype(int).tolist()
    code = tools.merge(tools.frPyObjects([(points - low).ravel() for points in corners], h, w))
    left, top = low.astype(int).tolist()
    x, y = max(0, -left), max(0, -top)
    return tools.decode(code).view(bool)[y : height - top, x : width - left], top + y, left + x


def run_region(runs: Mapping[str, object], height: int, width: int) -> np.ndarray:
    """(H, W) bool of run lengths as COCO has them, compressed or not, by pycocotools.

    They must add up to the image (`runs_of`): of pixels beyond their end pycocotools gives what the memory held.
    """
    tools = need("pycocotools.mask", "reading COCO files")
    region = tools.decode(tools.frPyObjects(runs, height, width) if isinstance(runs["counts"], list) else runs)
    return np.asarray(region.view(bool))


def runs_of(counts: object) -> np.ndarray:
    """(n,) int64: pixels outside and inside by turns, of a list of COCO or its text (`rleFrString` in maskApi.c).

    Raises `ValueError` for what is neither.
    """
    if isinstance(counts, list) and set(map(type, counts)) == {int}:
        return np.array(counts, np.int64)
    if not isinstance(counts, str):
        raise ValueError("they are neither a list of whole numbers nor a text")
    digits = np.frombuffer(counts.encode("ascii", "replace"), np.uint8).astype(np.int64) - 48
    last = (digits & 32) == 0
    first = np.flatnonzero(np.append(True, last[:-1]))
    shift = 5 * (np.arange(len(digits)) - np.repeat(first, np.diff(first, append=len(digits))))
    if not digits.size or digits.min() < 0 or digits.max() > 63 or not last[-1] or shift.max() > 30:
        raise ValueError("their text is damaged")
    runs = np.add.reduceat((digits & 31) << shift, first) - ((digits[last] & 16) << shift[last] + 1)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])  # differences to the last but one
    return runs


def labelme_region(shape: Shape, height: int, width: int) -> np.ndarray:
    """(H, W) bool of a shape of labelme, with its outline, as labelme's own `shape_to_mask` draws it."""
    region = Image.new("1", (width, height))
    draw = ImageDraw.Draw(region)
    if shape.kind == "mask":
        (left, top), (right, bottom), text = shape.data
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as part:
            pixels.refuse_frames(part)
            box = round(right) - round(left) + 1, round(bottom) - round(top) + 1
            if part.size != box:
                raise ValueError(f"its picture is of {part.size} pixels and its box of {box}, width and height")
            region.paste(1, (round(left), round(top)), part.convert("1", dither=Image.Dither.NONE))
        return np.array(region)
    points = [(float(x), float(y)) for x, y in shape.data]
    if shape.kind == "polygon":
        if len(points) < 3:
            raise ValueError(f"{len(points)} points; expected 3 or more")
        draw.polygon(points, outline=1, fill=1)
    elif shape.kind == "rectangle":
        (ax, ay), (bx, by) = points
        draw.rectangle([min(ax, bx), min(ay, by), max(ax, bx), max(ay, by)], outline=1, fill=1)
    else:
        (x, y), edge = points
        radius = float(np.hypot(edge[0] - x, edge[1] - y))
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=1, fill=1)
    return np.array(region)
