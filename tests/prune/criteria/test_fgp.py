"""FGP: G1 to G6 against maps of every class and full gradients."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.prune import Budget, CostModel, Group, Slot, collect, find_groups, make_criterion
from vss.prune.budget import search
from vss.prune.criteria import score_groups
from vss.prune.criteria.gradients import before_in_order, class_shares
from vss.prune.stats import Need
from vss.prune.stats.base import Stats

from ..nets import Heads, MaxAvg, randomise
from ..scoring import batches_of
from .feeds import Mixed, raw_scores


def net_and_groups(net: nn.Module | None = None) -> tuple[nn.Module, list[Group]]:
    torch.manual_seed(0)
    net = randomise(net or Mixed())
    groups = list(find_groups(net, torch.zeros(1, 3, 12, 12)))
    return net.double(), groups


def support(net: nn.Module, groups: list[Group], batches: object, **options: object) -> dict[str, Tensor]:
    need = Need.of("class_support", **{"site": "stream", "masks": "truth"} | options)
    return collect(net, groups, [need], batches, None)[0][str(need)]


def naive(net: nn.Module, module: str, batches: list, *, predicted: bool, inputs: bool, channels: slice) -> Tensor:
    """(K, C) sums of ReLU(alpha * A), the maps of every class in full."""
    rows = torch.zeros(3, channels.stop - channels.start, dtype=torch.float64)
    for images, labels in batches:
        kept: list[Tensor] = []
        hook = (
            net.get_submodule(module).register_forward_pre_hook(lambda m, i, kept=kept: kept.append(i[0]))
            if inputs
            else net.get_submodule(module).register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        )
        logits = net(images)
        hook.remove()
        masks = logits.argmax(dim=1) if predicted else labels
        for c in range(3):
            y = (logits[:, c] * (masks == c)).sum()
            (grad,) = torch.autograd.grad(y, kept[0], retain_graph=True)
            alpha = grad[:, channels].mean(dim=(2, 3), keepdim=True)
            rows[c] += (alpha * kept[0].detach()[:, channels]).relu().sum(dim=(0, 2, 3))
    return rows


def test_fgp_closed_form() -> None:
    net, groups = net_and_groups()
    batches = batches_of(2, classes=3)
    found = support(net, groups, batches)
    # the stream of the residual stage is read by `merge` from offset 0, the branch from offset 6
    wanted = naive(net, "merge.0", batches, predicted=False, inputs=True, channels=slice(0, 6))
    torch.testing.assert_close(found["backbone.stem.0"], wanted, rtol=1e-6, atol=1e-14)
    wanted = naive(net, "merge.0", batches, predicted=False, inputs=True, channels=slice(6, 10))
    torch.testing.assert_close(found["branch.0"], wanted, rtol=1e-6, atol=1e-14)


def test_closed_form_where_gradients_have_both_signs() -> None:
    net, groups = net_and_groups()
    batches = batches_of(2, classes=3)
    found = support(net, groups, batches, site="conv", masks="predicted")
    wanted = naive(net, "merge.0", batches, predicted=True, inputs=False, channels=slice(0, 7))
    torch.testing.assert_close(found["merge.0"], wanted, rtol=1e-6, atol=1e-14)
    members = [
        naive(net, name, batches, predicted=True, inputs=False, channels=slice(0, 6))
        for name in ("backbone.stem.0", "backbone.two.0")
    ]
    torch.testing.assert_close(found["backbone.stem.0"], members[0] + members[1], rtol=1e-6, atol=1e-14)
    assert make_criterion("fgp", preset="faithful").options() == make_criterion("fgp").options() | {
        "site": "conv", "masks": "predicted",
    }  # fmt: skip


def test_fgp_class_scale() -> None:
    net, groups = net_and_groups()
    batches = batches_of(2, classes=3)
    before = {name: class_shares(value) for name, value in support(net, groups, batches).items()}
    with torch.no_grad():
        net.head.weight[1] *= 7.0
        net.head.bias[1] *= 7.0
    after = {name: class_shares(value) for name, value in support(net, groups, batches).items()}
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-14)


def test_a_channel_without_gradient_has_no_support_and_goes_first() -> None:
    net, groups = net_and_groups()
    with torch.no_grad():
        net.head.weight[:, 3] = 0
    scores = raw_scores(make_criterion("fgp", ranking="share"), net, groups, batches_of(1, classes=3), None)
    assert float(scores["merge.0"][3]) == 0 and int(scores["merge.0"].argmin()) == 3
    energy = raw_scores(make_criterion("fgp"), net, groups, batches_of(1, classes=3), None)["merge.0"]
    assert int(energy.argmin()) == 3


def test_support_does_not_depend_on_the_scale_between_layers() -> None:
    net, groups = net_and_groups()
    batches = batches_of(2, classes=3)
    before = support(net, groups, batches)["merge.0"]
    with torch.no_grad():
        net.merge[1].weight[2] *= 5.0
        net.merge[1].bias[2] *= 5.0
        net.head.weight[:, 2] /= 5.0
    torch.testing.assert_close(support(net, groups, batches)["merge.0"], before, rtol=1e-6, atol=1e-14)


def energy_prefix(share: Tensor, energy: float) -> Tensor:
    """(C,) bool, the published rule: the shortest prefix of the channels, best first, that holds `energy` of the sum.

    Sums of floats are not exact: what is 1e-12 of the sum short of the energy holds it.
    """
    if energy >= 1:
        return share > 0
    before, total = before_in_order(share), float(share.sum())
    return (before < (energy - 1e-12) * total) | (before == 0)


def test_fgp_energy_prefix() -> None:
    share = torch.tensor([0.1, 0.4, 0.0, 0.3, 0.2], dtype=torch.float64)
    assert energy_prefix(share, 0.8).tolist() == [False, True, False, True, True]
    assert energy_prefix(share, 0.69).tolist() == [False, True, False, True, False]
    assert energy_prefix(share, 1.0).tolist() == [True, True, False, True, True]
    assert energy_prefix(share, 0.0).tolist() == [False, True, False, False, False]
    assert before_in_order(share).tolist() == pytest.approx([0.9, 0.0, 1.0, 0.4, 0.7])


def test_a_budget_walk_finds_the_energy_that_meets_it() -> None:
    net, groups = net_and_groups()
    raw = raw_scores(make_criterion("fgp", ranking="share"), net, groups, batches_of(2, classes=3), None)
    scores = raw_scores(make_criterion("fgp"), net, groups, batches_of(2, classes=3), None)
    wanted = {name: energy_prefix(share, 0.8) for name, share in raw.items()}
    count = sum(int(mask.sum()) for mask in wanted.values())
    total = sum(len(mask) for mask in wanted.values())
    budget = Budget(kind="channels", keep=count / total, floor=0.0)
    kept = search(groups, scores, CostModel({}, {}, frozenset()), budget)
    assert {name: k.tolist() for name, k in kept.items()} == {
        name: mask.nonzero().flatten().tolist() for name, mask in wanted.items()
    }
    assert 0 < count < total


def test_an_absent_class_does_not_count_and_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    net, groups = net_and_groups()
    batches = batches_of(3, classes=2)  # never class 2
    with caplog.at_level(logging.WARNING):
        found = support(net, groups, batches)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["classes absent from the calibration set do not count: 2"]
    assert all(not value[2].any() and value[0].any() for value in found.values())
    assert all(len(class_shares(value)) == 2 for value in found.values())


def test_void_pixels_and_excluded_classes_do_not_count() -> None:
    net, groups = net_and_groups()
    ((images, labels),) = batches_of(1, classes=3)
    void = labels.clone()
    void[:, :6] = 255
    found = support(net, groups, [(images, void)])["merge.0"]
    wanted = naive(net, "head", [(images, void)], predicted=False, inputs=True, channels=slice(0, 7))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-14)
    assert len(class_shares(found, exclude=(0, 9))) == 2


def test_every_head_counts_and_a_silent_one_is_named() -> None:
    net, groups = net_and_groups(Heads())
    net.forward_train = lambda x: {"out": (y := net(x))["out"], "aux": y["aux"][0]}
    found = support(net, groups, batches_of(1, classes=2))
    assert {"a.0", "b", "side"} <= set(found) and all(value.any() for value in found.values())
    half = support(net, groups, batches_of(1, classes=2), aux_weight=0.2)
    torch.testing.assert_close(half["side"] * 2, found["side"])
    torch.testing.assert_close(half["b"], found["b"])
    net.forward_train = lambda x: {"out": net(x)["out"]}
    with pytest.raises(VssError, match="layer 'aux' got no gradient: its head is outside the loss"):
        support(net, groups, batches_of(1, classes=2))


def test_a_decision_head_is_read_through_its_pooled_maps() -> None:
    net, groups = net_and_groups(MaxAvg())
    images, _ = batches_of(1)[0]
    found = support(net, groups, [(images, torch.ones(2, 12, 12, dtype=torch.int64))])
    assert found["a"].shape == (2, 6) and found["a"][1].any() and not found["a"][0].any()


def test_missing_labels_are_refused() -> None:
    net, groups = net_and_groups()
    images = batches_of(1)[0][0]
    with pytest.raises(VssError, match="needs labels, and the calibration batches have none"):
        support(net, groups, [images])
    assert support(net, groups, [images], masks="predicted")["merge.0"].any()
    with pytest.raises(VssError, match="no pixel of any class"):
        support(net, groups, [(images, torch.full((2, 12, 12), 255))])


def test_classes_are_averaged_or_the_least_counts() -> None:
    class Fake(nn.Module):
        pass

    group = Group("a", 2, (Slot("a.weight", 0),))
    rows = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    for how, wanted in (("mean", [0.375, 0.625]), ("min", [0.25, 0.5]), ("mix", [0.3375, 0.5875])):
        criterion = make_criterion("fgp", classes=how, ranking="share")
        stats = Stats(Fake(), {str(criterion.requests()[0]): {"a": rows}})
        score = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(criterion(group, stats), score / score.mean())
    dead = Stats(Fake(), {str(make_criterion("fgp").requests()[0]): {"a": 0 * rows}})
    with pytest.raises(VssError, match="no class of the calibration set is supported by layer 'a'"):
        score_groups(make_criterion("fgp"), [group], dead)
