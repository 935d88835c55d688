"""How the network is called holds for the calibration pass: statistics are those of the network that gives the map."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.core.errors import VssError
from vss.prune import collect, find_groups, make_plan
from vss.prune.quality import reconstruction
from vss.prune.stats import Need

from ..nets import randomise

FEATURE_NEEDS = [Need.of("class_support", site="stream", masks="truth"), Need.of("mean", site="bn_out")]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rgb, self.depth = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.mix = nn.Sequential(nn.Conv2d(10, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 3, 1)

    def features(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.rgb(x[:, :3]).relu(), self.depth(x[:, 3:]).relu()], 1))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


class Odd(Plain):
    """Two inputs, and maps in an object, beside features that are none."""

    def forward(self, rgb: Tensor, depth: Tensor) -> Any:
        f = self.features(torch.cat([rgb, depth], 1))
        return {"features": f, "found": types.SimpleNamespace(maps=self.head(f))}


def maps(net: nn.Module, inputs: Any) -> Tensor:
    return net(*inputs)["found"].maps


def setting() -> tuple[nn.Module, nn.Module, list[Any], list[Any]]:
    """The two networks with the same weights, and the batches of each."""
    torch.manual_seed(0)
    plain, odd = randomise(Plain()), Odd().eval()
    odd.load_state_dict(plain.state_dict())
    images = [torch.randn(2, 4, 12, 12) for _ in range(2)]
    labels = [torch.randint(3, (2, 12, 12)) for _ in images]
    whole = list(zip(images, labels, strict=True))
    return plain, odd, whole, [((x[:, :3], x[:, 3:]), y) for x, y in whole]


def test_statistics_without_a_loss() -> None:
    plain, odd, whole, parts = setting()
    groups = list(find_groups(plain, torch.randn(1, 4, 12, 12)))
    wanted, _ = collect(plain, groups, FEATURE_NEEDS, whole, None)
    found, count = collect(odd, groups, FEATURE_NEEDS, parts, None, forward=maps)
    assert count == 2 and found.keys() == wanted.keys()
    for need in wanted:
        assert all(torch.allclose(found[need][g.id], wanted[need][g.id], rtol=1e-5, atol=1e-7) for g in groups)
        assert any(float(wanted[need][g.id].abs().max()) > 0 for g in groups)
    with pytest.raises(VssError, match=r"heads of \(N, K, h, w\) with one K, got .*give forward="):
        collect(odd, groups, FEATURE_NEEDS, parts, None)


def test_a_plan_by_gradients_and_by_features() -> None:
    plain, odd, whole, parts = setting()
    x = torch.randn(1, 4, 12, 12)
    budget = {"kind": "channels", "keep": 0.5, "scope": "local"}
    for criterion in ("taylor", "fgp"):
        wanted = make_plan(plain, x, criterion=criterion, budget=budget, batches=whole,
                           loss=lambda net, b: F.cross_entropy(net(b[0]), b[1]))  # fmt: skip
        found = make_plan(odd, (x[:, :3], x[:, 3:]), criterion=criterion, budget=budget, batches=parts, forward=maps,
                          loss=lambda net, b: F.cross_entropy(maps(net, b[0]), b[1]))  # fmt: skip
        assert [group.kept for group in found.groups] == [group.kept for group in wanted.groups]


def test_what_a_cut_changes_in_the_outputs() -> None:
    plain, odd, whole, parts = setting()
    groups = list(find_groups(plain, torch.randn(1, 4, 12, 12)))
    kept = {group.id: torch.arange(group.channels // 2) for group in groups}
    wanted = reconstruction(plain, groups, kept, whole)
    assert reconstruction(odd, groups, kept, parts, forward=maps) == pytest.approx(wanted)
    assert wanted["relative"] > 0.01
