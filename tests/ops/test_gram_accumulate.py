"""gram_accumulate on both floors against einsum in float64."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Floors, arrange, normal, of
from torch import Tensor

from vss import ops

CASES = pytest.mark.parametrize("case", [c for c in of("gram_accumulate") if not c.bench], ids=lambda case: case.name)


def definition(total: Tensor, x: Tensor, norms: Tensor | None, means: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result in float64, and for every entry the sum of the sizes of its products."""
    rows = x.double().flatten(2)
    rows = rows if means is None else rows - means.double()[:, None]
    rows = rows if norms is None else rows / norms.double()[:, :, None]
    size = torch.einsum("bip,bjp->ij", rows.abs(), rows.abs())
    return total.double() + torch.einsum("bip,bjp->ij", rows, rows), total.double().abs() + size


@CASES
def test_total_gains_the_float64_gram(case: Case, floor: Floors) -> None:
    total, x, norms, means = case.inputs()
    expected, size = definition(total, x, norms, means)
    assert floor("gram_accumulate")(total, x, norms, means) is None
    assert ((total.double() - expected).abs() <= 2e-6 * size + 1e-12).all()
    assert torch.equal(total, total.T) or (total - total.T).abs().max() <= 1e-6 * size.max()


def test_batches_accumulate_to_one_big_batch(floor: Floors) -> None:
    x = normal(6, 20, 7, 8)
    once, twice = torch.zeros(20, 20), torch.zeros(20, 20)
    floor("gram_accumulate")(once, x, None, None)
    floor("gram_accumulate")(twice, x[:2], None, None)
    floor("gram_accumulate")(twice, x[2:], None, None)
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cosine_ignores_scale_and_a_joint_permutation_of_positions(layout: str, floor: Floors) -> None:
    x = normal(2, 9, 6, 5)
    scaled = x * torch.tensor([3.0, -2.0, 0.5] * 3)[:, None, None]
    shuffled = scaled.flatten(2)[:, :, torch.randperm(30, generator=torch.Generator().manual_seed(0))].view_as(x)
    first, second = torch.zeros(9, 9), torch.zeros(9, 9)
    floor("gram_accumulate")(first, x, x.square().sum((2, 3)).sqrt(), None)
    norms = shuffled.square().sum((2, 3)).sqrt()
    floor("gram_accumulate")(second, arrange(shuffled, layout), norms, None)
    torch.testing.assert_close(first.abs(), second.abs(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.diagonal(), torch.full((9,), 2.0))


def test_means_give_pearson(floor: Floors) -> None:
    x = normal(3, 11, 12, 13) + 5
    total = torch.zeros(11, 11)
    floor("gram_accumulate")(total, x, None, x.mean((0, 2, 3)))
    spread = total.diagonal().sqrt()
    expected = torch.corrcoef(x.double().transpose(0, 1).flatten(1)).float()
    torch.testing.assert_close(total / spread[:, None] / spread, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("two_threads")
def test_threads_do_not_change_the_sums(floor: Floors) -> None:
    x, two, one = normal(3, 70, 17, 18), torch.zeros(70, 70), torch.zeros(70, 70)
    floor("gram_accumulate")(two, x, None, None)
    torch.set_num_threads(1)
    floor("gram_accumulate")(one, x, None, None)
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-5)


def test_the_public_form_starts_from_zero() -> None:
    x = normal(2, 5, 4, 4)
    torch.testing.assert_close(ops.gram(x), torch.einsum("bihw,bjhw->ij", x, x), rtol=1e-5, atol=1e-5)


X, TOTAL = torch.zeros(2, 3, 4, 5), torch.zeros(3, 3)
BAD = [
    ((TOTAL, torch.zeros(3, 4, 5), None, None), r"x must be \(B, C, H, W\), got shape \[3, 4, 5\]"),
    ((TOTAL, X.double(), None, None), "must be float32, float16 or bfloat16"),
    ((torch.zeros(0, 0), torch.zeros(2, 0, 4, 5), None, None), "no channels"),
    (
        (torch.zeros(4, 4), X, None, None),
        r"total must be a contiguous float32 matrix of shape \[3, 3\], got .*\[4, 4\]",
    ),
    ((TOTAL.double(), X, None, None), "total must be a contiguous float32 matrix"),
    ((torch.zeros(3, 6)[:, ::2], X, None, None), "total must be a contiguous float32 matrix"),
    ((TOTAL, X, torch.ones(3), None), r"norms must be float32 of shape \[2, 3\], got .*\[3\]"),
    ((TOTAL, X, None, torch.zeros(2, 3)), r"means must be float32 of shape \[3\], got .*\[2, 3\]"),
    ((TOTAL, X[:, :, :1, :1].expand(2, 3, 1, 2**31), None, None), "has a side over the int32 range"),
    ((TOTAL.to("meta"), X, None, None), "all tensors must be on one device, got .* and "),
    ((TOTAL, X, torch.ones(2, 3, device="meta"), None), "all tensors must be on one device, got .* and "),
]


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_a_special_value_reaches_the_rows_and_columns_of_its_channel_alone(special: float, floor: Floors) -> None:
    x, total = normal(2, 70, 5, 6), torch.zeros(70, 70)
    x[1, 41, 2, 3] = special
    floor("gram_accumulate")(total, x, None, None)
    assert not total[41].isfinite().any() and not total[:, 41].isfinite().any()
    rest = [i for i in range(70) if i != 41]
    assert total[rest][:, rest].isfinite().all()


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_is_one_clear_sentence(args: tuple, message: str, floor: Floors) -> None:
    with pytest.raises(ValueError, match=f"gram_accumulate: .*{message}"):
        floor("gram_accumulate")(*args)
