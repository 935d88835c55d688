"""A group that does not survive its own cut is reported, and only that one."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vss.core.errors import VssError
from vss.prune import Group, find_groups, make_plan
from vss.prune.probe import TIME, Probe, half_of

from .nets import Chain, Concat

X = torch.zeros(1, 3, 16, 16)


def faults(net: nn.Module, groups: list[Group]) -> dict[str, str]:
    return Probe(net, X, None, 60.0).faults([half_of(group) for group in groups])


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
    found = Probe(net, X, None, -1.0).faults([half_of(group) for group in groups])
    assert {*found.values()} == {TIME} and set(found) == {"a", "b"}
    assert {lock.reason for lock in find_groups(net, X, time_limit_s=1e-9).locked} == {TIME}


def test_deciding_takes_no_time_from_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    net, now = Chain().eval(), [0.0]
    groups = find_groups(net, X)
    monkeypatch.setattr("vss.prune.probe.time", SimpleNamespace(monotonic=lambda: now[0]))

    def choose(free: list[Group], *_: Any) -> dict[str, torch.Tensor]:
        now[0] += 1000.0  # such as timing networks until one meets a target
        return {group.id: torch.arange(group.channels // 2) for group in free}

    plan = make_plan(net, X, groups=groups, choose=choose, time_limit_s=300.0)
    assert {group.id: len(group.kept) for group in plan.groups} == {g.id: g.channels // 2 for g in groups}
