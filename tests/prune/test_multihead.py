"""`nn.MultiheadAttention`: whole heads or channels within heads leave; what stays computes what torch's own does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vss
from vss import deploy
from vss.prune import Budget, apply_plan, count, find_groups, make_plan, masked, verify
from vss.prune.apply import NarrowAttention

WIDTH, HEADS, CLASSES = 32, 4, 5


class Block(nn.Module):
    """Normalised x + attention of x to itself, or to another width of it."""

    def __init__(self, *, other: int = 0, weights: bool = False, causal: bool = False, **options: Any) -> None:
        super().__init__()
        own = {"kdim": other, "vdim": other} if other else {}
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **own, **options)
        self.context = nn.Linear(WIDTH, other) if other else nn.Identity()
        self.norm, self.weights, self.causal = nn.LayerNorm(WIDTH), weights, causal

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.attention.batch_first else x.transpose(0, 1)
        seen = self.context(y)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if self.causal else None
        found = self.attention(y, seen, seen, need_weights=self.weights, attn_mask=mask)[0]
        return self.norm(x + (found if self.attention.batch_first else found.transpose(0, 1)))


class Net(nn.Module):
    """Blocks over the places of an image of (H / 2, W / 2)."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, WIDTH, 2, 2), nn.Sequential(*blocks)
        self.head = nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(self.blocks(y.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(y.shape))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True, norm_first=True), 2,
                                 enable_nested_tensor=False)  # fmt: skip


MAKES: dict[str, Callable[[], nn.Module]] = {
    "two alike": lambda: Net(Block(batch_first=True), Block(batch_first=True)),
    "with weights": lambda: Net(Block(weights=True, batch_first=True)),
    "places first, no bias": lambda: Net(Block(bias=False)),
    "another width of keys": lambda: Net(Block(other=24), Block(other=24, weights=True)),
    "masked": lambda: Net(Block(causal=True, batch_first=True), Block(causal=True, weights=True)),
    "encoder": lambda: Net(encoder()),
}


def awake(net: nn.Module) -> nn.Module:
    """Biases that matter, which torch begins at zero."""
    with torch.no_grad():
        for value in net.parameters():
            if value.ndim == 1:
                value.copy_(0.3 * torch.randn(value.shape))
    return net.eval()


@pytest.mark.parametrize("name", MAKES)
def test_heads_leave_and_the_cut_is_exact_saved_and_exported(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, image = awake(MAKES[name]()), torch.randn(1, 3, 12, 12)
    plan = make_plan(net, image, budget=Budget(kind="channels", keep=0.5, scope="local"))
    small = apply_plan(net, plan)
    cut = [module for module in small.modules() if isinstance(module, NarrowAttention)]
    assert len(cut) == sum(isinstance(module, nn.MultiheadAttention) for module in net.modules())
    assert all(module.out_proj.weight.shape == (WIDTH, WIDTH // 2) for module in cut)
    with torch.no_grad():
        wide, narrow = (copy.deepcopy(each).double()(image.double()) for each in (masked(net, plan), small))
    assert float((wide - narrow).abs().max()) < 1e-12
    assert verify(net, small, plan, example=image)["masked_max_rel"] < 1e-4
    small.train()(torch.randn(2, 3, 12, 12)).square().mean().backward()
    small.zero_grad()
    vss.save(small.eval(), tmp_path / "net.safetensors")
    again = vss.load(tmp_path / "net.safetensors", model=MAKES[name]()).eval()
    assert torch.equal(again(image), small(image))
    assert deploy.export(small, tmp_path / "net.onnx", example=image)["parity"]["max_rel"] < 1e-4


def test_heads_shrink_as_a_number_and_keep_their_scale() -> None:
    torch.manual_seed(0)
    net, image = awake(MAKES["two alike"]()), torch.randn(1, 3, 12, 12)
    first, second = find_groups(net, image)
    assert (first.channels, first.unit) == (WIDTH, WIDTH // HEADS)
    assert second.counts == ("blocks.1.attention.num_heads",)
    plan = make_plan(net, image, budget=Budget(kind="channels", keep=0.5, scope="local"))
    attention: Any = apply_plan(net, plan).get_submodule("blocks.0.attention")
    assert (attention.num_heads, attention.head_dim) == (HEADS // 2, WIDTH // HEADS)


def test_the_projections_count_as_multiplications() -> None:
    net, places = Net(Block(batch_first=True), Block(other=24)), 36
    wide = 12 * WIDTH + WIDTH * CLASSES + 4 * WIDTH**2  # stem, head, and the first block
    narrow = 2 * WIDTH**2 + 3 * 24 * WIDTH  # query and result; context, keys and values
    assert count(net.eval(), (12, 12))["macs_g"] * 1e9 == places * (wide + narrow)


def test_a_network_that_gives_the_mean_weight_of_its_heads_keeps_them() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.attention = nn.Linear(3, WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            y = self.stem(x.flatten(2).transpose(1, 2))
            return self.attention(y, y, y)

    torch.manual_seed(0)
    net, image = awake(Told()), torch.randn(1, 3, 4, 4)
    plan = make_plan(net, image, budget=Budget(kind="channels", keep=0.5, scope="local"))
    small: Any = apply_plan(net, plan)
    assert (small.attention.num_heads, small.attention.out_proj.weight.shape[1]) == (HEADS, WIDTH // 2)
    assert verify(net, small, plan, example=image)["masked_max_rel"] < 1e-4


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"kdim": 20, "vdim": 12}, {"bias": False}])
@pytest.mark.parametrize("weights", [None, True, False])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "padding", "both"])
@pytest.mark.parametrize("batched", [True, False])
def test_uncut_it_computes_what_torch_does(
    options: dict[str, Any], weights: bool | None, masks: str, batched: bool
) -> None:
    torch.manual_seed(0)
    own = nn.MultiheadAttention(WIDTH, HEADS, **options).double().eval()
    narrow = copy.deepcopy(own)
    NarrowAttention.of(narrow)
    shape = ((2, 5), (2, 7)) if own.batch_first else ((5, 2), (7, 2))
    if not batched:
        shape = ((5,), (7,))
    query, key, value = (torch.randn(*shape[int(n > 0)], width, dtype=torch.float64)
                         for n, width in enumerate((WIDTH, own.kdim, own.vdim)))  # fmt: skip
    given: dict[str, Any] = {"need_weights": bool(weights or weights is None), "average_attn_weights": weights is None}
    if masks in ("bool", "both"):
        given["attn_mask"] = torch.rand(5, 7) < 0.3
    if masks == "float":
        given["attn_mask"] = torch.randn(*([2 * HEADS] if batched else [HEADS]), 5, 7, dtype=torch.float64)
    if masks in ("padding", "both"):
        given["key_padding_mask"] = torch.arange(7) > 4 if not batched else torch.arange(7) > torch.tensor([[4], [5]])
    wanted, got = own(query, key, value, **given), narrow(query, key, value, **given)
    torch.testing.assert_close(got[0], wanted[0])
    assert (got[1] is None) == (wanted[1] is None)
    if wanted[1] is not None:
        torch.testing.assert_close(got[1], wanted[1])
