"""C4: filters times gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.prune import Group, find_groups, make_criterion

from ..nets import Heads, randomise
from ..scoring import batches_of, mean_loss
from .feeds import Mixed, raw_scores


def net_and_groups() -> tuple[nn.Module, list[Group]]:
    torch.manual_seed(0)
    net = randomise(Mixed())
    groups = list(find_groups(net, torch.zeros(1, 3, 12, 12)))
    return net.double(), groups


def gradients(net: nn.Module, name: str, batches: list) -> list[Tensor]:
    weight = net.get_submodule(name).weight
    return [torch.autograd.grad(mean_loss(net, batch), weight)[0] for batch in batches]


def per_filter(value: Tensor) -> Tensor:
    return value.detach().flatten(1).sum(dim=1)


def test_variants_against_autograd() -> None:
    net, groups = net_and_groups()
    batches = batches_of(3, classes=3)
    for name, members in (("merge.0", ["merge.0"]), ("backbone.stem.0", ["backbone.stem.0", "backbone.two.0"])):
        grads = {m: gradients(net, m, batches) for m in members}
        weights = {m: net.get_submodule(m).weight for m in members}
        wanted = {
            "abs_of_sum": sum(per_filter((weights[m] * sum(grads[m]) / 3).abs()) for m in members),
            "sum_of_abs": sum(per_filter((weights[m] * g).abs()) for m in members for g in grads[m]) / 3,
            "square_of_sum": sum(
                sum(per_filter(weights[m] * grads[m][t]) for m in members).square() for t in range(3)
            ) / 3,
        }  # fmt: skip
        for reduce, value in wanted.items():
            found = raw_scores(make_criterion("taylor_fo", reduce=reduce), net, groups, batches, mean_loss)[name]
            scale = float(wanted["sum_of_abs"].max()) ** 2
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9 * scale)  # of float32 sums that cancel


def test_c4_linear_in_loss() -> None:
    net, groups = net_and_groups()
    batches = batches_of(2, classes=3)
    for reduce, power in (("abs_of_sum", 1), ("sum_of_abs", 1), ("square_of_sum", 2)):
        criterion = make_criterion("c4", reduce=reduce)
        one = raw_scores(criterion, net, groups, batches, mean_loss)
        five = raw_scores(criterion, net, groups, batches, lambda m, b: 5 * mean_loss(m, b))
        for name in one:
            torch.testing.assert_close(five[name], 5.0**power * one[name], rtol=1e-6, atol=1e-9)  # sums are float32


def test_zero_gradients_give_zero_scores() -> None:
    net, groups = net_and_groups()
    found = raw_scores(make_criterion("c4"), net, groups, batches_of(2, classes=3), lambda m, b: 0 * mean_loss(m, b))
    assert all(not score.any() for score in found.values())


def test_one_batch_makes_the_sums_agree() -> None:
    net, groups = net_and_groups()
    batches = batches_of(1, classes=3)
    first = raw_scores(make_criterion("c4", reduce="abs_of_sum"), net, groups, batches, mean_loss)
    second = raw_scores(make_criterion("c4", reduce="sum_of_abs"), net, groups, batches, mean_loss)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=0)


def test_the_signed_sum_says_nothing_before_a_batch_norm() -> None:
    net, groups = net_and_groups()
    net.train()  # the scale invariance of a filter holds for batch statistics
    batches = batches_of(1, classes=3, size=4)
    signed = make_criterion("c4", reduce="square_of_sum", batch_norm="train")
    absolute = make_criterion("c4", reduce="sum_of_abs", batch_norm="train")
    signed_sum = raw_scores(signed, net, groups, batches, mean_loss)["merge.0"].sqrt()
    assert (signed_sum < 1e-3 * raw_scores(absolute, net, groups, batches, mean_loss)["merge.0"]).all()


def test_batch_norm_in_training_mode_leaves_its_statistics_alone() -> None:
    net, groups = net_and_groups()
    before = {name: value.clone() for name, value in net.named_buffers()}
    batches = batches_of(2, classes=3)
    train = raw_scores(make_criterion("c4", preset="faithful"), net, groups, batches, mean_loss)
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    assert not net.training
    eval_mode = raw_scores(make_criterion("c4"), net, groups, batches, mean_loss)
    assert not torch.allclose(train["merge.0"], eval_mode["merge.0"], rtol=1e-3)


def test_a_head_outside_the_loss_is_named() -> None:
    net = randomise(Heads()).double()
    groups = list(find_groups(net.float(), torch.zeros(1, 3, 12, 12)))
    with pytest.raises(VssError, match="layer 'side' got no gradient"):
        raw_scores(
            make_criterion("c4"), net.double(), groups, batches_of(1),
            lambda m, b: nn.functional.cross_entropy(m(b[0])["out"], b[1]),
        )  # fmt: skip
