"""C1: the two width rules against the published table, and the L1 norm behind them."""

from __future__ import annotations

import pytest
import torch

from vss.core.errors import VssError
from vss.prune import Budget, CostModel, Group, Slot, make_criterion, make_plan
from vss.prune.budget import allowed_counts, search
from vss.prune.criteria.base import strict32, tiered

from ..nets import randomise
from .feeds import Mixed, filter_scores

RATIOS = (0.2, 0.4, 0.6)
TABLE = {  # channels: kept by the documented rule, kept by the executed one, at the three ratios
    32: ((32, 32, 32), (25, 19, 12)),
    64: ((64, 32, 32), (48, 40, 24)),
    256: ((192, 160, 96), (192, 160, 96)),
    512: ((416, 320, 192), (416, 320, 192)),
    1024: ((832, 608, 416), (832, 608, 416)),
    2048: ((1632, 1216, 832), (1632, 1216, 832)),
}


@pytest.mark.parametrize("channels", TABLE)
def test_c1_table(channels: int) -> None:
    documented, executed = TABLE[channels]
    assert tuple(strict32(channels, r) for r in RATIOS) == documented
    assert tuple(tiered(channels, r) for r in RATIOS) == executed


def test_c1_rounds_half_to_even_as_python_does() -> None:
    assert round(0.5) == 0 and strict32(40, 0.6) == 32  # 16 channels are half a step, rounded to none, then at least 32
    assert strict32(100, 0.2) == 64 and strict32(140, 0.2) == 128  # 80: 2.5 -> 2 steps; 112: 3.5 -> 4 steps
    assert strict32(20, 0.2) == 20 and strict32(80, 0.0) == 80
    assert tiered(100, 0.24) == 80 and tiered(100, 0.0) == 100  # 76 is 9.5 steps, rounded up


def test_c1_takes_eight_where_nearly_all_would_stay() -> None:
    assert [tiered(64, r) for r in (0.01, 0.05, 0.07)] == [56, 56, 56]
    assert tiered(64, 0.1) == 56  # 57 is nearest to 56


@pytest.mark.parametrize("rule", [tiered, strict32])
def test_c1_never_zero(rule: object) -> None:
    for channels in (1, 2, 7, 31, 32, 33, 47, 48, 63, 64, 255, 256, 300):
        counts = [rule(channels, step / 50) for step in range(51)]
        assert all(1 <= count <= channels for count in counts)
        group = Group("g", channels, (Slot("w", 0),))
        table = allowed_counts(group, Budget(floor=0.0), rule).tolist()
        assert table == sorted(table) and table[0] >= 1 and table[-1] == channels


def test_c1_scores_are_l1_norms() -> None:
    w = torch.randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close(filter_scores("c1", w), w.abs().sum(dim=1), rtol=1e-6, atol=1e-6)  # float32 inside


def test_a_local_budget_keeps_the_published_widths() -> None:
    groups = [Group(f"g{c}", c, (Slot("w", 0),)) for c in TABLE]
    scores = {group.id: torch.rand(group.channels) for group in groups}
    for r in RATIOS:
        for name, column in (("strict32", 0), ("tiered", 1)):
            budget = Budget(kind="channels", keep=1 - r, scope="local", floor=0.0)
            rounding = make_criterion("hw_l1", align=name).rounding
            kept = search(groups, scores, CostModel({}, {}, frozenset()), budget, rounding=rounding)
            wanted = [TABLE[group.channels][column][RATIOS.index(r)] for group in groups]
            assert [len(kept[group.id]) for group in groups] == wanted


def test_widths_hold_in_plans_of_every_scope() -> None:
    net = randomise(Mixed(64))
    for kind, scope in (("channels", "local"), ("macs", "local"), ("macs", "global")):
        budget = {"kind": kind, "scope": scope, "keep": 0.6}
        plan = make_plan(net, torch.zeros(1, 3, 8, 8), criterion="hw_l1", budget=budget)
        before, after = plan.widths()["backbone.stem.0"]
        assert before == 64 and after % 8 == 0 and after < 64


def test_nothing_is_removed_where_nothing_was_asked_for() -> None:
    plan = make_plan(
        randomise(Mixed(64)), torch.zeros(1, 3, 8, 8), criterion="hw_l1",
        budget={"kind": "channels", "scope": "local", "keep": 1.0},
    )  # fmt: skip
    assert all(before == after for before, after in plan.widths().values())


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(VssError, match=r"align of criterion 'hw_l1' 'strict'\. Did you mean 'strict32'"):
        make_criterion("hw_l1", align="strict")
    assert make_criterion("hw_l1", align="none").rounding is None
