"""What a user decides about single layers: they stay, or lose a fraction of their own."""

from __future__ import annotations

import pytest
import torch

from vss.core.errors import VssError
from vss.models import build, wrap
from vss.prune import apply_plan, find_groups, make_plan
from vss.prune.plan import Plan

X = torch.zeros(1, 3, 32, 32)


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("unet", 3, width=16, depth=2).eval()


def left(plan: Plan, start: str) -> set[float]:
    return {after / before for name, (before, after) in plan.widths().items() if name.startswith(start)}


def test_some_layers_lose_a_fraction_of_their_own(net: torch.nn.Module) -> None:
    ratios = {"decoder.*": 0.25, "decoder.0": 0.5}
    plan = make_plan(net, X, budget={"kind": "macs", "keep": 0.5, "ratios": ratios})
    assert left(plan, "decoder.1") == {0.75} and left(plan, "decoder.0") == {0.5}
    assert plan.cost_after["macs"] <= 0.5 * plan.cost_before["macs"]
    small = apply_plan(net, plan)
    assert small(X).shape == (1, 3, 32, 32)
    alone = make_plan(net, X, budget={"keep": 1.0, "ratios": ratios})  # the rest is not cut
    assert left(alone, "encoder") == {1.0} and left(alone, "decoder.0") == {0.5}
    aligned = make_plan(net, X, budget={"keep": 1.0, "align": 8, "floor": 0.9, "ratios": {"encoder.0": 0.4}})
    assert left(aligned, "encoder.0") == {0.5}  # in steps, and above the floor since it is asked for by name
    with pytest.raises(VssError, match=r"--ratio\) 'decodr' names no layer that can be cut .*Did you mean 'decoder"):
        make_plan(net, X, budget={"ratios": {"decodr": 0.3}})
    with pytest.raises(VssError, match=r"'decoder' names no layer that can be cut \(frozen and locked ones cannot\)"):
        make_plan(net, X, keep=["decoder"], budget={"ratios": {"decoder": 0.3}})


def test_layers_stay_by_pattern_and_by_the_names_of_the_wrapped_network(net: torch.nn.Module) -> None:
    class Mine(torch.nn.Sequential):
        def __init__(self) -> None:
            conv, relu = torch.nn.Conv2d, torch.nn.ReLU
            super().__init__(conv(3, 8, 3), relu(), conv(8, 8, 3), relu(), conv(8, 8, 3), relu(), conv(8, 2, 1))

    assert not [group.id for group in find_groups(net, X, keep=["*coder.*"]) if "coder" in group.id]
    model = wrap(Mine(), num_classes=2)
    assert [group.id for group in find_groups(model, X, keep=["2"])] == ["net.0", "net.4"]
    assert [group.id for group in find_groups(model, X, keep=["net.[02]"])] == ["net.4"]
    with pytest.raises(VssError, match=r"unknown layer to keep 'encodr'. Did you mean 'encoder'"):
        find_groups(net, X, keep=["encodr"])
