"""What files hold, remembered: the SHA-256 of their bytes, and how often each value occurs in a mask.

A digest is kept under the file's path together with its size, times of change (mtime, ctime), inode and device, and is
taken again when one of these differs: a file of the same size with its mtime put back has another ctime. A file that
changed within the last `SETTLED` seconds is never remembered, since a clock tick may hide a second change. Counts are
kept under the digest, so that they follow the contents and not the name.

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
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vss.data.images import BadSampleError, read_stored_mask, thread_map

log = logging.getLogger(__name__)

SCHEMA = 1
SETTLED = 2.0  # seconds; the coarsest clock of a file system in use (FAT)
CHUNK = 500  # names in one question; SQLite takes 999 in every version
MANY = 1000  # files from which reading them all is worth a line
MAX_VALUES = 1024  # a mask of more different values is counted each time
TABLES = """
CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, facts TEXT NOT NULL, sha256 TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS counts (sha256 TEXT PRIMARY KEY, dtype TEXT NOT NULL, counts TEXT NOT NULL);
"""
Counts = tuple[str, dict[int, int]]
"""(numpy dtype of the stored values, {value: pixels})."""


def sha256_files(paths: Sequence[Path]) -> list[str]:
    """Hex SHA-256 of the bytes of every file, in order. Raises `BadSampleError` for one that cannot be read."""
    return _memory(cache_file()).digests(paths)


def count_values(masks: Sequence[Path]) -> list[Counts]:
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


def _unreadable(path: Path, error: OSError) -> BadSampleError:
    return BadSampleError(f"{path} cannot be read ({error.strerror or error}); put it back or remove it.")


def _digest(path: Path) -> tuple[str, str]:
    """(facts, digest); the facts are empty when the file changed while it was read."""
    try:
        before = facts_of(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return (before if facts_of(path) == before and _settled(before) else ""), digest
    except OSError as error:
        raise _unreadable(path, error) from error


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
            raise _unreadable(Path(error.filename), error) from error
        asked = [name for name, now in zip(names, facts, strict=True) if self.known.get(name, ("", ""))[0] != now]
        self.known |= {row[0]: (row[1], row[2]) for row in self._ask("path, facts, sha256", "digests", "path", asked)}
        result = {name: self.known[name][1] for name, now in zip(names, facts, strict=True)
                  if self.known.get(name, ("", ""))[0] == now}  # fmt: skip
        missing = [name for name in dict.fromkeys(names) if name not in result]
        if len(missing) > MANY:
            log.info("reading %d files once, to know their contents", len(missing))
        found = dict(zip(missing, thread_map(_digest, map(Path, missing)), strict=True))
        keep = {name: pair for name, pair in found.items() if pair[0]}
        self.known |= keep
        self._tell("digests", [(name, *pair) for name, pair in keep.items()])
        return [result[name] if name in result else found[name][1] for name in names]

    def counts(self, masks: Sequence[Path]) -> list[Counts]:
        """See `count_values`."""
        keys = self.digests(masks)
        asked = [key for key in dict.fromkeys(keys) if key not in self.counted]
        for key, dtype, text in self._ask("sha256, dtype, counts", "counts", "sha256", asked):
            with contextlib.suppress(ValueError, TypeError):  # a damaged row is counted again
                self.counted[key] = (np.dtype(dtype).name, {int(v): int(n) for v, n in json.loads(text)})
        missing = {key: mask for key, mask in zip(keys, masks, strict=True) if key not in self.counted}
        if len(missing) > MANY:
            log.info("reading %d masks once, to count their labels", len(missing))
        found = dict(zip(missing, thread_map(_count, missing.values()), strict=True))
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


def _count(mask: Path) -> Counts:
    stored = read_stored_mask(mask)
    if stored.dtype == np.uint8:
        counts = np.bincount(stored.ravel(), minlength=256)
        values = np.flatnonzero(counts)
        return "uint8", dict(zip(values.tolist(), counts[values].tolist(), strict=True))
    values, counts = np.unique(stored, return_counts=True)
    return stored.dtype.name, dict(zip(values.tolist(), counts.tolist(), strict=True))
