"""What a sweep with an axis of folds says by all its images: trials that differ in the fold alone, put together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vss.core.config import Recipe
from vss.sweep.experiment import Json, TrialDirs
from vss.sweep.grid import REPEATS, Trial
from vss.sweep.store import Store


def over_folds(store: Store, trials: Sequence[Trial], done: set[str]) -> list[Json]:
    """One entry a network and seed that was cross-validated.

    Args:
        store: the sweep.
        trials: all of its trials.
        done: ids of those that are done.

    Returns:
        {"name", "seed", "folds"}, and `rows` and `checks` of `vss.train.tasks.base.Task.over_folds`; or `missing`: the
        folds without a trial that is done, in place of both.
    """
    table: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        if "fold" in trial.coords and not trial.fault:
            name = " · ".join(v for axis, v in trial.coords.items() if axis not in REPEATS)
            table.setdefault((name, trial.coords.get("seed", "")), []).append(trial)
    found = []
    for (name, seed), members in table.items():
        folds = {str(trial.recipe().data.fold): trial for trial in members}
        counts = {fold.partition("/")[2] for fold in folds}
        wanted = {f"{number}/{count}" for count in counts for number in range(1, int(count) + 1)}
        missing = sorted(wanted - {fold for fold, trial in folds.items() if trial.id in done})
        entry: Json = {"name": name, "seed": seed, "folds": len(wanted)}
        if missing:
            found.append(entry | {"missing": missing})
            continue
        said = store.experiment().over_folds([_place(store, folds[fold]) for fold in sorted(folds)])
        if said is not None:
            found.append(entry | said)
    return found


def _place(store: Store, trial: Trial) -> tuple[Recipe, TrialDirs]:
    folder: Path = store.folder(trial.id)
    return trial.recipe(), TrialDirs(folder, store.root / "shared" / store.stage_of(trial), lambda *_: None)
