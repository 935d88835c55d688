"""Analytic cost against a counting forward of the network that was really cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vss import models
from vss.prune import CostModel, apply_plan, count, find_groups, make_plan
from vss.prune.trace import SINGLE

from .nets import Chain, FlattenLinear, MaxAvg, Twice, short_resnet50_seg

NETS = {
    "unet": lambda: models.build("unet", 5, width=4, depth=3),
    "resnet18_seg": lambda: models.build("resnet18_seg", 5, decoder=8),
    "resnet50_seg": short_resnet50_seg,
    "depthwise": lambda: Chain(nn.Conv2d(8, 8, 3, padding=1, groups=8, stride=2)),
    "grouped": lambda: Chain(nn.Conv2d(8, 8, 3, padding=1, groups=2)),
    "linear": FlattenLinear,
    "max and mean": MaxAvg,
    "called twice": Twice,
    "transposed": lambda: Chain(nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)),
}


def counted_macs(net: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates by definition: every weight is used once per position that it slides over."""
    total = 0

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.ConvTranspose2d):
            n, cin, h, w = inputs[0].shape
            total += n * cin * h * w * module.weight.shape[1] * module.weight.shape[2] * module.weight.shape[3]
        elif isinstance(module, nn.Conv2d):
            n, cout, h, w = output.shape
            kernel = module.weight.shape[1] * module.weight.shape[2] * module.weight.shape[3]  # Cin/groups * kh * kw
            total += n * cout * h * w * kernel
        elif isinstance(module, nn.Linear):
            total += output.shape[0] * module.weight.shape[0] * module.weight.shape[1]

    handles = [m.register_forward_hook(hook) for m in net.modules()]
    with torch.no_grad():
        net.eval()(x)
    for handle in handles:
        handle.remove()
    return total // x.shape[0]


@pytest.mark.parametrize("name", NETS)
def test_predicted_cost_is_the_cost_of_the_cut_network(name: str) -> None:
    torch.manual_seed(0)
    net, x = NETS[name](), torch.zeros(2, 3, 32, 48)
    groups = find_groups(net, x)
    budget = {"kind": "channels", "keep": 0.6, "floor": 0.1}
    plan = make_plan(net, x, criterion="random", budget=budget, groups=groups)
    small = apply_plan(net, plan)
    for one, figures in ((net, plan.cost_before), (small, plan.cost_after)):
        assert figures["macs"] == counted_macs(one, x)
        assert figures["params"] == sum(p.numel() for p in one.parameters())
        if name != "grouped":  # cut to a single group it is a plain convolution, whose two sides are free
            found = groups if one is net else find_groups(one, x)
            singles = sum(lock.reason == SINGLE for lock in found.locked)
            assert figures["channels"] == sum(group.channels for group in found) + singles
    assert plan.cost_after["macs"] < plan.cost_before["macs"]


def test_one_convolution_by_hand() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1))
    cost = CostModel.measure(net, torch.zeros(2, 3, 10, 12))
    assert cost.total("macs", [], []) == 8 * 3 * 9 * 5 * 6
    assert cost.total("params", [], []) == 8 * 3 * 9 + 8


def test_count_in_its_units() -> None:
    net = models.build("unet", 5, width=4, depth=2)
    assert count(net, (16, 24)) == {
        "params_m": sum(p.numel() for p in net.parameters()) / 1e6,
        "macs_g": counted_macs(net, torch.zeros(1, 3, 16, 24)) / 1e9,
    }


def test_measuring_leaves_modes_and_hooks_alone() -> None:
    net = Twice().train()
    net.shared[1].eval()
    mean = net.shared[1].running_mean.clone()
    CostModel.measure(net, torch.zeros(1, 3, 8, 8))
    assert net.training and net.shared[0].training and not net.shared[1].training
    assert torch.equal(net.shared[1].running_mean, mean)
    assert not any(m._forward_hooks for m in net.modules())


def test_macs_are_counted_through_the_callers_forward() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.d, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(1, 8, 1), nn.Conv2d(16, 5, 1)

        def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
            return self.b(torch.cat([self.a(rgb), self.d(depth)], 1))

    plan = make_plan(Two().eval(), torch.randn(1, 4, 8, 8), forward=lambda net, x: net(x[:, :3], x[:, 3:]))
    assert set(plan.widths()) == {"a", "d"}
    assert plan.cost_before["macs"] == 64 * (3 * 8 + 1 * 8 + 16 * 5)
