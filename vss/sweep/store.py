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
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vss.config import Recipe
from vss.errors import VssError
from vss.files import locked, read_json, sha256_json, write_json
from vss.sweep.grid import Cell, Grid
from vss.sweep.study import Json, Study, study

KIND, CELL, SHARE, SCHEMA = "vss.sweep", "vss.sweep_cell", "vss.sweep_share", 1


@dataclass(frozen=True)
class Store:
    """A sweep on disk."""

    root: Path
    grid: Grid

    @classmethod
    def read(cls, root: Path | str) -> Store:
        """A sweep that is there."""
        data = read_json(Path(root) / "sweep.json", kind=KIND, schema=SCHEMA)
        return cls(Path(root), Grid.model_validate(data["grid"]))

    @classmethod
    def make(cls, root: Path | str, grid: Grid, *, about: Json, replace: bool = False) -> Store:
        """Begin a sweep, or go on with the same one; another one in the folder is refused unless `replace`."""
        root, now = Path(root), sha256_json(grid.model_dump(mode="json"))
        file = root / "sweep.json"
        if file.is_file():
            old = read_json(file, kind=KIND, schema=SCHEMA)
            if old["key"] == now:
                return cls(root, grid)
            if not replace:
                raise VssError(
                    f"{root} holds sweep {old['grid']['name']!r}, which differs in {_difference(old['grid'], grid)}; "
                    "choose another folder, or give --extend to go on with what the two have in common."
                )
        elif root.is_dir() and any(path.name != ".lock" for path in root.iterdir()):
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
        path = self.root / "cells" / f"{cell}.json"
        return read_json(path, kind=CELL, schema=SCHEMA) if path.is_file() else None

    def keep(self, cell: Cell, key: str, outcome: Json) -> None:
        """Write the record of a cell, whole or not at all."""
        head = {"kind": CELL, "schema": SCHEMA, "id": cell.id, "coords": cell.coords, "key": key}
        write_json(self.root / "cells" / f"{cell.id}.json", head | outcome)

    def done(self, cell: Cell, key: str) -> bool:
        """Whether a record of this very cell says ok."""
        record = self.record(cell.id)
        return record is not None and record["status"] == "ok" and record["key"] == key

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
        write_json(self.root / "shared" / f"{name}.json", {"kind": SHARE, "schema": SCHEMA, "result": result})

    def has_share(self, name: str) -> bool:
        """Whether a shared part is done."""
        return (self.root / "shared" / f"{name}.json").is_file()

    def shared(self, name: str) -> Json:
        """What a shared part returned."""
        result: Json = read_json(self.root / "shared" / f"{name}.json", kind=SHARE, schema=SCHEMA)["result"]
        return result

    # -- what was computed --------------------------------------------------------------------------------------------

    def computed(self) -> list[Json]:
        """Every step that was computed to its end: {"part", "step", "key", "process"}, in no order."""
        files = sorted((self.root / "computed").glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

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

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Only one sweep is at work in a folder; the lock goes with the process, however that ends."""
        with locked(self.root / ".lock", refusal=f"another sweep is at work in {self.root}; wait for it."):
            yield


def note_computed(root: Path, part: str, step: str, key: str) -> None:
    """Append to this process's own file; a line is there once the step's record is."""
    process = f"{socket.gethostname()}-{os.getpid()}"
    path = root / "computed" / f"{process}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"part": part, "step": step, "key": key, "process": process}) + "\n")


def _difference(old: Json, grid: Grid) -> str:
    new: dict[str, Any] = grid.model_dump(mode="json")
    return ", ".join(key for key in new if old.get(key) != new[key]) or "nothing that this version knows"
