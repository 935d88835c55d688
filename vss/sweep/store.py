"""A sweep's folder: what it is, one record per trial, who is at work in it, and what has been computed.

sweep.json       the grid, its trials and how it was started
cells/ID.json    one record per trial: status, row, seconds, attempts
runs/ID/         the trial's own files; shared/NAME/ what trials of one network and seed share
logs/ID.log      everything that the trial printed and logged
computed/        one line per step that was really computed, a file per process
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.core.files import is_leftover, read_json, sha256_json, write_json
from vss.core.yaml12 import parse
from vss.run.runner import read_record, write_record
from vss.sweep.experiment import Experiment, Json, experiment
from vss.sweep.grid import Grid, Trial

log = logging.getLogger(__name__)

KIND, TRIAL, STAGE, SCHEMA = "vss.sweep", "vss.sweep_cell", "vss.sweep_share", 1


@dataclass(frozen=True)
class Store:
    """A sweep on disk."""

    root: Path
    grid: Grid

    @classmethod
    def read(cls, root: Path | str) -> Store:
        """A sweep that is there."""
        file = Path(root) / "sweep.json"
        grid: Grid = parse(Grid, read_json(file, kind=KIND, schema=SCHEMA).get("grid", {}), source=f"{file}, grid")
        return cls(Path(root), grid)

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
        """What a trial of this sweep does."""
        return experiment(self.grid.study, self.grid.plugins)

    def trials(self) -> list[Trial]:
        """All trials of the grid; its plugins are loaded first."""
        self.experiment()
        return self.grid.trials()

    def record(self, trial: str) -> Json | None:
        """The record of a trial, or None."""
        wanted = {"id": str, "coords": dict, "key": str, "status": str}
        return read_record(self.root / "cells" / f"{trial}.json", TRIAL, wanted)

    def keep(self, trial: Trial, key: str, outcome: Json) -> None:
        """Write the record of a trial, whole or not at all."""
        head = {"id": trial.id, "coords": trial.coords, "key": key}
        write_record(self.root / "cells" / f"{trial.id}.json", TRIAL, head | outcome)

    def folder(self, trial: str) -> Path:
        """Where a trial works."""
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
        """Write what a shared stage returned."""
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
