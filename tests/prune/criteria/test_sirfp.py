"""SIRFP: R1 to R12 against float64 brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.prune import collect, find_groups, make_criterion
from vss.prune.criteria.similarity import redundancy, z_score
from vss.prune.stats import Need

from ..nets import randomise
from ..scoring import batches_of, mean_loss
from .feeds import Feed, Mixed, fed, fed_scores, raw_scores


def similarity(**options: object) -> Need:
    return Need.of("similarity", **{"site": "stream", "metric": "cosine"} | options)


def texture(**options: object) -> Need:
    return Need.of("texture", **{"site": "stream"} | options)


def maps(channels: int = 6, *, seed: int = 0, batch: int = 3, side: tuple[int, int] = (6, 5)) -> Tensor:
    return torch.randn(batch, channels, *side, generator=torch.Generator().manual_seed(seed))


def symmetric(channels: int, *, seed: int = 0) -> Tensor:
    half = torch.rand(channels, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((half + half.T) / 2).float()


def plain_greedy(matrix: Tensor, *, diag: bool) -> tuple[list[int], dict[int, float]]:
    """All sums anew at every step, in float64."""
    a = matrix.double().abs()
    alive, order, value = list(range(len(a))), [], {}
    while alive:
        sums = {i: sum(float(a[i, j]) for j in alive if diag or j != i) for i in alive}
        k = max(alive, key=lambda i: (sums[i], -i))
        order.append(k)
        value[k] = sums[k]
        alive.remove(k)
    return order, value


def objective(matrix: Tensor, chosen: tuple[int, ...]) -> float:
    table = matrix.tolist()
    return sum(table[i][j] for i, j in itertools.combinations(chosen, 2))


@pytest.mark.parametrize("diag", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 7, 33])
def test_sirfp_greedy_equivalence(channels: int, diag: bool) -> None:
    matrix = symmetric(channels)
    order, v = redundancy(matrix, diag=diag)
    wanted, value = plain_greedy(matrix, diag=diag)
    assert order.tolist() == wanted
    torch.testing.assert_close(v, torch.tensor([value[i] for i in range(channels)], dtype=torch.float64))


def test_sirfp_monotone_v() -> None:
    for seed in range(5):
        order, v = redundancy(symmetric(40, seed=seed) - 0.4)
        assert v[order].tolist() == sorted(v.tolist(), reverse=True)


def test_without_aux_the_last_survivors_are_kept() -> None:
    x = maps(9)
    score = fed_scores(make_criterion("sirfp", aux="none", site="stream", min_positions=0), [x])
    order, _ = redundancy(fed(similarity(per_image=False, ema=None), [x]))
    assert score.argsort(stable=True).tolist() == order.tolist()


@pytest.mark.parametrize("metric", ["l1gram", "cosine", "pearson"])
@pytest.mark.parametrize("per_image", [False, True])
def test_sirfp_scale_sign_invariance(metric: str, per_image: bool) -> None:
    x = maps()
    scale = torch.tensor([3.0, -0.5, 10.0, -2.0, 0.1, 1.0])[None, :, None, None]
    need = similarity(metric=metric, per_image=per_image)
    torch.testing.assert_close(fed(need, [x * scale]).abs(), fed(need, [x]).abs(), rtol=1e-4, atol=1e-6)


def test_sirfp_permuting_positions_leaves_similarity_and_moves_edges() -> None:
    x = maps()
    shuffled = x.flatten(2)[..., torch.randperm(30, generator=torch.Generator().manual_seed(1))].view_as(x)
    for metric in ("l1gram", "cosine", "pearson"):
        need = similarity(metric=metric)
        torch.testing.assert_close(fed(need, [shuffled]), fed(need, [x]), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(fed(texture(), [shuffled]), fed(texture(), [x]), rtol=1e-2)


@pytest.mark.parametrize("metric", ["l1gram", "cosine"])
def test_sirfp_duplicate_pair(metric: str) -> None:
    x = torch.zeros(2, 6, 6, 4)
    for c in range(6):  # disjoint supports of equal size and magnitude, except that 4 repeats 1
        x[:, c, 1 if c == 4 else c] = 1.0
    matrix = fed(similarity(metric=metric), [x])
    order, v = redundancy(matrix)
    assert int(order[0]) == 1
    left = [i for i in range(6) if i != 1]
    sums = {i: sum(float(matrix[i, j].abs()) for j in left if j != i) for i in left}
    assert sums[4] == min(sums.values()) and float(v[4]) == pytest.approx(0.0, abs=1e-9)


def test_removal_lowers_the_objective_by_v() -> None:
    matrix = symmetric(10)
    order, v = redundancy(matrix)
    alive = tuple(range(10))
    for k in order.tolist():
        left = tuple(i for i in alive if i != k)
        assert objective(matrix, alive) - objective(matrix, left) == pytest.approx(float(v[k]), rel=1e-6)
        alive = left
    assert objective(matrix, alive) == 0


def test_sirfp_bruteforce_small() -> None:
    for seed in range(6):
        matrix = symmetric(8, seed=seed)
        order, _ = redundancy(matrix)
        for keep in range(2, 8):
            every = [objective(matrix, chosen) for chosen in itertools.combinations(range(8), keep)]
            found = objective(matrix, tuple(sorted(order[8 - keep :].tolist())))
            assert min(every) - 1e-6 <= found < sum(every) / len(every)
    blocks = torch.block_diag(*[torch.full((3, 3), 0.9)] * 4)  # four cliques of three: one of each is the optimum
    order, _ = redundancy(blocks)
    for keep in (1, 2, 4, 5, 8, 11, 12):
        best = min(objective(blocks, chosen) for chosen in itertools.combinations(range(12), keep))
        assert objective(blocks, tuple(sorted(order[12 - keep :].tolist()))) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("preset", [None, "faithful"])
def test_sirfp_p1_safe(preset: str | None) -> None:
    for x in (maps(side=(1, 1)), maps(side=(3, 5)), torch.zeros(2, 6, 8, 8), torch.full((2, 6, 8, 8), 3.3)):
        score = fed_scores(make_criterion("sirfp", preset=preset), [x, x])
        assert torch.isfinite(score).all()
    x = maps(side=(8, 8))
    x[:, 2], x[:, 4] = 0.0, 5.0
    score = fed_scores(make_criterion("sirfp", preset=preset), [x])
    assert torch.isfinite(score).all()
    if preset is None:
        assert int(score.argmin()) == 2  # dead: adds nothing to any other, and is never forced to the top


def test_small_maps_are_ranked_by_norm() -> None:
    net = Feed(6)
    norms = torch.tensor([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    with torch.no_grad():
        net.a.weight.mul_(norms[:, None, None, None])
    small, large = maps(side=(3, 5)), maps(side=(4, 4))
    criterion = make_criterion("sirfp", aux="none")
    by_norm = raw_scores(criterion, net, [net.group()], [small], None)["a"]
    torch.testing.assert_close(by_norm, 6 / 15 * (norms / 6 - 1).double())  # v / positions is at most 6 / 15
    by_map = raw_scores(criterion, net, [net.group()], [large], None)["a"]
    assert not torch.allclose(by_map, by_norm)


def test_sirfp_sparse_channel_not_penalised() -> None:
    x = maps(32, batch=2, side=(12, 12)).relu()
    x[:, 7] = 0
    x[:, 7, 5, 5] = 10.0
    faithful = fed_scores(make_criterion("sirfp", preset="faithful", aux="none", batch_norm="eval"), [x])
    assert int(faithful.argmin()) == 7  # the diagonal of a peaked map is huge
    assert int(fed_scores(make_criterion("sirfp"), [x]).argmax()) == 7
    assert int(fed_scores(make_criterion("sirfp", aux="none"), [x]).argmax()) == 7


@pytest.mark.parametrize("metric", ["l1gram", "cosine", "pearson"])
@pytest.mark.parametrize("per_image", [False, True])
def test_repeated_and_split_batches_agree(metric: str, per_image: bool) -> None:
    x = maps(batch=4)
    need = similarity(metric=metric, per_image=per_image)
    whole = fed(need, [x])
    for batches in ([x, x], [x[:1], x[1:]], [torch.cat([x, x])]):
        torch.testing.assert_close(fed(need, batches), whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fed(texture(), [x, x]), fed(texture(), [x]))


def gram_of(x: Tensor, metric: str, *, per_image: bool) -> Tensor:
    """float64, one einsum."""
    flat = x.double().flatten(2)
    if metric == "l1gram":
        flat = flat / (flat.abs().sum(dim=2, keepdim=True) + 1e-5)
        each = torch.einsum("bcp,bdp->bcd", flat, flat)
        return (each.abs() if per_image else each).mean(dim=0)
    if per_image:
        flat = flat - flat.mean(dim=2, keepdim=True) if metric == "pearson" else flat
        flat = flat / flat.norm(dim=2, keepdim=True)
        return torch.einsum("bcp,bdp->bcd", flat, flat).abs().mean(dim=0)
    joint = flat.transpose(0, 1).flatten(1)
    joint = joint - joint.mean(dim=1, keepdim=True) if metric == "pearson" else joint
    joint = joint / joint.norm(dim=1, keepdim=True)
    return joint @ joint.T


@pytest.mark.parametrize("metric", ["l1gram", "cosine", "pearson"])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("shape", [(2, 7, 3, 5), (2, 33, 1, 17), (3, 4, 9, 2)])
def test_sirfp_kernel_parity(shape: tuple[int, ...], metric: str, per_image: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    need, wanted = similarity(metric=metric, per_image=per_image), gram_of(x, metric, per_image=per_image)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(fed(need, [given]), wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))


def test_ties_go_to_the_lowest_channel() -> None:
    order, _ = redundancy(torch.ones(5, 5))
    assert order.tolist() == [0, 1, 2, 3, 4]


def edges(x: Tensor, mode: str) -> Tensor:
    """Standard deviation of the Sobel magnitude in float64."""
    kernel = torch.tensor([[-0.5, 0, 0.5], [-1, 0, 1], [-0.5, 0, 0.5]], dtype=torch.float64)
    flat = F.pad(x.double().flatten(0, 1)[:, None], (1, 1, 1, 1), mode=mode)
    both = F.conv2d(flat, torch.stack([kernel, kernel.T])[:, None])
    strength = both.square().sum(dim=1).sqrt().flatten(1)
    return strength.std(dim=1, unbiased=False).view(x.shape[:2]).mean(dim=0)


def test_edge_strength() -> None:
    x = maps()
    for padding, mode in (("replicate", "replicate"), ("zeros", "constant")):
        torch.testing.assert_close(fed(texture(padding=padding), [x]), edges(x, mode), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fed(texture(), [4 * x]), 4 * fed(texture(), [x]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        fed(texture(relative=True), [4 * x]), fed(texture(relative=True), [x]), rtol=1e-4, atol=1e-6
    )
    flat = torch.full((2, 3, 30, 30), 3.3)
    assert float(fed(texture(), [flat]).max()) < 1e-6
    assert float(fed(texture(padding="zeros"), [flat])[0]) == pytest.approx(float(edges(flat, "constant")[0]), rel=1e-4)


def test_moving_averages_start_from_zero_without_correction() -> None:
    first, second = maps(), maps(seed=1)
    need = similarity(metric="l1gram", ema=0.9)
    one, two = (gram_of(x, "l1gram", per_image=False) for x in (first, second))
    wanted = 0.9 * (0.1 * one) + 0.1 * two
    torch.testing.assert_close(fed(need, [first, second]), wanted, rtol=1e-4, atol=1e-8)
    wanted = 0.9 * 0.1 * edges(first, "replicate") + 0.1 * edges(second, "replicate")
    torch.testing.assert_close(fed(texture(ema=0.9), [first, second]), wanted, rtol=1e-4, atol=1e-8)
    pooled = fed(similarity(metric="pearson", ema=0.5), [first, first])  # a ratio, so the start cancels
    torch.testing.assert_close(pooled, gram_of(first, "pearson", per_image=False), rtol=1e-4, atol=1e-6)


def test_gated_gradients_wait_for_the_right_sign() -> None:
    torch.manual_seed(0)
    net = randomise(Mixed())
    groups = list(find_groups(net, torch.zeros(1, 3, 12, 12)))
    net, batches = net.double(), batches_of(4, classes=3)
    gamma = net.merge[1].weight
    grads = [torch.autograd.grad(mean_loss(net, batch), gamma)[0] for batch in batches]
    moving, plain, seen = torch.zeros(7), torch.zeros(7), torch.zeros(7)
    for grad in grads:
        right = grad * gamma.detach() > 0
        moving = torch.where(right, 0.8 * moving + 0.2 * grad.abs(), moving)
        plain, seen = plain + grad.abs() * right, seen + right
    for ema, wanted in ((0.8, moving), (None, plain / seen.clamp(min=1))):
        need = Need.of("gated_gradient", ema=ema)
        found = collect(net, groups, [need], batches, mean_loss)[0][str(need)]["merge.0"]
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert set(seen.tolist()) >= {0, 3, 4}  # both signs occurred, in one channel as well


def test_the_published_score_is_the_weighted_sum() -> None:
    torch.manual_seed(0)
    net = randomise(Mixed())
    groups = list(find_groups(net, torch.zeros(1, 3, 12, 12)))
    images = [batch[0].float() for batch in batches_of(2)]
    criterion = make_criterion("sirfp", preset="faithful", batch_norm="eval", ema=None)
    found = raw_scores(criterion, net, groups, images, None)
    for name, layers, lam in (
        ("merge.0", ["merge.1"], 0.0),
        ("backbone.one.0", ["backbone.one.1"], 0.4),
        ("backbone.stem.0", ["backbone.stem.1", "backbone.two.1"], 0.4),
    ):
        grams, strengths = [], []
        for layer in layers:
            out = outputs(net, layer, torch.cat(images))
            grams.append(gram_of(out, "l1gram", per_image=False))
            strengths.append(edges(out, "constant"))
        order, value = plain_greedy(torch.stack(grams).mean(dim=0), diag=True)
        wanted = lam * torch.stack(strengths).mean(dim=0) - torch.tensor(
            [value[i] for i in range(len(order))], dtype=torch.float64
        )
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-5)


def outputs(net: nn.Module, layer: str, images: Tensor) -> Tensor:
    """A layer's output before anything overwrites it."""
    kept: list[Tensor] = []
    hook = net.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o.detach().clone()))
    net(images)
    hook.remove()
    return kept[0]


def test_the_second_published_form_takes_gated_gradients() -> None:
    criterion = make_criterion("sirfp", preset="faithful_v2")
    assert [need.name for need in criterion.requests()] == ["similarity", "gated_gradient"]
    assert criterion.batch_norm_mode() == "train" and criterion.lam == 0.4 and criterion.diag


def test_pools_lose_the_same_fraction() -> None:
    criterion = make_criterion("sirfp", pool="backbone_head")
    scores = {
        "backbone.a": torch.tensor([5.0, 1.0, 3.0]), "head": torch.tensor([0.1, 0.3]),
        "backbone.b": torch.tensor([2.0]),
    }  # fmt: skip
    found = criterion.compare({name: value.double() for name, value in scores.items()})
    assert {name: value.tolist() for name, value in found.items()} == {
        "backbone.a": [1.0, 0.25, 0.75], "head": [0.5, 1.0], "backbone.b": [0.5],
    }  # fmt: skip
    alone = make_criterion("sirfp", pool="group").compare({name: value.double() for name, value in scores.items()})
    assert alone["head"].tolist() == [0.5, 1.0] and alone["backbone.b"].tolist() == [1.0]


def test_scales_of_v() -> None:
    x = maps(5)
    base = {"aux": "none", "site": "stream"}
    raw = fed_scores(make_criterion("sirfp", scale="none", **base), [x])
    order = raw.argsort(stable=True)
    torch.testing.assert_close(fed_scores(make_criterion("sirfp", **base), [x]), raw / (x.shape[2] * x.shape[3]))
    torch.testing.assert_close(fed_scores(make_criterion("sirfp", scale="max", **base), [x]), raw / raw.abs().max())
    alive = fed_scores(make_criterion("sirfp", scale="alive", **base), [x])
    others = torch.tensor([4.0, 3.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(alive[order], raw[order] / others)
    assert raw[order][-1] == raw[order][-2] < 0  # the last two are redundant with each other alone
    assert alive.min() >= -1


def test_the_aux_term_weighs_the_same_whatever_the_unit_of_v() -> None:
    x, options = maps(5), {"site": "stream", "lam": 0.3}
    wanted = fed_scores(make_criterion("sirfp", scale="max", **options), [x])
    raw = fed_scores(make_criterion("sirfp", scale="none", aux="none", site="stream"), [x]).abs().max()
    for scale, unit in (("none", raw), ("positions", raw / (x.shape[2] * x.shape[3]))):
        torch.testing.assert_close(fed_scores(make_criterion("sirfp", scale=scale, **options), [x]), wanted * unit)


def test_z_scores_of_equal_values_are_zero() -> None:
    assert not z_score(torch.full((4,), 0.1, dtype=torch.float64)).any()
    torch.testing.assert_close(z_score(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]))
