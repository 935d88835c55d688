"""Networks that cannot be planned say so before anything is done with them, and compiled ones are not compiled anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vss
from vss.core.errors import VssError
from vss.prune import apply_plan, find_groups, make_plan, verify


def test_networks_that_have_no_values_or_cannot_be_taken_apart_are_sentences() -> None:
    x = torch.zeros(1, 3, 8, 8)
    with torch.device("meta"):
        meta = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1))
    lazy = nn.Sequential(nn.LazyConv2d(8, 1), nn.Conv2d(8, 5, 1))
    scripted = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)), x)
    faults = {meta: "on the meta device", lazy: "lazy layer was never called", scripted: "is one of torch.jit"}
    for net, sentence in faults.items():
        for call in (find_groups, make_plan):
            with pytest.raises(VssError, match=sentence):
                call(net, x)
    assert not list(find_groups(nn.Upsample(scale_factor=2), x))


def test_a_compiled_part_is_planned_without_compiling() -> None:
    torch.manual_seed(0)
    calls: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    part = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
    layers = [nn.Conv2d(3, 8, 3, padding=1), torch.compile(part, backend=backend), nn.Conv2d(6, 5, 1)]
    net: Any = nn.Sequential(*layers).eval()
    example = torch.randn(1, 3, 16, 16)
    plan = make_plan(net, example)
    verify(net, apply_plan(net, plan), plan, example=example)
    assert plan.widths().keys() == {"0", "1._orig_mod.0"} and not calls


class Stateful(nn.Sequential):
    """A network with a state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_a_state_that_is_no_tensor_is_no_obstacle_to_a_cut_and_is_not_lost_in_silence(tmp_path: Path) -> None:
    net = Stateful(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
    example = torch.randn(1, 3, 16, 16)
    small = apply_plan(net, make_plan(net, example))
    with pytest.raises(VssError, match="_extra_state is no tensor"):
        vss.save(small, tmp_path / "small.safetensors")


def test_networks_of_inference_mode_and_of_fx(tmp_path: Path) -> None:
    class Inference(nn.Sequential):
        @torch.inference_mode()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = super().forward(x)
            return found

    def body(kind: type[nn.Sequential]) -> nn.Module:
        torch.manual_seed(0)
        return kind(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()

    example = torch.randn(1, 3, 16, 16)
    assert [group.id for group in find_groups(body(Inference), example)] == ["0"]
    traced = torch.fx.symbolic_trace(body(nn.Sequential))
    small = apply_plan(traced, make_plan(traced, example))
    vss.save(small, tmp_path / "small.safetensors")
    again = vss.load(tmp_path / "small.safetensors", model=torch.fx.symbolic_trace(body(nn.Sequential)))
    assert torch.equal(again(example), small(example))
