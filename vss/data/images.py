"""Image files in, arrays out; every damaged file is one sentence that names it."""

from __future__ import annotations

import functools
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from vss.errors import VssError

T = TypeVar("T")
R = TypeVar("R")

READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow's decoders raise for damaged files (it has no common base class for them)."""

MASK_MODES = ("L", "P", "1", "I;16", "I")
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I", "F")


class BadSampleError(VssError):
    """One image or mask cannot be used: the sentence names the file.

    A DataLoader worker sends an exception to the main process as its class and its printed traceback; the constructor
    takes the sentence back out of it, so that the user reads one line with workers as without.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rsplit("BadSampleError: ", 1)[-1].strip())


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Every file suffix (lower case, with the dot) that Pillow can open."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def is_image(path: Path) -> bool:
    """Whether the name is one of an image file; hidden files (`._x.png` of some archives) are not."""
    return path.suffix.lower() in image_suffixes() and not path.name.startswith(".")


def list_images(folder: Path, *, recursive: bool = False) -> list[Path]:
    """The image files of a folder, sorted by name; an absent folder has none."""
    if not folder.is_dir():
        return []
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(path for path in found if is_image(path) and path.is_file())


def _unreadable(path: Path, error: BaseException) -> BadSampleError:
    reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return BadSampleError(
        f"{path} cannot be read as an image ({reason}); replace the file or remove it with its partner."
    )


def open_rgb(path: Path) -> Image.Image:
    """Decode one image file to 8-bit RGB. Raises `BadSampleError` for damaged files and for deeper channels."""
    try:
        with Image.open(path) as image:
            if image.mode in DEEP_MODES:
                raise BadSampleError(
                    f"{path} has mode {image.mode!r} (more than 8 bits a channel); expected an 8-bit grey or colour "
                    "image: convert it first."
                )
            return image.convert("RGB")
    except BadSampleError:
        raise
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error


def check_mask_mode(path: Path, mode: str) -> None:
    """Refuse masks with more than one channel: their colours are not class indices."""
    if mode not in MASK_MODES:
        raise BadSampleError(
            f"mask {path} has mode {mode!r}; expected one channel of class indices (8-bit grey or palette): "
            "convert its colours to indices first."
        )


def read_stored_mask(path: Path) -> np.ndarray:
    """The stored values of a mask: (H, W), integers as in the file. Palette files give their indices, 1-bit 0 and 1."""
    try:
        with Image.open(path) as image:
            check_mask_mode(path, image.mode)
            values = np.array(image)
    except BadSampleError:
        raise
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def read_header(path: Path) -> tuple[tuple[int, int], str]:
    """((H, W), Pillow mode) from the file's header, without decoding the pixels."""
    try:
        with Image.open(path) as image:
            return (image.height, image.width), image.mode
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error


def thread_map(function: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """`map` in order over threads (Pillow releases the interpreter lock while it decodes); None: one per core."""
    with ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, items)
