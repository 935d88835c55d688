"""A grid: what is varied, over what recipe. Every cell of it is a whole recipe with a name.

An axis is a list of choices, each a name with overrides of the recipe. Networks, criteria, budgets and seeds have short
forms; `variants` takes overrides of any kind, so a grid is not bound to one task:

    name: small
    recipe: camvid_unet
    set: {data.root: data/camvid, train.epochs: 4}
    networks: [unet, {name: wide, set: {model.name: unet, model.options: {width: 32}}}]
    criteria: [l1, taylor, "sirfp:faithful"]
    budgets: [0.5, "params:0.3"]
    seeds: [0, 1]
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from vss.core.config import Recipe, Section, load_recipe
from vss.core.errors import VssError, shown, unknown
from vss.core.files import safe_name
from vss.core.yaml12 import overridden, parse, parse_yaml, read_yaml

AXES = {"networks": "network", "criteria": "criterion", "budgets": "budget", "seeds": "seed", "variants": "variant"}


class Choice(Section):
    """One value of an axis: a name and what it changes in the recipe, by dotted keys."""

    name: str = Field(min_length=1)
    set: dict[str, Any] = Field(default={})


class Grid(Section):
    """What a sweep varies; see the module."""

    name: str = "sweep"
    recipe: str | None = Field(default=None, description="a packaged recipe or a YAML file; null: the defaults")
    base: dict[str, Any] = Field(default={}, description="in place of `recipe`: its content")
    set: dict[str, Any] = Field(default={}, description="dotted overrides of every cell")
    networks: tuple[Choice, ...] = ()
    criteria: tuple[Choice, ...] = ()
    budgets: tuple[Choice, ...] = ()
    seeds: tuple[Choice, ...] = ()
    variants: tuple[Choice, ...] = ()
    metric: str | None = Field(default=None, description="what cells are compared by; null: that of the task")
    latency_seconds: float = Field(default=2.0, ge=0, description="to time each network when all is done; 0: not")
    panels: int = Field(default=2, ge=0, description="images in the report")
    plugins: tuple[str, ...] = Field(default=(), description="modules that register networks, criteria, data, studies")
    study: str = Field(default="prune", description="what a cell does: `vss.sweep.study`")

    @field_validator(*AXES, mode="before")
    @classmethod
    def _short_forms(cls, value: Any, info: Any) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        return [_SHORT[info.field_name](item) if isinstance(item, str | int | float) else item for item in items]

    @model_validator(mode="after")
    def _names_are_their_own(self) -> Grid:
        for axis in AXES:
            names = [choice.name for choice in getattr(self, axis)]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{axis} names {twice!r} twice")
        return self

    def cells(self) -> list[Cell]:
        """Every combination, variants innermost, each checked; one that cannot be carries its `fault`."""
        base = self._base()
        axes = [[(AXES[axis], choice) for choice in getattr(self, axis)] for axis in AXES if getattr(self, axis)]
        if not axes:
            raise VssError(f"sweep {self.name!r} varies nothing; give networks, criteria, budgets, seeds or variants.")
        cells = [_cell(base, combination) for combination in itertools.product(*axes)]
        ids = [cell.id for cell in cells]
        twice = next((name for name in ids if ids.count(name) > 1), None) if len(set(ids)) < len(ids) else None
        if twice:
            raise VssError(f"two cells of sweep {self.name!r} are called {twice!r}; give their choices other names.")
        return cells

    def _base(self) -> dict[str, Any]:
        data = load_recipe(self.recipe).model_dump(mode="json") if self.recipe else self.base
        return overridden(data, self.set.items())


@dataclass(frozen=True)
class Cell:
    """One run of a sweep; small, since there may be thousands.

    Attributes:
        id: unique, and a folder name.
        coords: axis -> name of the choice.
        overrides: what the cell changes in the base.
        base: content of the recipe that all cells start from, one dictionary for all.
        fault: why the cell cannot be run.
    """

    id: str
    coords: dict[str, str]
    overrides: dict[str, Any]
    base: dict[str, Any] = field(repr=False)
    fault: str = ""

    def recipe(self) -> Recipe:
        """All that the run depends on."""
        settings = [*self.overrides.items(), ("name", self.id)]
        recipe: Recipe = parse(Recipe, overridden(self.base, settings), source=f"cell {self.id}")
        return recipe


def _cell(base: dict[str, Any], combination: tuple[tuple[str, Choice], ...]) -> Cell:
    coords = {axis: choice.name for axis, choice in combination}
    overrides = {key: value for _, choice in combination for key, value in choice.set.items()}
    cell = Cell(
        safe_name("--".join(safe_name(part).strip("_") or "_" for part in coords.values())), coords, overrides, base
    )
    try:
        cell.recipe()
    except VssError as error:
        return dataclasses.replace(cell, fault=str(error))
    return cell


def _network(item: Any) -> dict[str, Any]:
    return {"name": str(item), "set": {"model.name": str(item)}}


def _criterion(item: Any) -> dict[str, Any]:
    name, _, preset = str(item).partition(":")
    options = {"preset": preset} if preset else {}
    return {"name": str(item), "set": {"prune.criterion": name, "prune.options": options}}


def _budget(item: Any) -> dict[str, Any]:
    kind, _, keep = item.rpartition(":") if isinstance(item, str) else ("macs", "", item)
    kind = kind or "macs"
    value = parse_yaml(keep, source=f"budget {shown(item)}") if isinstance(keep, str) else keep
    return {"name": f"{kind} {value}", "set": {"prune.budget.kind": kind, "prune.budget.keep": value}}


def _seed(item: Any) -> dict[str, Any]:
    return {"name": str(item), "set": {"seed": item}}


def _variant(item: Any) -> dict[str, Any]:
    return {"name": str(item)}


_SHORT = {"networks": _network, "criteria": _criterion, "budgets": _budget, "seeds": _seed, "variants": _variant}


GRIDS = Path(__file__).resolve().parent.parent / "run" / "grids"
OWN_KEYS = frozenset(Grid.model_fields) - {"name"}


def grids() -> list[str]:
    """Names of the grids that come with the package."""
    return sorted(path.stem for path in GRIDS.glob("*.yaml"))


def named_recipe(name: str, overrides: dict[str, Any] | None = None) -> Recipe | None:
    """The recipe of one row of a packaged grid, CRITERION_BUDGET such as `ours_c4_r40`, with the first seed; None where
    there is no such row."""
    for grid in (load_grid(each, overrides) for each in grids()):
        for cell in grid.cells():
            if "_".join(cell.coords[axis] for axis in ("criterion", "budget") if axis in cell.coords) == name:
                return cell.recipe().model_copy(update={"name": name})
    return None


def load_grid(path: Path | str, overrides: dict[str, Any] | None = None) -> Grid:
    """Read a packaged grid by name or any YAML file.

    `overrides` are dotted keys of the recipe, for every cell; keys of the grid itself (`recipe`, `seeds`, ...) replace
    what it says.
    """
    path = Path(path)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        if path.name not in grids():
            raise unknown("grid", str(path), grids())
        path = GRIDS / f"{path.name}.yaml"
    data = read_yaml(path, kind="grid")
    data.setdefault("name", path.stem)
    own = {key: value for key, value in (overrides or {}).items() if key in OWN_KEYS}
    data |= own
    if not isinstance(data.get("set") or {}, dict):
        raise VssError(f"{path}: set is {shown(data['set'])}; expected dotted keys of the recipe with values.")
    data["set"] = {**(data.get("set") or {}), **{k: v for k, v in (overrides or {}).items() if k not in own}}
    grid: Grid = parse(Grid, data, source=str(path))
    return grid
