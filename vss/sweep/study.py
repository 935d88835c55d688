"""What a cell does, in two parts: what cells of one network and seed share, and the cell itself.

A study is a row of `STUDIES`; a plugin adds its own. It runs in worker processes, gets a `Place` and returns JSON.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vss.core.config import Recipe
from vss.core.registry import Registry, load_plugin

Json = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a part of a sweep works.

    Attributes:
        folder: its own.
        shared: that of what the cells of one network and seed share; equal to `folder` in the shared part.
        computed: call it with the name and key of every step that was really done.
        progress: whether progress bars may be drawn.
    """

    folder: Path
    shared: Path
    computed: Callable[[str, str], None]
    progress: bool = False


class Study(ABC):
    """The parts of a sweep's work.

    Attributes:
        metric: key of a row by which cells are compared, higher is better, where `share` names none.
        times: whether it has `time` and `pictures`.
    """

    metric: ClassVar[str]
    times: ClassVar[bool] = False

    @abstractmethod
    def share_of(self, recipe: Recipe) -> Json:
        """What the shared part depends on; equal for all cells that share it. Cheap: no data is opened."""

    @abstractmethod
    def check(self, recipe: Recipe) -> None:
        """Raise `VssError` for a cell that can be known to be impossible."""

    def preflight(self, recipe: Recipe, *, here: bool) -> None:  # noqa: B027  (not every study opens data)
        """Raise `VssError` for what data and network show to be impossible; `here`: this machine does the work."""

    def preflight_of(self, recipe: Recipe) -> Json:
        """What `preflight` depends on: cells in which it is equal are looked at once."""
        return {}

    @abstractmethod
    def share(self, recipes: list[Recipe], place: Place) -> Json:
        """Do what the recipes of these cells share.

        Returns:
            {"key": hash of what it came from, "row": figures of the network before pruning}, and where it applies
            "score_key" (hash of what these figures came from), "metric", "title", "row_keys" (scores that tables show),
            "classes", "iou_pct", "protocol", "curves".
        """

    @abstractmethod
    def cell(self, recipe: Recipe, place: Place, shared: Json) -> Json:
        """Do one cell; `shared` is what `share` returned.

        Returns:
            {"row": {metric: value}}, and where it applies "stage", "iou_pct", "groups", "labels", "curves", "steps".
        """

    def time(self, recipe: Recipe, place: Place, seconds: float) -> Json:
        """Latency of a cell's network, as more of its row; nothing else runs meanwhile."""
        return {}

    def pictures(self, recipe: Recipe, place: Place, extra: Json) -> Json:
        """{"panels": [...], "palette": [...]} of the cells in `extra["cells"]`, `extra["panels"]` images."""
        return {"panels": []}


STUDIES: Registry[Study] = Registry("study")
BUILT_IN = {"prune": "vss.sweep.prune", "engine": "vss.sweep.prune"}


def study(name: str, plugins: Iterable[str] = ()) -> Study:
    """A study by name; the one of this package is imported when it is asked for, as it needs torch and lightning."""
    for module in plugins:
        load_plugin(module)
    if name in BUILT_IN:
        importlib.import_module(BUILT_IN[name])
    return STUDIES[name]
