"""A sweep's folder: what it is, one record per trial, what has been computed, and the tasks that workers do in it.

sweep.json       the grid, its trials and how it was started
cells/ID.json    one record per trial: status, row, seconds, attempts
runs/ID/         the trial's own files; shared/NAME/ what trials of one network and seed share
logs/ID.log      everything that the trial printed and logged
computed/        one line per step that was really computed, a file per process

A worker gets a `Task` and answers with an `Outcome`; a task that fails is an outcome too. Its trace, and all that it
prints and logs, is in its log.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.core.files import at_work, is_leftover, read_json, sha256_json, write_json
from vss.core.yaml12 import parse
from vss.run.runner import read_record, write_record
from vss.sweep.experiment import Experiment, Json, TrialDirs, experiment
from vss.sweep.grid import Grid, Trial

log = logging.getLogger(__name__)

LEAST_FREE = 32 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KIND, TRIAL, STAGE, SCHEMA = "vss.sweep", "vss.sweep_cell", "vss.sweep_share", 1


@dataclass(frozen=True)
class Store:
    """A sweep on disk."""

    root: Path
    grid: Grid

    @classmethod
    def read(cls, root: Path | str) -> Store:
        file = Path(root) / "sweep.json"
        head = read_json(file, kind=KIND, schema=SCHEMA)
        return cls(Path(root), parse(Grid, head.get("grid", {}), source=f"{file}, grid"))

    @classmethod
    def make(cls, root: Path | str, grid: Grid, *, about: Json, replace: bool = False) -> Store:
        """Begin a sweep, or go on with the same one; another one in the folder is refused unless `replace`."""
        root, content = Path(root), grid.model_dump(mode="json")
        file, key = root / "sweep.json", sha256_json(content)
        if file.is_file():
            old = _head(file)
            if old and old["key"] == key:
                return cls(root, grid)
            if old and not replace:
                differ = [name for name, value in content.items() if old["grid"].get(name) != value]
                raise VssError(
                    f"{root} holds sweep {old['grid']['name']!r}, which differs in "
                    f"{', '.join(differ) or 'nothing that this version knows'}; "
                    "choose another folder, or give --extend to go on with what the two have in common."
                )
        elif root.is_dir() and any(path.name != ".lock" and not is_leftover(path) for path in root.iterdir()):
            raise VssError(f"{root} holds other files and no sweep; choose another folder.")
        write_json(file, {"kind": KIND, "schema": SCHEMA, "key": key, "grid": content, **about})
        return cls(root, grid)

    def about(self) -> Json:
        """sweep.json: how the sweep was started."""
        return read_json(self.root / "sweep.json", kind=KIND, schema=SCHEMA)

    def experiment(self) -> Experiment:
        return experiment(self.grid.study, self.grid.plugins)

    def trials(self) -> list[Trial]:
        """All trials of the grid; its plugins are loaded first."""
        self.experiment()
        return self.grid.trials()

    def record(self, trial: str) -> Json | None:
        wanted = {"id": str, "coords": dict, "key": str, "status": str}
        return read_record(self.root / "cells" / f"{trial}.json", TRIAL, wanted)

    def keep(self, trial: Trial, key: str, outcome: Json) -> None:
        """Write the record of a trial, whole or not at all."""
        head = {"id": trial.id, "coords": trial.coords, "key": key}
        write_record(self.root / "cells" / f"{trial.id}.json", TRIAL, head | outcome)

    def folder(self, trial: str) -> Path:
        return self.root / "runs" / trial

    def log(self, name: str) -> Path:
        """The log of a trial or a shared stage."""
        return self.root / "logs" / f"{name}.log"

    def stage_of(self, trial: Trial) -> str:
        """Name of the shared stage that a trial builds on, which is also a folder."""
        return f"shared-{sha256_json(self.experiment().stage_inputs(trial.recipe()))[:12]}"

    def recipes(self, stage: str) -> list[Recipe]:
        """Recipes of the trials of one shared stage, without those that cannot be."""
        found = []
        for trial in self.trials():
            with contextlib.suppress(VssError):
                if not trial.fault and self.stage_of(trial) == stage:
                    recipe = trial.recipe()
                    self.experiment().check(recipe)
                    found.append(recipe)
        return found

    def keep_stage(self, name: str, result: Json) -> None:
        write_record(self.root / "shared" / f"{name}.json", STAGE, {"result": result})

    def shared(self, name: str) -> Json | None:
        """What a shared stage returned; None where it is not done."""
        record = read_record(self.root / "shared" / f"{name}.json", STAGE, {"result": dict})
        return record and record["result"]

    def computed(self) -> list[Json]:
        """Every step that was computed to its end: {"part", "step", "key", "process"}, in no order."""
        files = sorted((self.root / "computed").glob("*.jsonl"))
        lines = [line for file in files for line in file.read_text().splitlines(keepends=True)]
        return [json.loads(line) for line in lines if line.endswith("}\n")]  # a killed process leaves half a line

    def repeated(self) -> list[tuple[str, str]]:
        """(part, key) of steps that were computed again from the same inputs; empty when all is well."""
        counts = Counter((line["part"], line["key"]) for line in self.computed())
        return [place for place, count in counts.items() for _ in range(count - 1)]


def note_computed(root: Path, part: str, step: str, key: str) -> None:
    """Append to this process's own file; a line is there once the step's record is."""
    process = f"{socket.gethostname()}-{os.getpid()}"
    path = root / "computed" / f"{process}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"part": part, "step": step, "key": key, "process": process}) + "\n")


def _head(file: Path) -> Json | None:
    """sweep.json; None for a damaged one, which is written again: trials are kept by keys of their own."""
    try:
        data = read_json(file, kind=KIND, schema=SCHEMA)
        Grid.model_validate(data["grid"])
    except (VssError, KeyError, ValidationError) as error:
        log.warning("%s is no whole head of a sweep (%s); it is written again.", file, error)
        return None
    return data if isinstance(data.get("key"), str) else None


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
