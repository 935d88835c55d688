"""A network of a user's own is saved and loaded whatever wraps it; a file that could not be loaded is not written."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import vss
from vss.core.errors import VssError
from vss.models import wrap
from vss.prune import apply_plan, make_plan
from vss.train.checkpoint import inner
from vss.train.header import header

X = torch.zeros(1, 3, 16, 16)


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 1)
        )


class Holder(nn.Module):
    """A container of a user's, with a layer of its own or without."""

    def __init__(self, net: nn.Module, extra: bool = False) -> None:
        super().__init__()
        self.inside = net
        self.extra = nn.Conv2d(5, 2, 1) if extra else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.extra(self.inside(x))


def wrapped(net: nn.Module) -> nn.Module:
    return wrap(net, num_classes=5)


def bare(net: nn.Module) -> nn.Module:
    return net


def compiled(net: nn.Module) -> Any:
    return torch.compile(net)


OUTER: list[Callable[[nn.Module], Any]] = [bare, wrapped, nn.DataParallel, compiled, AveragedModel, Holder]


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    return apply_plan(net, make_plan(net, X))


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("fresh", [bare, wrapped, nn.DataParallel, compiled])
def test_every_wrapping_comes_back_in_every_other(outer: Any, fresh: Any, small: nn.Module, tmp_path: Path) -> None:
    model = fresh(Holder(Net()) if outer is Holder else Net())
    vss.save(outer(small), tmp_path / "small.safetensors")
    again = vss.load(tmp_path / "small.safetensors", model=model)
    assert torch.equal(again(X + 1), small(X + 1))
    plans = vss.save(again, tmp_path / "b.safetensors") and header(tmp_path / "b.safetensors").plans
    assert [each["groups"][0]["kept"] for each in plans] == [list(small.plans[0].groups[0].kept)]  # type: ignore[union-attr, index]


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("fresh", [bare, wrapped, nn.DataParallel])
def test_what_is_cut_inside_its_wrapping_is_saved_with_its_plans(outer: Any, fresh: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = outer(Net()).eval()
    for rounds in (1, 2):
        net = apply_plan(net, make_plan(net, X, budget={"kind": "channels", "keep": 0.7}))
        vss.save(net, tmp_path / "small.safetensors")
        again: Any = vss.load(tmp_path / "small.safetensors", model=fresh(Holder(Net()) if outer is Holder else Net()))
        assert torch.equal(again(X + 1), inner(net)(X + 1)) and len(again.plans) == rounds


@pytest.mark.parametrize("outer", [wrapped, nn.DataParallel, compiled])
def test_what_was_cut_is_wrapped_and_cut_again(outer: Any, small: nn.Module, tmp_path: Path) -> None:
    net = outer(copy.deepcopy(small)).eval()
    twice = apply_plan(net, make_plan(net, X))
    vss.save(twice, tmp_path / "twice.safetensors")
    again: Any = vss.load(tmp_path / "twice.safetensors", model=Net())
    assert torch.equal(again(X + 1), inner(twice)(X + 1)) and len(again.plans) == 2


def test_a_part_that_was_cut_and_a_whole_that_was_cut_again(small: nn.Module, tmp_path: Path) -> None:
    holder = Holder(small, extra=True).eval()
    twice = apply_plan(holder, make_plan(holder, X, budget={"kind": "channels", "keep": 0.5}))
    for net in (holder, twice):
        vss.save(net, tmp_path / "net.safetensors")
        again: Any = vss.load(tmp_path / "net.safetensors", model=Holder(Net(), extra=True))
        assert torch.equal(again(X + 1), net(X + 1))
    assert len(again.plans) == 2


def test_a_network_that_was_changed_after_its_cut_is_not_written(small: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net: Any = Net().eval()
    changed: Any = apply_plan(net, make_plan(net, X))
    changed[2] = nn.Conv2d(changed[2].in_channels - 4, 16, 3, padding=1)
    with pytest.raises(VssError, match=r"2\.weight is of shape .*changed after the cut: save what apply_plan returned"):
        vss.save(changed, tmp_path / "net.safetensors")
    changed[2] = nn.Identity()
    with pytest.raises(VssError, match=r"2\.weight is not there"):
        vss.save(nn.DataParallel(changed), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_attributes_of_a_foreign_class_are_its_own(tmp_path: Path) -> None:
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.options, self.num_classes, self.name = argparse.Namespace(width=1), [5], "unet"

    net = Odd().eval()
    vss.save(net, tmp_path / "net.safetensors")
    said = header(tmp_path / "net.safetensors")
    assert (said.model, said.network, said.options, said.num_classes) == ("Odd", "Odd", {}, None)
    assert torch.equal(vss.load(tmp_path / "net.safetensors", model=Odd())(X + 1), net(X + 1))
    with pytest.raises(VssError, match="holds a 'Odd' and was to be loaded into a 'Net'"):
        vss.load(tmp_path / "net.safetensors", model=wrap(Net(), num_classes=5))
    with pytest.raises(VssError, match=r"holds a 'Odd', which is not registered; give an unpruned instance"):
        vss.load(tmp_path / "net.safetensors")
