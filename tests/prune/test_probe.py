"""A group that does not survive its own cut is reported, and only that one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from vss.core.errors import VssError
from vss.prune import find_groups
from vss.prune.apply import flatten, unsound

from .nets import Chain, Concat

X = torch.zeros(1, 3, 16, 16)


def outputs(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return flatten(net(x))


def test_good_groups_pass() -> None:
    net = Concat().eval()
    assert unsound(net, X, list(find_groups(net, X)), outputs) == {}


def test_a_wrong_offset_is_found_in_the_group_that_has_it() -> None:
    net = Concat().eval()
    a, b = find_groups(net, X)
    wrong = tuple(dataclasses.replace(s, offset=s.offset - 1) if s.tensor == "norm.weight" else s for s in b.slots)
    assert list(unsound(net, X, [a, dataclasses.replace(b, slots=wrong)], outputs)) == ["b"]


def test_a_forgotten_consumer_is_found() -> None:
    net = Chain().eval()
    a, b = find_groups(net, X)
    short = dataclasses.replace(a, slots=tuple(s for s in a.slots if s.role != "consumer"))
    faults = unsound(net, X, [short, b], outputs)
    assert list(faults) == ["a"] and "does not run" in faults["a"]


def test_nan_is_not_taken_for_a_fault_of_a_group() -> None:
    net = Chain().eval()
    groups = list(find_groups(net, X))
    with torch.no_grad():
        net.head.weight[0, 0] = float("nan")
    with pytest.raises(VssError, match="NaN or infinite outputs"):
        unsound(net, X, groups, outputs)
