"""What a worker process does with a task: one function from JSON to JSON that never raises for a failed task.

A task is {"kind", "id", "root", "study", "plugins", "recipe", "threads", "share", "shared"}; its kind is one of share,
cell, time and pictures.
An outcome is {"id", "status": "ok", "seconds", "result"} or {"id", "status": "failed", "seconds", "error", "full"};
`full` says that the disk is. An executor answers "lost" for a worker that died.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.core.locks import at_work
from vss.sweep.store import Store, note_computed
from vss.sweep.study import Json, Place, Study, study

LEAST_FREE = 32 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def perform(task: Json) -> Json:
    """Do one task in this process; what it says goes to its log."""
    root, start = Path(task["root"]), time.monotonic()
    try:
        with _logged(root / "logs" / f"{task['id']}.log"):
            return _attempt(task, root) | {"id": task["id"], "seconds": time.monotonic() - start}
    except OSError as error:  # the log itself cannot be written
        failed = {"status": "failed", "error": str(error), "full": error.errno in FULL}
        return failed | {"id": task["id"], "seconds": time.monotonic() - start}


def _attempt(task: Json, root: Path) -> Json:
    try:
        work = study(task["study"], task["plugins"])
        _set_threads(task["threads"])
        return {"status": "ok", "result": _KINDS[task["kind"]](work, task, root)}
    except Exception as error:  # any error of a cell is that cell's alone: kept with its trace, named in its record
        traceback.print_exc()
        sentence = str(error) if isinstance(error, VssError) else f"{type(error).__name__}: {error}"
        return {"status": "failed", "error": sentence, "full": is_full(error, root)}


def _share(work: Study, task: Json, root: Path) -> Json:
    folder = root / "shared" / task["id"]
    with at_work(folder, wait=True):
        return work.share(Store.read(root).recipes(task["id"]), _place(task, folder, folder))


def _cell(work: Study, task: Json, root: Path) -> Json:
    folder = root / "runs" / task["id"]
    with at_work(folder, wait=True):
        place = _place(task, folder, root / "shared" / task["share"])
        return work.cell(Recipe.model_validate(task["recipe"]), place, task["shared"])


def _time(work: Study, task: Json, root: Path) -> Json:
    return work.time(Recipe.model_validate(task["recipe"]), _after(task), task["extra"]["seconds"])


def _pictures(work: Study, task: Json, root: Path) -> Json:
    return work.pictures(Recipe.model_validate(task["recipe"]), _after(task), task["extra"])


def _after(task: Json) -> Place:
    root = Path(task["root"])
    return Place(root / "runs" / task["cell"], root / "shared" / task["share"], lambda *_: None)


_KINDS = {"time": _time, "pictures": _pictures, "share": _share, "cell": _cell}


def _place(task: Json, folder: Path, shared: Path) -> Place:
    root = Path(task["root"])
    return Place(folder, shared, lambda step, key: note_computed(root, task["id"], step, key))


def _set_threads(count: int | None) -> None:
    torch = sys.modules.get("torch")
    if count and torch is not None:
        torch.set_num_threads(count)


def is_full(error: BaseException | None, root: Path) -> bool:
    """Whether an error came from a full disk: by its number, or because next to nothing is free."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return shutil.disk_usage(root).free < LEAST_FREE


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Everything that is written to standard output and error, by C code too, goes behind what the log holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.StreamHandler(sys.stderr)
    own = logging.getLogger("vss")
    with path.open("a") as log:
        saved = os.dup(1), os.dup(2)
        _flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        own.addHandler(handler)
        level = own.level
        own.setLevel(logging.INFO)
        try:
            yield
        finally:
            own.removeHandler(handler)
            own.setLevel(level)
            _flush()
            for descriptor, number in zip(saved, (1, 2), strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
