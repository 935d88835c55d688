"""Image and mask files in, arrays out; every damaged or refused file is one sentence that names it.

What files hold is remembered: the SHA-256 of their bytes, and how often each value occurs in a mask. A digest is kept
under the file's path together with its size, times of change (mtime, ctime), inode and device, and is taken again when
one of these differs: a file of the same size with its mtime put back has another ctime. A file that changed within the
last `SETTLED` seconds is never remembered, since a clock tick may hide a second change. Counts are kept under the
digest, so that they follow the contents and not the name.

The memory is one SQLite file, `contents-1.sqlite` in the folder `VSS_CACHE`, or else in `vss` below the user's cache
folder (`XDG_CACHE_HOME`, `~/.cache`): never among the data, which may be read-only or shared. It may be deleted at any
time. A damaged one is made anew; where none can be written, everything is read again, and a warning says so.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from vss.core.errors import VssError, steadily
from vss.core.files import sha256_json
from vss.data import pixels
from vss.data.pixels import READ_ERRORS, ImageKindError

log = logging.getLogger(__name__)

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

SCHEMA = 1
SETTLED = 2.0  # seconds; the coarsest clock of a file system in use (FAT)
CHUNK = 500  # names in one question; SQLite takes 999 in every version
MAX_VALUES = 1024  # a mask of more different values is counted each time
TABLES = """
CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, facts TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS counts (sha256 TEXT PRIMARY KEY, dtype TEXT NOT NULL, counts TEXT NOT NULL);
"""
Counts = tuple[str, dict[int, int]]
"""(numpy dtype of the stored values, {value: pixels})."""


class BadSampleError(VssError):
    """One image or mask cannot be used: the sentence names the file.

    A DataLoader worker sends an exception to the main process as its class and its printed traceback; the constructor
    takes the sentence back out of it, so that the user reads one line with workers as without.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rsplit("BadSampleError: ", 1)[-1].strip())


class MaskSource(ABC):
    """A mask that is no file of indices: colours, polygons, or none at all. It is as good as a path to one.

    `str` names it in sentences. It goes to the processes that read images, so that it is small. `file` is the one whose
    bytes matter, if any.
    """

    file: Path | None

    @abstractmethod
    def stored(self) -> np.ndarray:
        """(H, W) integers, as `SegData.decode` reads them. Raises `BadSampleError`."""

    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(H, W) without reading the pixels. Raises `BadSampleError`."""

    def about(self) -> object:
        """JSON-able: what `stored` depends on beside the bytes of `file`."""
        return None


Mask = Path | MaskSource


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
            f"mask {path} has mode {image.mode!r}; expected one channel of class indices (8-bit grey or palette); "
            "for a mask of colours give their table, --colors FILE (data.colors)."
        )
    if any(re.fullmatch(r"[L1];\d*I", text) for text in pixels.raw_modes(image)):
        raise BadSampleError(f"mask {path} stores white as 0, so that its values read inverted; save it as PNG.")
    pixels.refuse_frames(image)


def read_stored_mask(path: Mask) -> np.ndarray:
    """The stored values of a mask: (H, W), upright, integers as in the file.

    Palette files give their indices, files of 1, 2 or 4 bits 0..1, 0..3 and 0..15, those of 16 and 32 their integers.
    """
    if isinstance(path, MaskSource):
        return path.stored()
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


def read_header(path: Mask, *, mask: bool = False) -> tuple[int, int]:
    """(H, W), upright, from the file's header, without decoding the pixels; kinds that are refused are refused."""
    if isinstance(path, MaskSource):
        return path.size()
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


def sha256_files(paths: Sequence[Mask]) -> list[str]:
    """Hex SHA-256 of the bytes of every file, in order; of a mask that is no file, of all that it depends on.

    Raises `BadSampleError` for a file that cannot be read.
    """
    return _memory(cache_file()).contents(paths)


def count_values(masks: Sequence[Mask]) -> list[Counts]:
    """How often each stored value occurs in every mask, see `read_stored_mask`; raises its `BadSampleError`."""
    return _memory(cache_file()).counts(masks)


def cache_file() -> Path:
    """Where the memory lies; see the head of this file."""
    given, base = os.environ.get("VSS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "vss"
    return folder / f"contents-{SCHEMA}.sqlite"


def facts_of(path: Path) -> str:
    """What tells that a file is still the same without reading it."""
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino} {stat.st_dev}"


def _settled(facts: str) -> bool:
    _, modified, changed, *_ = (int(part) for part in facts.split())
    return max(modified, changed) / 1e9 < time.time() - SETTLED


def gone(path: Path, error: OSError) -> BadSampleError:
    """What to say of a file that was there when its folder was listed."""
    return BadSampleError(f"{path} cannot be read ({error.strerror or error}); put it back or remove it.")


def _digest(path: Path) -> tuple[str, str]:
    """(facts, digest); the facts are empty when the file changed while it was read."""
    try:
        before = facts_of(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return (before if facts_of(path) == before and _settled(before) else ""), digest
    except OSError as error:
        raise gone(path, error) from error


@functools.lru_cache(maxsize=4)
def _memory(path: Path) -> Memory:
    return Memory(path)


class Memory:
    """Digests and counts, in the process and in one SQLite file that processes share.

    Args:
        path: of the file; it and its folder are made.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.broken = path, False
        self.known: dict[str, tuple[str, str]] = {}
        self.counted: dict[str, Counts] = {}

    def digests(self, paths: Sequence[Path]) -> list[str]:
        """See `sha256_files`."""
        names = [os.path.abspath(path) for path in paths]
        try:
            facts = [facts_of(path) for path in paths]
        except OSError as error:
            raise gone(Path(error.filename), error) from error
        asked = [name for name, now in zip(names, facts, strict=True) if self.known.get(name, ("", ""))[0] != now]
        self.known |= {row[0]: (row[1], row[2]) for row in self._ask("path, facts, sha256", "digests", "path", asked)}
        result = {name: self.known[name][1] for name, now in zip(names, facts, strict=True)
                  if self.known.get(name, ("", ""))[0] == now}  # fmt: skip
        missing = [name for name in dict.fromkeys(names) if name not in result]
        read = steadily(thread_map(_digest, map(Path, missing)), "reading files, to know their contents", len(missing))
        found = dict(zip(missing, read, strict=True))
        keep = {name: pair for name, pair in found.items() if pair[0]}
        self.known |= keep
        self._tell("digests", [(name, *pair) for name, pair in keep.items()])
        return [result[name] if name in result else found[name][1] for name in names]

    def contents(self, sources: Sequence[Mask]) -> list[str]:
        """See `sha256_files`."""
        files = [source if isinstance(source, Path) else source.file for source in sources]
        found = iter(self.digests([file for file in files if file]))
        digests = [next(found) if file else "" for file in files]
        return [
            digest if isinstance(source, Path) else sha256_json([type(source).__name__, source.about(), digest])
            for source, digest in zip(sources, digests, strict=True)
        ]

    def counts(self, masks: Sequence[Mask]) -> list[Counts]:
        """See `count_values`."""
        keys = self.contents(masks)
        asked = [key for key in dict.fromkeys(keys) if key not in self.counted]
        for key, dtype, text in self._ask("sha256, dtype, counts", "counts", "sha256", asked):
            with contextlib.suppress(ValueError, TypeError):  # a damaged row is counted again
                self.counted[key] = (np.dtype(dtype).name, {int(v): int(n) for v, n in json.loads(text)})
        missing = {key: mask for key, mask in zip(keys, masks, strict=True) if key not in self.counted}
        read = steadily(thread_map(_count, missing.values()), "reading masks, to count their labels", len(missing))
        found = dict(zip(missing, read, strict=True))
        keep = {key: counts for key, counts in found.items() if len(counts[1]) <= MAX_VALUES}
        self.counted |= keep
        self._tell("counts", [(k, dtype, json.dumps(list(table.items()))) for k, (dtype, table) in keep.items()])
        return [self.counted[key] if key in self.counted else found[key] for key in keys]

    def _ask(self, columns: str, table: str, key: str, values: list[str]) -> list[tuple[str, ...]]:
        def work(file: sqlite3.Connection) -> list[tuple[str, ...]]:
            rows: list[tuple[str, ...]] = []
            for start in range(0, len(values), CHUNK):
                part = values[start : start + CHUNK]
                marks = ",".join("?" * len(part))
                rows += file.execute(f"SELECT {columns} FROM {table} WHERE {key} IN ({marks})", part).fetchall()
            return rows

        return self._use(work) if values else []

    def _tell(self, table: str, rows: list[tuple[str, ...]]) -> None:
        def work(file: sqlite3.Connection) -> list[tuple[str, ...]]:
            with file:
                file.executemany(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", rows)
            return []

        if rows:
            self._use(work)

    def _use(self, work: Callable[[sqlite3.Connection], list[tuple[str, ...]]]) -> list[tuple[str, ...]]:
        """`work` with the file open, which is made anew when it is damaged; [] where there can be none."""
        if self.broken:
            return []
        for attempt in range(2):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.closing(sqlite3.connect(self.path, timeout=30)) as file:
                    file.executescript(TABLES)
                    return work(file)
            except sqlite3.DatabaseError as error:
                if attempt == 0 and not isinstance(error, sqlite3.OperationalError):
                    log.warning("%s is damaged (%s) and is made anew", self.path, error)
                    for suffix in ("", "-journal"):
                        Path(f"{self.path}{suffix}").unlink(missing_ok=True)
                    continue
                reason: Exception = error
            except OSError as error:
                reason = error
            break
        log.warning("%s cannot be used (%s): data is read again by every command; set VSS_CACHE", self.path, reason)
        self.broken = True
        return []


def _count(mask: Mask) -> Counts:
    stored = read_stored_mask(mask)
    if stored.dtype == np.uint8:
        counts = np.bincount(stored.ravel(), minlength=256)
        values = np.flatnonzero(counts)
        return "uint8", dict(zip(values.tolist(), counts[values].tolist(), strict=True))
    values, counts = np.unique(stored, return_counts=True)
    return stored.dtype.name, dict(zip(values.tolist(), counts.tolist(), strict=True))
