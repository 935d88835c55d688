"""Statistics collected while a network trains."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vss.core.errors import VssError
from vss.prune import find_groups, make_criterion
from vss.prune.criteria import score_groups
from vss.prune.stats import Need, Recorder, Stats

from ..criteria.feeds import Mixed
from ..nets import randomise
from ..scoring import batches_of, mean_loss


def test_moving_averages_of_training_steps() -> None:
    torch.manual_seed(0)
    net = randomise(Mixed())
    groups = list(find_groups(net, torch.zeros(1, 3, 12, 12)))
    net = net.double().train()
    need = Need.of("similarity", site="bn_out", metric="l1gram", ema=0.9)
    wanted = torch.zeros(7, 7, dtype=torch.float64)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    criterion = make_criterion("sirfp", preset="faithful_v2", ema=0.9)
    example = torch.zeros(1, 3, 12, 12, dtype=torch.float64)
    kept: list[torch.Tensor] = []
    with Recorder(net, groups, [need, *criterion.needs], example) as recorder:
        handle = net.merge[1].register_forward_hook(lambda m, i, o: kept.append(o.detach().clone()))
        for batch in batches_of(3, classes=3):
            optimiser.zero_grad()
            mean_loss(net, batch).backward()
            recorder.step()
            optimiser.step()
            flat = kept.pop().flatten(2)
            flat = flat / (flat.abs().sum(dim=2, keepdim=True) + 1e-5)
            wanted = 0.9 * wanted + 0.1 * torch.einsum("bcp,bdp->cd", flat, flat) / len(flat)
            net.eval()
            net(batch[0])  # a validation forward does not count
            kept.clear()
            net.train()
        handle.remove()
    found = recorder.finish()
    torch.testing.assert_close(found[str(need)]["merge.0"], wanted, rtol=1e-4, atol=1e-8)
    scores = score_groups(criterion, groups, Stats(net, found))
    assert all(torch.isfinite(value).all() for value in scores.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules()) and net.training


def test_statistics_that_read_labels_need_a_calibration_set() -> None:
    net = randomise(Mixed())
    groups = list(find_groups(net, torch.zeros(1, 3, 12, 12)))
    for name in ("fgp", "defect"):
        with pytest.raises(VssError, match="cannot be recorded during training; use a calibration set"):
            Recorder(net, groups, make_criterion(name).needs, torch.zeros(1, 3, 12, 12))
    assert isinstance(net, nn.Module) and not net.training
