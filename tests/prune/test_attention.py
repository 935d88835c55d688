"""Attention whose heads carry a bias or a mask: heads leave with all that belongs to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vss
from vss.core.errors import VssError
from vss.prune import Budget, apply_plan, find_groups, make_plan, verify

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
