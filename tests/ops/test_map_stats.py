"""map_stats on both floors against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Floors, normal, of
from torch import Tensor

CASES = pytest.mark.parametrize("case", [c for c in of("map_stats") if not c.bench], ids=lambda case: case.name)


def definition(x: Tensor, padding: str) -> Tensor:
    """Loops over the nine neighbours, in float64."""
    values = x.double()
    batch, channels, height, width = x.shape
    padded = values.new_zeros(batch, channels, height + 2, width + 2)
    padded[:, :, 1:-1, 1:-1] = values
    if padding == "replicate":
        padded[:, :, 0], padded[:, :, -1] = padded[:, :, 1], padded[:, :, -2]
        padded[:, :, :, 0], padded[:, :, :, -1] = padded[:, :, :, 1], padded[:, :, :, -2]
    gx, gy = torch.zeros_like(values), torch.zeros_like(values)
    for i, row in enumerate([[-0.5, 0, 0.5], [-1, 0, 1], [-0.5, 0, 0.5]]):
        for j, weight in enumerate(row):
            gx += weight * padded[:, :, i : i + height, j : j + width]
            gy += weight * padded[:, :, j : j + height, i : i + width]
    edge = (gx.square() + gy.square()).sqrt()
    columns = (values.abs(), values, values.square(), values.relu(), (-values).relu(), edge, edge.square())
    return torch.stack([column.sum((2, 3)) for column in columns], 2)


@CASES
def test_sums_are_those_of_the_float64_definition(case: Case, floor: Floors) -> None:
    x, padding = case.inputs()
    stats = floor("map_stats")(x, padding)
    assert stats.dtype == torch.float32 and stats.shape == (*x.shape[:2], 7)
    expected = definition(x, padding)
    scale = (
        expected[..., :1].clone() if x.numel() else expected[..., :1]
    )  # a signed sum is as exact as the sum of sizes
    assert ((stats.double() - expected).abs() <= 1e-5 * torch.maximum(expected.abs(), scale)).all()


def test_a_constant_map_has_no_edges_unless_zeros_surround_it(floor: Floors) -> None:
    x = torch.full((1, 2, 6, 7), 3.25)
    assert (floor("map_stats")(x, "replicate")[..., 5:] == 0).all()
    assert (floor("map_stats")(x, "zeros")[..., 5] > 10).all()


def test_a_non_negative_map_has_no_negative_sum_and_edges_are_linear_in_scale(floor: Floors) -> None:
    x = normal(1, 3, 20, 21).relu()
    stats, doubled = floor("map_stats")(x, "replicate"), floor("map_stats")(2 * x, "replicate")
    assert (stats[..., 4] == 0).all() and torch.equal(stats[..., 0], stats[..., 1])
    torch.testing.assert_close(doubled[..., 5], 2 * stats[..., 5])
    torch.testing.assert_close(doubled[..., 6], 4 * stats[..., 6])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_stays_in_its_own_map_and_reaches_every_sum(layout: str, floor: Floors) -> None:
    x = normal(2, 20, 9, 9, layout=layout)
    x[1, 17, 4, 4] = float("nan")
    stats = floor("map_stats")(x, "replicate")
    assert stats[1, 17].isnan().all()
    stats[1, 17] = 0
    assert stats.isfinite().all()


@pytest.mark.usefixtures("two_threads")
def test_threads_do_not_change_the_sums(floor: Floors) -> None:
    x = normal(2, 40, 17, 18)
    two = floor("map_stats")(x, "replicate")
    torch.set_num_threads(1)
    assert torch.equal(two, floor("map_stats")(x, "replicate"))


BAD = [
    ((torch.zeros(3, 4, 5), "replicate"), r"x must be \(B, C, H, W\), got shape \[3, 4, 5\]"),
    ((torch.zeros(1, 3, 4, 5, dtype=torch.float64), "replicate"), "must be float32, float16 or bfloat16"),
    ((torch.zeros(1, 3, 0, 5), "replicate"), r"no positions, got shape \[1, 3, 0, 5\]"),
    ((torch.zeros(1, 3, 4, 5), "reflect"), "padding must be 'replicate' or 'zeros', got 'reflect'"),
    ((torch.zeros(1, 0, 4, 5), "replicate"), r"x has no channels, got shape \[1, 0, 4, 5\]"),
    ((torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 2**31), "replicate"), "has a side over the int32 range"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_is_one_clear_sentence(args: tuple, message: str, floor: Floors) -> None:
    with pytest.raises(ValueError, match=f"map_stats: .*{message}"):
        floor("map_stats")(*args)
