"""TensorRT's timing cache on disk: one file per device and version, shared by builds that run at the same time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vss.core.errors import VssError
from vss.core.files import atomic, write_json

KIND, SCHEMA = "vss.timing_cache", 1


def default_folder() -> Path:
    """Where timing caches are kept: VSS_CACHE, or vss in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("VSS_CACHE") or Path(base) / "vss") / "timing"


class TimingCache:
    """A file in TensorRT's own format, so that trtexec and polygraphy read it, with a JSON of its hash beside it.

    The JSON is written first and names the old and the new content, so that a process killed between the two writes
    leaves a pair that agrees.

    Args:
        path: the file; need not exist.
        wait: seconds to wait for another process's lock.
    """

    def __init__(self, path: Path, *, wait: float = 10.0) -> None:
        self.path, self._wait = path, wait
        self._beside = path.with_name(path.name + ".json")

    def read(self) -> bytes:
        """The content, empty when there is none yet; refuses a damaged file."""
        with self._lock():
            return self._read()

    def apply(self, config: Any) -> None:
        """Give a builder config what was measured before."""
        data = self.read()
        cache = config.create_timing_cache(data)
        if cache is None:
            raise VssError(f"the timing cache {self.path} is damaged ({len(data)} bytes); remove it.")
        if not config.set_timing_cache(cache, ignore_mismatch=False):
            raise VssError(
                f"the timing cache {self.path} is of another device or TensorRT version; give another --timing-cache."
            )

    def merge(self, config: Any) -> int:
        """Add what a build has measured to what other builds have written meanwhile; returns the bytes written."""
        measured = config.get_timing_cache()
        with self._lock():
            before = self._read()
            if before and (other := config.create_timing_cache(before)) is not None:
                measured.combine(other, ignore_mismatch=False)
            data = bytes(measured.serialize())
            self._write(before, data)
        return len(data)

    def _read(self) -> bytes:
        try:
            data = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise VssError(f"the timing cache {self.path} cannot be read ({error.strerror or error}).") from error
        if data and self._beside.exists():
            try:
                known = json.loads(self._beside.read_text())["sha256"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise VssError(f"{self._beside} is damaged; remove it and {self.path.name}.") from error
            if _digest(data) not in known:
                raise VssError(f"the timing cache {self.path} is damaged ({len(data)} bytes); remove it.")
        return data

    def _write(self, before: bytes, data: bytes) -> None:
        known = [_digest(each) for each in (data, before) if each]
        write_json(self._beside, {"kind": KIND, "schema": SCHEMA, "bytes": len(data), "sha256": known})
        with atomic(self.path) as temporary:
            temporary.write_bytes(data)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise VssError(
                f"the timing cache {self.path} cannot be used ({error.strerror or error}); give another --timing-cache."
            ) from error
        try:
            self._wait_for(handle)
            yield
        finally:
            os.close(handle)

    def _wait_for(self, handle: int) -> None:
        import fcntl  # POSIX alone; TensorRT engines are built on Linux

        end = time.monotonic() + self._wait
        while True:
            try:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() >= end:
                    raise VssError(
                        f"the timing cache {self.path} is locked by another process (waited {self._wait:g} s); wait "
                        "for that build, or give another --timing-cache."
                    ) from error
                time.sleep(0.05)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
