"""What a worker does: it gets a `Task` and answers with an `Outcome`; a task that fails is an outcome too.

Its trace, and everything that it prints and logs, is in its log.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.core.files import at_work
from vss.sweep.experiment import Experiment, Json, TrialDirs, experiment
from vss.sweep.store import Store, note_computed

LEAST_FREE = 32 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work.

    Attributes:
        id: names its log: of a trial, of a shared stage, or of what follows a trial.
        root, experiment, plugins: of the sweep.
        stage: the shared stage that it is, or that it builds on.
        trial: whose folder it works in; empty for a stage.
        shared: what the stage returned.
        extra: what `time` and `pictures` need.
    """

    kind: Literal["stage", "trial", "time", "pictures"]
    id: str
    root: Path
    experiment: str
    plugins: tuple[str, ...]
    threads: int
    stage: str
    trial: str = ""
    recipe: Json | None = None
    shared: Json = field(default_factory=dict)
    extra: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a task: "lost" when its worker died, `full` when the disk is."""

    id: str
    status: Literal["ok", "failed", "lost"]
    result: Json = field(default_factory=dict)
    error: str = ""
    seconds: float | None = None
    full: bool = False


def perform(task: Task) -> Outcome:
    """Do one task in this process."""
    start = time.monotonic()
    try:
        with _logged(task.root / "logs" / f"{task.id}.log"):
            outcome = _attempt(task)
    except OSError as error:  # the log itself cannot be written
        outcome = Outcome(task.id, "failed", error=str(error), full=error.errno in FULL)
    return replace(outcome, seconds=time.monotonic() - start)


def _attempt(task: Task) -> Outcome:
    try:
        work, torch = experiment(task.experiment, task.plugins), sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(task.threads)
        result = json.loads(json.dumps(_result(work, task), allow_nan=False))  # as its record will give it back
        return Outcome(task.id, "ok", result)
    except Exception as error:  # any error of a trial is that trial's alone: kept with its trace, named in its record
        traceback.print_exc()
        sentence = str(error) if isinstance(error, VssError) else f"{type(error).__name__}: {error}"
        return Outcome(task.id, "failed", error=sentence, full=is_full(error, task.root))


def _result(work: Experiment, task: Task) -> Json:
    shared = task.root / "shared" / task.stage
    folder = task.root / "runs" / task.trial if task.trial else shared
    dirs = TrialDirs(folder, shared, functools.partial(note_computed, task.root, task.id))
    if task.kind == "stage":
        with at_work(folder, wait=True):
            return work.stage(Store.read(task.root).recipes(task.stage), dirs)
    recipe = Recipe.model_validate(task.recipe)
    if task.kind == "trial":
        with at_work(folder, wait=True):
            return work.trial(recipe, dirs, task.shared)
    return work.time(recipe, dirs, **task.extra) if task.kind == "time" else work.pictures(recipe, dirs, task.extra)


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
    handler, own = logging.StreamHandler(sys.stderr), logging.getLogger("vss")
    level = own.level
    with path.open("a") as file:
        saved = os.dup(1), os.dup(2)
        _flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        own.addHandler(handler)
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
