"""OBD, DCFP, LAMP and Wanda against their formulas in float64, by brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.prune import find_groups, make_criterion
from vss.prune.criteria.base import lamp

from ..nets import Residual, randomise
from ..scoring import Batch, batches_of, mean_loss, scores_of
from .feeds import Feed, Mixed, fed_scores, filter_scores, raw_scores


def double(make: type[nn.Module]) -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    net = randomise(make())
    groups = list(find_groups(net, torch.zeros(1, 3, 12, 12)))
    return net.double().eval(), groups


def gradients(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
    net.zero_grad()
    mean_loss(net, batch).backward()
    return {name: value.grad.clone() for name, value in net.named_parameters()}


def test_obd_is_half_the_fisher_weighted_square_of_all_that_goes() -> None:
    net, groups = double(Residual)
    images = [(x[i : i + 1], y[i : i + 1]) for x, y in batches_of(2) for i in range(2)]  # one image a batch
    found = raw_scores(make_criterion("obd"), net, groups, images, mean_loss)
    grads, values = [gradients(net, image) for image in images], dict(net.named_parameters())
    for group in groups:
        for channel in range(group.channels):
            wanted = 0.0
            for slot in group.slots:
                if slot.tensor in values:
                    places = slice(slot.offset + channel * slot.block, slot.offset + (channel + 1) * slot.block)
                    at = (slice(None),) * slot.dim + (places,)
                    fisher = sum(g[slot.tensor][at].square() for g in grads) / len(grads)
                    wanted += float((fisher * values[slot.tensor].detach()[at].square()).sum()) / 2
            assert float(found[group.id][channel]) == pytest.approx(wanted, rel=1e-9)
    roles = {slot.role for group in groups for slot in group.slots}
    assert {"producer", "consumer", "norm"} <= roles


def test_obd_of_a_quadratic_loss_is_what_zeroing_a_weight_costs() -> None:
    """Targets that the network meets but for noise of variance 1: Fisher's diagonal is the Hessian's."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False))
    groups = list(find_groups(net, torch.zeros(1, 3, 4, 4)))
    net.double()
    images = [torch.randn(1, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(4000)]
    with torch.no_grad():
        pairs = [(x, net(x) + torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)) for x in images]
    found = raw_scores(make_criterion("obd"), net, groups, pairs, lambda m, b: 0.5 * (m(b[0]) - b[1]).square().sum())[
        "0"
    ]
    positions = torch.cat(images).movedim(1, 0).flatten(1)
    first, second = (layer.weight.detach().flatten(1) for layer in net)
    middle = (first @ positions).square().sum(dim=1) / len(images)
    readers = second.square().sum(dim=0) * middle  # of each w_ij: w^2 E[x_j^2]
    filters = (first.square() * positions.square().sum(dim=1) / len(images)).sum(dim=1) * second.square().sum(dim=0)
    torch.testing.assert_close(found, (readers + filters) / 2, rtol=0.12, atol=0)


def test_dcfp_averages_the_gradients_of_one_sign_and_ranks_in_two_pools() -> None:
    net, groups = double(Mixed)
    batches = batches_of(5, classes=3)
    raw = raw_scores(make_criterion("dcfp"), net, groups, batches, mean_loss)
    grads = [gradients(net, batch) for batch in batches]
    for group in groups:
        layers = [slot for slot in group.by_role("norm") if slot.leaf == "weight"]
        rows = []
        for slot in layers:
            gamma = net.get_parameter(slot.tensor).detach()
            right = torch.stack([g[slot.tensor] * gamma > 0 for g in grads])
            size = torch.stack([g[slot.tensor].abs() for g in grads])
            rows.append((size * right).sum(0) / right.sum(0).clamp(min=1))
        if rows:
            torch.testing.assert_close(raw[group.id], torch.stack(rows).mean(0), rtol=1e-9, atol=1e-15)
    ranks = scores_of(net, groups, "dcfp", batches)
    scored = [g.id for g in groups if g.id in raw]
    pools = [[n for n in scored if n.startswith("backbone") is inside] for inside in (True, False)]
    assert all(pools)
    for names in pools:
        order = torch.cat([raw[name] for name in names]).argsort(stable=True)
        assert torch.equal(torch.cat([ranks[name] for name in names]).argsort(stable=True), order)
    assert make_criterion("dcfp").scope_of("auto") == "global"
    with pytest.raises(VssError, match=r"budget\.scope is local, which criterion 'dcfp' cannot have"):
        make_criterion("dcfp").scope_of("local")


def test_lamp_is_a_share_of_what_is_not_smaller() -> None:
    squares = torch.tensor([4.0, 1.0, 9.0, 0.0], dtype=torch.float64)
    assert lamp(squares).tolist() == pytest.approx([4 / 13, 1 / 14, 1.0, 0.0])
    net, groups = double(Residual)
    found = scores_of(net, groups, "lamp", [])
    joined = torch.cat([net.stem[0].weight.flatten(1), net.two[0].weight.flatten(1)], dim=1).double()
    norms = joined.square().sum(dim=1).detach()
    wanted = [float(v / norms[norms >= v].sum()) for v in norms]
    assert found["stem.0"].tolist() == pytest.approx(wanted, rel=1e-6)
    assert float(found["stem.0"].max()) == pytest.approx(1.0)
    assert filter_scores("lamp", torch.tensor([[3.0, 4.0], [0.0, 1.0]])).tolist() == [25.0, 1.0]


def test_wanda_is_the_norm_of_what_is_read_times_what_reads_it() -> None:
    net, groups = double(Residual)
    batches = [x for x, _ in batches_of(3)]
    found = raw_scores(make_criterion("wanda"), net, groups, batches, None)["one.0"]
    seen: list[Tensor] = []
    handle = net.two[0].register_forward_hook(lambda m, i, o: seen.append(i[0].detach()))
    for images in batches:
        net(images)
    handle.remove()
    norm = torch.cat(seen).square().mean(dim=(0, 2, 3)).sqrt()
    wanted = norm * net.two[0].weight.detach().abs().sum(dim=(0, 2, 3))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)


def test_wanda_of_chosen_maps() -> None:
    maps = torch.tensor([[[[3.0, -4.0]], [[1.0, 1.0]]]])
    torch.manual_seed(1)
    score = fed_scores(make_criterion("wanda"), [maps])
    torch.manual_seed(1)
    reader = Feed(2).b.weight.detach().abs().flatten().double()
    torch.testing.assert_close(score, reader * torch.tensor([12.5, 1.0], dtype=torch.float64).sqrt())
