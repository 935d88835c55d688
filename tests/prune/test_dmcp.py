"""DMCP's pure parts: chains, expectations, the cost loss, order, gates. Every figure against another way to get it."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from tests.prune.nets import Chain as ChainNet
from tests.prune.nets import Concat, Heads, MaxAvg, Residual, Twice, randomise
from vss.core.errors import VssError
from vss.core.example import default_forward, logits_of
from vss.prune import CostModel, Group, cut, find_groups
from vss.prune.phases import (
    Chain,
    ExpectedCost,
    Gates,
    expected_width,
    expected_widths,
    gate_points,
    importance_order,
    keep_probabilities,
    mac_loss,
    marginals,
    reorder,
    sample_width,
    sample_widths,
    soft_mask,
    uniform_width,
    untracked,
)

EXAMPLE = torch.zeros(1, 3, 16, 24)
NETS = {"residual": Residual, "concat": Concat, "heads": Heads, "maxavg": MaxAvg, "twice": Twice, "plain": ChainNet}


def prefix_net(model: nn.Module, groups: list[Group], widths: list[int]) -> nn.Module:
    """The slow reference of hard gates: the network cut to these prefixes."""
    return cut(model, groups, {g.id: torch.arange(width) for g, width in zip(groups, widths, strict=True)})


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 16, 24, generator=gen(seed))


def chain_of(channels: int, unit: int = 1, **options: float) -> Chain:
    return Chain.of(Group("g", channels, (), unit), **options)


# -- chains -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "unit", "wanted"),
    [(64, 1, (10, 6, 9)), (256, 1, (31, 25, 9)), (10, 1, (1, 1, 9)), (4, 1, (1, 1, 3)), (1, 1, (1, 1, 0)),
     (32, 4, (4, 4, 7))],
)  # fmt: skip
def test_chain_of_a_group(channels: int, unit: int, wanted: tuple[int, int, int]) -> None:
    chain = chain_of(channels, unit)
    assert (chain.least, chain.step, chain.links) == wanted
    assert chain.least + chain.step * chain.links == channels and chain.least % unit == chain.step % unit == 0


@pytest.mark.parametrize("form", ["sigmoid", "exp"])
def test_marginals_fall_and_stay_probabilities(form: str) -> None:
    alpha = torch.randn(9, generator=gen(), dtype=torch.float64)
    q = marginals(alpha, form)
    assert (q[1:] <= q[:-1]).all() and (q > 0).all() and (q <= 1).all()
    by_hand = [math.prod(keep_probabilities(alpha, form)[: k + 1].tolist()) for k in range(9)]
    assert torch.allclose(q, torch.tensor(by_hand, dtype=torch.float64))


def test_the_two_forms_begin_at_opposite_ends() -> None:
    chain, zero = chain_of(100), torch.zeros(9, dtype=torch.float64)
    assert float(expected_width(chain, zero, "exp")) == 100
    assert float(expected_width(chain, zero)) == pytest.approx(10 + 10 * sum(0.5**k for k in range(1, 10)))
    assert 0.89 < float(expected_width(chain, zero + 3.7)) / 100 < 0.91  # where the search begins


@pytest.mark.parametrize("form", ["sigmoid", "exp"])
def test_dmcp_expected_width_mc(form: str) -> None:
    chain = chain_of(64)
    alpha = torch.tensor([3.0, 2, 1, 0.5, 2, 0.2, 1, 1, 0.1], dtype=torch.float64)
    generator, exact = gen(3), float(expected_width(chain, alpha, form))
    drawn = torch.tensor([sample_width(chain, alpha, generator, form) for _ in range(6000)], dtype=torch.float64)
    assert abs(float(drawn.mean()) - exact) < 4 * float(drawn.std()) / math.sqrt(6000)
    # and exactly, over all ends of the walk
    p = keep_probabilities(alpha, form).tolist()
    ends = [math.prod(p[:k]) * (1 - p[k] if k < 9 else 1) for k in range(10)]
    assert sum(ends) == pytest.approx(1) and sum(e * (10 + 6 * k) for k, e in enumerate(ends)) == pytest.approx(exact)


def test_gradient_of_the_expected_width_is_the_finite_difference() -> None:
    chain, alpha = chain_of(64), torch.randn(9, generator=gen(), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: expected_width(chain, a), (alpha,))
    assert torch.autograd.gradcheck(lambda a: soft_mask(chain, a), (alpha,))
    assert torch.allclose(soft_mask(chain, alpha).sum(), expected_width(chain, alpha))


def test_certain_alphas_are_the_full_and_the_least_width() -> None:
    chain = chain_of(64)
    for value, width in ((math.inf, 64), (-math.inf, 10)):
        alpha = torch.full((9,), value, dtype=torch.float64)
        assert float(expected_width(chain, alpha)) == width == sample_width(chain, alpha, gen())
        assert torch.equal(soft_mask(chain, alpha), chain.mask(width).double())


def test_uniform_widths_reach_every_width() -> None:
    chain, generator = chain_of(10), gen()
    drawn = [uniform_width(chain, generator) for _ in range(2000)]
    assert set(drawn) == set(range(1, 11)) and max(drawn.count(w) for w in range(1, 11)) < 260


def test_nearest_width() -> None:
    wide, narrow, units = chain_of(64), chain_of(6), chain_of(32, 4)
    assert [wide.nearest(w, 8) for w in (1.0, 19.9, 20.1, 63.0)] == [8, 16, 24, 64]
    assert chain_of(16).nearest(9.4, 16) == 8 and chain_of(16).nearest(13, 32) == 16  # 16 leaves no choice
    assert narrow.nearest(2.6, 8) == 4 and narrow.nearest(0.1) == 1
    assert units.nearest(9.9) == 8 and units.nearest(13, 6) == 12


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
@pytest.mark.parametrize("name", list(NETS))
def test_expected_cost_of_whole_widths_is_the_cost_model(name: str, kind: str) -> None:
    model = NETS[name]().eval()
    groups = list(find_groups(model, EXAMPLE))
    cost = CostModel.measure(model, EXAMPLE)
    form = ExpectedCost(cost, kind, groups)
    for seed in range(3):
        widths = [int(torch.randint(1, g.channels + 1, (), generator=gen(seed))) // g.unit * g.unit for g in groups]
        assert float(form(widths)) == cost.total(kind, groups, widths)


def test_expected_cost_is_differentiable() -> None:
    model = Residual().eval()
    groups = list(find_groups(model, EXAMPLE))
    form = ExpectedCost(CostModel.measure(model, EXAMPLE), "macs", groups)
    widths = [torch.tensor(g.channels * 0.7, dtype=torch.float64, requires_grad=True) for g in groups]
    assert torch.autograd.gradcheck(lambda *w: form(w) / 1e4, widths)


def test_dmcp_flops_deadzone() -> None:
    def slope(ratio: float, target: float) -> float:
        expected = torch.tensor(ratio * target, dtype=torch.float64, requires_grad=True)
        return float(torch.autograd.grad(mac_loss(expected, target), expected)[0])

    for target in (1.0, 3e9):
        assert [slope(r, target) for r in (0.95, 0.97, 0.999)] == [0, 0, 0]
        assert slope(0.5, target) * target == pytest.approx(1 / (0.5 - 1))  # of log |r - 1|: pulls up
        assert slope(2.0, target) * target == pytest.approx(1 / (2 - 0.95))  # of log |r - 0.95|: pulls down
        assert slope(1.0, target) * target == pytest.approx(20)


def test_drawing_to_a_budget_and_giving_up() -> None:
    model = Residual(width=20).eval()
    groups = list(find_groups(model, EXAMPLE))
    chains = [Chain.of(g) for g in groups]
    cost = ExpectedCost(CostModel.measure(model, EXAMPLE), "macs", groups)
    alphas = [torch.full((c.links,), 1.5, dtype=torch.float64) for c in chains]
    target = 0.4 * float(cost([c.channels for c in chains]))
    widths, draws = sample_widths(chains, alphas, cost=cost, target=target, generator=gen(), tolerance=0.1)
    assert draws is not None and abs(float(cost(widths)) / target - 1) <= 0.1
    sure = [torch.full((c.links,), 50.0, dtype=torch.float64) for c in chains]
    widths, draws = sample_widths(chains, sure, cost=cost, target=target, generator=gen(), tries=20)
    assert draws is None and widths == expected_widths(chains, sure) == [c.channels for c in chains]


# -- order ------------------------------------------------------------------------------------------------------------


def test_importance_order() -> None:
    assert importance_order(torch.tensor([0.1, 3, 2, 3])).tolist() == [1, 3, 2, 0]
    assert importance_order(torch.tensor([0.0, 1, 5, 5, 4, 0]), 2).tolist() == [2, 3, 4, 5, 0, 1]


def permutations(groups: list[Group], seed: int) -> dict[str, Tensor]:
    return {
        g.id: importance_order(torch.rand(g.channels, generator=gen(seed + i)), g.unit) for i, g in enumerate(groups)
    }


@pytest.mark.parametrize("name", list(NETS))
def test_dmcp_prefix_reorder_noop(name: str) -> None:
    model = randomise(NETS[name]())
    groups = list(find_groups(model, EXAMPLE))
    orders = permutations(groups, 5)
    other = reorder(model, groups, orders)
    for a, b in zip(
        logits_of(default_forward(model, images())), logits_of(default_forward(other, images())), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)
    changed = [not torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items() if v.ndim]
    assert any(changed)
    back = reorder(other, groups, {key: order.argsort() for key, order in orders.items()})
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in model.state_dict().items())


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETS))
def test_dmcp_mask_slice_parity(name: str) -> None:
    model = randomise(NETS[name]())
    groups = list(find_groups(model, EXAMPLE))
    gates, chains = Gates(model, groups, EXAMPLE), [Chain.of(g) for g in groups]
    before = copy.deepcopy(model.state_dict())
    for seed in range(3):
        widths = [uniform_width(c, gen(seed)) for c in chains]
        small = prefix_net(model, groups, widths)
        wanted = logits_of(default_forward(small, images()))
        got = logits_of(gates(model, images(), [c.mask(w) for c, w in zip(chains, widths, strict=True)]))
        for a, b in zip(wanted, got, strict=True):
            assert float((a - b).abs().max()) <= 1e-5 * float(a.abs().max() + 1)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_members_of_a_group_share_their_gate_and_norms_carry_it() -> None:
    model = randomise(Residual())
    stream = next(g for g in find_groups(model, EXAMPLE) if g.channels == 6)
    assert {s.tensor for s in gate_points(model, stream)} == {
        "stem.1.weight", "stem.1.bias", "two.1.weight", "two.1.bias"
    }  # fmt: skip
    seen: dict[str, Tensor] = {}
    for name in ("stem", "two"):
        model.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: seen.update({name: out.detach()}))
    gate = torch.tensor([1.0, 1, 0.5, 0, 0, 0])
    Gates(model, [stream], EXAMPLE)(model, images(), [gate])
    for name in ("stem", "two"):
        assert float(seen[name][:, 3:].abs().max()) == 0 < float(seen[name][:, :3].abs().min(dim=0).values.max())


def test_soft_gates_are_hooks_that_multiply_the_norms_outputs() -> None:
    model = randomise(Residual())
    groups = list(find_groups(model, EXAMPLE))
    soft = {g.id: torch.rand(g.channels, generator=gen(i)) for i, g in enumerate(groups)}
    got = Gates(model, groups, EXAMPLE)(model, images(), [soft[g.id] for g in groups])
    twin: nn.Module = copy.deepcopy(model)
    for norm, group in (("stem.1", "stem.0"), ("one.1", "one.0"), ("two.1", "stem.0")):
        factor = soft[group].view(1, -1, 1, 1)
        twin.get_submodule(norm).register_forward_hook(lambda m, i, out, factor=factor: out * factor)
    assert torch.allclose(twin(images()), got, atol=1e-5)


class BesideNorm(nn.Module):
    """A stream that is read both through its norm layer and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 4, 1)
        self.side = nn.Conv2d(6, 4, 1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.head(self.b(self.norm(y)) + self.side(y))


def test_a_stream_read_beside_its_norm_is_gated_in_all_its_tensors() -> None:
    model = randomise(BesideNorm())
    groups = list(find_groups(model, EXAMPLE))
    gates = Gates(model, groups, EXAMPLE)
    chains = [Chain.of(g) for g in groups]
    for widths in itertools.product(*([1, c.channels // 2] for c in chains)):
        wanted = prefix_net(model, groups, list(widths))(images())
        got = gates(model, images(), [c.mask(w) for c, w in zip(chains, widths, strict=True)])
        assert torch.allclose(wanted, got, atol=1e-5)
    first = next(points for group, points in zip(groups, gates.points, strict=True) if group.id == "a")
    assert "a.weight" in {slot.tensor for slot in first}


def test_gates_that_cannot_reach_everything_are_refused() -> None:
    model = randomise(Residual())
    groups = list(find_groups(model, EXAMPLE))
    broken = [Group(g.id, g.channels, tuple(s for s in g.slots if s.tensor != "two.1.weight"), g.unit) for g in groups]

    class Leaky(Gates):
        def _differs(self, *_: object) -> bool:
            return True

    with pytest.raises(VssError, match="cannot be searched"):
        Leaky(model, broken, EXAMPLE)


def test_untracked_uses_batch_statistics_and_keeps_the_running_ones() -> None:
    model = randomise(Residual()).train()
    before = copy.deepcopy(model.state_dict())
    with untracked(model):
        out = model(images())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert torch.equal(out, model(images()))  # the same numbers as in plain training mode,
    assert not torch.equal(before["stem.1.running_mean"], model.get_buffer("stem.1.running_mean"))  # which track
