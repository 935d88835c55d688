"""max_pool_indices and max_unpool on both floors against torch's own pooling, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Floors, normal, of
from torch import Tensor

from vss import ops

POOL = pytest.mark.parametrize("case", [c for c in of("max_pool_indices") if not c.bench], ids=lambda case: case.name)
UNPOOL = pytest.mark.parametrize("case", [c for c in of("max_unpool") if not c.bench], ids=lambda case: case.name)


@POOL
def test_values_and_indices_are_those_of_torch(case: Case, floor: Floors) -> None:
    x, kernel = case.inputs()
    values, indices = floor("max_pool_indices")(x, kernel)
    assert values.dtype == x.dtype and indices.dtype == torch.int32
    if x.numel():
        expected, positions = F.max_pool2d(x.double(), kernel, return_indices=True)
        assert torch.equal(values.double(), expected) and torch.equal(indices.long(), positions)
    assert values.shape == (*x.shape[:2], x.shape[2] // kernel, x.shape[3] // kernel)


@UNPOOL
def test_values_return_to_their_places(case: Case, floor: Floors) -> None:
    values, indices, size = case.inputs()
    maps = floor("max_unpool")(values, indices, size)
    expected = torch.zeros(*values.shape[:2], size[0] * size[1], dtype=values.dtype)
    for b in range(values.shape[0]):
        for c in range(values.shape[1]):
            expected[b, c][indices[b, c].flatten().long()] = values[b, c].flatten()
    assert torch.equal(maps, expected.view(*values.shape[:2], *size))


def test_ties_and_nan_are_resolved_as_in_torch(floor: Floors) -> None:
    x = normal(2, 3, 9, 8).round()
    x[0, 0, 0, 1] = x[0, 0, 1, 0] = x[1, 2, 4, 4] = float("nan")
    values, indices = floor("max_pool_indices")(x, 2)
    expected, positions = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(values.isnan(), expected.isnan()) and values.isnan().sum() == 2
    numbers = ~values.isnan()
    assert torch.equal(values[numbers], expected[numbers])
    assert torch.equal(indices.long()[numbers], positions[numbers])
    assert x.flatten(2).gather(2, indices.flatten(2).long()).isnan().sum() == 2


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_are_those_of_torch(layout: str) -> None:
    ours, theirs = (normal(2, 4, 11, 12, layout=layout).requires_grad_() for _ in range(2))
    scale, bias = normal(2, 4, 5, 6, seed=1), normal(2, 4, 11, 12, seed=2)

    def loss(pooled: Tensor, restored: Tensor) -> Tensor:
        return (pooled * scale).sum() + (restored * bias).square().sum()

    values, indices = ops.max_pool_indices(ours)
    loss(values, ops.max_unpool(values, indices, (11, 12))).backward()
    expected, positions = F.max_pool2d(theirs, 2, return_indices=True)
    loss(expected, F.max_unpool2d(expected, positions, 2, output_size=(11, 12))).backward()
    assert ours.grad is not None and ours.grad.abs().sum() > 0
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_opcheck_with_gradients() -> None:
    x = normal(2, 3, 6, 8).requires_grad_()
    torch.library.opcheck(torch.ops.vss.max_pool_indices.default, (x,))
    values, indices = ops.max_pool_indices(x.detach())
    torch.library.opcheck(torch.ops.vss.max_unpool.default, (values.requires_grad_(), indices, (6, 8)))


X, INDICES = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4, dtype=torch.int32)
BAD = [
    ("max_pool_indices", (X[0], 2), r"x must be \(B, C, H, W\), got shape \[2, 4, 4\]"),
    ("max_pool_indices", (X.double(), 2), "must be float32, float16 or bfloat16"),
    ("max_pool_indices", (X, 0), "kernel must be at least 1 and fit into the map, got 0"),
    ("max_pool_indices", (X, 5), r"fit into the map, got 5 for shape \[1, 2, 4, 4\]"),
    ("max_unpool", (X, INDICES.long(), (8, 8)), "indices must be int32"),
    ("max_unpool", (X, INDICES[:, :1], (8, 8)), r"indices must be int32 of shape \[1, 2, 4, 4\]"),
    ("max_unpool", (X, INDICES, (8, 0)), r"size must be two positive integers \(H, W\), got \[8, 0\]"),
    ("max_unpool", (X, INDICES, (2**16, 2**16)), "a map of 65536x65536 is over the int32 range"),
    ("max_pool_indices", (X[:, :0], 2), r"x has no channels, got shape \[1, 0, 4, 4\]"),
    ("max_pool_indices", (X[:, :, :1, :1].expand(1, 2, 2, 2**31), 2), "has a side over the int32 range"),
    ("max_unpool", (X, INDICES.to("meta"), (8, 8)), "all tensors must be on one device, got .* and "),
]


@pytest.mark.parametrize("shift", [64, -1])
def test_an_index_outside_its_map_is_refused(shift: int, floor: Floors, request: pytest.FixtureRequest) -> None:
    args = (torch.ones_like(X), INDICES + shift, (8, 8))
    if "cuda" in request.node.name:  # refusing would wait for the device; such values are left out
        assert (floor("max_unpool")(*args) == 0).all()
        return
    with pytest.raises(ValueError, match="max_unpool: an index is outside a map of 8x8"):
        floor("max_unpool")(*args)


@pytest.mark.parametrize(("op", "args", "message"), BAD)
def test_bad_input_is_one_clear_sentence(op: str, args: tuple, message: str, floor: Floors) -> None:
    with pytest.raises(ValueError, match=f"{op}: .*{message}"):
        floor(op)(*args)
