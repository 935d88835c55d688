"""make_plan is pure and deterministic; verify tells a good cut from a bad one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vss import models
from vss.core.errors import VssError
from vss.core.files import sha256_tensors
from vss.prune import Budget, Plan, apply_plan, find_groups, make_plan, verify
from vss.prune.criteria.weights import L2

from .nets import Chain, Heads, Residual, randomise
from .scoring import batches_of, mean_loss

X = torch.zeros(1, 3, 16, 16)
SIZES = [(16, 16), (24, 32)]


def seeded(make: object = Residual) -> nn.Module:
    torch.manual_seed(0)
    return randomise(make())  # type: ignore[operator]


def taylor_plan(net: nn.Module) -> Plan:
    batches = [(images.float(), labels) for images, labels in batches_of(2)]
    return make_plan(net, X, criterion="taylor", batches=batches, loss=mean_loss, calibration={"split": "train"})


def test_the_plan_says_how_it_was_made() -> None:
    torch.manual_seed(0)
    net = models.build("unet", 5, width=4, depth=2)
    plan = make_plan(net, X, criterion=L2(member_rms=True), budget=Budget(keep=0.6, align=2), seed=7)
    assert (plan.model, plan.options, plan.num_classes) == ("unet", {"width": 4, "depth": 2}, 5)
    assert (plan.criterion, plan.criterion_options["member_rms"], plan.seed) == ("l2", True, 7)
    assert plan.budget["keep"] == 0.6 and plan.budget["align"] == 2
    assert plan.weights_sha256 == sha256_tensors(net.state_dict())
    assert plan.calibration["input_size"] == [16, 16]
    assert taylor_plan(seeded()).calibration == {"split": "train", "batches": 2, "input_size": [16, 16]}


def test_pure_and_deterministic() -> None:
    net = seeded().train()
    net.two[1].eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    first = taylor_plan(net)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    torch.manual_seed(99)
    assert taylor_plan(net) == first
    assert taylor_plan(seeded()).sha256() == first.sha256()


def test_the_best_channels_stay() -> None:
    net = seeded(Chain)
    norms = net.a.weight.abs().sum((1, 2, 3))
    plan = make_plan(net, X, budget={"kind": "channels", "keep": 0.5, "scope": "local"})
    assert plan.groups[0].kept == tuple(sorted(norms.topk(4).indices.tolist()))


def test_permuted_channels_give_the_permuted_keep_set() -> None:
    net = seeded(Chain)
    plan = make_plan(net, X, budget={"kind": "channels", "keep": 0.5})
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for value, dim in ((net.a.weight, 0), (net.a.bias, 0), (net.b.weight, 1)):
            value.copy_(value.index_select(dim, order))
    moved = make_plan(net, X, budget={"kind": "channels", "keep": 0.5})
    assert {int(order[i]) for i in moved.groups[0].kept} == set(plan.groups[0].kept)
    assert moved.groups[1] == plan.groups[1]


def test_known_groups_save_the_tracing_and_change_nothing() -> None:
    net = seeded()
    assert make_plan(net, X, groups=find_groups(net, X)) == make_plan(net, X)


def test_kept_layers_keep_their_width() -> None:
    plan = make_plan(seeded(), X, keep=["one"], budget={"kind": "channels", "keep": 0.5})
    assert plan.widths() == {"stem.0": (6, 3)}


def test_nan_weights_are_named() -> None:
    net = seeded()
    with torch.no_grad():
        net.two[0].weight[0, 0] = float("nan")
    with pytest.raises(VssError, match=r"NaN or infinity in two\.0\.weight"):
        taylor_plan(net)


def test_a_network_that_is_all_head_is_a_sentence() -> None:
    with pytest.raises(VssError, match="no prunable channels were found"):
        make_plan(nn.Sequential(nn.Conv2d(3, 2, 1)), X)


def test_a_criterion_with_statistics_asks_for_batches() -> None:
    with pytest.raises(VssError, match="needs gate, from calibration images"):
        make_plan(seeded(), X, criterion="taylor")


def test_verify_reports_figures_of_a_good_cut_and_leaves_gradients_alone() -> None:
    net = seeded(Heads)
    plan = make_plan(net, X)
    small = apply_plan(net, plan)
    before = copy.deepcopy(small.state_dict())
    small.head.weight.requires_grad_(False)
    figures = verify(net, small, plan, SIZES)
    assert figures["sizes"] == [[16, 16], [24, 32]]
    assert figures["outputs"] == [[[2, 2, 16, 16]] * 2, [[2, 2, 24, 32]] * 2]
    assert 0 <= figures["masked_max_abs"] < 1e-5 and figures["masked_max_rel"] < 1e-5
    assert all(p.grad is None for p in small.parameters()) and not small.head.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


@pytest.mark.parametrize("tensor", ["one.0.weight", "stem.1.running_mean", "head.bias"])
def test_verify_finds_one_changed_number(tensor: str) -> None:
    net = seeded()
    plan = make_plan(net, X)
    small = apply_plan(net, plan)
    small.state_dict()[tensor].flatten()[0].add_(0.5)
    with pytest.raises(VssError, match=r"differs from the masked one by .* \(relative to the spread; at most 1e-4\)"):
        verify(net, small, plan, SIZES)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_a_constant_on_top_of_the_outputs_hides_no_wrong_cut(offset: float) -> None:
    net = seeded()
    with torch.no_grad():
        net.head.bias.add_(offset)
    plan = make_plan(net, X)
    right, wrong = apply_plan(net, plan), apply_plan(net, plan)
    found = verify(net, right, plan, SIZES)
    assert found["masked_max_rel"] < 1e-4 and found["label_agreement"] == 1.0
    assert found["precision"] == ("float64" if offset else "float32")
    with torch.no_grad():
        wrong.one[0].weight.mul_(1.01)
    with pytest.raises(VssError, match="relative to the spread"):
        verify(net, wrong, plan, SIZES)


def test_verify_finds_nan_and_other_heads() -> None:
    net = seeded()
    plan = make_plan(net, X)
    small = apply_plan(net, plan)
    with torch.no_grad():
        small.head.bias[0] = float("nan")
    with pytest.raises(VssError, match="NaN or infinite outputs"):
        verify(net, small, plan, SIZES)
    small = apply_plan(net, plan)
    small.head = nn.Conv2d(small.head.in_channels, 4, 1)
    with pytest.raises(VssError, match=r"outputs have shapes \[\(2, 4, 16, 16\)\]; the heads changed"):
        verify(net, small, plan, SIZES)


def test_verify_wants_a_gradient_wherever_the_uncut_network_has_one() -> None:
    class Detached(Residual):
        cut = False

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.stem(x))
            inner = self.one(y).detach() if self.cut else self.one(y)
            return self.head(torch.relu(y + self.two(inner)))

    net = seeded(Detached)
    plan = make_plan(net, X)
    small = apply_plan(net, plan)
    verify(net, small, plan, SIZES)
    small.cut = True
    with pytest.raises(VssError, match=r"no finite gradient for one\.0\.weight"):
        verify(net, small, plan, SIZES)


def test_a_layer_that_the_network_never_uses_is_no_fault_of_the_cut() -> None:
    net = seeded(Chain)
    net.unused = nn.Linear(4, 4)
    plan = make_plan(net, X)
    assert verify(net, apply_plan(net, plan), plan, SIZES)["masked_max_rel"] < 1e-5
