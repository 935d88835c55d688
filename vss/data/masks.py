"""Masks that are no files of class indices: colours, panoptic segments, polygons, and images without a mask.

Each is a `MaskSource`: what it stores is integers like those of an index mask, and one table decodes them.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
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
class ColourFile(MaskSource):
    """A mask of colours. Stored values are `packed`."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def stored(self) -> np.ndarray:
        rgb = _colours(self.path)
        return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]

    def size(self) -> tuple[int, int]:
        return read_header(self.path)

    @property
    def file(self) -> Path:
        return self.path

    def about(self) -> Any:
        return None


@dataclass(frozen=True)
class PanopticFile(ColourFile):
    """A PNG of COCO panoptic: the number of a segment is R + 256 G + 256^2 B; 0 is no segment."""

    segments: Mapping[int, int]  # number -> stored value

    def stored(self) -> np.ndarray:
        rgb = _colours(self.path)
        numbers, inverse = np.unique(rgb[..., 0] | rgb[..., 1] << 8 | rgb[..., 2] << 16, return_inverse=True)
        table = {0: CROWD, **self.segments}
        missing = [int(number) for number in numbers if int(number) not in table]
        if missing:
            raise BadSampleError(
                f"mask {self.path} holds segment {missing[0]} ({len(missing)} such), which its JSON file does not "
                "list; export both again."
            )
        values = np.array([table[int(number)] for number in numbers], np.uint8)
        return values[inverse].reshape(rgb.shape[:2])

    def about(self) -> Any:
        return sorted(self.segments.items())


@dataclass(frozen=True)
class Sound(MaskSource):
    """The mask of an image that has none and needs none: 0 throughout."""

    image: Path

    def __str__(self) -> str:
        return f"(none) of {self.image}"

    def stored(self) -> np.ndarray:
        image = open_rgb(self.image)
        return np.zeros((image.height, image.width), np.uint8)

    def size(self) -> tuple[int, int]:
        return read_header(self.image)

    @property
    def file(self) -> Path:
        return self.image

    def about(self) -> Any:
        return None


class Shape(NamedTuple):
    """One region. `kind`: polygons (flat x, y), rle (COCO), or a shape of labelme; `data` as the file has it."""

    value: int
    kind: str
    data: Any


@dataclass(frozen=True)
class Drawn(MaskSource):
    """A mask drawn from shapes, later ones over earlier ones; 0 where there is none."""

    path: Path
    image: str
    height: int
    width: int
    shapes: tuple[Shape, ...]

    def __str__(self) -> str:
        return f"{self.path} ({self.image})"

    def stored(self) -> np.ndarray:
        values = np.zeros((self.height, self.width), np.uint8)
        for shape in self.shapes:
            values[self._region(shape)] = shape.value
        return values

    def _region(self, shape: Shape) -> np.ndarray:
        """(H, W) bool."""
        try:
            if shape.kind in ("polygons", "rle"):
                return coco_region(shape, self.height, self.width)
            return labelme_region(shape, self.height, self.width)
        except (ValueError, TypeError, IndexError, KeyError, *READ_ERRORS, binascii.Error) as error:
            raise BadSampleError(
                f"{self} holds a {shape.kind} that cannot be drawn ({shown(str(error))}); export the file again."
            ) from error

    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def file(self) -> None:
        return None

    def about(self) -> Any:
        return [self.height, self.width, [list(shape) for shape in self.shapes]]


def coco_region(shape: Shape, height: int, width: int) -> np.ndarray:
    """(H, W) bool of polygons or run lengths, by pycocotools."""
    tools = need("pycocotools.mask", "reading COCO files")
    if shape.kind == "polygons":
        code = tools.merge(tools.frPyObjects(shape.data, height, width))
    elif isinstance(shape.data["counts"], list):
        code = tools.frPyObjects(shape.data, height, width)
    else:
        code = shape.data
    region = tools.decode(code).astype(bool)
    if region.shape != (height, width):
        raise ValueError(f"its size is {region.shape}, that of the image {(height, width)}")
    return np.asarray(region)


def labelme_region(shape: Shape, height: int, width: int) -> np.ndarray:
    """(H, W) bool of a shape of labelme, with its outline, as labelme's own `shape_to_mask` draws it."""
    region = Image.new("1", (width, height))
    draw = ImageDraw.Draw(region)
    if shape.kind == "mask":
        (left, top), text = shape.data
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as part:
            pixels.refuse_frames(part)
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
