"""The penalty on scales: one step by hand, coupled layers, what it leaves alone, and that no layer collapses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.prune.nets import Chain, Concat, Residual, randomise
from vss.core.errors import VssError
from vss.models import build
from vss.prune import Groups, find_groups, make_plan
from vss.prune.phases import add_subgradient, penalty, scale_facts, scale_slots

EXAMPLE = torch.zeros(1, 3, 16, 24)


def zero_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def residual() -> tuple[nn.Module, Groups]:
    model = randomise(Residual())
    with torch.no_grad():
        model.get_submodule("stem.1").weight.mul_(torch.tensor([1.0, -1, 1, -1, 1, 0]))
    return model, find_groups(model, EXAMPLE)


def test_slim_subgradient_step() -> None:
    model, groups = residual()
    before = zero_gradients(model)
    assert add_subgradient(model, groups, 0.3, group_lasso=False) == 3
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, value in model.named_parameters():
        scale = name in ("stem.1.weight", "one.1.weight", "two.1.weight")
        wanted = before[name] - (0.1 * 0.3 * before[name].sign() if scale else 0)
        assert torch.allclose(value, wanted, rtol=0, atol=1e-7), name
    assert model.get_submodule("stem.1").weight[5] == 0  # the subgradient of |0| is 0


def test_the_group_lasso_is_the_gradient_of_the_norm_over_members() -> None:
    model, groups = residual()
    zero_gradients(model)
    add_subgradient(model, groups, 0.7, group_lasso=True)
    names = ("stem.1.weight", "two.1.weight")
    rows = [model.get_parameter(name).detach().double().requires_grad_() for name in names]
    torch.stack(rows).square().sum(0).sqrt().sum().mul(0.7).backward()
    for name, row in zip(names, rows, strict=True):
        assert torch.allclose(model.get_parameter(name).grad.double(), row.grad, atol=1e-7)
    alone = model.get_parameter("one.1.weight")  # a group with one member: the plain sign
    assert torch.allclose(alone.grad, 0.7 * alone.detach().sign())


def test_slim_group_lasso_joint_zero() -> None:
    """Only the group lasso lets a channel of uneven members go as a whole; a pull on one member keeps it for all."""

    def shrink(group_lasso: bool) -> torch.Tensor:
        a, b = torch.tensor([[1.0], [0.3]]), torch.tensor([[0.1], [0.2]])
        pull = torch.tensor([[1.0], [0.0]])  # the task holds member a of channel 0 at 1
        for _ in range(4000):
            change = penalty([a, b], group_lasso=group_lasso)[1]
            a, b = a - 1e-3 * (change[0] * 0.2 + (a - pull)), b - 1e-3 * (change[1] * 0.2 + 0.1 * (b - 0.1) * pull)
        return torch.cat([a, b], 1)

    joint, apart = shrink(True), shrink(False)
    assert joint[1].abs().max() < 2e-3  # channel 1 is gone in both members together
    assert joint[0, 1] > 0.03 > 2e-3 > apart[0, 1].abs()  # channel 0 keeps both, or a hole in one member


def test_penalty_value_and_zero_channels() -> None:
    rows = [torch.tensor([[3.0], [0.0]]), torch.tensor([[-4.0], [0.0]])]
    value, parts = penalty(rows, group_lasso=True)
    assert float(value) == 5 and torch.equal(torch.cat(parts, 1), torch.tensor([[0.6, -0.8], [0, 0]]))
    value, parts = penalty(rows, group_lasso=False)
    assert float(value) == 7 and torch.equal(torch.cat(parts, 1), torch.tensor([[1.0, -1], [0, 0]]))


def test_a_norm_over_a_concatenation_is_reached_where_the_group_lies() -> None:
    model = randomise(Concat())
    groups = find_groups(model, EXAMPLE, keep=["b"])  # only a's four channels can go
    zero_gradients(model)
    add_subgradient(model, groups, 1.0)
    assert torch.equal(model.norm.weight.grad, torch.tensor([1.0] * 4 + [0.0] * 6))
    assert float(model.norm.bias.grad.abs().sum()) == 0


def test_feature_norm_scales_are_reached_and_their_shifts_are_not() -> None:
    model = build("segdecnet", 1)
    groups = Groups(tuple(find_groups(model, torch.zeros(1, 3, 64, 128)))[:2])
    zero_gradients(model)
    assert add_subgradient(model, groups, 0.5) >= 2
    for group in groups:
        for slot in scale_slots(model, group):
            value = model.get_parameter(slot.tensor)
            assert slot.tensor.endswith("scale") and torch.equal(value.grad, 0.5 * value.detach().sign())
            shift = model.get_parameter(slot.tensor.removesuffix("scale") + "bias")
            assert shift.grad is None or float(shift.grad.abs().sum()) == 0


def test_slim_no_layer_collapse() -> None:
    """All scales of one layer at zero: the budget's floor keeps some of it, where the published rule would take all."""
    model, groups = residual()
    with torch.no_grad():
        model.get_submodule("one.1").weight.zero_()
    plan = make_plan(
        model, EXAMPLE, criterion="slimming", groups=groups, budget={"kind": "channels", "keep": 0.6, "floor": 0.2}
    )
    kept = {group.id: len(group.kept) for group in plan.groups}
    assert kept["one.0"] == 1 and kept["stem.0"] == 5


def test_facts_of_scales() -> None:
    model, groups = residual()
    facts = scale_facts(model, groups, bins=4)
    values = torch.cat([model.get_submodule(n).weight.detach().abs() for n in ("stem.1", "one.1", "two.1")])
    assert facts["max"] == pytest.approx(float(values.max())) and sum(facts["histogram"]) == len(values) == 17
    assert facts["near_zero"] == pytest.approx(1 / 17) and facts["histogram"][0] >= 1


def test_networks_without_scales_or_gradients_are_refused() -> None:
    model = Chain()
    with pytest.raises(VssError, match="needs norm layers"):
        add_subgradient(model, find_groups(model, EXAMPLE), 1.0)
    with pytest.raises(VssError, match="no norm layers"):
        scale_facts(model, find_groups(model, EXAMPLE))
    model, groups = residual()
    with pytest.raises(VssError, match=r"stem\.1\.weight got no gradient"):
        add_subgradient(model, groups, 1.0)
