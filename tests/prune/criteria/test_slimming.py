"""Network slimming, the score: S2 to S5."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.prune import Budget, CostModel, Group, Slot, find_groups, make_criterion
from vss.prune.budget import search
from vss.prune.criteria import score_groups
from vss.prune.stats.base import Stats

from ..nets import Chain, Residual, randomise
from .feeds import Mixed


class Norms(nn.Module):
    """Groups that are one batch norm each."""

    def __init__(self, *gammas: Tensor) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(len(gamma)) for gamma in gammas)
        for norm, gamma in zip(self.norms, gammas, strict=True):
            norm.weight = nn.Parameter(gamma)

    def groups(self) -> list[Group]:
        def slots(i: int) -> tuple[Slot, ...]:
            return tuple(Slot(f"norms.{i}.{leaf}", 0, role="norm") for leaf in ("weight", "bias"))

        return [Group(f"norms.{i}", norm.num_features, slots(i)) for i, norm in enumerate(self.norms)]


def slimming(net: Norms) -> dict[str, Tensor]:
    return score_groups(make_criterion("slimming"), net.groups(), Stats(net))


def keep(net: Norms, count: int, total: int, floor: float = 0.0) -> dict[str, Tensor]:
    budget = Budget(kind="channels", keep=count / total, floor=floor)
    return search(net.groups(), slimming(net), CostModel({}, {}, frozenset()), budget)


def test_slim_score_is_symmetric_in_sign_and_ignores_beta() -> None:
    net = Norms(torch.tensor([0.5, -0.25, 2.0]))
    before = slimming(net)["norms.0"]
    assert before.tolist() == [0.5, 0.25, 2.0]
    with torch.no_grad():
        net.norms[0].weight.neg_()
        net.norms[0].bias.fill_(7.0)
    assert torch.equal(slimming(net)["norms.0"], before)


@pytest.mark.parametrize("percent", [0.1, 0.33, 0.5, 0.7])
def test_slim_threshold_keeps_what_is_strictly_above_it(percent: float) -> None:
    torch.manual_seed(0)
    net = Norms(torch.rand(12), torch.rand(20) * 0.5)
    gammas = torch.cat([norm.weight.detach() for norm in net.norms])
    index = int(len(gammas) * percent)
    threshold = gammas.sort().values[index]
    kept = keep(net, len(gammas) - (index + 1), len(gammas))
    for i, norm in enumerate(net.norms):
        assert kept[f"norms.{i}"].tolist() == (norm.weight > threshold).nonzero().flatten().tolist()
    assert sum(map(len, kept.values())) == len(gammas) - (index + 1)


def test_slim_no_layer_collapse() -> None:
    equal = Norms(torch.full((8,), 0.3), torch.full((8,), 0.3))
    kept = keep(equal, 4, 16, floor=0.25)
    assert [len(kept[f"norms.{i}"]) for i in (0, 1)] == [2, 2]
    weak = Norms(torch.full((8,), 1e-6), torch.ones(8))
    assert [len(k) for k in keep(weak, 8, 16).values()] == [1, 7]


@pytest.mark.parametrize(("reduce", "by"), [("mean", Tensor.mean), ("sum", Tensor.sum), ("max", Tensor.amax)])
def test_coupled_norm_layers_are_reduced(reduce: str, by: object) -> None:
    net = randomise(Mixed())
    groups = find_groups(net, torch.zeros(1, 3, 8, 8))
    with torch.no_grad():
        net.backbone["two"][1].weight.neg_()
    score = make_criterion("slimming", reduce=reduce)(groups["backbone.stem.0"], Stats(net))
    both = torch.stack([net.backbone["stem"][1].weight, net.backbone["two"][1].weight]).detach().double().abs()
    torch.testing.assert_close(score, by(both, 0))


def test_the_published_masks_unite() -> None:
    assert make_criterion("slimming", preset="faithful").options()["reduce"] == "max"


def test_a_network_without_batch_norm_is_refused() -> None:
    net = Chain()
    groups = list(find_groups(net, torch.zeros(1, 3, 8, 8)))
    with pytest.raises(VssError, match="criterion 'slimming' does not apply to this network"):
        score_groups(make_criterion("slimming"), groups, Stats(net))


def test_layers_without_batch_norm_go_last_by_norm() -> None:
    net = randomise(Chain(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())))
    groups = list(find_groups(net, torch.zeros(1, 3, 8, 8)))
    scores = score_groups(make_criterion("slimming"), groups, Stats(net))
    assert scores["b"].min() > scores["a"].max()
    norms = net.b.weight.detach().abs().sum(dim=(1, 2, 3))
    assert torch.equal(scores["b"].argsort(), norms.argsort())


def test_scoring_leaves_the_network_alone() -> None:
    net = randomise(Residual())
    before = copy.deepcopy(net.state_dict())
    score_groups(make_criterion("slimming"), list(find_groups(net, torch.zeros(1, 3, 8, 8))), Stats(net))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
