"""Every kind of network through plan, cut, proof, checkpoint and file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vss
from vss.deploy import export
from vss.models import build
from vss.prune import apply_plan, count, find_groups, make_plan, verify

from .nets import few_blocks, randomise

FULL = {"classes": 4, "size": (64, 64)}
NETWORKS: dict[str, dict[str, Any]] = {
    "deeplabv3_resnet50": FULL | {"groups": (23, 8_000)},
    "fcn_resnet50": FULL | {"groups": (17, 6_720)},
    "resnet18_seg": FULL | {"options": {"decoder": 32}, "groups": (14, 2_944)},
    "resnet50_seg": FULL | {"options": {"decoder": 32}, "groups": (17, 6_016)},
    "segnet": FULL | {"options": {"width": 8}, "groups": (21, 872)},
    "unet": FULL | {"options": {"width": 8, "depth": 3}, "groups": (17, 408)},
    "segdecnet": {"classes": 1, "size": (128, 64), "options": {"widths": [8, 12, 12, 12, 48]}, "groups": (12, 196)},
    "lraspp_mobilenet_v3_large": FULL | {"groups": (18, 3_512)},
}


@pytest.fixture(autouse=True)
def short_backbones() -> Iterator[None]:
    """Groups of the whole networks are in tests/models."""
    with few_blocks():
        yield


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    row = NETWORKS[name]
    return randomise(build(name, row["classes"], **row.get("options", {})))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_half_the_macs_cut_proven_saved_and_exported(name: str, tmp_path: Path) -> None:
    net, size = network(name), NETWORKS[name]["size"]
    example = torch.zeros(1, 3, *size)
    groups = find_groups(net, example)
    assert (len(groups), sum(group.channels for group in groups)) == NETWORKS[name]["groups"]

    budget = {"kind": "macs", "keep": 0.5, "scope": "global"}  # the scope of the finest steps
    plan = make_plan(net, example, criterion="l1", budget=budget, groups=groups)
    small = apply_plan(net, plan)
    left = count(small, size)["macs_g"] / count(net, size)["macs_g"]
    assert 0.48 < left <= 0.5
    assert count(small, size)["macs_g"] * 1e9 == pytest.approx(plan.cost_after["macs"], rel=1e-12)

    proof = verify(net, small, plan, [size, (size[0] + 64, size[1])])
    assert proof["masked_max_rel"] < 1e-4
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert all(float(out.std()) > 0 for out in vss.core.example.logits_of(small(x)) if out.numel() > 1)

    vss.save(small, tmp_path / "small.safetensors")
    again = vss.load(tmp_path / "small.safetensors")
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in again.state_dict().items())
    with torch.no_grad():
        pairs = zip(vss.core.example.logits_of(again(x)), vss.core.example.logits_of(small(x)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    report = export(again, tmp_path / "small.onnx", size=size, parity_batches=(1, 2))
    assert report["parity"]["max_rel"] < 1e-4 and report["parity"]["argmax_agreement"] > 0.999


@pytest.mark.parametrize("name", ["segnet", "segdecnet"])
def test_aligned_and_iterated_plans_compose(name: str) -> None:
    """Two cuts, the second aligned to 4 channels, equal the one composed plan."""
    net, size = network(name), NETWORKS[name]["size"]
    example = torch.zeros(1, 3, *size)
    first = make_plan(net, example, budget={"kind": "macs", "keep": 0.7})
    half = apply_plan(net, first)
    second = make_plan(half, example, budget={"kind": "macs", "keep": 0.7, "align": 4})
    twice, once = apply_plan(half, second), apply_plan(net, first.then(second))
    assert all(torch.equal(value, once.state_dict()[key]) for key, value in twice.state_dict().items())
    assert verify(net, once, first.then(second), [size, (size[0] + 64, size[1])])["masked_max_rel"] < 1e-4
    assert all(len(g.kept) % 4 == 0 or len(g.kept) == g.channels for g in second.groups if g.channels > 4)
