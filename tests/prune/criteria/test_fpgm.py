"""FPGM: F1 to F7, folding and coupled producers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vss.core.errors import VssError
from vss.prune import find_groups, make_criterion
from vss.prune.criteria.weights import distances
from vss.prune.stats.base import Stats

from ..nets import randomise
from .feeds import Mixed, filter_scores

RAW = {"fold_bn": False, "member_rms": False}


def rows(count: int = 7, width: int = 11, *, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute(filters: Tensor) -> Tensor:
    return torch.stack([sum((f - g).square().sum().sqrt() for g in filters) for f in filters])


def test_score_is_the_sum_of_distances() -> None:
    w = rows()
    torch.testing.assert_close(filter_scores("fpgm", w, **RAW), brute(w), rtol=1e-12, atol=0)
    scaled = w / w.square().mean().sqrt()
    torch.testing.assert_close(filter_scores("fpgm", w), brute(scaled), rtol=1e-10, atol=0)


def test_fpgm_translation() -> None:
    w = rows()
    torch.testing.assert_close(
        filter_scores("fpgm", w + 5 * rows(1, 11, seed=3), **RAW), filter_scores("fpgm", w, **RAW), rtol=1e-10, atol=0
    )


def test_fpgm_rotation() -> None:
    w = rows()
    rotation = torch.linalg.qr(rows(11, 11, seed=1)).Q
    torch.testing.assert_close(
        filter_scores("fpgm", w @ rotation, **RAW), filter_scores("fpgm", w, **RAW), rtol=1e-10, atol=0
    )


def test_fpgm_homogeneity() -> None:
    w = rows()
    torch.testing.assert_close(filter_scores("fpgm", 3 * w, **RAW), 3 * filter_scores("fpgm", w, **RAW))


def test_identical_filters_have_identical_scores() -> None:
    w = rows()
    w[4] = w[1]
    score = filter_scores("fpgm", w, **RAW)
    torch.testing.assert_close(score[4], score[1], rtol=1e-12, atol=0)
    assert float(distances([w])[1, 4]) < 1e-7
    assert torch.equal(distances([w]).diagonal(), torch.zeros(7, dtype=torch.float64))


def test_the_centre_of_a_symmetric_set_goes_first() -> None:
    axes = torch.eye(3, dtype=torch.float64)
    w = torch.cat([axes, torch.zeros(1, 3, dtype=torch.float64), -axes])
    score = filter_scores("fpgm", w, **RAW)
    assert int(score.argmin()) == 3 and float(score[3]) == pytest.approx(6.0)


def test_fpgm_norm_stage_counts() -> None:
    w = rows(64, 5) * torch.linspace(0.5, 3, 64, dtype=torch.float64)[torch.randperm(64)][:, None]
    score = filter_scores("fpgm", w, rate_norm=0.9, **RAW)
    gone = w.norm(dim=1).argsort()[: int(64 * (1 - 0.9))]
    assert len(gone) == 6 and sorted(gone.tolist()) == sorted((score < 0).nonzero().flatten().tolist())
    assert torch.equal(score[gone], torch.arange(-6.0, 0.0, dtype=torch.float64))
    left = (score >= 0).nonzero().flatten()
    torch.testing.assert_close(score[left], brute(w[left]), rtol=1e-10, atol=0)
    assert (filter_scores("fpgm", w, rate_norm=1.0, **RAW) >= 0).all()
    with pytest.raises(VssError, match=r"option rate_norm of criterion 'fpgm' is 0; .*greater than 0"):
        make_criterion("fpgm", rate_norm=0)


def test_fpgm_group_concat() -> None:
    first, second = rows(6, 9), rows(6, 4, seed=2)
    torch.testing.assert_close(
        filter_scores("fpgm", first, second, **RAW), brute(torch.cat([first, second], dim=1)), rtol=1e-10, atol=0
    )
    big = filter_scores("fpgm", first, 1000 * second)  # the RMS of each member divides its scale out
    torch.testing.assert_close(big, filter_scores("fpgm", first, second), rtol=1e-10, atol=0)


def test_filters_are_folded_into_the_batch_norm_behind_them() -> None:
    net = randomise(Mixed()).double()
    group = find_groups(net.float(), torch.zeros(1, 3, 8, 8))["backbone.stem.0"]
    net = net.double()
    parts = []
    for block in (net.backbone["stem"], net.backbone["two"]):
        conv, norm = block[0], block[1]
        parts.append((conv.weight.flatten(1) * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None]).detach())
    score = make_criterion("fpgm", member_rms=False)(group, Stats(net))
    torch.testing.assert_close(score, brute(torch.cat(parts, dim=1)), rtol=1e-10, atol=0)
    with torch.no_grad():  # the same function: filters and running statistics scaled alike
        net.backbone["stem"][0].weight *= 4.0
        net.backbone["stem"][1].running_mean *= 4.0
        net.backbone["stem"][1].running_var.add_(1e-5).mul_(16.0).sub_(1e-5)
    torch.testing.assert_close(make_criterion("fpgm", member_rms=False)(group, Stats(net)), score, rtol=1e-9, atol=0)
    faithful = make_criterion("fpgm", preset="faithful")
    assert faithful.options() == {"fold_bn": False, "member_rms": False, "rate_norm": 1.0}
