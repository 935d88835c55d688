"""Which counts are allowed, and that the walk meets a budget with the longest network, deterministically."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from vss import models
from vss.core.errors import VssError
from vss.prune import Budget, CostModel, Group, Slot, apply_plan, find_groups, make_plan
from vss.prune.budget import allowed_counts, rank, search, top_channels
from vss.prune.criteria import make_criterion

from .nets import Concat, Residual


def group(channels: int, name: str = "g", unit: int = 1) -> Group:
    return Group(name, channels, (Slot(f"{name}.weight", 0),), unit)


def free(groups: list[Group]) -> CostModel:
    """One parameter a channel."""
    return CostModel(
        {g.slots[0].tensor: (g.channels,) for g in groups}, {}, frozenset(g.slots[0].tensor for g in groups)
    )


@pytest.mark.parametrize(
    ("channels", "unit", "align", "floor", "choices"),
    [
        (8, 1, 1, 0.0, [1, 2, 3, 4, 5, 6, 7, 8]),
        (8, 1, 1, 0.5, [4, 5, 6, 7, 8]),
        (64, 1, 32, 0.1, [32, 64]),
        (64, 1, 8, 0.3, [24, 32, 40, 48, 56, 64]),  # floor 19.2
        (20, 1, 8, 0.1, [8, 16, 20]),  # the full width may stay whatever the alignment
        (8, 1, 8, 0.1, [8]),
        (16, 1, 16, 0.1, [8, 16]),  # 16 leaves no choice: the next power of two, not below 8
        (32, 1, 32, 0.1, [16, 32]),
        (20, 1, 32, 0.1, [16, 20]),
        (40, 1, 32, 0.9, [40]),  # nothing between the floor and the whole
        (60, 1, 32, 0.7, [48, 60]),  # 32 is below the floor, 16 is not
        (8, 1, 16, 0.1, [8]),
        (6, 1, 6, 0.1, [4, 6]),
        (12, 1, 16, 0.1, [8, 12]),  # narrower than align: the largest power of two in it
        (7, 1, 8, 0.1, [4, 7]),
        (16, 1, 24, 0.1, [8, 16]),
        (48, 3, 16, 0.1, [24, 48]),  # 48 leaves no choice
        (3, 1, 16, 0.1, [2, 3]),
        (1, 1, 16, 0.1, [1]),
        (8, 2, 1, 0.1, [2, 4, 6, 8]),
        (16, 4, 8, 0.1, [8, 16]),
        (48, 6, 8, 0.1, [24, 48]),  # both: the least common multiple
        (32, 16, 8, 0.1, [16, 32]),
        (1, 1, 1, 0.0, [1]),
        (10, 10, 1, 0.0, [10]),
    ],
)
def test_allowed_counts(channels: int, unit: int, align: int, floor: float, choices: list[int]) -> None:
    table = allowed_counts(group(channels, unit=unit), Budget(align=align, floor=floor))
    wanted = [min(choices, key=lambda c: (abs(c - i), c)) for i in range(channels + 1)]
    assert table.tolist() == wanted
    assert min(table.tolist()) >= 1 and sorted(set(table.tolist())) == choices


@pytest.mark.parametrize("align", [8, 16, 24, 32, 64])
@pytest.mark.parametrize("rule", [None, "tiered", "strict32"])
def test_align_holds_in_every_group(align: int, rule: str | None) -> None:
    """No width that is cut to is off the eights, whatever asks for it; below eight channels none is odd."""
    rounding = make_criterion("hw_l1", align=rule).rounding if rule else None
    for channels in range(1, 100):
        counts = set(allowed_counts(group(channels), Budget(align=align, floor=0.2), rounding).tolist()) - {channels}
        assert all(count % min(8, 1 << (channels.bit_length() - 1)) == 0 for count in counts)
        assert counts or rule or channels in (1, 2, 4, 8), (channels, counts)


def test_auto_needs_a_target() -> None:
    with pytest.raises(VssError, match="align is auto, and what that is depends on a target"):
        allowed_counts(group(8), Budget(align="auto"))


def test_a_fixed_table() -> None:
    assert allowed_counts(group(20), Budget(align=8, floor=0)).tolist() == [8] * 13 + [16] * 6 + [20] * 2


@pytest.mark.parametrize(
    ("channels", "removed", "kept"), [(64, 0.2, 51), (1024, 0.4, 614), (10, 0.3, 7), (32, 0.5, 16), (3, 0.9, 1)]
)
def test_local_channels_follow_the_published_integer_rule(channels: int, removed: float, kept: int) -> None:
    groups, scores = [group(channels)], {"g": torch.rand(channels)}
    budget = Budget(kind="channels", keep=1 - removed, scope="local", floor=0)
    assert len(search(groups, scores, free(groups), budget)["g"]) == kept


def test_ties_do_not_over_prune() -> None:
    # a threshold rule that was asked for 2 of 48 removed all 8 dead channels
    groups = [group(16, "a"), group(32, "b")]
    scores = {"a": torch.ones(16), "b": torch.ones(32)}
    scores["b"][:8] = 0
    kept = search(groups, scores, free(groups), Budget(kind="channels", keep=46 / 48, floor=0))
    assert [len(kept["a"]), len(kept["b"])] == [16, 30]
    assert kept["b"].tolist() == list(range(2, 32))


def test_global_rank_no_veto_a_group_of_tiny_scores_is_floored_and_the_rest_pays() -> None:
    # a threshold that would empty the 16-wide group vetoed it: 16 and 24 stayed of the 24 asked for
    groups = [group(16, "a"), group(32, "b")]
    generator = torch.Generator().manual_seed(0)
    scores = {"a": 1e-3 * torch.rand(16, generator=generator), "b": 1 + torch.rand(32, generator=generator)}
    kept = search(groups, scores, free(groups), Budget(kind="channels", keep=0.5, floor=0.25))
    assert [len(kept["a"]), len(kept["b"])] == [4, 20]
    kept = search(groups, scores, free(groups), Budget(kind="channels", keep=0.5, floor=0))
    assert [len(kept["a"]), len(kept["b"])] == [1, 23]


@pytest.mark.parametrize("scope", ["local", "global"])
def test_alignment_goes_to_the_nearest_multiple_and_never_vetoes(scope: str) -> None:
    # round_to=32 at C=64: removing 0.6 left 64; the nearest multiple to 25 is 32
    groups, scores = [group(64)], {"g": torch.arange(64.0)}
    budget = Budget(kind="channels", keep=0.5 if scope == "global" else 0.4, scope=scope, align=32, floor=0)
    assert search(groups, scores, free(groups), budget)["g"].tolist() == list(range(32, 64))


def test_tie_break_deterministic_by_score_then_group_then_channel() -> None:
    groups = [group(2, "a"), group(3, "b")]
    assert rank(groups, {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([1.0, 2.0, 0.0])}).tolist() == [1, 0, 1, 0, 1]


def test_top_channels_breaks_ties_by_keeping_the_higher_number() -> None:
    assert top_channels(torch.ones(5), 2).tolist() == [3, 4]
    assert top_channels(torch.tensor([3.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 2, 3]
    assert top_channels(torch.tensor([9.0, 0.0, 4.0, 4.0, 1.0, 2.0]), 4, unit=2).tolist() == [0, 1, 2, 3]


def fixture(make: object) -> tuple[nn.Module, list[Group], dict[str, Tensor], CostModel]:
    torch.manual_seed(0)
    net, x = make().eval(), torch.zeros(1, 3, 32, 32)  # type: ignore[operator]
    groups = list(find_groups(net, x))
    return net, groups, {g.id: torch.rand(g.channels) for g in groups}, CostModel.measure(net, x)


@pytest.fixture(scope="module")
def unet() -> tuple[nn.Module, list[Group], dict[str, Tensor], CostModel]:
    return fixture(lambda: models.build("unet", 5, width=8, depth=3))


@pytest.mark.parametrize("kind", ["channels", "params", "macs"])
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("keep", [0.3, 0.55, 0.9])
def test_budgets_are_met_within_one_step(unet: tuple, kind: str, scope: str, keep: float) -> None:
    _, groups, scores, cost = unet
    kept = search(groups, scores, cost, Budget(kind=kind, keep=keep, scope=scope, floor=0.1))
    counts = [len(kept[g.id]) for g in groups]
    whole = cost.total(kind, groups, [g.channels for g in groups])
    spent = cost.total(kind, groups, counts) / whole
    assert spent <= keep + 1e-9
    step = max(
        cost.total(kind, groups, [c + (i == j) for j, c in enumerate(counts)]) / whole - spent
        for i in range(len(groups))
    )
    slack = step if scope == "global" else 22 * step  # a local step takes one channel of many groups
    assert keep - spent < slack
    assert all(len(kept[g.id]) >= max(1, int(0.1 * g.channels)) for g in groups)


@pytest.mark.parametrize("kind", ["channels", "params", "macs"])
@pytest.mark.parametrize(("align", "floor", "make"), [(1, 0.0, Concat), (2, 0.3, Concat), (1, 0.2, Residual)])
def test_search_is_the_shortest_walk_by_brute_force(kind: str, align: int, floor: float, make: object) -> None:
    _, groups, scores, cost = fixture(make)
    tables = [allowed_counts(g, Budget(align=align, floor=floor)).tolist() for g in groups]
    channels = sorted((float(scores[g.id][c]), i, c) for i, g in enumerate(groups) for c in range(g.channels))
    for keep in (0.35, 0.5, 0.7, 0.95):
        whole = cost.total(kind, groups, [g.channels for g in groups])
        left = [g.channels for g in groups]
        walks = [list(left)]
        for _, i, _ in channels:
            left[i] -= 1
            walks.append([table[count] for table, count in zip(tables, left, strict=True)])
        fitting = [w for w in walks if cost.total(kind, groups, w) <= keep * whole + 1e-6]
        budget = Budget(kind=kind, keep=keep, floor=min(floor, keep), align=align)
        if not fitting:
            with pytest.raises(VssError, match="allows no less than"):
                search(groups, scores, cost, budget)
            continue
        kept = search(groups, scores, cost, budget)
        assert [len(kept[g.id]) for g in groups] == fitting[0]
        for g in groups:  # and within a group the best ones stay
            ranked = sorted(range(g.channels), key=lambda c, g=g: (float(scores[g.id][c]), c))
            assert kept[g.id].tolist() == sorted(ranked[g.channels - len(kept[g.id]) :])


def test_cost_falls_along_every_walk(unet: tuple) -> None:
    _, groups, scores, cost = unet
    previous = [
        cost.total("macs", groups, [len(search(groups, scores, cost, Budget(keep=k, floor=0))[g.id]) for g in groups])
        for k in (0.9, 0.7, 0.5, 0.3, 0.1)
    ]
    assert all(a > b for a, b in itertools.pairwise(previous))


def test_equal_scores_give_one_answer_whatever_the_seed(unet: tuple) -> None:
    _, groups, _, cost = unet
    scores = {g.id: torch.ones(g.channels) for g in groups}
    torch.manual_seed(1)
    one = search(groups, scores, cost, Budget(keep=0.7))
    torch.manual_seed(2)
    two = search(groups, scores, cost, Budget(keep=0.7))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_floor_is_never_gone_below(unet: tuple) -> None:
    """0.55 of 16 channels are 9, so steps of 8 leave all 16 and not 8."""
    _, groups, scores, cost = unet
    for floor, align in ((0.55, 8), (0.3, 1), (0.3, 4)):
        kept = search(groups, scores, cost, Budget(keep=0.85, floor=floor, align=align))
        assert all(len(kept[g.id]) >= floor * g.channels for g in groups)
        assert any(len(kept[g.id]) < g.channels for g in groups)


def test_unreachable_budget_names_the_least(unet: tuple) -> None:
    _, groups, scores, cost = unet
    floors = [math.ceil(g.channels * 0.9) for g in groups]
    least = cost.total("macs", groups, floors) / cost.total("macs", groups, [g.channels for g in groups])
    with pytest.raises(VssError, match=rf"0\.200 of the macs and the floor of 0\.9 .* no less than {least:.3f}; ask"):
        search(groups, scores, cost, Budget(keep=0.2, floor=0.9))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep": 0}, r"budget: keep is 0; .*greater than or equal to 0\.001"),
        ({"keep": 1.5}, r"budget: keep is 1\.5"),
        ({"kind": "flops"}, "budget: kind is 'flops'; .*'channels', 'params' or 'macs'"),
        ({"align": 0}, "budget: align is 0"),
        ({"align": "eight"}, "budget: align is 'eight'; expected a whole number from 1, or auto"),
        ({"floors": 0.1}, "unknown key in budget 'floors'. Did you mean 'floor'"),
        ({"kind": "channels", "keep": 0.2, "floor": 0.3}, "floor 0.3 is above keep 0.2"),
    ],
)
def test_bad_budgets_are_sentences(options: dict, sentence: str) -> None:
    with pytest.raises(VssError, match=sentence):
        make_plan(nn.Identity(), torch.zeros(1, 3, 8, 8), budget=options)


def nets() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    return {"concat": Concat(), "residual": Residual(), "unet": models.build("unet", 4, width=6, depth=2)}


def legal(whole: int, unit: int, align: int, floor: float) -> set[int]:
    """What may be left of a group of `whole` channels, written out again."""
    step = align if align <= whole else max(p for p in (1, 2, 4, 8) if p <= whole)
    return {n for n in range(1, whole + 1) if n == whole or (n % step == 0 and n % unit == 0 and n >= whole * floor)}


@pytest.mark.parametrize("name", ["concat", "residual", "unet"])
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("align", [1, 4, 8])
@pytest.mark.parametrize("rounds", [2, 4])
def test_floor_and_alignment_hold_of_the_original_widths_in_every_round(
    name: str, scope: str, align: int, rounds: int
) -> None:
    net, example = nets()[name].eval(), torch.zeros(1, 3, 16, 16)
    origin: dict[str, int] = {}
    whole, last, small = 0.0, 1.0, net
    for step in range(1, rounds + 1):
        keep = 1 - 0.2 * step / rounds
        budget = {"kind": "macs", "keep": keep, "scope": scope, "align": align, "floor": 0.3}
        try:
            plan = make_plan(small, example, criterion="random", budget=budget, origin=origin, seed=step)
        except VssError as error:
            assert "allows no less than" in str(error)
            assert least_macs(net, example, align, 0.3) > keep
            return
        origin = origin or {group: before for group, (before, _) in plan.widths().items()}
        whole = whole or plan.cost_before["macs"]
        for group in plan.groups:
            assert len(group.kept) in legal(origin[group.id], group.unit, align, 0.3)
        last = plan.cost_after["macs"] / whole
        assert last <= keep + 1e-9 and plan.budget["keep"] == keep
        small = apply_plan(small, plan)
    assert last >= least_macs(net, example, align, 0.3) - 1e-9


def least_macs(net: nn.Module, example: torch.Tensor, align: int, floor: float) -> float:
    groups = list(find_groups(net, example))
    cost = CostModel.measure(net, example)
    least = [min(legal(g.channels, g.unit, align, floor)) for g in groups]
    return cost.total("macs", groups, least) / cost.total("macs", groups, [g.channels for g in groups])


def test_local_channels_in_rounds_are_those_of_one_round() -> None:
    net, example = nets()["unet"].eval(), torch.zeros(1, 3, 16, 16)
    budget = {"kind": "channels", "scope": "local", "floor": 0.0}
    once = make_plan(net, example, budget=budget | {"keep": 0.4}).widths()
    origin, small = {group: before for group, (before, _) in once.items()}, net
    for keep in (0.7, 0.4):
        plan = make_plan(small, example, budget=budget | {"keep": keep}, origin=origin)
        assert {g.id: len(g.kept) for g in plan.groups} == {g: int(c * keep + 1e-9) for g, c in origin.items()}
        small = apply_plan(small, plan)
    assert {g.id: len(g.kept) for g in plan.groups} == {g: after for g, (_, after) in once.items()}
