"""What `vss quality` computes: criteria judged on a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.config import Recipe
from vss.core.yaml12 import parse
from vss.prune import Budget, CostModel, Criterion, Group, collect, find_groups
from vss.prune import quality as measures
from vss.prune.budget import search
from vss.prune.criteria import parse_methods, score_groups
from vss.prune.stats.base import Stats
from vss.run.project import Project, project_of

SHARES = {"overlap_25": 0.25, "overlap_50": 0.5}
Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A checkpoint with its groups, calibration images (in memory) and the oracle's sample."""

    project: Project
    net: nn.Module
    groups: list[Group]
    batches: Pairs
    sample: list[tuple[str, int]]

    @classmethod
    def open(cls, ckpt: Path, recipe: Recipe, *, dataset: str | None, data_root: str | None, channels: int) -> Subject:
        """Read a checkpoint and `recipe.prune.batches` batches of training images."""
        project = project_of(ckpt, data_root=data_root, dataset=dataset, recipe=recipe)
        net = project.load(ckpt)
        groups = list(find_groups(net, torch.zeros(1, 3, *project.preprocess.size), keep=recipe.prune.keep))
        batches = list(project.calibration(recipe.prune.batches, recipe.prune.batch_size))
        sample = measures.sample_channels(groups, channels, seed=recipe.seed)
        return cls(project, net, groups, batches, sample)

    def cost_sentence(self) -> str:
        images = sum(len(batch[0]) for batch in self.batches)
        forwards = measures.oracle_cost(self.sample, self.batches)
        return f"oracle: {len(self.sample)} channels left out on {images} images, {forwards} forward passes"

    def scores(self, criteria: dict[str, Criterion]) -> dict[str, dict[str, Tensor]]:
        """Scores of every criterion; those that agree on the mode of batch norms share one calibration pass."""
        loss = self.project.task.calibration_loss()
        found: dict[str, dict[str, Tensor]] = {}
        for mode in ("eval", "train"):
            same = {name: criterion for name, criterion in criteria.items() if criterion.batch_norm_mode() == mode}
            needs = [need for criterion in same.values() for need in criterion.needs]
            collected, _ = collect(self.net, self.groups, needs, self.batches, loss, batch_norm=mode)  # type: ignore[arg-type]
            stats = Stats(self.net, collected, seed=self.project.recipe.seed)
            found |= {name: score_groups(criterion, self.groups, stats) for name, criterion in same.items()}
        return {name: found[name] for name in criteria}


def compare(
    subject: Subject, names: Sequence[str], *, keep: float, tick: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Judge criteria, NAME or NAME:PRESET; see `vss.prune.quality` for every figure.

    `keep` is the fraction of the MACs that stays for the reconstruction error; `tick` is called after every channel of
    the oracle.

    Returns:
        `oracle` (sample, absolute changes of the loss, forwards) and `methods`, a row each: `overlap_25`, `overlap_50`
        (chance: 0.25, 0.5), `rank_correlation` with the oracle, `relative_error` of the outputs, `correlations` with
        every criterion over all channels, `correlations_within` groups, and a `note` where a sparse phase was skipped.
    """
    criteria = parse_methods(names)
    scores = subject.scores(criteria)
    net, groups, batches = subject.net, subject.groups, subject.batches
    cost = CostModel.measure(net, torch.zeros(1, 3, *subject.project.preprocess.size))
    budget = parse(Budget, {"keep": keep}, source="budget")
    oracle = measures.oracle(net, groups, subject.sample, batches, subject.project.task.calibration_loss(), tick=tick)
    truth = oracle.change.abs()
    rows = []
    for name, criterion in criteria.items():
        mine = measures.sampled_scores(groups, scores[name], subject.sample)
        own = budget.model_copy(update={"scope": criterion.scope_of(budget.scope)})
        kept = search(groups, scores[name], cost, own, rounding=criterion.rounding)
        others = {other: measures.correlations(scores[name], scores[other]) for other in criteria}
        rows.append({
            "name": name,
            **{key: measures.overlap(mine, truth, share=share) for key, share in SHARES.items()},
            "rank_correlation": measures.rank_correlation(mine, truth),
            "relative_error": measures.reconstruction(net, groups, kept, batches)["relative"],
            "correlations": {other: value["global"] for other, value in others.items()},
            "correlations_within": {other: value["within"] for other, value in others.items()},
            "note": "its sparse phase was not run" if criterion.sparse_phase else "",
        })  # fmt: skip
    sample = [
        {"group": group, "channel": channel, "change": change}
        for (group, channel), change in zip(oracle.sample, oracle.change.tolist(), strict=True)
    ]
    return {
        "keep": keep,
        "seed": subject.project.recipe.seed,
        "images": sum(len(images) for images, _ in batches),
        "oracle": {"loss": oracle.loss, "forwards": oracle.forwards, "sample": sample},
        "methods": rows,
    }


def scan(subject: Subject, name: str) -> list[dict[str, object]]:
    """Mean loss on the calibration images when one group alone loses its lowest channels, for every group."""
    scores = subject.scores(parse_methods([name]))
    loss = subject.project.task.calibration_loss()

    def measure(net: nn.Module) -> float:
        return measures.mean_loss(net, subject.batches, loss)

    return measures.sensitivity(subject.net, subject.groups, next(iter(scores.values())), measure)
