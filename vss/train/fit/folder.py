"""The folder of a fit: locked while it works, and never mistaken for that of another fit.

`fit.json` says what the fit was made from: settings, seed, hashes of start weights, teacher and data. The same inputs
go on where they stopped. Other inputs start anew, and what was there is kept in `earlier/KEY`; asked for again, it
comes back from there.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vss.core.errors import VssError
from vss.core.files import atomic, read_json, sha256_json, write_json
from vss.core.locks import at_work, remove_leftovers

log = logging.getLogger(__name__)
KIND, SCHEMA = "vss.fit", 1
BEST, CURVES, RECORD, RESUME = "best.safetensors", "curves.json", "fit.json", "lightning/resume.ckpt"
OWN = (BEST, CURVES, "lightning", "csv", "tensorboard", RECORD)  # the record goes last
PATIENCE_S = 120.0
DAMAGE: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    pickle.UnpicklingError,
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    LookupError,
    AttributeError,
    TypeError,
)


class WholeFiles(TorchCheckpointIO):
    """Lightning's checkpoints, each whole or absent: written beside the target, flushed to the disk, renamed.

    Its own way writes into TMPDIR and moves, which is a copy where that is another file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def fit_folder(path: Path, inputs: Mapping[str, Any]) -> Iterator[tuple[str, Path | None]]:
    """The folder made ready for these inputs and held: their key, and the file to go on from."""
    key = sha256_json(inputs)
    if path.exists() and not path.is_dir():
        raise VssError(f"{path} is a file; a training writes a folder, so choose another --save.")
    if getattr(rank_zero_only, "rank", 0):  # the first process makes the folder ready
        _await(path, key)
        yield key, _resume_file(path, key)
        return
    with at_work(path, deep=False):
        remove_leftovers((path / RESUME).parent, deep=False)
        _make_ready(path, key, inputs)
        yield key, _resume_file(path, key)


def _make_ready(path: Path, key: str, inputs: Mapping[str, Any]) -> None:
    old = _record(path)
    if old.get("key") != key:
        _set_aside(path, old, inputs)
        write_json(path / RECORD, {"kind": KIND, "schema": SCHEMA, "key": key, "inputs": dict(inputs)})
    back = path / "earlier" / key[:12]
    if back.is_dir():
        log.info("%s had this training before: going on with what was kept in %s", path, back)
        _move(back, path)
        shutil.rmtree(back)


def _set_aside(path: Path, old: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    if not any((path / name).exists() for name in OWN):
        return
    other = sorted(_flat(old.get("inputs", {})).items() ^ _flat(inputs).items())
    changed = ", ".join(dict.fromkeys(key for key, _ in other)) if old else "of which no record is left"
    earlier = path / "earlier"
    free = next(f"unknown-{i}" for i in itertools.count(1) if not (earlier / f"unknown-{i}").exists())
    aside = earlier / (str(old["key"])[:12] if old else free)
    _move(path, aside)
    log.warning("%s held another training (%s); it is kept in %s", path, changed, aside)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} as {"a.b": "1"}."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


def _move(source: Path, target: Path) -> None:
    """Move what a fit wrote; what a kill left behind of an earlier try is moved too."""
    for name in OWN:
        if not (source / name).exists():
            continue
        if (target / name).is_dir():
            shutil.rmtree(target / name)
        target.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, target / name)


def _record(path: Path) -> dict[str, Any]:
    if not (path / RECORD).is_file():
        return {}
    try:
        record = read_json(path / RECORD, kind=KIND, schema=SCHEMA)
    except VssError as error:
        log.warning("%s", error)
        return {}
    return record if isinstance(record.get("key"), str) and isinstance(record.get("inputs"), dict) else {}


def _await(path: Path, key: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while _record(path).get("key") != key:
        if time.monotonic() > until:
            raise VssError(f"{path} was not made ready by the first process; all nodes must see the same folder.")
        time.sleep(0.2)


def _resume_file(path: Path, key: str) -> Path | None:
    """The file to go on from; a damaged one is said and left for the next epoch to replace."""
    file = path / RESUME
    if not file.is_file():
        return None
    fault = _damage(file, key)
    if fault:
        log.warning("%s cannot be used (%s); the training starts anew", file, fault)
        return None
    return file


def _damage(file: Path, key: str) -> str:
    """What is wrong with a resume file; every part's checksum is read."""
    try:
        with zipfile.ZipFile(file) as parts:
            wrong = parts.testzip()
        if wrong:
            return f"the checksum of {wrong} is wrong"
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True).get("vss")
    except DAMAGE as error:
        return f"it is truncated or damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return "" if found == key else "it is of another training"
