"""C2: activity on defects, with and without the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.core.errors import VssError
from vss.prune import Group, find_groups, make_criterion
from vss.prune.stats.maps import masked_means

from ..nets import randomise
from .feeds import Mixed, raw_scores

Batch = tuple[Tensor, Tensor]


def net_and_groups() -> tuple[nn.Module, list[Group]]:
    torch.manual_seed(0)
    net = randomise(Mixed())
    groups = list(find_groups(net, torch.zeros(1, 3, 12, 12)))
    return net.double(), groups


def batch(seed: int = 0, *, size: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    masks = (torch.rand(size, 12, 12, generator=generator) < 0.2).long()
    return torch.randn(size, 3, 12, 12, generator=generator, dtype=torch.float64), masks


def loss(model: nn.Module, given: Batch) -> Tensor:
    """A decision in every image: the mean over images of a function of one image each."""
    decision = model(given[0])[:, 0].flatten(1).logsumexp(dim=1)
    return F.binary_cross_entropy_with_logits(decision, torch.ones_like(decision))


def scores(batches: list[Batch], name: str = "merge.0", **options: object) -> Tensor:
    net, groups = net_and_groups()
    return raw_scores(make_criterion("defect", **options), net, groups, batches, loss)[name]


def conv_output(net: nn.Module, images: Tensor, name: str) -> Tensor:
    kept: list[Tensor] = []
    hook = net.get_submodule(name).register_forward_hook(lambda m, i, o: kept.append(o))
    net(images)
    hook.remove()
    return kept[0].detach()


def test_grad_act_is_the_masked_mean_of_activation_times_gradient() -> None:
    net, _ = net_and_groups()
    images, masks = batch()
    kept: list[Tensor] = []
    hook = net.head.register_forward_pre_hook(lambda m, i: kept.append(i[0]))
    value = loss(net, (images, masks))
    hook.remove()
    (grad,) = torch.autograd.grad(value, kept[0])
    product = (kept[0] * grad).detach().abs() * 2  # two images
    m = masks[:, None].double()
    wanted = ((product * m).sum(dim=(2, 3)) / (m.sum(dim=(2, 3)) + 1e-8)).mean(dim=0)
    torch.testing.assert_close(scores([(images, masks)]), wanted, rtol=1e-6, atol=0)
    other = ((product * (1 - m)).sum(dim=(2, 3)) / ((1 - m).sum(dim=(2, 3)) + 1e-8)).mean(dim=0)
    torch.testing.assert_close(scores([(images, masks)], background=0.5), wanted - 0.5 * other, rtol=1e-6, atol=1e-14)


def test_c2_mask_ones() -> None:
    images, masks = batch()
    ones = torch.ones_like(masks)
    net, _ = net_and_groups()
    for name in ("merge.0", "branch.0"):
        wanted = conv_output(net, images, name).abs().mean(dim=(0, 2, 3))
        found = scores([(images, ones)], name, preset="faithful")
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_c2_mask_scaling_does_not_matter() -> None:
    values, mask = torch.rand(2, 3, 5, 5), torch.rand(2, 5, 5)
    found = masked_means(values, None, mask)
    torch.testing.assert_close(masked_means(values, None, 7 * mask), found, rtol=1e-6, atol=0)
    weights = mask.double()[:, None]
    wanted = (values.double() * weights).sum(dim=(2, 3)) / weights.sum(dim=(2, 3))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    images, masks = batch()
    assert torch.equal(scores([(images, masks * 9)]), scores([(images, masks)]))


def test_c2_multiplier_guard() -> None:
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return grad * 0

    net, groups = net_and_groups()
    net.branch.register_forward_hook(lambda m, i, o: Cut.apply(o))
    net.backbone["two"].register_forward_hook(lambda m, i, o: Cut.apply(o))
    only = [group for group in groups if group.id == "backbone.one.0"]
    with pytest.raises(VssError, match=r"gradient at layer 'backbone.two.0' is zero throughout: a gradient multiplier"):
        raw_scores(make_criterion("defect"), net, only, [batch()], loss)


def test_c2_images_without_defects_do_not_count() -> None:
    first, clean = batch(), batch(1)
    clean = (clean[0], torch.zeros_like(clean[1]))
    torch.testing.assert_close(scores([first, clean]), scores([first]))
    mixed = (torch.cat([first[0], clean[0]]), torch.cat([first[1], clean[1]]))
    torch.testing.assert_close(scores([mixed]), scores([first]), rtol=1e-6, atol=0)  # whatever the batching
    void = (first[0], torch.where(first[1] > 0, first[1], 255))
    torch.testing.assert_close(scores([void]), scores([first]))
    with pytest.raises(VssError, match="the calibration set shows no defect"):
        scores([clean])


def test_only_the_labels_that_are_defects_count() -> None:
    images, masks = batch()
    two = torch.where(masks > 0, 2, 1)
    torch.testing.assert_close(scores([(images, two)], positive=(2,)), scores([(images, masks)]))


def test_small_defects_survive_the_resize_to_the_map() -> None:
    from vss.prune.stats.maps import _resized

    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 0, 0] = 1
    assert float(_resized(mask, (2, 2), "area").sum()) > 0
    assert float(_resized(mask, (2, 2), "bilinear").sum()) == 0


def test_c2_needs_masks_and_a_loss() -> None:
    net, groups = net_and_groups()
    images, _ = batch()
    with pytest.raises(VssError, match="a criterion that looks at defects needs labels"):
        raw_scores(make_criterion("defect", mode="act"), net, groups, [images], None)
    with pytest.raises(VssError, match=r"needs defect_activity\(.*\), from gradients; give batches with labels"):
        raw_scores(make_criterion("c2"), net, groups, [batch()], None)


def test_c2_presets_and_widths() -> None:
    faithful = make_criterion("ours_c2", preset="faithful")
    assert faithful.rounding is not None and faithful.rounding(64, 0.2) == 48
    assert make_criterion("defect").rounding is None


def test_activations_survive_what_the_network_overwrites() -> None:
    net, groups = net_and_groups()
    found = raw_scores(make_criterion("defect", site="bn_out", mode="act"), net, groups, [batch()], None)
    images, masks = batch()
    m = masks[:, None].double()
    total = 0.0
    for name in ("backbone.stem.1", "backbone.two.1"):
        kept: list[Tensor] = []
        hook = net.get_submodule(name).register_forward_hook(lambda m, i, o, kept=kept: kept.append(o.clone()))
        net(images)
        hook.remove()
        total = total + ((kept[0].abs() * m).sum(dim=(2, 3)) / (m.sum(dim=(2, 3)) + 1e-8)).mean(dim=0)
    torch.testing.assert_close(found["backbone.stem.0"], total.detach(), rtol=1e-6, atol=0)
