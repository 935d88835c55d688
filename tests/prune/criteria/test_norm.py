"""Norms of filters against the definition, on the concatenation of a group's producers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vss import models
from vss.prune import Groups, find_groups

from ..nets import Chain, Residual, randomise
from ..scoring import scores_of

ORDERS = {"l1": 1, "l2": 2}


def residual() -> tuple[nn.Module, Groups]:
    torch.manual_seed(0)
    net = randomise(Residual())
    return net, find_groups(net, torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("name", ORDERS)
def test_norm_concat_relative_to_the_groups_mean(name: str) -> None:
    net, groups = residual()
    scores = scores_of(net, groups, name)
    joined = torch.cat([net.stem[0].weight.flatten(1), net.two[0].weight.flatten(1)], dim=1).double()
    alone = net.one[0].weight.flatten(1).double()
    for key, rows in (("stem.0", joined), ("one.0", alone)):
        norms = torch.linalg.vector_norm(rows, ord=ORDERS[name], dim=1).detach()
        torch.testing.assert_close(scores[key], norms / norms.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ORDERS)
def test_a_transposed_convolutions_filters_lie_along_dim_1(name: str) -> None:
    torch.manual_seed(0)
    net = models.build("unet", 3, width=2, depth=1)
    groups = find_groups(net, torch.zeros(1, 3, 16, 16))
    norms = torch.linalg.vector_norm(net.up[0].weight.movedim(1, 0).flatten(1).double(), ord=ORDERS[name], dim=1)
    torch.testing.assert_close(scores_of(net, groups, name)["up.0"], (norms / norms.mean()).detach())


@pytest.mark.parametrize("name", ORDERS)
def test_homogeneous_within_a_group_and_free_of_its_scale(name: str) -> None:
    net, groups = residual()
    before = scores_of(net, groups, name)
    with torch.no_grad():
        net.one[0].weight *= 5
    after = scores_of(net, groups, name)
    torch.testing.assert_close(after["one.0"], before["one.0"], rtol=1e-6, atol=0)
    with torch.no_grad():
        net.one[0].weight[0] *= 3
    ratio = scores_of(net, groups, name)["one.0"] / after["one.0"]
    torch.testing.assert_close(ratio[0] / ratio[1], torch.tensor(3.0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ORDERS)
def test_a_zero_filter_comes_last(name: str) -> None:
    torch.manual_seed(0)
    net = Chain()
    groups = find_groups(net, torch.zeros(1, 3, 16, 16))
    with torch.no_grad():
        net.a.weight[5] = 0
    scores = scores_of(net, groups, name)["a"]
    assert int(scores.argmin()) == 5 and scores[5] == 0


@pytest.mark.parametrize("name", ORDERS)
def test_member_rms_makes_coupled_members_weigh_the_same(name: str) -> None:
    net, groups = residual()
    with torch.no_grad():
        net.two[0].weight *= 100
    rows = [m.weight.flatten(1).double() / m.weight.double().square().mean().sqrt() for m in (net.stem[0], net.two[0])]
    norms = torch.linalg.vector_norm(torch.cat(rows, dim=1), ord=ORDERS[name], dim=1).detach()
    scores = scores_of(net, groups, name, member_rms=True)["stem.0"]
    torch.testing.assert_close(scores, norms / norms.mean(), rtol=1e-6, atol=0)
    plain = scores_of(net, groups, name)["stem.0"]
    assert float((scores - plain).abs().max()) > 0.01
