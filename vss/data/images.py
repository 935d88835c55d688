"""Image and mask files in, arrays out; every damaged or refused file is one sentence that names it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from vss.core.errors import VssError
from vss.data import pixels
from vss.data.pixels import READ_ERRORS, ImageKindError, list_images

__all__ = ["BadSampleError", "list_images", "open_rgb", "read_header", "read_stored_mask", "thread_map"]

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int], None]
"""Called with (done, total)."""

READING = 2
"""What is made of the same file: raise this when it changes, and what was computed from images is computed anew."""

MASK_MODES = ("L", "P", "1", "I;16", "I;16B", "I;16L", "I")
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp", "jpeg2000")
SCALED = {"L;2": 85, "L;4": 17}
"""Grey of 2 and 4 bits is spread over 0..255 by Pillow; divided by these the values are those of the file."""


class BadSampleError(VssError):
    """One image or mask cannot be used: the sentence names the file.

    A DataLoader worker sends an exception to the main process as its class and its printed traceback; the constructor
    takes the sentence back out of it, so that the user reads one line with workers as without.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rsplit("BadSampleError: ", 1)[-1].strip())


def _unreadable(path: Path, error: BaseException) -> BadSampleError:
    if isinstance(error, ImageKindError):
        return BadSampleError(f"{path} {error}, or remove it with its partner.")
    reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    return BadSampleError(
        f"{path} cannot be read as an image ({reason}); replace the file or remove it with its partner."
    )


def open_rgb(path: Path) -> Image.Image:
    """One image file as upright 8-bit RGB by the rule of `vss.data.pixels`; `BadSampleError` for what it refuses."""
    try:
        return pixels.read_rgb(path)
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error


def check_mask(path: Path, image: Image.Image) -> None:
    """Refuse an opened file that cannot hold class indices: lossy, of several channels or frames, stored inverted."""
    compression = str(image.info.get("compression"))
    if image.format in LOSSY or (image.format == "TIFF" and compression in LOSSY_TIFF):
        kind = image.format if image.format in LOSSY else f"TIFF with {compression} compression"
        raise BadSampleError(
            f"mask {path} is a {kind} file, which does not keep class indices as they were; export the mask again as "
            "PNG from its source (a converted copy keeps the damage)."
        )
    if image.mode not in MASK_MODES:
        raise BadSampleError(
            f"mask {path} has mode {image.mode!r}; expected one channel of class indices (8-bit grey or palette): "
            "convert its colours to indices first."
        )
    if any(re.fullmatch(r"[L1];\d*I", text) for text in pixels.raw_modes(image)):
        raise BadSampleError(f"mask {path} stores white as 0, so that its values read inverted; save it as PNG.")
    pixels.refuse_frames(image)


def read_stored_mask(path: Path) -> np.ndarray:
    """The stored values of a mask: (H, W), upright, integers as in the file.

    Palette files give their indices, files of 1, 2 or 4 bits 0..1, 0..3 and 0..15, those of 16 and 32 their integers.
    """
    try:
        with Image.open(path) as image:
            check_mask(path, image)
            scale = next((SCALED[text] for text in pixels.raw_modes(image) if text in SCALED), 1)
            image.load()
            values = np.array(pixels.upright(image, pixels.orientation(image)))
    except BadSampleError:
        raise
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error
    return values.astype(np.uint8) if values.dtype == np.bool_ else values if scale == 1 else values // scale


def read_header(path: Path, *, mask: bool = False) -> tuple[int, int]:
    """(H, W), upright, from the file's header, without decoding the pixels; kinds that are refused are refused."""
    try:
        with Image.open(path) as image:
            if mask:
                check_mask(path, image)
            else:
                pixels.refuse_kind(image)
            return pixels.upright_size(image)
    except BadSampleError:
        raise
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error


def thread_map(
    function: Callable[[T], R], items: Iterable[T], workers: int | None = None, progress: Progress | None = None
) -> Iterator[R]:
    """`map` in order over threads (Pillow releases the interpreter lock while it decodes); None: one per core."""
    items = list(items)
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        for done, result in enumerate(pool.map(function, items), start=1):
            if progress is not None:
                progress(done, len(items))
            yield result
