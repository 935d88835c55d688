"""The random control: exact in number, uniform, and independent of everything but the seed and the group."""

from __future__ import annotations

import math

import torch
from scipy import stats as scipy_stats

from vss.prune import Budget, CostModel, Group, Slot, make_criterion
from vss.prune.budget import search
from vss.prune.stats.base import Stats


def group(name: str, channels: int) -> Group:
    return Group(name, channels, (Slot(f"{name}.weight", 0),))


def draw(name: str, channels: int, seed: int) -> torch.Tensor:
    return make_criterion("random")(group(name, channels), Stats(torch.nn.Identity(), seed=seed))


def test_keyed_by_seed_and_group_alone() -> None:
    torch.manual_seed(0)
    first = draw("a", 16, 1)
    torch.rand(7)
    draw("b", 16, 1)
    assert torch.equal(draw("a", 16, 1), first)
    assert not torch.equal(draw("b", 16, 1), first) and not torch.equal(draw("a", 16, 2), first)
    state = torch.get_rng_state()
    draw("a", 16, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_exact_count_whatever_the_seed() -> None:
    groups = [group("a", 10)]
    cost = CostModel({}, {}, frozenset())
    budget = Budget(kind="channels", keep=0.6, scope="local", floor=0)
    for seed in range(20):
        kept = search(groups, {"a": draw("a", 10, seed)}, cost, budget)
        assert len(kept["a"]) == 6


def test_every_subset_is_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(3000):
        chosen = tuple(sorted(draw("layer", 6, seed).argsort()[3:].tolist()))
        counts[chosen] = counts.get(chosen, 0) + 1
    assert len(counts) == math.comb(6, 3)
    assert scipy_stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_groups_are_independent() -> None:
    a = torch.stack([draw("a", 4, seed) for seed in range(1500)])
    b = torch.stack([draw("b", 4, seed) for seed in range(1500)])
    correlation = torch.corrcoef(torch.cat([a, b], dim=1).T)[:4, 4:]
    assert float(correlation.abs().max()) < 0.1
    assert scipy_stats.kstest(a.flatten().numpy(), "uniform").pvalue > 1e-3
