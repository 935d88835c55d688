"""Attention: channels within heads leave, and heads with the bias or the mask that they carry."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vss
from vss.core.errors import VssError
from vss.prune import Budget, apply_plan, find_groups, make_plan, verify
from vss.prune.probe import SIZED
from vss.prune.products import GROUPED

from .nets import around, proven, reasons

HEADS, WIDTH, CHANNELS, SIDE = 4, 6, 16, 8


class Windowed(nn.Module):
    """Attention over positions with a learned bias for each head, from a table, as in Swin; heads are not written down.

    `masked`: a mask of positions is added to the bias. `fused`: attention is one call.
    """

    def __init__(self, *, fused: bool, masked: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(CHANNELS, HEADS * WIDTH) for _ in range(3))
        self.out = nn.Linear(HEADS * WIDTH, CHANNELS)
        self.table = nn.Parameter(torch.randn(9, HEADS))
        places = SIDE * SIDE
        self.register_buffer("index", torch.randint(0, 9, (places * places,)), persistent=False)
        self.register_buffer("mask", torch.randn(places, places) if masked else None, persistent=False)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        places, shape = SIDE * SIDE, (*x.shape[:-1], -1, WIDTH)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        bias = self.table[self.index].view(places, places, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        bias = bias if self.mask is None else bias + self.mask
        if self.fused:
            seen = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            seen = (q @ k.transpose(2, 3) * WIDTH**-0.5 + bias).softmax(-1) @ v
        return x + self.out(seen.transpose(1, 2).reshape(*x.shape[:-1], -1))


class Net(nn.Module):
    """Windowed attention between two convolutions."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Conv2d(3, CHANNELS, 1), attention, nn.Conv2d(CHANNELS, 5, 1)
        self.norm = nn.LayerNorm(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stem(x)
        places = self.norm(self.attention(y.flatten(2).transpose(1, 2)))
        out: Tensor = self.head(places.transpose(1, 2).reshape(y.shape))
        return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_heads_leave_with_their_column_of_the_bias(fused: bool, masked: bool) -> None:
    torch.manual_seed(0)
    net, image = Net(Windowed(fused=fused, masked=masked)).eval(), torch.randn(1, 3, SIDE, SIDE)
    (group,) = find_groups(net, image)
    assert group.channels == HEADS
    blocks = {slot.tensor: slot.block for slot in group.slots}
    assert blocks["attention.table"] == 1
    assert {blocks[f"attention.{name}.weight"] for name in ("q", "k", "v", "out")} == {WIDTH}
    plan = make_plan(net, image, budget=Budget(kind="channels", keep=0.5))
    small = apply_plan(net, plan)
    assert small.attention.table.shape == (9, HEADS // 2)  # type: ignore[union-attr]
    assert verify(net, small, plan, example=image)["masked_max_rel"] < 1e-4


class Counted(nn.Module):
    """Attention that writes down its heads, their width and their product, as timm does; one layer makes q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = HEADS, WIDTH, HEADS * WIDTH
        self.qkv, self.proj = nn.Linear(CHANNELS, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        n, places, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, places, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(q, k, v, scale=WIDTH**-0.5)
        out: Tensor = self.proj(seen.transpose(1, 2).reshape(n, places, self.attn_dim))
        return x + out


def test_whole_numbers_that_a_module_keeps_shrink_with_its_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, image = Net(nn.Sequential(Counted(), Counted())).eval(), torch.randn(1, 3, SIDE, SIDE)
    groups = find_groups(net, image)
    assert [group.channels for group in groups] == [WIDTH, WIDTH]  # within heads: more widths to choose from
    assert groups.groups[1].counts == ("attention.1.attn_dim", "attention.1.head_dim")
    plan = make_plan(net, image, budget=Budget(kind="channels", keep=0.5, scope="local"), groups=groups)
    small = apply_plan(net, plan)
    first = small.attention[0]  # type: ignore[index]
    assert (first.num_heads, first.head_dim, first.attn_dim) == (HEADS, WIDTH // 2, HEADS * WIDTH // 2)
    assert net.attention[0].head_dim == WIDTH  # type: ignore[index]
    assert verify(net, small, plan, example=image)["masked_max_rel"] < 1e-4
    vss.save(small, tmp_path / "net.safetensors")
    again = vss.load(tmp_path / "net.safetensors", model=Net(nn.Sequential(Counted(), Counted())))
    assert torch.equal(again.eval()(image), small(image))


def test_a_plan_with_a_number_that_the_network_does_not_keep_is_refused() -> None:
    torch.manual_seed(0)
    net, image = Net(Counted()).eval(), torch.randn(1, 3, SIDE, SIDE)
    plan = make_plan(net, image, budget=Budget(kind="channels", keep=0.5))
    net.attention.head_dim = 7  # type: ignore[assignment]
    with pytest.raises(VssError, match=r"shrinks attention.head_dim to 3 of 6 and found 7"):
        apply_plan(net, plan)


class Attention(nn.Module):
    """x + attention over positions, from 1x1 convolutions, by one of several spellings."""

    def __init__(self, how: Callable[[Tensor, Tensor, Tensor], Tensor], c: int = 32, heads: int = 1) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Conv2d(c, 8, 1),
            nn.Conv2d(c, 8, 1),
            nn.Conv2d(c, 16, 1),
            nn.Conv2d(16, c, 1),
        )
        self.how, self.heads = how, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2).unflatten(1, (self.heads, -1)).squeeze(1) for layer in (self.q, self.k, self.v))
        return x + self.out(self.how(q, k, v).reshape(len(x), -1, *x.shape[2:]))


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bnm,bcm->bcn", torch.einsum("bcn,bcm->bnm", q, k).softmax(-1), v)


def product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turned = (each.transpose(-1, -2) for each in (q, k, v))
    return F.scaled_dot_product_attention(*turned, scale=0.3).transpose(-1, -2)


class GlobalContext(nn.Module):
    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.mask = nn.Conv2d(c, 1, 1)
        self.t = nn.Sequential(nn.Conv2d(c, 4, 1), nn.ReLU(), nn.Conv2d(4, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weights = self.mask(x).view(b, 1, h * w).softmax(2).unsqueeze(-1)
        return x + self.t((x.view(b, c, h * w).unsqueeze(1) @ weights).view(b, c, 1, 1))


@pytest.mark.parametrize("how", [einsum, product, fused])
def test_attention_is_cut_within_its_head(how: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    net, x = around(Attention(how)), torch.randn(1, 3, 8, 8)
    start = time.process_time()
    groups = find_groups(net, x)
    assert time.process_time() - start < 10
    assert [(g.id, g.channels) for g in groups] == [("0", 32), ("2.q", 8), ("2.v", 16), ("3", 16)]
    assert groups["2.q"].module_names("producer") == ["2.q", "2.k"]
    proven(net, x)


def test_attention_with_heads_written_into_it_loses_channels_of_all_heads_alike() -> None:
    net, x = around(Attention(fused, heads=4)), torch.randn(1, 3, 8, 8)
    groups = find_groups(net, x)
    assert [(g.id, g.channels) for g in groups] == [("0", 32), ("2.q", 2), ("2.v", 4), ("3", 16)]
    _, small = proven(net, x)
    block: Any = small.get_submodule("2")
    assert (block.q.out_channels, block.k.out_channels, block.v.out_channels) == (4, 4, 8)


def test_a_global_context_block_is_cut() -> None:
    net, x = around(GlobalContext()), torch.randn(1, 3, 8, 8)
    assert [g.id for g in find_groups(net, x)] == ["0", "2.t.0", "3"]
    proven(net, x)


class Scrambled(nn.Module):
    """x + what attention over positions gives, read as channels without being turned back, as in MAnet."""

    def __init__(self, c: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Conv2d(c, 8, 1), nn.Conv2d(c, 8, 1), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
        return x + ((q.transpose(1, 2) @ k).softmax(-1) @ v.transpose(1, 2)).reshape(x.shape)


def test_channels_that_belong_together_at_one_size_alone_stay() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.AvgPool2d(16), around(Scrambled())).eval(), torch.randn(1, 3, 32, 32)
    groups = find_groups(net, x)
    assert [(g.id, g.channels) for g in groups] == [("1.2.q", 8), ("1.3", 16)]
    assert reasons(groups)["1.0"] == reasons(groups)["1.2.v"] == SIZED
    plan, small = proven(net, x)
    assert verify(net, small, plan, [(64, 32), (32, 96)])["masked_max_rel"] < 1e-4


class Grouped(nn.Module):
    """Two heads of queries share one of keys and values, and the call counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(CHANNELS, HEADS * WIDTH), nn.Linear(HEADS * WIDTH, CHANNELS)
        self.k, self.v = (nn.Linear(CHANNELS, HEADS // 2 * WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip((self.q, self.k, self.v), (HEADS, HEADS // 2, HEADS // 2), strict=True)
        q, k, v = (layer(x).unflatten(-1, (heads, WIDTH)).transpose(1, 2) for layer, heads in sizes)
        seen = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(seen.transpose(1, 2).flatten(2))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mixed, self.last = nn.Conv2d(3, CHANNELS, 3, padding=1), Grouped(), nn.Conv2d(CHANNELS, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        mixed = self.mixed(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return self.last(x + mixed.unflatten(2, x.shape[2:]))


def test_grouped_queries_stay_and_the_rest_is_offered() -> None:
    net, x = Tokens().eval(), torch.randn(1, 3, SIDE, SIDE)
    groups = find_groups(net, x)
    assert [group.id for group in groups] == ["first"]
    assert {"mixed.q", "mixed.k", "mixed.v"} <= {lock.layer for lock in groups.locked if lock.reason == GROUPED}
    plan = make_plan(net, x, criterion="l1", budget={"kind": "channels", "keep": 0.5})
    assert verify(net, apply_plan(net, plan), plan, [(SIDE, SIDE), (12, 12)])["masked_max_rel"] < 1e-5
