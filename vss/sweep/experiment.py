"""What the trials of a sweep do: a stage that trials of one network and seed share, and the trial itself.

An experiment is a row of `EXPERIMENTS`; a plugin adds its own. It runs in worker processes and returns JSON.
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
class TrialDirs:
    """Where a trial (or a shared stage) works.

    Attributes:
        folder: its own.
        shared: that of the shared stage; in the stage itself equal to `folder`.
        computed: call it with the name and key of every step that was really done.
    """

    folder: Path
    shared: Path
    computed: Callable[[str, str], None]


class Experiment(ABC):
    """The work of a sweep.

    Attributes:
        metric: key of a row by which trials are compared, higher is better, where the shared stage names none.
        times: whether it has `time` and `pictures`.
    """

    metric: ClassVar[str]
    times: ClassVar[bool] = False

    @abstractmethod
    def stage_inputs(self, recipe: Recipe) -> Json:
        """What the shared stage depends on; equal for all trials that share it. Cheap: no data is opened."""

    @abstractmethod
    def check(self, recipe: Recipe) -> None:
        """Raise `VssError` for a trial that can be known to be impossible."""

    def preflight(self, recipe: Recipe, *, here: bool) -> None:  # noqa: B027  (not every experiment opens data)
        """Raise `VssError` for what data and network show to be impossible; `here`: this machine does the work."""

    def preflight_inputs(self, recipe: Recipe) -> Json:
        """What `preflight` depends on: of trials in which it is equal one is looked at."""
        return {}

    @abstractmethod
    def stage(self, recipes: list[Recipe], dirs: TrialDirs) -> Json:
        """Do what the trials of these recipes share.

        Returns:
            {"key": hash of what it came from, "row": figures of the network before pruning}, and where it applies
            "score_key" (hash of what these figures came from), "metric", "title", "row_keys" (scores that tables show),
            "classes", "iou_pct", "protocol", "curves".
        """

    @abstractmethod
    def trial(self, recipe: Recipe, dirs: TrialDirs, shared: Json) -> Json:
        """Do one trial; `shared` is what `stage` returned.

        Returns:
            {"row": {metric: value}}, and where it applies "stage", "iou_pct", "groups", "labels", "curves", "steps".
        """

    def over_folds(self, trials: list[tuple[Recipe, TrialDirs]]) -> Json | None:
        """What the trials of all folds of a cross-validation say together, where the experiment knows: see
        `vss.sweep.results`."""
        return None

    def time(self, recipe: Recipe, dirs: TrialDirs, seconds: float) -> Json:
        """Latency of a trial's network, as more of its row; nothing else runs meanwhile."""
        return {}

    def pictures(self, recipe: Recipe, dirs: TrialDirs, extra: Json) -> Json:
        """{"panels": [...], "palette": [...]} of the trials in `extra["trials"]`, `extra["panels"]` images."""
        return {"panels": []}


EXPERIMENTS: Registry[Experiment] = Registry("experiment")
BUILT_IN = dict.fromkeys(("prune", "engine"), "vss.sweep.prune")


def experiment(name: str, plugins: Iterable[str] = ()) -> Experiment:
    """An experiment by name; one of this package is imported when it is asked for, as it needs torch and lightning."""
    for module in plugins:
        load_plugin(module)
    if name in BUILT_IN:
        importlib.import_module(BUILT_IN[name])
    return EXPERIMENTS[name]
