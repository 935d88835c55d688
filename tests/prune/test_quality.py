"""Oracle, overlap, reconstruction error, rank correlation and sensitivity against brute force."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.prune import Groups, apply_plan, find_groups, make_plan, quality

from .nets import Residual, randomise
from .scoring import batches_of, mean_loss


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(3)
    return randomise(Residual()).double()


@pytest.fixture(scope="module")
def groups(net: nn.Module) -> Groups:
    return find_groups(net, torch.zeros(1, 3, 12, 12, dtype=torch.float64))


BATCHES = batches_of(2, classes=3)


def cut(net: nn.Module, groups: Groups, kept: dict[str, list[int]]) -> nn.Module:
    """The sliced network, by a plan that keeps what is asked for: the reference, which zeroes nothing."""
    plan = make_plan(net, torch.zeros(1, 3, 12, 12, dtype=torch.float64), criterion="l1", groups=groups,
                     budget={"kind": "channels", "keep": 1.0})  # fmt: skip
    rows = tuple(group.keep(torch.tensor(kept.get(group.id, range(group.channels)))) for group in groups)
    return apply_plan(net, plan.model_copy(update={"groups": rows}))


def loss_of(net: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(mean_loss(net, batch)) for batch in BATCHES) / len(BATCHES)


def test_the_oracle_is_the_loss_of_the_network_without_the_channel(net: nn.Module, groups: Groups) -> None:
    sample = quality.sample_channels(list(groups), 1000)
    assert sample == [(group.id, channel) for group in groups for channel in range(group.channels)]
    calls = []
    found = quality.oracle(net, groups, sample, BATCHES, lambda m, b: calls.append(1) or mean_loss(m, b))
    assert len(calls) == found.forwards == quality.oracle_cost(sample, BATCHES) == (len(sample) + 1) * 2
    assert found.loss == pytest.approx(loss_of(net), rel=1e-12)
    for (name, channel), change in zip(sample, found.change.tolist(), strict=True):
        left = [k for k in range(groups[name].channels) if k != channel]
        assert change == pytest.approx(loss_of(cut(net, groups, {name: left})) - loss_of(net), abs=1e-10)
    assert found.change.abs().min() > 0


def test_the_network_is_left_as_it_was(net: nn.Module, groups: Groups) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    quality.oracle(net, groups, quality.sample_channels(list(groups), 3), BATCHES, mean_loss)
    other = copy.deepcopy(net)
    group = groups.groups[0]
    with pytest.raises(RuntimeError, match="inside"), quality.zeroed(other, [(group, torch.tensor([1]))]):
        assert any(not torch.equal(before[name], value) for name, value in other.state_dict().items())
        raise RuntimeError("inside")
    for state in (net.state_dict(), other.state_dict()):
        assert all(torch.equal(before[name], value) for name, value in state.items())


def test_a_sample_is_seeded_and_without_repeats(groups: Groups) -> None:
    one, two = (quality.sample_channels(list(groups), 5, seed=seed) for seed in (1, 2))
    assert one == quality.sample_channels(list(groups), 5, seed=1) != two
    assert len(set(one)) == 5
    seen = set(itertools.chain.from_iterable(quality.sample_channels(list(groups), 5, seed=s) for s in range(40)))
    assert len(seen) == sum(group.channels for group in groups)


def test_overlap_counts_common_members_of_the_two_tops() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = torch.randn(2, 17, generator=generator)
        for share, k in ((0.1, 2), (0.5, 8), (1.0, 17), (0.001, 1)):
            tops = [set(sorted(range(17), key=lambda i, v=v: float(v[i]))[-k:]) for v in (a, b)]
            assert quality.overlap(a, b, share=share) == pytest.approx(len(tops[0] & tops[1]) / k)
    assert quality.overlap(a, a, share=0.3) == 1.0
    assert quality.overlap(a, -a, share=0.5) == 0.0


def test_rank_correlation_is_the_correlation_of_mean_ranks() -> None:
    a, b = torch.tensor([1.0, 2, 2, 5, 9]), torch.tensor([3.0, 1, 4, 4, 7])
    ranks = torch.tensor([[1, 2.5, 2.5, 4, 5], [2, 1, 3.5, 3.5, 5]], dtype=torch.float64)
    assert quality.rank_correlation(a, b) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), rel=1e-12)
    assert quality.rank_correlation(a, torch.ones(5)) is None
    assert quality.rank_correlation(a[:1], b[:1]) is None


def test_correlations_weigh_groups_by_their_channels() -> None:
    a = {"x": torch.tensor([1.0, 2, 3, 4]), "y": torch.tensor([5.0, 6]), "z": torch.tensor([7.0])}
    b = {"x": torch.tensor([1.0, 2, 3, 4]), "y": torch.tensor([9.0, 8]), "z": torch.tensor([0.0])}
    found = quality.correlations(a, b)
    assert found["within"] == pytest.approx((4 * 1 + 2 * -1) / 6)
    assert found["global"] == pytest.approx(
        quality.rank_correlation(torch.arange(7), torch.tensor([1, 2, 3, 4, 9, 8, 0]))
    )


def test_reconstruction_error_is_that_of_the_sliced_network(net: nn.Module, groups: Groups) -> None:
    kept = {group.id: list(range(0, group.channels, 2)) for group in groups}
    small = cut(net, groups, kept)
    with torch.no_grad():
        whole = torch.cat([net(images).flatten() for images, _ in BATCHES])
        left = torch.cat([small(images).flatten() for images, _ in BATCHES])
    found = quality.reconstruction(net, groups, {name: torch.tensor(k) for name, k in kept.items()}, BATCHES)
    assert found["mse"] == pytest.approx(float((whole - left).square().mean()), rel=1e-9)
    assert found["relative"] == pytest.approx(float((whole - left).square().sum() / whole.square().sum()), rel=1e-9)
    everything = {group.id: torch.arange(group.channels) for group in groups}
    assert quality.reconstruction(net, groups, everything, BATCHES) == {"mse": 0.0, "relative": 0.0}


def test_sensitivity_removes_the_lowest_of_one_group(net: nn.Module, groups: Groups) -> None:
    scores = {group.id: torch.randn(group.channels, generator=torch.Generator().manual_seed(7)) for group in groups}
    rows = quality.sensitivity(net, groups, scores, loss_of, ratios=(0.3, 0.99))
    assert [(row["group"], row["ratio"]) for row in rows] == [(g.id, r) for g in groups for r in (0.3, 0.99)]
    for row in rows:
        order = scores[row["group"]].argsort().tolist()
        gone = min(int(row["channels"] * row["ratio"]), row["channels"] - 1)
        assert row["removed"] == gone
        expected = loss_of(cut(net, groups, {row["group"]: sorted(order[gone:])}))
        assert row["value"] == pytest.approx(expected, abs=1e-10)
        assert row["change"] == pytest.approx(expected - loss_of(net), abs=1e-10)


def test_units_are_left_out_together() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.GroupNorm(4, 8)
            self.head = nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.a(x)).relu())

    torch.manual_seed(0)
    net = randomise(Grouped()).double()
    groups = find_groups(net, torch.zeros(1, 3, 12, 12, dtype=torch.float64))
    sample = quality.sample_channels(list(groups), 99)
    assert [channel for _, channel in sample] == [0, 2, 4, 6]
    found = quality.oracle(net, groups, sample, BATCHES, mean_loss)
    for channel, change in zip((0, 2, 4, 6), found.change.tolist(), strict=True):
        left = [k for k in range(8) if k not in (channel, channel + 1)]
        assert change == pytest.approx(loss_of(cut(net, groups, {"a": left})) - loss_of(net), abs=1e-10)
    scores = quality.sampled_scores(groups, {"a": torch.arange(8.0)}, sample)
    assert scores.tolist() == [0.5, 2.5, 4.5, 6.5]


def test_bad_input_is_a_sentence(net: nn.Module, groups: Groups) -> None:
    scores = {group.id: torch.ones(group.channels) for group in groups}
    with pytest.raises(VssError, match="sample of 0 channels"):
        quality.sample_channels(list(groups), 0)
    with pytest.raises(VssError, match="at least one batch"):
        quality.mean_loss(net, [], mean_loss)
    with pytest.raises(VssError, match="at least one batch"):
        quality.reconstruction(net, groups, {g.id: torch.arange(g.channels) for g in groups}, [])
    with pytest.raises(VssError, match=r"ratio of removed channels is 1\.0"):
        quality.sensitivity(net, groups, scores, loss_of, ratios=(1.0,))
