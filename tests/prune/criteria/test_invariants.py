"""What holds for every registered criterion, on a network with a residual and a concatenation (U1 to U3, U5 to U7)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.prune import CRITERIA, Criterion, Groups, apply_plan, collect, find_groups, make_criterion, make_plan
from vss.prune.criteria import data_needs, score_groups
from vss.prune.stats.base import Stats

from ..nets import randomise
from .feeds import FeatureNorm, Mixed

EXAMPLE = torch.zeros(1, 3, 12, 12)
WIDTHS = {"backbone.stem.0": 3, "backbone.one.0": 4, "branch.0": 2, "merge.0": 5}
NAMES = CRITERIA.names()
PRESETS = [(name, preset) for name in NAMES for preset in (None, *CRITERIA[name].PRESETS)]
EQUIVARIANT = [(name, preset) for name, preset in PRESETS if name != "random"]  # keyed by channel number on purpose
BY_FILTER = ("random", "l1", "l2", "hw_l1", "dmcp", "corr", "lamp")  # blind to what the norm layer does to a filter
Batch = tuple[Tensor, Tensor]


def make(name: str, preset: str | None = None) -> Criterion:
    options: dict[str, Any] = {"widths": WIDTHS} if name == "dmcp" else {}
    return make_criterion(name, preset=preset, **options)


def net_for(name: str, *, side: int = 12) -> tuple[nn.Module, Groups]:
    """In float64, so that permuted sums agree; feature norms where the criterion scores them."""
    torch.manual_seed(3)
    net = randomise(Mixed(norm=FeatureNorm if name == "fn" else nn.BatchNorm2d))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, FeatureNorm):
                module.scale.copy_(0.5 + torch.rand_like(module.scale))
    groups = find_groups(net, torch.zeros(1, 3, side, side))
    return net.double(), groups


def batches_of(count: int = 3, *, side: int = 12, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64),
            torch.randint(3, (2, side, side), generator=generator),
        )
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def scores(criterion: Criterion, net: nn.Module, groups: Groups, batches: list[Batch]) -> dict[str, Tensor]:
    mode = criterion.batch_norm_mode()
    collected, _ = collect(net, list(groups), criterion.needs, batches, loss, batch_norm=mode)
    return score_groups(criterion, list(groups), Stats(net, collected))


def permuted(net: nn.Module, groups: Groups, orders: dict[str, Tensor]) -> nn.Module:
    """The same function with every group's channels in another order."""
    net = copy.deepcopy(net)
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    with torch.no_grad():
        for group in groups:
            for slot in group.slots:
                before = slot.indices(torch.arange(group.channels))
                after = slot.indices(orders[group.id])
                value = tensors[slot.tensor]
                value.index_copy_(slot.dim, before, value.index_select(slot.dim, after).clone())
    return net


@pytest.mark.parametrize(("name", "preset"), EQUIVARIANT)
def test_permuting_channels_permutes_scores(name: str, preset: str | None) -> None:
    net, groups = net_for(name)
    generator = torch.Generator().manual_seed(7)
    orders = {group.id: torch.randperm(group.channels, generator=generator) for group in groups}
    other = permuted(net, groups, orders)
    images = batches_of(1)[0][0]
    torch.testing.assert_close(other(images), net(images), rtol=1e-6, atol=1e-9)
    criterion = make(name, preset)
    first, second = (scores(criterion, n, groups, batches_of()) for n in (net, other))
    for group in groups:
        torch.testing.assert_close(second[group.id], first[group.id][orders[group.id]], rtol=1e-3, atol=1e-6)
        keep = first[group.id][orders[group.id]].argsort()
        assert torch.equal(second[group.id].argsort(), keep)


@pytest.mark.parametrize("name", NAMES)
def test_scores_repeat_and_do_not_depend_on_the_order_of_batches(name: str) -> None:
    net, groups = net_for(name)
    criterion, batches = make(name), batches_of()
    first = scores(criterion, net, groups, batches)
    assert all(torch.equal(value, first[key]) for key, value in scores(criterion, net, groups, batches).items())
    for key, value in scores(criterion, net, groups, batches[::-1]).items():
        torch.testing.assert_close(value, first[key], rtol=1e-4, atol=1e-6)
    flipped = [(images.flip(0), labels.flip(0)) for images, labels in batches]
    for key, value in scores(criterion, net, groups, flipped).items():
        torch.testing.assert_close(value, first[key], rtol=1e-4, atol=1e-6)


def killed(net: nn.Module) -> nn.Module:
    """Channel 1 of the residual stage and of `merge` is zero for every image; channel 2 of `merge` is constant."""
    with torch.no_grad():
        for block in (net.backbone["stem"], net.backbone["two"], net.merge):
            for p in block[1].parameters():
                p[(..., 1, slice(None), slice(None)) if p.ndim == 4 else 1] = 0
        for leaf, value in (("weight", 0.0), ("scale", 0.0), ("bias", 2.0)):
            p = getattr(net.merge[1], leaf, None)
            if p is not None:
                p.view(-1)[2] = value
    return net


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_scores_are_finite_for_dead_and_constant_channels(name: str, preset: str | None) -> None:
    net, groups = net_for(name)
    found = scores(make(name, preset), killed(net), groups, batches_of(2))
    assert set(found) == set(WIDTHS) and all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_scores_are_finite_for_maps_of_one_position(name: str, preset: str | None) -> None:
    net, groups = net_for(name)
    if name == "fn":  # a feature norm of one position divides by the spread of one value
        net.head.register_forward_pre_hook(lambda m, inputs: (inputs[0].nan_to_num(0.0),))
    found = scores(make(name, preset), net, groups, batches_of(2, side=1))
    assert all(torch.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_FILTER])
def test_a_channel_that_is_zero_ranks_below_the_group_mean_and_goes_without_a_trace(name: str) -> None:
    net, groups = net_for(name)
    net = killed(net)
    found = scores(make(name), net, groups, batches_of(2))["merge.0"]
    if name != "fpgm":  # a zero filter may be far from the others
        assert found[1] <= found.mean()
    budget = {"kind": "channels", "keep": 24 / 25, "floor": 0.0, "scope": "global"}
    forced = {group.id: torch.ones(group.channels) for group in groups}
    forced["merge.0"][1] = 0.0
    plan = make_plan(
        net, EXAMPLE.double(), criterion=_Given(forced), budget=budget, groups=groups, batches=None, loss=None
    )
    assert 1 not in next(group.kept for group in plan.groups if group.id == "merge.0")
    images = torch.randn(2, 3, 9, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(apply_plan(net, plan)(images), net(images), rtol=1e-6, atol=1e-9)


class _Given(Criterion):
    """Scores from a table."""

    def __init__(self, table: dict[str, Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "table", table)

    def __call__(self, group: Any, stats: Stats) -> Tensor:
        return self.table[group.id]


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_is_the_identity_and_nothing_is_lost(name: str) -> None:
    net, groups = net_for(name)
    example = EXAMPLE.double()
    given = {"batches": batches_of(1), "loss": loss, "groups": groups}
    for kind in ("channels", "macs"):
        plan = make_plan(net, example, criterion=make(name), budget={"kind": kind, "keep": 1.0}, **given)
        assert all(list(group.kept) == list(range(group.channels)) for group in plan.groups)
    plan = make_plan(net, example, criterion=make(name), budget={"kind": "macs", "keep": 0.5}, **given)
    for group in plan.groups:
        both = sorted([*group.kept, *group.removed().tolist()])
        assert both == list(range(group.channels)) and group.kept
    assert plan.cost_after["macs"] <= 0.5 * plan.cost_before["macs"]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_nothing_of_the_scored_network_changes(name: str, preset: str | None) -> None:
    net, groups = net_for(name)
    net.train()
    net.merge[1].eval()
    loss(net, batches_of(1)[0]).backward()
    grads = {key: p.grad.clone() for key, p in net.named_parameters()}
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    scores(make(name, preset), net, groups, batches_of(2))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(p.grad, grads[key]) for key, p in net.named_parameters())
    assert [module.training for module in net.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


def test_the_table_of_criteria_is_complete() -> None:
    aliases = {
        "l1": "naive_l1", "taylor": "bn_taylor", "fn": "naive_fn", "hw_l1": "c1", "defect": "c2", "corr": "c3",
        "taylor_fo": "c4", "sirfp": "sirfp", "slimming": "slimming", "fpgm": "fpgm", "fgp": "fgp", "dmcp": "dmcp",
        "random": "random", "l2": "l2", "obd": "fisher", "dcfp": "eic", "lamp": "lamp", "wanda": "activation_norm",
    }  # fmt: skip
    assert set(NAMES) >= set(aliases) and all(CRITERIA.canonical(alias) == name for name, alias in aliases.items())
    assert [CRITERIA.canonical(f"ours_c{i}") for i in range(1, 5)] == ["hw_l1", "defect", "corr", "taylor_fo"]
    wanted = {
        "weights": {"l1", "l2", "random", "slimming", "fpgm", "hw_l1", "dmcp", "lamp"},
        "images": {"fn", "sirfp", "corr", "wanda"}, "images, labels, classes": {"fgp"},
        "images, labels, gradients": {"taylor", "taylor_fo", "defect", "obd", "dcfp"},
    }  # fmt: skip
    assert {need: {n for n in aliases if data_needs(make(n)) == need} for need in wanted} == wanted
    assert all(CRITERIA[name].source for name in aliases)
