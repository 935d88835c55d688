"""U-Net's widths, parameters and skips against the published layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from vss import models


def parameters(width: int, depth: int, classes: int, *, up: str) -> int:
    """From the layout: two 3x3 convolutions without bias and their batch norms a block."""

    def block(i: int, o: int) -> int:
        return 9 * i * o + 9 * o * o + 4 * o

    widths = [width * 2**level for level in range(depth + 1)]
    total = sum(block(i, o) for i, o in zip([3, *widths], widths, strict=False))
    for low, high in itertools.pairwise(widths):
        total += (4 * high * low if up == "transpose" else high * low) + low + block(2 * low, low)
    return total + width * classes + classes


@pytest.mark.parametrize(("width", "depth"), [(4, 1), (8, 3), (4, 4)])
@pytest.mark.parametrize("up", ["transpose", "bilinear"])
def test_parameters_by_formula(width: int, depth: int, up: str) -> None:
    net = models.build("unet", 5, width=width, depth=depth, up=up)
    assert sum(p.numel() for p in net.parameters()) == parameters(width, depth, 5, up=up)
    assert net.size_multiple == 2**depth


def test_the_published_size() -> None:
    net = models.build("unet", 2, width=64, depth=4)
    assert sum(p.numel() for p in net.parameters()) == parameters(64, 4, 2, up="transpose") == 31_037_698
    assert [b[0][0].out_channels for b in net.encoder] == [64, 128, 256, 512, 1024]


@torch.no_grad()
def test_the_skip_carries_detail_past_the_poolings() -> None:
    torch.manual_seed(0)
    net = models.build("unet", 3, width=4, depth=2).eval()
    for up in net.up:
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
    x = torch.randn(1, 3, 16, 16)
    skip = net.encoder[0](x)
    wanted = net.classifier(net.decoder[-1](torch.cat([skip, torch.zeros_like(skip)], 1)))
    torch.testing.assert_close(net(x), wanted)


def test_convolutions_start_he_normal_and_norms_neutral() -> None:
    torch.manual_seed(0)
    net = models.build("unet", 5, width=16, depth=2)
    conv = net.encoder[2][1][0]
    assert float(conv.weight.std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
    assert torch.equal(net.encoder[0][0][1].weight, torch.ones(16)) and not net.classifier.bias.any()
