"""What lives or dies together, and what is locked with which reason."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn import functional as F

from vss import models
from vss.core.errors import VssError
from vss.prune import Groups, Slot, apply_plan, find_groups, make_plan, verify

from .nets import (
    BufferScale,
    Chain,
    Concat,
    FlattenLinear,
    Heads,
    MaxAvg,
    Reorder,
    Residual,
    Shuffle,
    Swap,
    Twice,
    Unfolded,
    randomise,
    reasons,
)

X = torch.zeros(2, 3, 32, 48)


def slots(groups: Groups, name: str) -> set[tuple[str, int, int, int, str]]:
    return {(s.tensor, s.dim, s.offset, s.block, s.role) for s in groups[name].slots}


@pytest.fixture(scope="module")
def unet() -> Groups:
    return find_groups(models.build("unet", 5, width=4), X)


def test_unet_has_22_groups_and_locks_its_classifier(unet: Groups) -> None:
    # 5 encoder and 4 decoder blocks of two convolutions, and 4 transposed convolutions
    assert len(unet) == 22
    assert sorted(g.channels for g in unet) == sorted(2 * [4, 8, 16, 32, 64] + 3 * [4, 8, 16, 32])
    assert reasons(unet) == {"classifier": "its channels are an output of the network"}
    assert unet.locked[0].channels == 5


def test_unet_skip_comes_first_in_the_concatenation_and_upsampled_channels_behind_it(unet: Groups) -> None:
    first = unet["encoder.0.1.0"]  # full resolution, 4 channels: to the pool path and to the last decoder block
    assert {(s.tensor, s.dim, s.offset) for s in first.by_role("consumer")} == {
        ("encoder.1.0.0.weight", 1, 0),
        ("decoder.3.0.0.weight", 1, 0),
    }
    up = unet["up.3"]
    assert slots(unet, "up.3") == {
        ("up.3.weight", 1, 0, 1, "producer"),  # a transposed convolution keeps its filters along dim 1
        ("up.3.bias", 0, 0, 1, "producer"),
        ("decoder.3.0.0.weight", 1, 4, 1, "consumer"),
    }
    assert up.channels == 4 and up.unit == 1
    assert ("up.0.weight", 0, 0, 1, "consumer") in slots(unet, "encoder.4.1.0")


def test_unet_bilinear_up_path_traces_through_the_resize() -> None:
    groups = find_groups(models.build("unet", 5, width=4, depth=2, up="bilinear"), X)
    assert ("decoder.1.0.0.weight", 1, 4, 1, "consumer") in slots(groups, "up.1.1")
    assert len(groups) == 12


@pytest.mark.parametrize(
    ("name", "count", "channels", "members"),
    [("resnet18_seg", 14, 2_896, 3), ("resnet50_seg", 39, 11_472, 5)],
)
def test_resnet_streams_and_lateral_sum(name: str, count: int, channels: int, members: int) -> None:
    groups = find_groups(models.build(name, 5, decoder=8), X)
    assert (len(groups), sum(group.channels for group in groups)) == (count, channels)
    conv = "conv3" if "50" in name else "conv2"
    stream = next(g for g in groups if f"backbone.layer2.0.{conv}" in g.module_names("producer"))
    blocks = 2 if "18" in name else 4
    assert set(stream.module_names("producer")) == {
        "backbone.layer2.0.downsample.0",
        *(f"backbone.layer2.{i}.{conv}" for i in range(blocks)),
    }
    assert len(stream.module_names("norm")) == members
    assert stream.channels == (128 if "18" in name else 512)
    assert set(stream.module_names("consumer")) == {
        *(f"backbone.layer2.{i}.conv1" for i in range(1, blocks)),
        "backbone.layer3.0.conv1",
        "backbone.layer3.0.downsample.0",
        "lateral.1.0",
    }
    lateral = groups["lateral.0.0"]
    assert lateral.module_names("producer") == [f"lateral.{i}.0" for i in range(4)]
    assert lateral.channels == 8 and lateral.module_names("consumer") == ["fuse.0"]
    if "18" in name:  # basic blocks: the stem joins the first stream, which has no downsample
        assert set(groups["backbone.stem.0"].module_names("producer")) == {
            "backbone.stem.0",
            "backbone.layer1.0.conv2",
            "backbone.layer1.1.conv2",
        }


def test_concat_gives_offsets_in_norm_and_consumer() -> None:
    groups = find_groups(Concat(), X)
    wanted = {(f"norm.{t}", 0, 4, 1, "norm") for t in ("weight", "bias", "running_mean", "running_var")}
    assert slots(groups, "b") == wanted | {
        ("b.weight", 0, 0, 1, "producer"),
        ("b.bias", 0, 0, 1, "producer"),
        ("head.weight", 1, 4, 1, "consumer"),
    }
    assert ("head.weight", 1, 0, 1, "consumer") in slots(groups, "a")
    assert ("b.weight", 1, 0, 1, "consumer") in slots(groups, "a")


def test_flatten_gives_a_block_of_positions() -> None:
    groups = find_groups(FlattenLinear(), X)
    (consumer,) = groups["a"].by_role("consumer")
    assert consumer == Slot("fc.weight", 1, 0, 6, "consumer")
    assert consumer.indices(torch.tensor([1, 3])).tolist() == [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23]
    assert ("head.weight", 1, 0, 1, "consumer") in slots(groups, "fc")


def test_max_and_mean_side_by_side_give_two_slots() -> None:
    groups = find_groups(MaxAvg(), X)
    assert [(s.tensor, s.offset, s.block) for s in groups["a"].by_role("consumer")] == [
        ("head.weight", 0, 1),
        ("head.weight", 6, 1),
    ]


def test_bare_conv_head_is_locked() -> None:
    groups = find_groups(Chain(), X)
    assert [g.id for g in groups] == ["a", "b"]
    assert reasons(groups) == {"head": "its channels are an output of the network"}


@pytest.mark.parametrize(
    ("middle", "after", "reason"),
    [
        (nn.Softmax(dim=1), 8, "reorders or mixes"),
        (Reorder(), 8, "its channels are shuffled on the way to a layer"),
        (nn.LocalResponseNorm(3), 8, "reorders or mixes"),
        (nn.GroupNorm(1, 8), 8, "GroupNorm of one group"),
        (nn.GroupNorm(4, 8, affine=False), 8, "GroupNorm without weights"),
    ],
)
def test_what_slices_cannot_express_is_locked_and_the_rest_stays_prunable(
    middle: nn.Module, after: int, reason: str
) -> None:
    groups = find_groups(Chain(middle, after=after), X)
    assert [g.id for g in groups] == ["b"]
    assert reason in reasons(groups)["a"]


@pytest.mark.parametrize(
    ("middle", "after", "unit", "block"),
    [
        (Shuffle(), 8, 1, 2),
        (Swap(), 8, 2, 1),
        (nn.ChannelShuffle(2), 8, 1, 2),
        (BufferScale(), 8, 1, 1),
        (nn.PixelShuffle(2), 2, 1, 1),
        (nn.PixelUnshuffle(2), 32, 1, 4),
        (nn.Conv2d(8, 4, 3, padding=1, groups=2), 4, 2, 1),
        (nn.Unfold(3, padding=1), 72, 1, 9),
    ],
)
def test_moves_of_channels_are_followed(middle: nn.Module, after: int, unit: int, block: int) -> None:
    """Whole rows or columns of a box of channels leave; what is left computes what the masked network does."""
    net = randomise(Chain(middle, after=after)) if not isinstance(middle, nn.Unfold) else Unfolded()
    example = torch.zeros(1, 3, 32, 48)
    group = find_groups(net, example)["a"]
    assert group.unit == unit and max(slot.block for slot in group.by_role("consumer")) == block
    plan = make_plan(net, example, budget={"kind": "channels", "keep": 0.5, "scope": "local"})
    small = apply_plan(net, plan)
    assert small.a.out_channels == 4
    assert verify(net, small, plan, [(32, 48), (48, 32)])["masked_max_rel"] < 1e-4


def test_layer_norm_over_channels_is_locked() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    groups = find_groups(Chain(Norm()), X)
    assert [g.id for g in groups] == ["b"]
    assert "LayerNorm" in reasons(groups)["a"]


def test_channels_added_to_the_image_are_locked() -> None:
    class OnImage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1)
            self.head = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) + x)

    groups = find_groups(OnImage(), X)
    assert len(groups) == 0 and set(reasons(groups)) == {"a", "head"}


def test_tied_weights_are_locked() -> None:
    net = Chain(nn.Conv2d(8, 8, 1), inner=8)
    net.b.weight = net.middle.weight
    groups = find_groups(net, X)
    assert len(groups) == 0
    assert reasons(groups)["b"] == "middle.weight is shared with another layer"


def test_a_grouped_convolution_loses_whole_groups() -> None:
    groups = find_groups(Chain(nn.Conv2d(8, 8, 3, padding=1, groups=2)), X)
    assert [(g.id, g.unit) for g in groups] == [("a", 4), ("b", 1)]
    assert groups["a"].module_names("producer") == ["a", "middle"]


def test_depthwise_convolution_rides_with_its_producer() -> None:
    groups = find_groups(Chain(nn.Conv2d(8, 8, 3, padding=1, groups=8)), X)
    assert [g.id for g in groups] == ["a", "b"]
    assert ("middle.weight", 0, 0, 1, "norm") in slots(groups, "a")
    assert groups["a"].module_names("producer") == ["a"]


def test_group_norm_sets_the_unit_and_two_of_them_their_least_common_multiple() -> None:
    groups = find_groups(Chain(nn.GroupNorm(4, 8)), X)
    assert (groups["a"].unit, groups["b"].unit) == (2, 1)
    both = nn.Sequential(nn.GroupNorm(6, 12), nn.ReLU(), nn.GroupNorm(4, 12))
    assert find_groups(Chain(both, width=12), X)["a"].unit == 6


def test_shared_module_called_twice_is_one_set_of_slots() -> None:
    groups = find_groups(Twice(), X)
    (group,) = groups
    assert group.id == "a"
    assert group.module_names("producer") == ["a", "shared.0"]
    assert ("shared.0.weight", 1, 0, 1, "consumer") in slots(groups, "a")
    assert len(group.slots) == len({(s.tensor, s.dim, s.offset) for s in group.slots})


def test_every_head_of_a_nested_output_is_locked_even_behind_a_resize() -> None:
    groups = find_groups(Heads(), X)
    assert [g.id for g in groups] == ["a.0", "b", "side"]
    assert set(reasons(groups)) == {"head", "aux"}
    assert set(groups["a.0"].module_names("consumer")) == {"b", "side"}


def test_a_call_that_reaches_one_head_leaves_the_other_untouched() -> None:
    groups = find_groups(Heads(), X, forward=lambda net, x: net(x)["out"])
    assert [g.id for g in groups] == ["a.0", "b", "side"]  # the other head's own output stays
    assert "nothing reads its channels" in reasons(groups)["aux"]


def test_parameters_outside_layers_follow() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x * self.scale)

    groups = find_groups(Chain(Scaled()), X)
    assert ("middle.scale", 1, 0, 1, "param") in slots(groups, "a")


def test_keep_locks_a_layer_a_norm_or_a_container() -> None:
    assert [g.id for g in find_groups(Residual(), X, keep=["one"])] == ["stem.0"]
    assert [g.id for g in find_groups(Residual(), X, keep=["one.1"])] == ["stem.0"]
    groups = find_groups(Residual(), X, keep=["two.0"])
    assert [g.id for g in groups] == ["one.0"]
    assert reasons(groups)["stem.0"] == "it was asked to stay"


def test_keep_of_an_unknown_layer_names_the_closest() -> None:
    with pytest.raises(VssError, match=r"unknown layer to keep 'stem\.00'.*Did you mean 'stem\.0'"):
        find_groups(Residual(), X, keep=["stem.00"])


def test_two_groups_never_own_one_slice(unet: Groups) -> None:
    places = [(s.tensor, s.dim, int(i)) for g in unet for s in g.slots for i in s.indices(torch.arange(g.channels))]
    assert len(places) == len(set(places))


class Gated(nn.Module):
    """An attention U-Net's skip: a map of one channel scales one of many."""

    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.enc, self.down, self.up = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.Conv2d(12, 8, 1),
        )
        self.wx, self.psi = (nn.Conv2d(8, 4, 1), nn.Conv2d(4, 1, 1)) if gate else (None, None)
        self.dec, self.out = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        e = self.enc(x).relu()
        u = nn.functional.interpolate(self.up(self.down(nn.functional.max_pool2d(e, 2)).relu()), scale_factor=2.0)
        g = e * torch.sigmoid(self.psi(self.wx(e).relu())) if self.psi is not None and self.wx is not None else e
        return self.out(self.dec(torch.cat([g, u], 1)).relu())


def test_a_gate_of_one_channel_is_no_partner_of_what_it_scales() -> None:
    torch.manual_seed(0)
    groups = find_groups(Gated(True).eval(), torch.zeros(1, 3, 16, 16))
    bare = find_groups(Gated(False).eval(), torch.zeros(1, 3, 16, 16))
    widths = {group.id: group.channels for group in groups}
    assert widths == {g.id: g.channels for g in bare} | {"wx": 4}
    assert {s.tensor for s in groups["enc"].slots} == {
        "enc.weight", "enc.bias", "down.weight", "wx.weight", "dec.weight"
    }  # fmt: skip
    assert [(s.offset, s.dim) for s in groups["up"].slots if s.tensor == "dec.weight"] == [(8, 1)]


PARAMETRISED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm of all": lambda layer: nn.utils.parametrizations.weight_norm(layer, dim=None),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "mask": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.3),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", PARAMETRISED)
def test_a_parametrised_layer_is_locked_by_name_and_the_rest_is_cut(name: str) -> None:
    torch.manual_seed(0)
    widths = [(3, 8), (8, 8), (8, 12), (12, 8), (8, 5)]
    net = nn.Sequential(*(layer for a, b in widths for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU()))).eval()
    PARAMETRISED[name](net[2])
    example = torch.randn(1, 3, 16, 16)
    net(example)  # leaves a computed weight behind, which torch does not copy
    found = find_groups(net, example)
    assert [group.id for group in found] == ["4", "6"]
    assert all("2.weight is parametrised" in reasons(found)[layer] for layer in ("0", "2"))
    plan = make_plan(net, example, budget={"kind": "macs", "keep": 0.8})
    dense = sum(a * b * 9 * 256 for a, b in widths)
    assert plan.cost_before["macs"] == dense
    small = apply_plan(net, plan, check_weights=False)
    verify(net, small, plan, [(16, 16), (24, 16)])


class Hidden(nn.Module):
    """Global response normalisation whose gain begins at zero: it divides by a mean over channels."""

    channel_params: ClassVar[dict[str, int]] = {"g": 0}

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        n = x.norm(dim=(2, 3), keepdim=True)
        return x + x * n / (n.mean(1, keepdim=True) + 1e-6) * self.g[:, None, None]


@pytest.mark.parametrize("layer", [Hidden(8), nn.LocalResponseNorm(5)], ids=["zero gain", "response norm"])
def test_a_layer_that_hides_what_it_does_is_seen(layer: nn.Module) -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), layer, nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()]
    found = find_groups(nn.Sequential(*parts, nn.Conv2d(6, 5, 1)).eval(), torch.zeros(1, 3, 16, 16))
    assert [group.id for group in found] == ["3"]
    assert "reorders or mixes" in next(lock.reason for lock in found.locked if lock.layer == "0")


def test_every_layer_is_in_a_group_or_locked_with_its_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 8, 1) for _ in range(3))
            self.unused, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.a(x) + self.b(x) + self.c(x))

    found = find_groups(Odd().eval(), torch.zeros(1, 3, 8, 8), keep=["b"])
    why = reasons(found)
    assert set(why) == {"a", "b", "c", "out", "unused"} and not list(found)
    assert why["a"] == why["c"] == "it was asked to stay" and "does not use it" in why["unused"]
