"""FN: scales of feature norms, and what they let through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.prune import Group, apply_plan, find_groups, make_criterion, make_plan, verify
from vss.prune.criteria import score_groups
from vss.prune.stats.base import Stats

from ..nets import Residual, randomise
from .feeds import FeatureNorm, Mixed, raw_scores


def net_and_groups() -> tuple[nn.Module, list[Group]]:
    torch.manual_seed(0)
    net = Mixed(norm=FeatureNorm).eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, FeatureNorm):
                module.scale.copy_(torch.randn_like(module.scale))
                module.bias.copy_(torch.randn_like(module.bias))
    return net, list(find_groups(net, torch.zeros(1, 3, 12, 12)))


def output_stds(net: nn.Module, name: str, images: Tensor) -> Tensor:
    """(C,) mean over images of the standard deviation of a layer's output over positions."""
    kept: list[Tensor] = []
    hook = net.get_submodule(name).register_forward_hook(lambda m, i, o: kept.append(o.detach().clone()))
    net(images)
    hook.remove()
    return kept[0].double().std(dim=(2, 3)).mean(dim=0)


def test_fn_effective_std() -> None:
    net, groups = net_and_groups()
    images = torch.randn(4, 3, 12, 12)
    found = raw_scores(make_criterion("fn"), net, groups, [images[:1], images[1:]], None)
    for name, layers in (
        ("merge.0", ["merge.1"]),
        ("branch.0", ["branch.1"]),
        ("backbone.stem.0", ["backbone.stem.1", "backbone.two.1"]),
    ):
        wanted = torch.stack([output_stds(net, layer, images) for layer in layers]).mean(dim=0)
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-7)


def test_the_published_score_is_the_scale_alone() -> None:
    net, groups = net_and_groups()
    criterion = make_criterion("naive_fn", preset="faithful")
    assert criterion.needs == () and criterion.sparse_phase
    found = raw_scores(criterion, net, groups, [], None)
    torch.testing.assert_close(found["merge.0"], net.merge[1].scale.detach().flatten().abs().double())
    both = torch.stack([net.backbone["stem"][1].scale.flatten(), net.backbone["two"][1].scale.flatten()]).detach()
    torch.testing.assert_close(found["backbone.stem.0"], both.abs().amax(dim=0).double())


def test_score_is_symmetric_in_sign_and_ignores_bias() -> None:
    net, groups = net_and_groups()
    images = [torch.randn(2, 3, 12, 12)]
    before = raw_scores(make_criterion("fn"), net, groups, images, None)["merge.0"]
    with torch.no_grad():
        net.merge[1].scale.neg_()
        net.merge[1].bias.fill_(3.0)
    torch.testing.assert_close(raw_scores(make_criterion("fn"), net, groups, images, None)["merge.0"], before)


def test_fn_params_pruned_together() -> None:
    net, _ = net_and_groups()
    example = torch.zeros(1, 3, 12, 12)
    images = [torch.randn(2, 3, 12, 12)]
    plan = make_plan(net, example, criterion="fn", batches=images, budget={"kind": "channels", "keep": 0.6})
    small = apply_plan(net, plan)
    figures = verify(net, small, plan, [(12, 12), (9, 14)])
    assert figures["masked_max_rel"] < 1e-4
    kept = {group.id: list(group.kept) for group in plan.groups}
    for conv, norm, group in (
        ("merge.0", "merge.1", "merge.0"),
        ("backbone.stem.0", "backbone.stem.1", "backbone.stem.0"),
        ("backbone.two.0", "backbone.two.1", "backbone.stem.0"),
    ):
        for leaf in ("scale", "bias"):
            was, now = getattr(net.get_submodule(norm), leaf), getattr(small.get_submodule(norm), leaf)
            assert torch.equal(now, was[:, kept[group]])
        assert len(small.get_submodule(conv).weight) == len(kept[group])
    assert any(len(kept[group.id]) < group.channels for group in plan.groups)


def test_a_network_without_feature_norms_is_refused() -> None:
    net = randomise(Residual())
    groups = list(find_groups(net, torch.zeros(1, 3, 8, 8)))
    with pytest.raises(VssError, match="criterion 'fn' does not apply to this network"):
        score_groups(make_criterion("fn", effective=False), groups, Stats(net))
    with pytest.raises(VssError, match="needs feature_norm_std, from calibration images"):
        make_plan(net, torch.zeros(1, 3, 8, 8), criterion="fn")
