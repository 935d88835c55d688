"""C3: true correlations, one of two twins, and the published code that is the L1 norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vss.core.errors import VssError
from vss.prune import make_criterion
from vss.prune.criteria.similarity import greedy_penalty, outer_product_redundancy
from vss.prune.stats import Need

from .feeds import Feed, fed, fed_scores, raw_scores

PEARSON = Need.of("similarity", site="stream", metric="pearson")


def maps(channels: int = 5, *, seed: int = 0, batch: int = 3, side: int = 6) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(seed))


def test_correlation_is_that_of_numpy() -> None:
    x = maps() + torch.linspace(-30, 30, 5)[None, :, None, None]
    flat = x.double().transpose(0, 1).flatten(1)
    for batches in ([x], [x[:1], x[1:]]):
        torch.testing.assert_close(fed(PEARSON, batches), torch.corrcoef(flat), rtol=1e-4, atol=1e-5)


def test_c3_duplicates_correlate_fully() -> None:
    x = maps()
    x[:, 3] = x[:, 1]
    rho = fed(PEARSON, [x])
    assert float(rho[1, 3]) == pytest.approx(1.0, abs=1e-6)


def test_c3_pearson_affine() -> None:
    x = maps()
    before = fed(PEARSON, [x])
    scale, shift = torch.tensor([2.0, 0.5, 3.0, 1.0, 7.0]), torch.tensor([1.0, -2.0, 0.0, 5.0, 3.0])
    after = fed(PEARSON, [x * scale[None, :, None, None] + shift[None, :, None, None]])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def with_norms(x: Tensor, norms: list[float]) -> tuple[Feed, list[Tensor]]:
    """A network that feeds `x` as it is through filters of chosen L1 norms."""
    net = Feed(x.shape[1])
    with torch.no_grad():
        net.a.weight.mul_(torch.tensor(norms)[:, None, None, None])
    return net, [x / torch.tensor(norms)[None, :, None, None]]


def scores(x: Tensor, norms: list[float], **options: object) -> Tensor:
    net, batches = with_norms(x, norms)
    return raw_scores(make_criterion("corr", **options), net, [net.group()], batches, None)["a"]


def test_c3_lambda0_is_l1() -> None:
    norms = [3.0, 1.0, 2.0, 5.0, 4.0]
    for greedy in (True, False):
        found = scores(maps(), norms, lam=0.0, greedy=greedy)
        torch.testing.assert_close(found, torch.tensor(norms, dtype=torch.float64) / 5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("redundancy", ["max", "mean"])
def test_c3_single_twin(redundancy: str) -> None:
    x = maps()
    x[:, 3] = x[:, 1]
    norms = [1.0, 0.96, 0.95, 0.97, 0.98]
    lam = 0.3 if redundancy == "max" else 1.2
    order = scores(x, norms, lam=lam, redundancy=redundancy).argsort()
    assert int(order[0]) == 1  # the twin of the lower norm goes, although channel 2 has the lowest norm
    assert order.tolist()[1:] == [2, 3, 4, 0]  # and the other is then judged by its norm again
    both = scores(x, norms, lam=lam, redundancy=redundancy, greedy=False).argsort()
    assert set(both[:2].tolist()) == {1, 3}


@pytest.mark.parametrize("redundancy", ["max", "mean"])
def test_greedy_penalty_against_a_plain_loop(redundancy: str) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = torch.rand(9, generator=generator, dtype=torch.float64)
    half = torch.rand(9, 9, generator=generator, dtype=torch.float64) * 2 - 1
    rho = (half + half.T) / 2
    found = greedy_penalty(norm, rho, lam=0.7, tau=0.2, redundancy=redundancy)
    alive, value, order = list(range(9)), {}, []
    while alive:
        final = {}
        for i in alive:
            excess = [max(0.0, abs(float(rho[i, j])) - 0.2) / 0.8 for j in alive if j != i]
            final[i] = float(norm[i]) - 0.7 * (max(excess, default=0.0) if redundancy == "max" else sum(excess) / 8)
        k = min(final, key=final.__getitem__)
        value[k] = final[k]
        order.append(k)
        alive.remove(k)
    torch.testing.assert_close(found, torch.tensor([value[i] for i in range(9)], dtype=torch.float64))
    assert found[order].tolist() == sorted(found.tolist())  # keeping the best is keeping the last


def test_constant_and_dead_maps_are_redundant_and_finite() -> None:
    x = maps()
    x[:, 0], x[:, 2] = 0.0, 4.0
    found = scores(x, [0.99, 1.0, 0.99, 1.0, 1.0])
    assert torch.isfinite(found).all() and int(found.argmin()) == 0
    rho = fed(PEARSON, [x])
    assert torch.equal(rho[0], torch.ones(5, dtype=torch.float64)) and torch.equal(rho[2], rho[0])


def test_the_published_correlation_never_reaches_its_threshold() -> None:
    for channels in (2, 8, 200, 600):
        means = torch.randn(channels, generator=torch.Generator().manual_seed(channels), dtype=torch.float64)
        assert not outer_product_redundancy(means).any()
    spiked = torch.tensor([0.0] * 7 + [100.0], dtype=torch.float64)
    assert not outer_product_redundancy(spiked).any()
    norms = [3.0, 1.0, 2.0, 5.0, 4.0]
    found = scores(maps(), norms, preset="faithful")
    torch.testing.assert_close(found, torch.tensor(norms, dtype=torch.float64) / 5, rtol=1e-6, atol=0)


def test_channel_means_are_means() -> None:
    x = maps()
    found = fed(Need.of("mean", site="conv"), [x[:1], x[1:]])
    torch.testing.assert_close(found, x.double().mean(dim=(0, 2, 3)), rtol=1e-6, atol=1e-8)


def test_bad_options_are_refused() -> None:
    with pytest.raises(VssError, match=r"option tau of criterion 'corr' is 1; .*less than 1"):
        make_criterion("corr", tau=1)
    with pytest.raises(VssError, match="site of criterion 'corr' 'steam'"):
        make_criterion("corr", site="steam")
    assert torch.isfinite(fed_scores(make_criterion("corr"), [maps()])).all()
