"""A sweep's folder: what it is, one record per cell, who is at work in it, and what has been computed.

sweep.json       the grid, its cells and how it was started
cells/ID.json    one record per cell: status, row, seconds, attempts
runs/ID/         the cell's own files; shared/NAME/ what cells of one network and seed share
logs/ID.log      all that was said in the cell
computed/        one line per step that was really computed, a file per process
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.core.files import read_json, sha256_json, write_json
from vss.core.locks import is_leftover
from vss.core.yaml12 import parse
from vss.run.runner import read_record, write_record
from vss.sweep.grid import Cell, Grid
from vss.sweep.study import Json, Study, study

log = logging.getLogger(__name__)

KIND, CELL, SHARE, SCHEMA = "vss.sweep", "vss.sweep_cell", "vss.sweep_share", 1


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
        root, now = Path(root), sha256_json(grid.model_dump(mode="json"))
        file = root / "sweep.json"
        if file.is_file():
            old = _head(file)
            if old and old["key"] == now:
                return cls(root, grid)
            if old and not replace:
                raise VssError(
                    f"{root} holds sweep {old['grid']['name']!r}, which differs in {_difference(old['grid'], grid)}; "
                    "choose another folder, or give --extend to go on with what the two have in common."
                )
        elif root.is_dir() and any(path.name != ".lock" and not is_leftover(path) for path in root.iterdir()):
            raise VssError(f"{root} holds other files and no sweep; choose another folder.")
        head = {"kind": KIND, "schema": SCHEMA, "key": now}
        write_json(file, head | {"grid": grid.model_dump(mode="json"), **about})
        return cls(root, grid)

    def about(self) -> Json:
        """The content of sweep.json."""
        return read_json(self.root / "sweep.json", kind=KIND, schema=SCHEMA)

    # -- cells --------------------------------------------------------------------------------------------------------

    def record(self, cell: str) -> Json | None:
        """The record of a cell, or None."""
        wanted = {"id": str, "coords": dict, "key": str, "status": str}
        return read_record(self.root / "cells" / f"{cell}.json", CELL, wanted)

    def keep(self, cell: Cell, key: str, outcome: Json) -> None:
        """Write the record of a cell, whole or not at all."""
        head = {"id": cell.id, "coords": cell.coords, "key": key}
        write_record(self.root / "cells" / f"{cell.id}.json", CELL, head | outcome)

    def done(self, cell: Cell, key: str) -> Json | None:
        """The record of this very cell, where it says ok."""
        record = self.record(cell.id)
        return record if record and record["status"] == "ok" and record["key"] == key else None

    def folder(self, cell: str) -> Path:
        """Where a cell works."""
        return self.root / "runs" / cell

    def log(self, name: str) -> Path:
        """The log of a cell or a shared part."""
        return self.root / "logs" / f"{name}.log"

    def cells(self) -> list[Cell]:
        """All cells of the grid; its plugins are loaded first."""
        self.study()
        return self.grid.cells()

    def study(self) -> Study:
        """What a cell of this sweep does."""
        return study(self.grid.study, self.grid.plugins)

    # -- shared parts -------------------------------------------------------------------------------------------------

    def share(self, cell: Cell) -> str:
        """Name of the shared part that a cell belongs to, which is also a folder."""
        return f"shared-{sha256_json(self.study().share_of(cell.recipe()))[:12]}"

    def recipes(self, share: str) -> list[Recipe]:
        """Recipes of the cells of one shared part, without those that cannot be."""
        found = []
        for cell in self.cells():
            with contextlib.suppress(VssError):
                if not cell.fault and self.share(cell) == share:
                    recipe = cell.recipe()
                    self.study().check(recipe)
                    found.append(recipe)
        return found

    def keep_share(self, name: str, result: Json) -> None:
        """Write what a shared part returned."""
        write_record(self._share_file(name), SHARE, {"result": result})

    def shared(self, name: str) -> Json | None:
        """What a shared part returned; None where it is not done."""
        record = read_record(self._share_file(name), SHARE, {"result": dict})
        return record and record["result"]

    def _share_file(self, name: str) -> Path:
        return self.root / "shared" / f"{name}.json"

    # -- what was computed --------------------------------------------------------------------------------------------

    def computed(self) -> list[Json]:
        """Every step that was computed to its end: {"part", "step", "key", "process"}, in no order."""
        files = sorted((self.root / "computed").glob("*.jsonl"))
        lines = [line for file in files for line in file.read_text().splitlines(keepends=True)]
        return [json.loads(line) for line in lines if line.endswith("}\n")]  # a killed process leaves half a line

    def repeated(self) -> list[Json]:
        """Steps that were computed more than once from the same inputs in the same place; empty when all is well."""
        seen: set[tuple[str, str]] = set()
        twice = []
        for line in self.computed():
            place = (line["part"], line["key"])
            if place in seen:
                twice.append(line)
            seen.add(place)
        return twice


def note_computed(root: Path, part: str, step: str, key: str) -> None:
    """Append to this process's own file; a line is there once the step's record is."""
    process = f"{socket.gethostname()}-{os.getpid()}"
    path = root / "computed" / f"{process}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"part": part, "step": step, "key": key, "process": process}) + "\n")


def _head(file: Path) -> Json | None:
    """sweep.json; None for a damaged one, which is written again: cells are kept by keys of their own."""
    try:
        data = read_json(file, kind=KIND, schema=SCHEMA)
        Grid.model_validate(data["grid"])
    except (VssError, KeyError, ValidationError) as error:
        log.warning("%s is no whole head of a sweep (%s); it is written again.", file, error)
        return None
    return data if isinstance(data.get("key"), str) else None


def _difference(old: Json, grid: Grid) -> str:
    new: dict[str, Any] = grid.model_dump(mode="json")
    return ", ".join(key for key in new if old.get(key) != new[key]) or "nothing that this version knows"
