"""The other published forms of Taylor importance, and sharing one calibration pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.prune import Group, collect, find_groups, make_criterion
from vss.prune.criteria import score_groups
from vss.prune.stats.base import Stats

from ..nets import Chain, Heads, Residual, Twice, randomise
from ..scoring import batches_of, mean_loss
from .feeds import Mixed, raw_scores


def net_and_groups(net: nn.Module | None = None) -> tuple[nn.Module, list[Group]]:
    torch.manual_seed(0)
    net = randomise(net or Mixed())
    groups = list(find_groups(net, torch.zeros(1, 3, 12, 12)))
    return net.double(), groups


def terms(net: nn.Module, norm: str, batch: object) -> tuple[Tensor, Tensor]:
    """gamma * g_gamma and beta * g_beta of one batch."""
    layer = net.get_submodule(norm)
    gamma, beta = torch.autograd.grad(mean_loss(net, batch), [layer.weight, layer.bias])
    return (layer.weight * gamma).detach(), (layer.bias * beta).detach()


def taylor(net: nn.Module, groups: list[Group], batches: list, **options: object) -> dict[str, Tensor]:
    return raw_scores(make_criterion("taylor", **options), net, groups, batches, mean_loss)


def test_members_are_squared_together_or_apart() -> None:
    net, groups = net_and_groups()
    batches = batches_of(3, classes=3)
    norms = ("backbone.stem.1", "backbone.two.1")
    both = [torch.stack([sum(terms(net, norm, batch)) for norm in norms]) for batch in batches]
    joint = sum(pair.sum(dim=0).square() for pair in both) / 3
    apart = sum(pair.square().sum(dim=0) for pair in both) / 3
    torch.testing.assert_close(taylor(net, groups, batches)["backbone.stem.0"], joint, rtol=1e-6, atol=0)
    torch.testing.assert_close(taylor(net, groups, batches, joint=False)["backbone.stem.0"], apart, rtol=1e-6, atol=0)
    half = taylor(net, groups, batches, divide_by_members=True)
    torch.testing.assert_close(half["backbone.stem.0"], joint / 2, rtol=1e-6, atol=0)


def test_gamma_alone_and_gamma_with_beta() -> None:
    net, groups = net_and_groups()
    batches = batches_of(2, classes=3)
    parts = [terms(net, "merge.1", batch) for batch in batches]
    with_beta = sum((gamma + beta).square() for gamma, beta in parts) / 2
    alone = sum(gamma.square() for gamma, _ in parts) / 2
    torch.testing.assert_close(taylor(net, groups, batches, variant="bn")["merge.0"], with_beta, rtol=1e-6, atol=0)
    torch.testing.assert_close(taylor(net, groups, batches, variant="gamma")["merge.0"], alone, rtol=1e-6, atol=0)


def test_variants_of_norm_layers_are_silent_where_there_are_none() -> None:
    net, groups = net_and_groups(Chain())
    for variant in ("bn", "gamma"):
        assert taylor(net, groups, batches_of(1), variant=variant) == {}
        criterion = make_criterion("taylor", variant=variant)
        collected, _ = collect(net, groups, criterion.needs, batches_of(1), mean_loss)
        with pytest.raises(VssError, match="criterion 'taylor' does not apply to this network"):
            score_groups(criterion, groups, Stats(net, collected))
    assert set(taylor(net, groups, batches_of(1))) == {"a", "b"}


@pytest.mark.parametrize("make", [Mixed, Residual, Chain, Twice])
def test_per_example_gates_square_every_image(make: type[nn.Module]) -> None:
    net, groups = net_and_groups(make())
    classes = 3 if make in (Mixed, Residual) else 2
    ((images, labels),) = batches_of(1, classes=classes, size=3)
    single = [(images[i : i + 1], labels[i : i + 1]) for i in range(3)]
    found = taylor(net, groups, [(images, labels)], variant="examples")
    by_image = [taylor(net, groups, [pair]) for pair in single]
    for name, score in found.items():  # the batch's loss is the mean over three images
        torch.testing.assert_close(score, sum(s[name] for s in by_image) / 9, rtol=1e-8, atol=1e-20)


def test_per_example_gates_of_one_image_are_gates() -> None:
    net, groups = net_and_groups()
    batches = batches_of(2, classes=3, size=1)
    gates, examples = taylor(net, groups, batches), taylor(net, groups, batches, variant="examples")
    for name in gates:
        torch.testing.assert_close(examples[name], gates[name], rtol=1e-8, atol=0)


def test_per_example_gates_name_a_head_outside_the_loss() -> None:
    net, groups = net_and_groups(Heads())
    with pytest.raises(VssError, match="layer 'side' got no gradient"):
        raw_scores(
            make_criterion("taylor", variant="examples"), net, groups, batches_of(1),
            lambda m, b: nn.functional.cross_entropy(m(b[0])["out"], b[1]),
        )  # fmt: skip


def test_filter_variants() -> None:
    net, groups = net_and_groups()
    batches = batches_of(2, classes=3)
    products = []
    for batch in batches:
        weight = net.merge[0].weight
        products.append((weight * torch.autograd.grad(mean_loss(net, batch), weight)[0]).detach().flatten(1))
    square, absolute = sum(p.square().sum(1) for p in products) / 2, sum(p.abs().sum(1) for p in products) / 2
    found = taylor(net, groups, batches, variant="filter_square")["merge.0"]
    torch.testing.assert_close(found, square, rtol=1e-6, atol=0)
    found = taylor(net, groups, batches, variant="filter_abs")["merge.0"]
    torch.testing.assert_close(found, absolute, rtol=1e-6, atol=0)


def test_one_pass_feeds_all_criteria() -> None:
    net, groups = net_and_groups()
    names = ("taylor", "sirfp", "fgp", "defect", "corr", "taylor_fo")
    criteria = {name: make_criterion(name) for name in names}
    batches = batches_of(2, classes=3)
    passes = []

    def counted(model: nn.Module, batch: object) -> Tensor:
        passes.append(1)
        return mean_loss(model, batch)

    collected, _ = collect(net, groups, [need for c in criteria.values() for need in c.needs], batches, counted)
    assert len(passes) == len(batches) + 1  # the first batch also shows the layers' shapes
    stats = Stats(net, collected)
    for name, criterion in criteria.items():
        alone = raw_scores(criterion, net, groups, batches, mean_loss)
        for group in groups:
            torch.testing.assert_close(criterion(group, stats), alone[group.id], rtol=1e-6, atol=1e-15)
        assert set(alone) == {group.id for group in groups}, name
