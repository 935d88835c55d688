"""Which tensor and which channels of it stand for a group."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.core.errors import VssError
from vss.prune import Groups, find_groups
from vss.prune.stats.taps import Layout, Tap, following_norm

from ..criteria.feeds import Mixed
from ..nets import Chain, Concat, FlattenLinear, MaxAvg, Twice, randomise


class Encoder(nn.Module):
    """One step of a U-Net: `a` feeds a pool and, by way of a concatenation, `merge` at full size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 5, 3, padding=1)
        self.merge = nn.Conv2d(9, 6, 1)
        self.after = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        deep = F.interpolate(F.relu(self.deep(F.max_pool2d(y, 2))), scale_factor=2.0)
        return self.after(F.relu(self.merge(torch.cat([deep, y], dim=1))))


def layout_of(net: nn.Module, side: int = 12) -> tuple[Layout, Groups]:
    torch.manual_seed(0)
    example = torch.zeros(2, 3, side, side)
    groups = find_groups(randomise(net), example[:1])
    return Layout.measure(net, lambda: net(example)), groups


@pytest.mark.parametrize(
    ("net", "group", "site", "wanted"),
    [
        (Mixed(), "backbone.stem.0", "stream", [Tap("merge.0", "input", 6)]),
        (Mixed(), "branch.0", "stream", [Tap("merge.0", "input", 4, 6)]),
        (Mixed(), "merge.0", "stream", [Tap("head", "input", 7)]),
        (Mixed(), "backbone.stem.0", "mixed", [Tap("merge.0", "input", 6)]),
        (Mixed(), "branch.0", "mixed", [Tap("branch.1", "output", 4)]),
        (
            Mixed(),
            "backbone.stem.0",
            "bn_out",
            [Tap("backbone.stem.1", "output", 6), Tap("backbone.two.1", "output", 6)],
        ),
        (Mixed(), "backbone.stem.0", "conv", [Tap("backbone.stem.0", "output", 6), Tap("backbone.two.0", "output", 6)]),
        (Chain(), "a", "bn_out", [Tap("a", "output", 8)]),
        (Concat(), "b", "bn_out", [Tap("norm", "output", 6, 4)]),
        (Concat(), "a", "stream", [Tap("head", "input", 4)]),
        (Encoder(), "a", "stream", [Tap("merge", "input", 4, 5)]),
        (FlattenLinear(), "a", "stream", [Tap("fc", "input", 4, 0, 6, True)]),
        (MaxAvg(), "a", "stream", [Tap("head", "input", 6, 0, 1, True)]),
    ],
)
def test_taps(net: nn.Module, group: str, site: str, wanted: list[Tap]) -> None:
    layout, groups = layout_of(net)
    assert layout.taps(groups[group], site) == wanted


def test_an_unknown_site_is_refused() -> None:
    layout, groups = layout_of(Chain())
    with pytest.raises(VssError, match=r"unknown site 'streem'\. Did you mean 'stream'"):
        layout.taps(groups["a"], "streem")


def test_positions_are_the_fewest_on_the_way() -> None:
    layout, groups = layout_of(Encoder())
    assert {group.id: layout.positions(group, "stream") for group in groups} == {"a": 144, "deep": 36, "merge": 144}
    layout, groups = layout_of(MaxAvg())
    assert layout.positions(groups["a"], "stream") == 1
    layout, groups = layout_of(FlattenLinear())
    assert layout.positions(groups["a"], "stream") == 6


def test_maps_of_a_tap() -> None:
    x = torch.arange(2 * 10 * 3 * 4.0).view(2, 10, 3, 4)
    assert torch.equal(Tap("m", "input", 3, 5).maps(x), x[:, 5:8])
    assert Tap("m", "input", 3, 5).maps(x).data_ptr() == x[:, 5:].data_ptr()  # a view
    flat = torch.arange(2 * 13.0).view(2, 13)
    assert torch.equal(Tap("m", "input", 4, 1, 3, True).maps(flat), flat[:, 1:13].view(2, 4, 3, 1))
    tokens = torch.randn(2, 7, 5)
    assert torch.equal(Tap("m", "input", 4, 1, 1, True).maps(tokens)[..., 0], tokens.movedim(-1, 1)[:, 1:5])


def test_a_layer_that_runs_twice_is_seen_twice() -> None:
    net = Twice()
    calls: list[int] = []
    handle = Tap("shared.0", "input", 6).hook(net, lambda module, x: calls.append(x.shape[1]))
    net(torch.zeros(1, 3, 8, 8))
    handle.remove()
    net(torch.zeros(1, 3, 8, 8))
    assert calls == [6, 6]


def test_the_norm_behind_a_producer() -> None:
    net = Mixed()
    groups = find_groups(net, torch.zeros(1, 3, 8, 8))
    stem = groups["backbone.stem.0"]
    assert following_norm(net, stem, "backbone.stem.0") == "backbone.stem.1"
    assert following_norm(net, stem, "backbone.two.0") == "backbone.two.1"
    chain = Chain()
    assert following_norm(chain, find_groups(chain, torch.zeros(1, 3, 8, 8))["a"], "a") is None
