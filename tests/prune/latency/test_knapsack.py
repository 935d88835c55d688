"""The search against brute force, its floor, ties to alignment, and units of channels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vss.core.errors import VssError
from vss.prune.latency import choices, group_step, search, widths_of
from vss.prune.plan import Group

GROUPS = [Group("a", 16, ()), Group("b", 24, ()), Group("c", 8, ())]


def latency(widths: np.ndarray) -> np.ndarray:
    """A chain with a cliff: b is paid for in blocks of 8."""
    a, b, c = (widths[..., i] for i in range(3))
    b = np.ceil(b / 8) * 8
    return 1.0 + 0.02 * a * b + 0.05 * b * c + 0.1 * c


def scores(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.id: torch.rand(group.channels, generator=generator) ** 2 for group in GROUPS}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_near_the_best_of_all_widths(seed: int, share: float) -> None:
    options = choices(GROUPS, scores(seed), step=2, floor=0.1)
    target = share * float(latency(np.array([16, 24, 8])))
    every = np.array(list(itertools.product(*(range(len(each)) for each in options.widths))))
    fits = every[latency(options.at(every)) <= target]
    best = float(options.score(fits).max())
    widths = search(options, latency, target)
    assert float(latency(widths)) <= target
    state = np.array([list(each).index(w) for each, w in zip(options.widths, widths, strict=True)])
    assert float(options.score(state)) >= 0.98 * best


def test_widths_at_the_end_of_a_cliff_are_taken() -> None:
    options = choices(GROUPS, scores(0), step=1, floor=0.1)
    widths = search(options, latency, 0.6 * float(latency(np.array([16, 24, 8]))))
    assert widths[1] % 8 == 0  # 17..24 cost the same, so what fits is filled up


def test_a_target_below_the_floor_says_the_floor() -> None:
    options = choices(GROUPS, scores(0), step=4, floor=0.5)
    least = float(latency(np.array([8, 12, 4])))
    with pytest.raises(VssError, match=rf"target of {least - 0.01:.3f} ms is below the floor.*takes {least:.3f} ms"):
        search(options, latency, least - 0.01)
    assert search(options, latency, least).tolist() == [8, 16, 4]  # 16 cost what 12 do
    assert search(options, latency, 1e9).tolist() == [16, 24, 8]


def test_small_groups_get_smaller_steps_and_units_stay_whole() -> None:
    assert group_step(Group("x", 256, ()), 32) == 32
    assert group_step(Group("x", 64, ()), 32) == 16
    assert group_step(Group("x", 16, ()), 32) == 4
    assert group_step(Group("x", 4, ()), 32) == 2  # never down to odd widths
    assert widths_of(Group("x", 16, ()), 16, 0.1, exact=True).tolist() == [8, 16]
    assert widths_of(Group("x", 64, ()), 16, 0.3).tolist() == [32, 48, 64]
    assert widths_of(Group("x", 24, (), unit=6), 4, 0.0).tolist() == [12, 24]
    only = choices([Group("x", 24, (), unit=6)], {"x": torch.arange(24.0)}, step=1, floor=0.0)
    assert only.widths[0].tolist() == [6, 12, 18, 24]
    assert only.kept[0].tolist() == [sum(range(24 - n, 24)) for n in (6, 12, 18, 24)]


def test_a_rule_of_widths_is_kept() -> None:

    def rule(channels: int, removed: float) -> int:
        return max(8, int(channels * (1 - removed)) // 8 * 8)

    assert widths_of(Group("x", 64, ()), 1, 0.1, rule).tolist() == [8, 16, 24, 32, 40, 48, 56, 64]
