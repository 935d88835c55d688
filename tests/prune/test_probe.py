"""A group that does not survive its own cut is reported, and only that one."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from torch import nn

from vss.core.errors import VssError
from vss.prune import Group, find_groups
from vss.prune.probe import TIME, Probe, half_of

from .nets import Chain, Concat

X = torch.zeros(1, 3, 16, 16)


def faults(net: nn.Module, groups: list[Group]) -> dict[str, str]:
    return Probe(net, X, None, time.monotonic() + 60).faults([half_of(group) for group in groups])


def test_good_groups_pass() -> None:
    net = Concat().eval()
    assert faults(net, list(find_groups(net, X))) == {}


def test_a_wrong_offset_is_found_in_the_group_that_has_it() -> None:
    net = Concat().eval()
    a, b = find_groups(net, X)
    wrong = tuple(dataclasses.replace(s, offset=s.offset - 1) if s.tensor == "norm.weight" else s for s in b.slots)
    assert list(faults(net, [a, dataclasses.replace(b, slots=wrong)])) == ["b"]


def test_a_forgotten_consumer_is_found() -> None:
    net = Chain().eval()
    a, b = find_groups(net, X)
    short = dataclasses.replace(a, slots=tuple(s for s in a.slots if s.role != "consumer"))
    found = faults(net, [short, b])
    assert list(found) == ["a"] and "does not run" in found["a"]


def test_nan_is_not_taken_for_a_fault_of_a_group() -> None:
    net = Chain().eval()
    groups = list(find_groups(net, X))
    with torch.no_grad():
        net.head.weight[0, 0] = float("nan")
    with pytest.raises(VssError, match="NaN or infinite outputs"):
        faults(net, groups)


def test_without_time_everything_is_refused_with_that_reason() -> None:
    net = Chain().eval()
    groups = list(find_groups(net, X))
    found = Probe(net, X, None, time.monotonic() - 1).faults([half_of(group) for group in groups])
    assert {*found.values()} == {TIME} and set(found) == {"a", "b"}
    assert {lock.reason for lock in find_groups(net, X, time_limit_s=1e-9).locked} == {TIME}
