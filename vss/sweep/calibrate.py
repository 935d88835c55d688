"""One calibration pass for all criteria of a network and seed, kept in a file that every cell reads a part of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vss.core.config import PruneConfig, Recipe
from vss.core.errors import VssError
from vss.core.files import atomic, sha256_json
from vss.prune import Statistics, collect, find_groups, make_criterion
from vss.run import steps
from vss.run.project import Project

Mode = Literal["eval", "train"]
Wanted = dict[Mode, dict[str, Any]]
Found = dict[str, Tensor]
SEPARATOR = "|"


def calibrations(recipes: Iterable[Recipe]) -> dict[str, list[PruneConfig]]:
    """Calibration set (by hash of its settings) -> the prune sections that use it."""
    sets: dict[str, list[PruneConfig]] = {}
    for recipe in recipes:
        sets.setdefault(set_name(recipe.prune), []).append(recipe.prune)
    return sets


def set_name(config: PruneConfig) -> str:
    """What a calibration set is called."""
    return sha256_json([config.batches, config.batch_size, list(config.keep)])[:8]


def wanted(configs: Iterable[PruneConfig]) -> Wanted:
    """Mode of the batch norms -> {name of a statistic: need}, of all criteria together."""
    found: Wanted = {"eval": {}, "train": {}}
    for config in configs:
        criterion = make_criterion(config.criterion, **config.options)
        found[criterion.batch_norm_mode()] |= {str(need): need for need in criterion.needs}
    return found


def measure(
    project: Project, model: nn.Module, config: PruneConfig, needs: Wanted
) -> tuple[Found, dict[str, int], dict[str, str]]:
    """One pass per mode. A statistic that stops the pass is left out of it, and its reason is returned.

    Returns:
        {mode|need|group: statistic}, {mode: batches} and {mode|need: reason}.
    """
    groups = list(find_groups(model, torch.zeros(1, 3, *project.preprocess.size), keep=config.keep))
    loss = steps.calibration_loss(project)
    found: Found = {}
    seen: dict[str, int] = {}
    faults: dict[str, str] = {}

    def run(mode: Mode, names: list[str]) -> None:
        batches = project.calibration(config.batches, config.batch_size)
        results, seen[mode] = collect(model, groups, [needs[mode][n] for n in names], batches, loss, batch_norm=mode)
        for need, table in results.items():
            found.update({SEPARATOR.join((mode, need, group)): value for group, value in table.items()})

    for mode, table in needs.items():
        good = sorted(table)
        if not good:
            continue
        try:
            run(mode, good)
        except VssError:
            for name in good:
                try:
                    run(mode, [name])
                except VssError as error:
                    faults[SEPARATOR.join((mode, name))] = str(error)
    return found, seen, faults


def write(path: Path, found: Found, seen: dict[str, int]) -> None:
    """Statistics as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={mode: str(count) for mode, count in seen.items()})


def read(path: Path, config: PruneConfig, faults: dict[str, str]) -> Statistics | None:
    """What the criterion of `config` needs; None where it needs nothing.

    Raises:
        VssError: a needed statistic could not be had, with the reason.
    """
    from safetensors import safe_open

    criterion = make_criterion(config.criterion, **config.options)
    if not criterion.needs:
        return None
    mode, needs = criterion.batch_norm_mode(), {str(need) for need in criterion.needs}
    for need in sorted(needs):
        if SEPARATOR.join((mode, need)) in faults:
            raise VssError(faults[SEPARATOR.join((mode, need))])
    collected: dict[str, dict[str, Tensor]] = {need: {} for need in needs}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (no mapping, only a method of that name)
            own_mode, need, group = name.split(SEPARATOR, 2)
            if own_mode == mode and need in needs:
                collected[need][group] = file.get_tensor(name)
        return collected, int(file.metadata()[mode])
