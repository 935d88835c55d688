"""The cut: against torch-pruning's own removal, against masking, against the original's slices."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from vss import models
from vss.core.errors import VssError
from vss.core.example import logits_of
from vss.prune import Plan, apply_plan, find_groups, make_plan, masked, recalibrate_bn, verify
from vss.prune.make import norm_of_single_values, refuse_single_images

from .nets import Chain, Concat, FlattenLinear, Heads, MaxAvg, Residual, Twice, randomise, short_resnet50_seg

NETS = {
    "unet": lambda: models.build("unet", 5, width=4, depth=3),
    "unet bilinear": lambda: models.build("unet", 5, width=4, depth=2, up="bilinear"),
    "resnet18_seg": lambda: models.build("resnet18_seg", 5, decoder=8),
    "resnet50_seg": short_resnet50_seg,
}
SMALL = {
    "concat": Concat,
    "flatten": FlattenLinear,
    "max and mean": MaxAvg,
    "twice": Twice,
    "heads": Heads,
    "residual": Residual,
    "group norm": lambda: Chain(nn.GroupNorm(4, 8)),
    "depthwise": lambda: Chain(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.PReLU(8))),
    "grouped": lambda: Chain(nn.Conv2d(8, 8, 3, padding=1, groups=2)),
    "instance norm": lambda: Chain(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
}


def seeded(make: object, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(make())  # type: ignore[operator]


def random_plan(net: nn.Module, x: Tensor, keep: float = 0.6, seed: int = 3) -> Plan:
    budget = {"kind": "channels", "keep": keep, "scope": "local"}
    return make_plan(net, x, criterion="random", budget=budget, seed=seed)


@pytest.mark.parametrize("name", NETS)
def test_equals_torch_prunings_own_removal_bit_by_bit(name: str) -> None:
    net, x = seeded(NETS[name]), torch.zeros(1, 3, 32, 32)
    plan = random_plan(net, x)
    small = apply_plan(net, plan)
    other = copy.deepcopy(net)
    graph = tp.DependencyGraph().build_dependency(other, x, forward_fn=lambda m, v: m(v).clone())
    for group in plan.groups:
        root = other.get_submodule(group.id)
        cut = tp.prune_conv_out_channels
        graph.get_pruning_group(root, cut, group.removed().tolist()).prune()
    ours, theirs = small.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    wrong = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert wrong == []
    assert sum(v.numel() for v in ours.values()) < 0.6 * sum(v.numel() for v in net.state_dict().values())
    y = torch.randn(2, 3, 32, 64)
    assert torch.equal(small(y), other(y))


@pytest.mark.parametrize("name", [*NETS, *SMALL])
def test_masked_equals_sliced_and_a_prefix_does_not(name: str) -> None:
    net, x = seeded({**NETS, **SMALL}[name]), torch.zeros(1, 3, 32, 32)
    plan = random_plan(net, x)
    figures = verify(net, apply_plan(net, plan), plan, [(32, 32), (64, 32)])
    # An output of one value a channel hardly varies over two images, so that float32's own step is more of it.
    assert 0 <= figures["masked_max_rel"] < (1e-4 if name == "flatten" else 2e-5)
    first_n = [g.keep(torch.arange(len(g.kept))) for g in plan.groups]
    assert tuple(first_n) != plan.groups
    wrong = apply_plan(net, plan.model_copy(update={"groups": tuple(first_n)}))
    with pytest.raises(VssError, match="differs from the masked one"):
        verify(net, wrong, plan, [(32, 32), (64, 32)])


def test_kept_tensors_are_slices_of_the_original_which_stays_as_it_was() -> None:
    net = seeded(NETS["unet"])
    before = {key: value.clone() for key, value in net.state_dict().items()}
    plan = random_plan(net, torch.zeros(1, 3, 32, 32))
    small = apply_plan(net, plan)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    kept = {group.id: torch.tensor(group.kept) for group in plan.groups}
    first, skip, up = kept["encoder.0.0.0"], kept["encoder.0.1.0"], kept["up.2"]
    ours = small.state_dict()
    assert torch.equal(ours["encoder.0.1.0.weight"], before["encoder.0.1.0.weight"][skip][:, first])
    assert torch.equal(ours["encoder.0.1.1.running_var"], before["encoder.0.1.1.running_var"][skip])
    both = torch.cat([skip, 4 + up])
    out = kept["decoder.2.0.0"]
    assert torch.equal(ours["decoder.2.0.0.weight"], before["decoder.2.0.0.weight"][out][:, both])
    below = kept["decoder.1.1.0"]
    assert torch.equal(ours["up.2.weight"], before["up.2.weight"][below][:, up])
    assert torch.equal(ours["classifier.weight"], before["classifier.weight"][:, kept["decoder.2.1.0"]])
    shared = {v.data_ptr() for v in net.state_dict().values() if v.numel()}
    assert not shared & {v.data_ptr() for v in ours.values() if v.numel()}


def test_layer_attributes_follow_the_tensors() -> None:
    net = seeded(SMALL["depthwise"])
    small = apply_plan(net, random_plan(net, torch.zeros(1, 3, 32, 32), keep=0.5))
    depthwise, prelu = small.middle
    assert (small.a.out_channels, small.b.in_channels, small.b.out_channels, small.head.in_channels) == (4, 4, 3, 3)
    assert (depthwise.groups, depthwise.in_channels, depthwise.out_channels, prelu.num_parameters) == (4, 4, 4, 4)
    net = seeded(SMALL["group norm"])
    small = apply_plan(net, random_plan(net, torch.zeros(1, 3, 32, 32), keep=0.5))
    assert (small.middle.num_groups, small.middle.num_channels) == (2, 4)
    net = seeded(FlattenLinear)
    small = apply_plan(net, random_plan(net, torch.zeros(1, 3, 32, 32), keep=0.5))
    assert (small.fc.in_features, small.fc.out_features, small.head.in_features) == (12, 3, 3)


def test_a_group_norm_loses_whole_norm_groups() -> None:
    net = seeded(SMALL["group norm"])
    plan = random_plan(net, torch.zeros(1, 3, 32, 32), keep=0.5)
    kept = plan.groups[0].kept
    assert len(kept) == 4 and all(kept[i] % 2 == 0 and kept[i + 1] == kept[i] + 1 for i in (0, 2))


def test_pruning_twice_equals_the_composed_plan() -> None:
    net, x = seeded(NETS["resnet18_seg"]), torch.zeros(1, 3, 32, 32)
    first = random_plan(net, x, keep=0.7, seed=1)
    once = apply_plan(net, first)
    second = random_plan(once, x, keep=0.6, seed=2)
    twice = apply_plan(once, second)
    at_once = apply_plan(net, first.then(second))
    ours, theirs = twice.state_dict(), at_once.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours) and list(ours) == list(theirs)
    assert once.plans == (first,) and twice.plans == (first, second)
    assert all(len(g.kept) == int(int(g.channels * 0.7 + 1e-9) * 0.6 + 1e-9) for g in first.then(second).groups)


def test_keeping_everything_is_the_identity() -> None:
    net, x = seeded(NETS["unet"]), torch.zeros(1, 3, 32, 32)
    plan = make_plan(net, x, budget={"kind": "macs", "keep": 1.0})
    assert all(g.kept == tuple(range(g.channels)) for g in plan.groups)
    assert plan.cost_before == plan.cost_after
    small, y = apply_plan(net, plan), torch.randn(1, 3, 32, 32)
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in net.state_dict().items())
    assert torch.equal(small(y), net(y)) and torch.equal(masked(net, plan)(y), net(y))


def test_kept_and_removed_make_the_whole() -> None:
    plan = random_plan(seeded(NETS["unet"]), torch.zeros(1, 3, 32, 32))
    for group in plan.groups:
        assert sorted([*group.kept, *group.removed().tolist()]) == list(range(group.channels))


def test_a_channel_without_scale_and_shift_goes_without_a_trace() -> None:
    net, x = seeded(NETS["resnet18_seg"]), torch.zeros(1, 3, 32, 32)
    groups, gone = find_groups(net, x), 0.4
    plan = random_plan(net, x, keep=1 - gone)
    with torch.no_grad():
        for group in plan.groups:
            for slot in group.slots:
                if slot.role == "norm" and not slot.tensor.endswith(("running_mean", "running_var")):
                    net.get_parameter(slot.tensor)[slot.indices(group.removed())] = 0
    small, y = apply_plan(net, plan, check_weights=False), torch.randn(2, 3, 64, 32)
    assert len(groups) == len(plan.groups)
    assert float((small(y) - net(y)).abs().max()) < 1e-6 * max(1.0, float(net(y).abs().max()))


def test_flags_of_parameters_and_buffers_survive() -> None:
    net = seeded(Residual)
    net.one[0].weight.requires_grad_(False)
    small = apply_plan(net, random_plan(net, torch.zeros(1, 3, 32, 32)))
    assert not small.one[0].weight.requires_grad and small.two[0].weight.requires_grad
    assert [n for n, _ in small.named_buffers()] == [n for n, _ in net.named_buffers()]
    assert all(p.is_contiguous() and p.is_leaf for p in small.parameters())


def test_refusals_are_sentences() -> None:
    net, x = seeded(NETS["unet"]), torch.zeros(1, 3, 32, 32)
    plan = random_plan(net, x)
    with pytest.raises(VssError, match="the plan is for model 'unet' and was given a 'Residual'"):
        apply_plan(Residual(), plan)
    with pytest.raises(VssError, match="made for other weights of 'unet'"):
        apply_plan(seeded(NETS["unet"], seed=1), plan)
    with pytest.raises(VssError, match=r"needs 4 slices along dim 0 of .* and found .*other options"):
        apply_plan(models.build("unet", 5, width=2, depth=3), plan, check_weights=False)
    with pytest.raises(VssError, match="and found none"):
        apply_plan(models.build("unet", 5, width=4, depth=2), plan)
    with pytest.raises(VssError, match="other weights"):
        apply_plan(models.build("unet", 5, width=8, depth=3), plan)
    with pytest.raises(VssError, match="uncut 'unet'"):
        apply_plan(apply_plan(net, plan), plan)


def test_recalibration_is_the_float64_average_of_batch_statistics() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.ReLU(), nn.Dropout(0.5))
    batches = [3 + 2 * torch.randn(4, 3, 12, 10) for _ in range(5)]
    net.train()
    net[3].eval()
    assert recalibrate_bn(net, batches) == 5
    outputs = [nn.functional.conv2d(b.double(), net[0].weight.double(), net[0].bias.double()) for b in batches]
    mean = torch.stack([o.mean((0, 2, 3)) for o in outputs]).mean(0)
    var = torch.stack([o.var((0, 2, 3), correction=1) for o in outputs]).mean(0)
    torch.testing.assert_close(net[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net[1].running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert net[1].momentum == 0.3 and int(net[1].num_batches_tracked) == 5
    assert [m.training for m in net] == [True, True, True, False] and net.training


def test_recalibration_reaches_the_norms_behind_other_norms_and_all_heads() -> None:
    net = seeded(Heads).eval()
    weights = {k: v.clone() for k, v in net.named_parameters()}
    batches = [torch.randn(2, 3, 16, 16) for _ in range(3)]
    recalibrate_bn(net, batches)
    assert not any(m.training for m in net.modules())
    assert all(torch.equal(v, weights[k]) for k, v in net.named_parameters())
    assert len(logits_of(net(batches[0]))) == 2


def test_recalibration_on_nothing_is_refused_and_forgets_nothing() -> None:
    net = seeded(Residual).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(VssError, match="on no batches"):
        recalibrate_bn(net, [])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.stem[1].momentum == 0.1 and net.training
    assert recalibrate_bn(Chain(), [torch.zeros(1, 3, 8, 8)]) == 0


def test_recalibration_that_fails_midway_still_restores_momentum() -> None:
    net = seeded(Residual)

    def broken() -> object:
        yield torch.randn(2, 3, 8, 8)
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        recalibrate_bn(net, broken())  # type: ignore[arg-type]
    assert net.stem[1].momentum == 0.1 and not net.stem[1].training


@pytest.mark.parametrize(("side", "name"), [(8, ""), (4, "deep.1")])
def test_a_batch_norm_over_single_values_is_found(side: int, name: str) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.deep = nn.Sequential(nn.Conv2d(4, 4, 4, stride=4), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.deep(self.stem(x))

    net = Deep().train()
    assert norm_of_single_values(net, torch.zeros(1, 3, side, side)) == name
    assert net.training and not net.stem[1].num_batches_tracked
    with pytest.raises(VssError, match=r"batch norm 'deep.1' sees one position.*prune.batch_size"):
        refuse_single_images(net, torch.zeros(1, 3, 4, 4))
