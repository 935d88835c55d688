"""Couplings that are no values: pooling indices, grouped convolutions, declarations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.core.errors import VssError
from vss.prune import Slot, apply_plan, count, find_groups, make_plan, verify

from .nets import Chain, randomise

EXAMPLE = torch.zeros(1, 3, 32, 32)


class Unpool(nn.Module):
    """conv -> pool with indices -> conv, `back` -> unpool -> head, with torch's own modules."""

    def __init__(self, kernel: int = 2, stride: int = 2) -> None:
        super().__init__()
        self.front = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(kernel, stride, return_indices=True)
        self.middle = nn.Conv2d(8, 6, 3, padding=1)
        self.back = nn.Conv2d(6, 8, 3, padding=1)
        self.unpool = nn.MaxUnpool2d(kernel, stride)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, indices = self.pool(F.relu(self.front(x)))
        return self.head(self.unpool(F.relu(self.back(F.relu(self.middle(x)))), indices))


class UnpoolConcat(nn.Module):
    """Two convolutions are pooled side by side and one unpooled tensor takes the indices of both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.back, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, indices = F.max_pool2d(torch.cat([self.left(x), self.right(x)], 1), 2, return_indices=True)
        return self.head(F.max_unpool2d(self.back(y), indices, 2))


class ForeignIndices(nn.Module):
    """Unpools with indices that no pooling of the network gave."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x)))
        places = torch.arange(y[0, 0].numel()).reshape(y[0, 0].shape).expand_as(y) * 2
        return self.head(F.max_unpool2d(y, places, 2))


class Beside(nn.Module):
    """A grouped convolution over a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.grouped, self.b, self.head = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(self.grouped(torch.cat([self.left(x), self.right(x)], 1)))))


class Residual(nn.Module):
    """y + grouped(y)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.grouped, self.head = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1, groups=4),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.head(y + self.grouped(y))


def prove(net: nn.Module, keep: float = 0.5) -> nn.Module:
    """Cut to half of every group's channels, prove it, and return the cut network."""
    plan = make_plan(net, EXAMPLE, budget={"kind": "channels", "scope": "local", "keep": keep})
    small = apply_plan(net, plan)
    assert verify(net, small, plan, [(32, 32), (48, 32)])["masked_max_rel"] < 1e-4
    assert count(small, (32, 32))["macs_g"] * 1e9 == pytest.approx(plan.cost_after["macs"], rel=1e-12)
    assert plan.cost_after["macs"] < plan.cost_before["macs"]
    return small


def reasons(net: nn.Module) -> dict[str, str]:
    return {lock.layer: lock.reason for lock in find_groups(net, EXAMPLE).locked}


def test_pooled_and_unpooled_channels_are_one_group() -> None:
    net = randomise(Unpool())
    groups = find_groups(net, EXAMPLE)
    assert [(group.id, group.channels) for group in groups] == [("front", 8), ("middle", 6)]
    assert groups["front"].module_names("producer") == ["front", "back"]
    assert groups["front"].module_names("consumer") == ["middle", "head"]
    small = prove(net)
    assert (small.front.out_channels, small.back.out_channels, small.head.in_channels) == (4, 4, 4)


def test_three_by_three_windows_too() -> None:
    groups = find_groups(randomise(Unpool(kernel=3, stride=3)), torch.zeros(1, 3, 36, 36))
    assert groups["front"].module_names("producer") == ["front", "back"]


def test_indices_of_a_concatenation_tie_every_part_to_its_own() -> None:
    net = UnpoolConcat()
    found = find_groups(net, EXAMPLE)
    assert [group.id for group in found] == ["left", "right"]
    assert [s.offset for g in found for s in g.slots if (s.tensor, s.dim) == ("back.weight", 0)] == [0, 4]
    prove(randomise(net))


def test_indices_of_unknown_origin_lock_the_unpooled_channels_alone() -> None:
    found = find_groups(ForeignIndices(), EXAMPLE)
    assert [group.id for group in found] == ["a"]
    assert {lock.layer: lock.reason for lock in found.locked}["b"] == "it is unpooled with indices of unknown origin"


EXPANSIONS = {
    "depthwise": (nn.Conv2d(8, 24, 3, padding=1, groups=8), 24, 1, 3),
    "depthwise twice": (
        nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.Conv2d(16, 32, 1, groups=16)), 32, 1, 4
    ),
    "groups of two": (nn.Conv2d(8, 16, 3, padding=1, groups=4), 16, 2, 2),
    "with a group norm over six": (
        nn.Sequential(nn.Conv2d(8, 24, 3, padding=1, groups=8), nn.GroupNorm(4, 24)), 24, 2, 3
    ),
    "with a batch norm": (nn.Sequential(nn.Conv2d(8, 16, 1, groups=8), nn.BatchNorm2d(16), nn.ReLU()), 16, 1, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPANSIONS)
def test_expanding_grouped_convolutions_carry_blocks(name: str) -> None:
    middle, after, unit, block = EXPANSIONS[name]
    net = randomise(Chain(middle, after=after))
    group = find_groups(net, EXAMPLE)["a"]
    assert (group.channels, group.unit) == (8, unit)
    assert Slot("a.weight", 0, 0, 1, "producer") in group.slots
    assert Slot("b.weight", 1, 0, block, "consumer") in group.slots
    small = prove(net)
    assert (small.a.out_channels, small.b.in_channels) == (4, 4 * block)
    for layer in small.middle.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[0] == layer.out_channels
            assert layer.weight.shape[1] * layer.groups == layer.in_channels


def test_grouped_convolution_of_equal_width_is_a_second_producer() -> None:
    net = randomise(Chain(nn.Conv2d(8, 8, 3, padding=1, groups=2)))
    group = find_groups(net, EXAMPLE)["a"]
    assert (group.module_names("producer"), group.unit) == (["a", "middle"], 4)
    assert prove(net).middle.groups == 1


def test_residual_around_a_grouped_convolution() -> None:
    net = randomise(Residual())
    assert [(group.id, group.unit) for group in find_groups(net, EXAMPLE)] == [("a", 2)]
    assert prove(net).grouped.groups == 2


LOCKED = {
    "transposed": (Chain(nn.ConvTranspose2d(8, 8, 1, groups=2)), "a", "a transposed grouped convolution is not cut"),
    "over a concatenation": (Beside(), "right", "only leave all together"),
    "of the image": (
        nn.Sequential(nn.Conv2d(3, 12, 1, groups=3), nn.Conv2d(12, 6, 1), nn.Conv2d(6, 2, 1)), "0", "from the image"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOCKED)
def test_grouped_convolutions_that_are_not_cut_are_named_and_the_rest_is(name: str) -> None:
    net, layer, why = LOCKED[name]
    assert why in reasons(net)[layer]
    assert len(find_groups(net, EXAMPLE)) == 1
    prove(randomise(net))


class Hidden(torch.autograd.Function):
    """max(a, b) whose gradient knows only a."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Pair(nn.Module):
    """Two branches that meet where no graph sees it."""

    def __init__(self, ties: list[tuple[str, ...]] | None = None, right: int = 8) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, right, 1)
        self.head = nn.Conv2d(8 + right, 2, 1)
        self.ties = ties or []

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        return self.head(torch.cat([Hidden.apply(left, right.detach()), right], 1))


def test_declared_ties_and_custom_functions_join_groups() -> None:
    groups = find_groups(Pair([("left", "right")]), EXAMPLE)
    assert [group.module_names("producer") for group in groups] == [["left", "right"]]
    prove(randomise(Pair([("left", "right")])))
    groups = find_groups(Pair(), EXAMPLE)  # a custom function's operations are seen even where its gradient is not
    assert [group.module_names("producer") for group in groups] == [["left", "right"]]


def test_ties_of_a_part_are_names_inside_it() -> None:
    inner = Pair([("left", "right")])
    groups = find_groups(nn.Sequential(inner, nn.Conv2d(2, 3, 1)), EXAMPLE)
    assert groups["0.left"].module_names("producer") == ["0.left", "0.right"]


class Spare(Pair):
    """Names a layer that the network never calls."""

    def __init__(self) -> None:
        super().__init__([("left", "spare")])
        self.spare = nn.Conv2d(3, 8, 1)


def test_wrong_ties_are_sentences() -> None:
    with pytest.raises(VssError, match=r"layer in ties 'lefd'.*left"):
        find_groups(Pair([("lefd", "right")]), EXAMPLE)
    with pytest.raises(VssError, match="pairs of layer names"):
        find_groups(Pair([("left", "right", "head")]), EXAMPLE)
    with pytest.raises(VssError, match="one of these layers has no channels"):
        find_groups(Spare(), EXAMPLE)


def test_ties_of_layers_of_different_width_lock_both() -> None:
    found = find_groups(Chain(nn.ReLU(), width=8, inner=6), EXAMPLE)
    assert [group.channels for group in found] == [8, 6]
    net = Chain(nn.ReLU(), width=8, inner=6)
    net.ties = [("a", "b")]
    why = "the channels that it is tied to are of another number"
    assert {lock.layer: lock.reason for lock in find_groups(net, EXAMPLE).locked if lock.layer != "head"} == {
        "a": why,
        "b": why,
    }


class Scale(nn.Module):
    """x * gain + shift with (C,) tensors, one of them a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.channel_params = {"gain": 0, "shift": 0}
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 8))
        self.register_buffer("shift", torch.linspace(-1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain[:, None, None] + self.shift[:, None, None]


def test_declared_channel_tensors_are_norm_slots_buffers_too() -> None:
    net = randomise(Chain(Scale()))
    slots = find_groups(net, EXAMPLE)["a"].by_role("norm")
    assert slots == [Slot("middle.gain", 0, 0, 1, "norm"), Slot("middle.shift", 0, 0, 1, "norm")]
    small = prove(net)
    assert small.middle.gain.shape == small.middle.shift.shape == (4,)
    assert isinstance(small.middle.gain, nn.Parameter)
