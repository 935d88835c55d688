"""A module that is registered under two names is one module; a tensor of two modules stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vss
from vss.core.errors import VssError
from vss.models import MODELS, wrap
from vss.models.weights import load_weights
from vss.prune import apply_plan, count, find_groups, make_plan, masked, verify

from .nets import randomise

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
HALF = {"kind": "channels", "keep": 0.5, "scope": "local"}


def block(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())


class Once(nn.Module):
    """A small U-shape, every block under one name."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = block(3, 8), block(8, 12), block(20, 6)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        return self.head(self.up(torch.cat([a, self.deep(a)], 1)))


class Level(nn.Module):
    """One step of a recursive U-shape: what is before, what is inside, what is behind."""

    def __init__(self, down: nn.Module, inside: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.inside, self.up = down, inside, up

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        return self.up(torch.cat([a, self.inside(a)], 1))


class Twice(Once):
    """The same network; its blocks are attributes, members of a list and of a recursion."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.head = nn.Conv2d(6, classes, 1)
        self.blocks = nn.ModuleList([self.down, self.deep, self.up])
        self.level = Level(self.down, self.deep, self.up)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.level(x))


def pair() -> tuple[nn.Module, nn.Module]:
    """The network with each block under one name and under three, with the same weights."""
    torch.manual_seed(0)
    once, twice = randomise(Once()), Twice().eval()
    state = once.state_dict()
    aliases = {"level.inside": "deep", "level.down": "down", "level.up": "up", "blocks.0": "down", "blocks.1": "deep",
               "blocks.2": "up"}  # fmt: skip
    for alias, name in aliases.items():
        state |= {alias + key[len(name) :]: value for key, value in state.items() if key.startswith(f"{name}.")}
    twice.load_state_dict(state)
    return once, twice


def test_it_is_cut_as_the_network_with_one_name_each() -> None:
    once, twice = pair()
    first, second = (make_plan(net, X, budget=HALF) for net in (once, twice))
    assert second.groups == first.groups and second.cost_after == first.cost_after
    small, reference = apply_plan(twice, second), apply_plan(once, first)
    assert small.level.down is small.blocks[0] is small.down  # type: ignore[union-attr,index]
    assert torch.equal(small(X), reference(X))
    assert float((small(X) - masked(once, first)(X)).detach().abs().max()) < 1e-5
    assert verify(twice, small, second, [(16, 16), (24, 16)])["masked_max_rel"] < 1e-4
    assert count(small, (16, 16)) == count(reference, (16, 16))


def test_it_is_saved_and_loaded_to_the_bit_twice_cut(tmp_path: Path) -> None:
    _, net = pair()
    for budget in (HALF, HALF | {"keep": 0.75}):
        net = apply_plan(net, make_plan(net, X, budget=budget))
    path = vss.save(net, tmp_path / "a.safetensors")
    again = vss.load(path, model=Twice())
    assert torch.equal(again(X), net(X)) and again.level.up is again.up
    wrapped = vss.load(path, model=wrap(Twice(), num_classes=5))
    assert torch.equal(wrapped(X), net(X))
    assert torch.equal(vss.load(vss.save(wrapped, tmp_path / "b.safetensors"), model=Twice())(X), net(X))


def test_a_registered_one_comes_back_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MODELS.names()
    monkeypatch.setattr(MODELS, "_items", dict(MODELS._items))
    MODELS.add("registered_twice", lambda num_classes: wrap(Twice(num_classes), num_classes=num_classes))
    net: Any = vss.models.build("registered_twice", 4)
    small = apply_plan(net.eval(), make_plan(net, X, budget=HALF))
    again = vss.load(vss.save(small, tmp_path / "a.safetensors"))
    assert torch.equal(again(X), small(X)) and again.net.level.up is again.net.up


def test_layers_are_asked_for_by_any_name() -> None:
    _, net = pair()
    for name in ("deep.0", "level.inside", "blocks.1.*"):
        assert [group.id for group in find_groups(net, X, keep=[name])] == ["down.0", "up.0"]


def test_a_tensor_of_two_modules_stays_and_is_saved(tmp_path: Path) -> None:
    class Tied(Once):
        def __init__(self) -> None:
            super().__init__()
            self.again = block(6, 6)
            self.more = block(6, 6)
            self.more[0].weight = self.again[0].weight

        def forward(self, x: Tensor) -> Tensor:
            a = self.down(x)
            return self.head(self.more(self.again(self.up(torch.cat([a, self.deep(a)], 1)))))

    net = randomise(Tied())
    groups = find_groups(net, X)
    assert [group.id for group in groups] == ["down.0", "deep.0"]
    why = {lock.layer: lock.reason for lock in groups.locked}
    assert why["more.0"] == "again.0.weight is shared with another layer"
    small = apply_plan(net, make_plan(net, X, groups=groups, budget=HALF))
    again = vss.load(vss.save(small, tmp_path / "a.safetensors"), model=Tied())
    assert torch.equal(again(X), small(X)) and again.more[0].weight is again.again[0].weight


def test_a_file_with_other_values_under_the_second_name_is_refused(tmp_path: Path) -> None:
    class Apart(Twice):
        """Of the same names, and the blocks are different ones."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([block(3, 8), block(8, 12), block(20, 6)])

    Apart.__name__ = "Twice"
    path = vss.save(Apart(), tmp_path / "a.safetensors")
    with pytest.raises(VssError, match=r"other values in 'blocks.0.0.weight' than in 'down.0.weight', which are one"):
        vss.load(path, model=Twice())
    torch.save(Apart().state_dict(), tmp_path / "a.pt")
    with pytest.raises(VssError, match=r"other values in blocks.0.0.weight than in down.0.weight, which are one"):
        load_weights(Twice(), tmp_path / "a.pt")


def test_weights_of_others_under_one_name_are_enough(tmp_path: Path) -> None:
    once, twice = pair()
    torch.save(once.state_dict(), tmp_path / "a.pt")
    fresh = Twice().eval()
    load_weights(fresh, tmp_path / "a.pt")
    assert torch.equal(fresh(X), twice(X))
