"""Differences against the spread of an output: a constant on top hides nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vss.core.closeness import alike, label_agreement, relative_difference, spread


def test_a_constant_on_every_channel_changes_nothing() -> None:
    values = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    offset = torch.tensor([1e4, -1e6, 7.0], dtype=torch.float64).view(1, 3, 1, 1)
    by_hand = max(float((values[:, k] - values[:, k].mean()).abs().max()) for k in range(3))
    assert spread(values) == pytest.approx(by_hand) and spread(values + offset) == pytest.approx(by_hand)
    other = values + 0.01
    assert relative_difference(values + offset, other + offset) == pytest.approx(0.01 / by_hand, rel=1e-6)


def test_one_value_a_channel_is_judged_by_its_size_and_a_constant_output_by_a_billionth() -> None:
    assert spread(torch.tensor([[3.0, -5.0]])) == 5.0
    assert spread(torch.full((2, 1, 4, 4), 8.0)) == pytest.approx(8e-9)
    assert relative_difference(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)) == 0.0


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_or_has_another_shape_is_infinitely_far(wrong: float) -> None:
    values = torch.zeros(1, 2, 2, 2)
    assert relative_difference(values, values.clone().index_fill(1, torch.tensor([0]), wrong)) == math.inf
    assert relative_difference(values, values[:, :1]) == math.inf


def test_labels_count_and_ties_do_not() -> None:
    wanted = torch.tensor([[1.0, 0.0, 0.5, 2.0], [0.0, 1.0, 0.5, 1.0]]).view(1, 2, 2, 2)
    got = torch.tensor([[0.0, 0.0, 0.4, 2.0], [1.0, 1.0, 0.5, 1.0]]).view(1, 2, 2, 2)
    assert label_agreement(wanted, got) == 0.75  # one label is another one, one tie went the other way
    assert label_agreement(wanted[:, :1], got[:, :1]) == 1.0


def test_rounding_on_a_large_offset_is_asked_again_in_float64() -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(3, 2, 1)
    same, other = nn.Sequential(net, nn.Identity()), nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        net.bias.add_(1e6)
        other.bias.copy_(net.bias)
        other.weight.copy_(net.weight * 1.001)

    def outputs(network: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        return [network(x)]

    x = torch.randn(1, 3, 8, 8)
    assert alike(net, same, x, outputs, 1e-4) and not alike(net, other, x, outputs, 1e-4)
