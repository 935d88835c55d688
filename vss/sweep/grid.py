"""A grid: what is varied, over what recipe. Every trial of it is a whole recipe with a name.

An axis is a list of choices, each a name with overrides of the recipe. All but one have short forms; `variants` takes
overrides of any kind, so a grid is not bound to one task:

    name: small
    recipe: camvid_unet
    set: {data.root: data/camvid, train.epochs: 4}
    networks: [unet, {name: wide, set: {model.name: unet, model.options: {width: 32}}}]
    criteria: [l1, taylor, "sirfp:faithful"]
    budgets: [0.5, "params:0.3"]
    seeds: [0, 1]
    folds: 5          # of cross-validation: 1/5, 2/5, ...
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from vss.core.config import ModelConfig, Recipe, load_recipe
from vss.core.errors import VssError, shown, unknown
from vss.core.files import safe_name
from vss.core.report import read_report
from vss.core.sections import Section
from vss.core.yaml12 import overridden, parse, parse_yaml, read_yaml

AXES = {
    "networks": "network", "criteria": "criterion", "budgets": "budget", "seeds": "seed", "folds": "fold",
    "variants": "variant",
}  # fmt: skip
REPEATS = ("seed", "fold")
"""Axes over which figures are averaged."""


class Choice(Section):
    """One value of an axis: a name and what it changes in the recipe, by dotted keys."""

    name: str = Field(min_length=1)
    set: dict[str, Any] = Field(default={})


class Grid(Section):
    """What a sweep varies; see the module."""

    name: str = "sweep"
    recipe: str | None = Field(default=None, description="a packaged recipe or a YAML file; null: the defaults")
    base: dict[str, Any] = Field(default={}, description="in place of `recipe`: its content")
    set: dict[str, Any] = Field(default={}, description="dotted overrides of every trial")
    networks: tuple[Choice, ...] = ()
    criteria: tuple[Choice, ...] = ()
    budgets: tuple[Choice, ...] = ()
    seeds: tuple[Choice, ...] = ()
    folds: tuple[Choice, ...] = Field(default=(), description="a number N for 1/N to N/N, or some of them")
    variants: tuple[Choice, ...] = ()
    metric: str | None = Field(default=None, description="what trials are compared by; null: that of the task")
    latency_seconds: float = Field(default=2.0, ge=0, description="to time each network when all is done; 0: not")
    panels: int = Field(default=2, ge=0, description="images in the report")
    plugins: tuple[str, ...] = Field(default=(), description="modules that register networks, criteria, experiments")
    study: str = Field(default="prune", description="what a trial does: `vss.sweep.experiment`")

    @field_validator(*AXES, mode="before")
    @classmethod
    def _short_forms(cls, value: object, info: ValidationInfo) -> list[object]:
        if info.field_name == "folds" and isinstance(value, int):
            value = [f"{number}/{value}" for number in range(1, value + 1)] or [f"1/{value}"]
        items = value if isinstance(value, list | tuple) else [value]
        return [_SHORT[str(info.field_name)](item) if isinstance(item, str | int | float) else item for item in items]

    @model_validator(mode="after")
    def _names_are_their_own(self) -> Grid:
        for axis in AXES:
            names = [choice.name for choice in getattr(self, axis)]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{axis} names {twice!r} twice")
        return self

    def trials(self) -> list[Trial]:
        """Every combination, variants innermost, each checked; one that cannot be carries its `fault`."""
        data = load_recipe(self.recipe).model_dump(mode="json") if self.recipe else self.base
        base = overridden(data, self.set.items())
        axes = [[(AXES[axis], choice) for choice in getattr(self, axis)] for axis in AXES if getattr(self, axis)]
        if not axes:
            raise VssError(f"sweep {self.name!r} varies nothing; give networks, criteria, budgets, seeds or variants.")
        trials = [_trial(base, combination) for combination in itertools.product(*axes)]
        ids = [trial.id for trial in trials]
        twice = next((name for name in ids if ids.count(name) > 1), None) if len(set(ids)) < len(ids) else None
        if twice:
            raise VssError(f"two trials of sweep {self.name!r} are called {twice!r}; give their choices other names.")
        return trials


@dataclass(frozen=True)
class Trial:
    """One run of a sweep; small, since there may be thousands.

    Attributes:
        id: unique, and a folder name.
        coords: axis -> name of the choice.
        overrides: what the trial changes in the base.
        base: content of the recipe that all trials start from, one dictionary for all.
        fault: why the trial cannot be run.
    """

    id: str
    coords: dict[str, str]
    overrides: dict[str, Any]
    base: dict[str, Any] = field(repr=False)
    fault: str = ""

    def recipe(self) -> Recipe:
        settings = [*self.overrides.items(), ("name", self.id)]
        return parse(Recipe, overridden(self.base, settings), source=f"trial {self.id}")


def _trial(base: dict[str, object], combination: tuple[tuple[str, Choice], ...]) -> Trial:
    coords = {axis: choice.name for axis, choice in combination}
    overrides = {key: value for _, choice in combination for key, value in choice.set.items()}
    trial = Trial(
        safe_name("--".join(safe_name(part).strip("_") or "_" for part in coords.values())), coords, overrides, base
    )
    try:
        trial.recipe()
    except VssError as error:
        return dataclasses.replace(trial, fault=str(error))
    return trial


def _criterion(item: object) -> dict[str, Any]:
    name, _, preset = str(item).partition(":")
    options = {"preset": preset} if preset else {}
    return {"name": str(item), "set": {"prune.criterion": name, "prune.options": options}}


def _budget(item: object) -> dict[str, Any]:
    kind, _, keep = item.rpartition(":") if isinstance(item, str) else ("macs", "", item)
    kind = kind or "macs"
    value = parse_yaml(keep, source=f"budget {shown(item)}") if isinstance(keep, str) else keep
    return {"name": f"{kind} {value}", "set": {"prune.budget.kind": kind, "prune.budget.keep": value}}


_SHORT: dict[str, Callable[[object], dict[str, Any]]] = {
    "networks": lambda item: {"name": str(item), "set": {"model.name": str(item)}},
    "criteria": _criterion,
    "budgets": _budget,
    "seeds": lambda item: {"name": str(item), "set": {"seed": item}},
    "folds": lambda item: {"name": f"fold {item}", "set": {"data.fold": item}},
    "variants": lambda item: {"name": str(item)},
}


GRIDS = Path(__file__).resolve().parent.parent / "run" / "grids"
OWN_KEYS = frozenset(Grid.model_fields) - {"name"}


def grids() -> list[str]:
    """Names of the grids that come with the package."""
    return sorted(path.stem for path in GRIDS.glob("*.yaml"))


def named_recipe(name: str, overrides: dict[str, object] | None = None) -> Recipe | None:
    """The recipe of a row of a packaged grid, CRITERION_BUDGET such as `ours_c4_r40`, with the first seed, or None."""
    for grid in (load_grid(each, overrides) for each in grids()):
        for trial in grid.trials():
            if "_".join(trial.coords[axis] for axis in ("criterion", "budget") if axis in trial.coords) == name:
                return trial.recipe().model_copy(update={"name": name})
    return None


def load_grid(path: Path | str, overrides: dict[str, object] | None = None) -> Grid:
    """Read a packaged grid by name or any YAML file.

    `overrides` are dotted keys of the recipe, for every trial; keys of the grid itself (`recipe`, `seeds`, ...) replace
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
    return parse(Grid, data, source=str(path))


NETS = ("baseline.safetensors", "best.safetensors")


def benchmark_grid(
    name: str, baseline: Path, methods: list[str], budgets: list[str], seeds: int, changes: dict[str, Any]
) -> Grid:
    """Methods (METHOD or METHOD:PRESET) x budgets (KIND:KEEP) x seeds on one trained network.

    Args:
        name: of the sweep.
        baseline: a checkpoint, or a folder with one; the report of a run beside it gives data and schedules.
        seeds: how many.
        changes: dotted keys of the recipe; `model.factory` builds a network that is not registered.
    """
    if seeds < 1:
        raise VssError(f"{seeds} seeds are no benchmark; give at least 1.")
    file = _checkpoint(baseline)
    from vss.run.inputs import require_foreign
    from vss.run.project import read_network

    own = {key: changes[f"model.{key}"] for key in ("factory", "options") if f"model.{key}" in changes}
    config = ModelConfig(**own)
    require_foreign(config, [file])
    saved = read_network(file, config)
    if saved.preprocess is None:
        raise VssError(f"{file} does not say its preprocessing; save it with vss.save(..., preprocess=...).")
    report = file.parent / "report.json"
    base: dict[str, Any] = dict(read_report(report)["recipe"]) if report.is_file() else {}
    dataset = saved.info.get("dataset")
    data = base.get("data", {}) | {"size": saved.preprocess["size"]} | ({"dataset": dataset} if dataset else {})
    base |= {"data": data, "model": {"checkpoint": str(file.resolve())} | (own or {"name": saved.model.name})}
    axes = {"criteria": methods, "budgets": budgets, "seeds": list(range(seeds))}
    return parse(Grid, {"name": name, "base": base, "set": changes, **axes}, source="the command line")


def _checkpoint(path: Path) -> Path:
    if path.is_file():
        return path
    found = next((path / name for name in NETS if (path / name).is_file()), None)
    if found is None:
        raise VssError(f"{path} holds no trained network; expected {' or '.join(NETS)} in it, or a checkpoint.")
    return found


def finetune_grid(grid: Grid, changes: dict[str, Any]) -> Grid:
    """The grid of a finished sweep with another fine-tuning."""
    wrong = next((key for key in changes if not key.startswith("finetune.")), None)
    if wrong:
        raise VssError(f"finetune-batch changes the fine-tuning alone, and {wrong} is not of it; start a sweep.")
    return grid.model_copy(update={"set": {**grid.set, **changes}})
