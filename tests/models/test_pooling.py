"""Pooling with indices: the exported form against torch's own, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vss.models.segnet import max_pool, max_pool_phases, max_unpool, max_unpool_phases


@pytest.mark.parametrize("size", [(2, 2), (8, 12), (7, 12), (8, 11), (9, 5), (2, 3)])
@pytest.mark.parametrize("kind", ["normal", "ties", "negative", "zero"])
def test_both_forms_agree_exactly(size: tuple[int, int], kind: str) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
    x = {"normal": x, "ties": x.round(), "negative": -x.abs() - 1, "zero": x * 0}[kind]
    value, indices = max_pool(x)
    other, phase = max_pool_phases(x)
    assert torch.equal(value, other) and torch.equal(value, F.max_pool2d(x, 2))
    replaced = value * 3 + 1
    wanted = F.max_unpool2d(replaced, indices.long(), 2, 2, output_size=list(size))
    assert torch.equal(max_unpool(replaced, indices, x.shape), wanted)
    assert torch.equal(max_unpool_phases(replaced, phase, x.shape), wanted)
    assert wanted.shape[-2:] == size and int((wanted != 0).sum()) == int((replaced != 0).sum())


def test_phases_say_where_the_maximum_is_by_brute_force() -> None:
    x = torch.randn(1, 2, 6, 5, generator=torch.Generator().manual_seed(4))
    _, phase = max_pool_phases(x)
    for c in range(2):
        for i in range(3):
            for j in range(2):
                window = x[0, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1).tolist()
                assert phase[0, c, i, j] == window.index(max(window))


def test_an_infinite_value_does_not_spread_to_its_window() -> None:
    x = torch.zeros(1, 1, 2, 2)
    _, phase = max_pool_phases(x)
    out = max_unpool_phases(torch.full((1, 1, 1, 1), float("inf")), phase, x.shape)
    assert out.flatten().tolist() == [float("inf"), 0.0, 0.0, 0.0]


def test_float64_goes_by_torch_and_gives_the_same() -> None:
    x = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(5))
    (value, indices), (wide, wide_indices) = max_pool(x), max_pool(x.double())
    assert (indices.dtype, wide_indices.dtype) == (torch.int32, torch.int64)
    assert torch.equal(value.double(), wide) and torch.equal(indices.long(), wide_indices)
    assert torch.equal(max_unpool(value, indices, x.shape).double(), max_unpool(wide, wide_indices, x.shape))
