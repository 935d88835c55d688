"""Taylor scores against explicit gates, and their invariances."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vss import models
from vss.core.example import logits_of
from vss.prune import Group, Groups, find_groups

from ..nets import Chain, Heads, Residual, Twice, randomise
from ..scoring import Batch, batches_of, mean_loss, scores_of

NETS = {
    "residual": Residual,
    "heads": Heads,
    "plain": Chain,
    "called twice": Twice,
    "unet": lambda: models.build("unet", 3, width=2, depth=2),
    "resnet18_seg": lambda: models.build("resnet18_seg", 3, decoder=4),
}


def double(name: str, seed: int = 0) -> tuple[nn.Module, Groups]:
    torch.manual_seed(seed)
    net = randomise(NETS[name](), seed)
    groups = find_groups(net, torch.zeros(1, 3, 32, 32))
    return net.double().eval(), groups


def gated_modules(net: nn.Module, group: Group) -> list[str]:
    """Norm layers of a group; its producers where it has none."""
    norms = [n for n in group.module_names("norm") if not isinstance(net.get_submodule(n), nn.Conv2d)]
    return norms or group.module_names("producer")


def explicit_gates(net: nn.Module, groups: Groups, batch: Batch) -> dict[str, Tensor]:
    """dL/dz at z = 1 of a real factor z on the output of every gated layer, shared by the members of a group."""
    net, handles = copy.deepcopy(net), []
    gates = {g.id: torch.ones(g.channels, dtype=torch.float64, requires_grad=True) for g in groups}
    for group in groups:
        for name in gated_modules(net, group):
            factor = gates[group.id].view(1, -1, 1, 1)
            handles.append(net.get_submodule(name).register_forward_hook(lambda m, i, o, f=factor: o * f))
    grads = torch.autograd.grad(mean_loss(net, batch), list(gates.values()))
    return dict(zip(gates, grads, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_taylor_gate_identity_score_is_the_mean_square_of_an_explicit_gate_gradient(name: str) -> None:
    net, groups = double(name)
    side = 12 if name in ("residual", "heads", "plain", "called twice") else 32
    batches = batches_of(3, side=side)
    scores = scores_of(net, groups, "taylor", batches)
    gates = [explicit_gates(net, groups, batch) for batch in batches]
    for group in groups:
        wanted = torch.stack([g[group.id].square() for g in gates]).mean(0)
        torch.testing.assert_close(scores[group.id], wanted, rtol=1e-8, atol=1e-16)
        assert wanted.max() > 0


def test_taylor_group_signed_sum_adds_before_squaring() -> None:
    net, groups = double("residual")
    (batch,) = batches_of(1)
    score = scores_of(net, groups, "taylor", [batch])["stem.0"]
    mean_loss(net, batch).backward()
    parts = [n.weight * n.weight.grad + n.bias * n.bias.grad for n in (net.stem[1], net.two[1])]
    torch.testing.assert_close(score, (parts[0] + parts[1]).square().detach(), rtol=1e-6, atol=0)
    loose = (parts[0].square() + parts[1].square()).detach()
    assert float(((score - loose).abs() / loose).max()) > 0.05


def test_dividing_by_members_counts_norm_layers() -> None:
    net, groups = double("residual")
    batches = batches_of(2)
    plain = scores_of(net, groups, "taylor", batches)
    divided = scores_of(net, groups, "taylor", batches, divide_by_members=True)
    torch.testing.assert_close(divided["stem.0"], plain["stem.0"] / 2)
    torch.testing.assert_close(divided["one.0"], plain["one.0"])


def test_taylor_loss_scaling_times_s_gives_scores_times_s_squared() -> None:
    net, groups = double("heads")
    batches = batches_of(2)
    one = scores_of(net, groups, "taylor", batches)
    seven = scores_of(net, groups, "taylor", batches, loss=lambda m, b: 7 * mean_loss(m, b))
    for key in one:
        torch.testing.assert_close(seven[key], 49 * one[key], rtol=1e-6, atol=0)


def test_a_channel_that_nobody_reads_scores_zero() -> None:
    net, groups = double("residual")
    with torch.no_grad():
        net.two[0].weight[:, 2] = 0  # the only consumer of group one.0
    scores = scores_of(net, groups, "taylor", batches_of(2))["one.0"]
    assert scores[2] == 0 and (scores[[0, 1, 3, 4]] > 0).all()


def test_twins_score_the_same() -> None:
    net, groups = double("residual")
    with torch.no_grad():
        net.one[0].weight[3] = net.one[0].weight[1]
        for tensor in (net.one[1].weight, net.one[1].bias, net.one[1].running_mean, net.one[1].running_var):
            tensor[3] = tensor[1]
        net.two[0].weight[:, 3] = net.two[0].weight[:, 1]
    scores = scores_of(net, groups, "taylor", batches_of(2))["one.0"]
    torch.testing.assert_close(scores[3], scores[1], rtol=1e-6, atol=0)
    assert abs(float(scores[0] - scores[1])) > 1e-6 * float(scores[1])


def test_scaling_filters_and_statistics_together_changes_nothing() -> None:
    net, groups = double("residual")
    batches = batches_of(2)
    before = scores_of(net, groups, "taylor", batches)
    conv, norm = net.one[0], net.one[1]
    with torch.no_grad():
        conv.weight *= 3
        norm.running_mean *= 3
        norm.running_var.copy_(9 * (norm.running_var + norm.eps) - norm.eps)
    after = scores_of(net, groups, "taylor", batches)
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=1e-6, atol=0)


def test_additive_over_disjoint_sets_and_free_of_their_order() -> None:
    net, groups = double("residual")
    batches = batches_of(5)
    whole = scores_of(net, groups, "taylor", batches)
    first, second = (scores_of(net, groups, "taylor", part) for part in (batches[:2], batches[2:]))
    backwards = scores_of(net, groups, "taylor", batches[::-1])
    for key in whole:
        torch.testing.assert_close(whole[key], (2 * first[key] + 3 * second[key]) / 5, rtol=1e-6, atol=0)
        torch.testing.assert_close(whole[key], backwards[key], rtol=1e-6, atol=0)


@pytest.mark.parametrize("criterion", ["taylor", "l1", "l2"])
@pytest.mark.parametrize("root", ["stem.0", "one.0"])
def test_permuting_channels_permutes_scores(criterion: str, root: str) -> None:
    net, groups = double("residual")
    batches = batches_of(2)
    before = scores_of(net, groups, criterion, batches)
    order = torch.randperm(groups[root].channels, generator=torch.Generator().manual_seed(1))
    y = batches[0][0]
    wanted = logits_of(net(y))[0]
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    with torch.no_grad():
        for slot in groups[root].slots:
            tensors[slot.tensor].copy_(tensors[slot.tensor].index_select(slot.dim, order))
    torch.testing.assert_close(logits_of(net(y))[0], wanted)
    after = scores_of(net, groups, criterion, batches)
    for key in before:
        expected = before[key][order] if key == root else before[key]
        torch.testing.assert_close(after[key], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("criterion", ["taylor", "l1", "l2", "random"])
def test_dead_channels_and_single_pixel_maps_score_finite(criterion: str) -> None:
    net, groups = double("residual")
    with torch.no_grad():
        for module in (net.one[0], net.stem[0]):
            module.weight[1] = 0
        for norm in (net.one[1], net.stem[1]):
            norm.weight[1] = norm.bias[1] = norm.running_mean[1] = norm.running_var[1] = 0
    scores = scores_of(net, groups, criterion, batches_of(2, side=1))
    assert all(torch.isfinite(value).all() for value in scores.values())
