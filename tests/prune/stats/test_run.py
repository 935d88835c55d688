"""The calibration pass: what it refuses and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vss.core.errors import VssError
from vss.prune import COLLECTORS, Groups, collect, find_groups
from vss.prune.stats import READS, Reads

from ..nets import Heads, Residual, randomise
from ..scoring import batches_of, mean_loss, scores_of


def net_and_groups(make: type[nn.Module] = Residual) -> tuple[nn.Module, Groups]:
    torch.manual_seed(0)
    net = randomise(make())
    groups = find_groups(net, torch.zeros(1, 3, 12, 12))
    return net.double(), groups


def test_the_table_says_what_every_collector_takes() -> None:
    kinds = {name: COLLECTORS[name] for name in READS}
    assert {name: Reads(kind.gradients, kind.labels, kind.outputs) for name, kind in kinds.items()} == READS
    assert {name for name in COLLECTORS.names() if COLLECTORS[name].__module__.startswith("vss.")} == set(READS)


def test_nothing_of_the_scored_model_changes() -> None:
    net, groups = net_and_groups()
    net.train()
    net.one[1].eval()
    net.one[0].weight.requires_grad_(False)
    mean_loss(net, batches_of(1, seed=9)[0]).backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    before = copy.deepcopy(net.state_dict())
    modes = {name: m.training for name, m in net.named_modules()}
    scores_of(net, groups, "taylor", batches_of(2))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert {name: m.training for name, m in net.named_modules()} == modes
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["one.0.weight"]
    for name, p in net.named_parameters():
        assert (p.grad is None) == (grads[name] is None)
        assert p.grad is None or torch.equal(p.grad, grads[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules())


def test_the_model_is_restored_when_the_loss_fails() -> None:
    net, groups = net_and_groups()
    net.train()
    net.one[0].weight.requires_grad_(False)

    def broken(model: nn.Module, batch: object) -> torch.Tensor:
        raise RuntimeError("no labels")

    with pytest.raises(RuntimeError, match="no labels"):
        collect(net, list(groups), ["gate"], batches_of(1), broken)
    assert net.training and not net.one[0].weight.requires_grad
    assert all(p.grad is None for p in net.parameters())


def test_scores_do_not_depend_on_the_mode_and_are_deterministic() -> None:
    net, groups = net_and_groups()
    first = scores_of(net.train(), groups, "taylor", batches_of(2))
    second = scores_of(net.eval(), groups, "taylor", batches_of(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_number_of_batches_is_returned() -> None:
    net, groups = net_and_groups()
    assert collect(net, list(groups), ["gate"], iter(batches_of(3)), mean_loss)[1] == 3
    assert collect(net, list(groups), [], None, None) == ({}, 0)


def test_a_head_outside_the_loss_is_named() -> None:
    net, groups = net_and_groups(Heads)
    with pytest.raises(VssError, match="layer 'side' got no gradient: its head is outside the loss"):
        scores_of(net, groups, "taylor", batches_of(1), loss=lambda m, b: F.cross_entropy(m(b[0])["out"], b[1]))


def test_no_batches_is_a_sentence() -> None:
    net, groups = net_and_groups()
    with pytest.raises(VssError, match="the calibration set is empty; give at least one batch"):
        scores_of(net, groups, "taylor", [])
    with pytest.raises(VssError, match="needs gate, from calibration images; give batches and a loss"):
        collect(net, list(groups), ["gate"], None, None)
