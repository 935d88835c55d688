"""Image files to 8-bit RGB pictures, by one rule for every reader: training, evaluation, calibration, bundles.

Needs Pillow alone and nothing of this package: `vss ship` copies the file beside `run.py`, so that a bundle
reads an image exactly as the network's training did. The rule:

- The EXIF orientation is applied: a picture is upright, as viewers, annotation tools and OpenCV show it.
- Grey becomes three equal channels, one bit 0 and 255, a palette its colours; CMYK, YCbCr and HSV are converted by
  Pillow, without colour profiles.
- Transparency does not count: alpha is dropped and the stored colours stay, as OpenCV does it.
- More than 8 bits a channel, floating point, LAB, premultiplied alpha, and files of several frames or pages are refused
  by name. Of an MPO file (phones, stereo cameras) the first picture is the photograph and is taken.
"""

from __future__ import annotations

import functools
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

READ_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, TypeError, OverflowError, IndexError,
    KeyError, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise for damaged files (it has no common base class for them)."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
ORIENTATION = 0x0112  # the tag of EXIF and TIFF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


class ImageKindError(ValueError):
    """A kind of image that is refused; the text says which and what to do, without the name of the file."""


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Every file suffix (lower case, with the dot) that Pillow can open."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def is_image(path: Path) -> bool:
    """Whether the name is one of an image file; hidden files (`._x.png` of some archives) are not."""
    return path.suffix.lower() in image_suffixes() and not path.name.startswith(".")


def list_images(folder: Path, *, recursive: bool = False) -> list[Path]:
    """The image files of a folder, sorted by name; an absent folder has none.

    Links to folders are followed, but not back into a folder that they lie in; hidden folders are left out. A link to
    a file that is gone is listed, so that the reader names it.
    """
    return sorted(_walk(folder, (), recursive))


def holds_images(folder: Path) -> bool:
    """Whether an image file lies in a folder or below it."""
    return next(_walk(folder, (), True), None) is not None


def _walk(folder: Path, above: tuple[str, ...], recursive: bool) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above or not folder.is_dir():
        return
    for path in folder.iterdir():
        if not path.is_dir():
            yield from [path] if is_image(path) else []
        elif recursive and not path.name.startswith("."):
            yield from _walk(path, (*above, real), recursive)


def read_rgb(path: Path) -> Image.Image:
    """Decode one image file to upright 8-bit RGB. Raises one of `READ_ERRORS`, which `ImageKindError` is among."""
    with Image.open(path) as image:
        refuse_kind(image)
        image.load()
        return upright(to_rgb(image), orientation(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any accepted mode as RGB, not turned. Raises `ImageKindError` for the other modes."""
    refuse_mode(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow warns of the direct way
    return image if image.mode == "RGB" else image.convert("RGB")


def refuse_kind(image: Image.Image) -> None:
    """Refuse an opened, not yet loaded picture that `read_rgb` would refuse. Raises `ImageKindError`."""
    refuse_frames(image)
    if is_deep(image):
        raise ImageKindError(f"has more than 8 bits a channel (mode {image.mode!r}); save it as 8-bit grey or colour")
    refuse_mode(image)


def refuse_mode(image: Image.Image) -> None:
    """Refuse what has no stated way to RGB."""
    if image.mode not in MODES:
        raise ImageKindError(f"has mode {image.mode!r}; save it as 8-bit grey or colour")


def refuse_frames(image: Image.Image) -> None:
    """Refuse animations and files of several pages: which of the pictures is meant is not known."""
    if image.format != "MPO" and getattr(image, "is_animated", False):
        count = getattr(image, "n_frames", "several")
        raise ImageKindError(f"holds {count} frames or pages ({image.format}); save the one that is meant by itself")


def is_deep(image: Image.Image) -> bool:
    """Whether a picture that was opened and not yet loaded has more than 8 bits a channel in its file.

    Pillow reads colour of 16 bits as 8 without a word; how a file stores its pixels is in the tiles.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return True
    return any("16" in text or ";32" in text for text in raw_modes(image))


def raw_modes(image: Image.Image) -> list[str]:
    """What the decoders of a picture that is not yet loaded are called and told: `L`, `RGB;16B`, `L;4`, ..."""
    found: list[str] = []
    for tile in getattr(image, "tile", ()):
        args = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        found += [text for text in (tile[0], *args) if isinstance(text, str)]
        if tile[0].startswith("ppm") and any(isinstance(value, int) and value > 255 for value in args):
            found.append("16")
    return found


def orientation(image: Image.Image) -> int:
    """1 to 8 of the EXIF of a picture that has been loaded; anything else counts as 1, as it is.

    Pillow turns TIFF by itself when it loads one.
    """
    value = 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION, 1)
    return value if isinstance(value, int) and value in UPRIGHT else 1


def upright(image: Image.Image, turn: int) -> Image.Image:
    """A picture turned by an EXIF orientation."""
    return image.transpose(UPRIGHT[turn]) if turn in UPRIGHT else image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(H, W) of a picture that was opened, as `read_rgb` gives it, without decoding it.

    A PNG that holds its EXIF behind the pixels is taken as it lies; it is judged when it is read.
    """
    known = image.format != "PNG" or "exif" in image.info or "XML:com.adobe.xmp" in image.info
    sideways = known and orientation(image) in SIDEWAYS
    return (image.width, image.height) if sideways else (image.height, image.width)
