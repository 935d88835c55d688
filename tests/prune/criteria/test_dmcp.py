"""DMCP, the score: searched widths become suffixes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vss.core.errors import VssError
from vss.prune import CostModel, Groups, find_groups, make_criterion, make_plan
from vss.prune.criteria import score_groups
from vss.prune.stats.base import Stats

from ..nets import Chain, randomise
from ..scoring import batches_of, mean_loss
from .feeds import Mixed

EXAMPLE = torch.zeros(1, 3, 12, 12)


def net_and_groups() -> tuple[nn.Module, Groups]:
    torch.manual_seed(0)
    net = randomise(Mixed())
    return net, find_groups(net, EXAMPLE)


def widths_of(groups: Groups, *counts: int) -> dict[str, int]:
    return {group.id: count for group, count in zip(groups, counts, strict=True)}


@pytest.mark.parametrize("counts", [(3, 5, 4, 2), (6, 1, 1, 7), (2, 2, 2, 2)])
@pytest.mark.parametrize("kind", ["channels", "params", "macs"])
def test_the_budget_of_the_searched_widths_cuts_exactly_the_suffixes(counts: tuple[int, ...], kind: str) -> None:
    net, groups = net_and_groups()
    cost, members = CostModel.measure(net, EXAMPLE), list(groups)
    whole = cost.total(kind, members, [group.channels for group in members])
    budget = {"kind": kind, "keep": cost.total(kind, members, list(counts)) / whole, "floor": 0.0}
    criterion = make_criterion("dmcp", order="index", widths=widths_of(groups, *counts))
    plan = make_plan(net, EXAMPLE, criterion=criterion, budget=budget, groups=groups)
    assert [list(group.kept) for group in plan.groups] == [list(range(count)) for count in counts]


def test_channels_are_ordered_by_another_criterion() -> None:
    net, groups = net_and_groups()
    criterion = make_criterion("dmcp", widths=widths_of(groups, 3, 5, 2, 4))
    scores = score_groups(criterion, list(groups), Stats(net))
    for group, width in zip(groups, (3, 5, 2, 4), strict=True):
        norms = make_criterion("l1")(group, Stats(net))
        assert torch.equal(scores[group.id].argsort(), norms.argsort())
        assert int((scores[group.id] > 0).sum()) == width
        assert scores[group.id].abs().max() <= 1


def test_an_order_that_needs_images_gets_them() -> None:
    net, groups = net_and_groups()
    criterion = make_criterion("dmcp", order="taylor", widths=widths_of(groups, 3, 3, 3, 3))
    assert criterion.needs == ("gate",)
    net = net.double()
    batches = batches_of(1, classes=3)
    plan = make_plan(net, EXAMPLE.double(), criterion=criterion, batches=batches, loss=mean_loss, groups=groups)
    assert plan.calibration["batches"] == 1


def test_dmcp_without_a_search_is_refused() -> None:
    net, groups = net_and_groups()
    with pytest.raises(VssError, match="dmcp needs the widths of a search"):
        make_plan(net, EXAMPLE, criterion="dmcp", groups=groups)
    with pytest.raises(VssError, match=r"unknown group in the searched widths 'merge.0'\. Did you mean 'merge.1'"):
        score_groups(make_criterion("dmcp", widths={"merge.1": 3}), [groups["merge.0"]], Stats(net))
    with pytest.raises(VssError, match=r"the searched width of merge.0 is 8; it must be in 1\.\.7"):
        score_groups(make_criterion("dmcp", widths={"merge.0": 8}), [groups["merge.0"]], Stats(net))
    with pytest.raises(VssError, match="order of dmcp must be another criterion"):
        make_criterion("dmcp", order="dmcp")


def test_an_order_that_is_silent_is_refused() -> None:
    net = Chain()
    group = find_groups(net, EXAMPLE)["a"]
    criterion = make_criterion("dmcp", order="slimming", widths={"a": 3})
    with pytest.raises(VssError, match="criterion 'slimming' cannot order the channels of a"):
        score_groups(criterion, [group], Stats(net))
