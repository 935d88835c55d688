"""channel_moments on both floors against sums in float64."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Floors, normal, of

CASES = pytest.mark.parametrize("case", [c for c in of("channel_moments") if not c.bench], ids=lambda case: case.name)


@CASES
def test_sums_are_those_of_float64(case: Case, floor: Floors) -> None:
    a, g, mask = case.inputs()
    moments = floor("channel_moments")(a, g, mask)
    assert moments.dtype == torch.float32 and moments.shape == (*a.shape[:2], 4)
    weight = torch.ones(a.shape[0], *a.shape[2:]).double() if mask is None else mask.double()
    for column, equation in enumerate(("bchw,bchw,bhw->bc",) * 2):
        pair = (a.double(), g.double()) if column == 0 else (a.double().abs(), g.double().abs())
        expected = torch.einsum(equation, *pair, weight)
        size = torch.einsum(equation, a.double().abs(), g.double().abs(), weight)
        assert ((moments[..., column].double() - expected).abs() <= 2e-6 * size).all()
    absolute = torch.einsum("bchw,bhw->bc", a.double().abs(), weight)
    gradient, size = (torch.einsum("bchw,bhw->bc", v, weight) for v in (g.double(), g.double().abs()))
    assert ((moments[..., 2].double() - absolute).abs() <= 2e-6 * absolute).all()
    assert ((moments[..., 3].double() - gradient).abs() <= 2e-6 * size).all()


def test_a_mask_of_ones_changes_nothing_and_one_of_zeros_leaves_nothing(floor: Floors) -> None:
    a, g = normal(2, 5, 6, 7), normal(2, 5, 6, 7, seed=1)
    moments = floor("channel_moments")(a, g, None)
    torch.testing.assert_close(floor("channel_moments")(a, g, torch.ones(2, 6, 7)), moments)
    assert (floor("channel_moments")(a, g, torch.zeros(2, 6, 7)) == 0).all()


def test_the_signed_sum_is_the_derivative_by_a_channel_gate(floor: Floors) -> None:
    x = normal(2, 3, 8, 8).requires_grad_()
    gate = torch.ones(1, 3, 1, 1, requires_grad=True)
    activation = x * gate
    activation.retain_grad()
    (activation * normal(2, 3, 8, 8, seed=1)).tanh().sum().backward()
    assert activation.grad is not None and gate.grad is not None
    moments = floor("channel_moments")(activation.detach(), activation.grad, None)
    torch.testing.assert_close(moments[..., 0].sum(0), gate.grad.flatten(), rtol=1e-5, atol=1e-5)


A = torch.zeros(2, 3, 4, 5)
BAD = [
    ((torch.zeros(3, 4, 5), A, None), r"activation must be \(B, C, H, W\), got shape \[3, 4, 5\]"),
    ((A.double(), A.double(), None), "must be float32, float16 or bfloat16"),
    ((A, torch.zeros(2, 3, 4, 4), None), r"gradient must match activation, got .*\[2, 3, 4, 4\] for .*\[2, 3, 4, 5\]"),
    ((A, A.half(), None), "gradient must match activation"),
    ((A, A, torch.ones(2, 1, 4, 5)), r"mask must be float32 of shape \[2, 4, 5\], got .*\[2, 1, 4, 5\]"),
    ((A, A, torch.ones(2, 4, 5, dtype=torch.bool)), r"mask must be float32 of shape \[2, 4, 5\]"),
    ((A[:, :0], A[:, :0], None), r"activation has no channels, got shape \[2, 0, 4, 5\]"),
    ((A[:, :, :1, :1].expand(2, 3, 1, 2**31), A, None), "has a side over the int32 range"),
    ((A, A.to("meta"), None), "all tensors must be on one device, got .* and "),
    ((A, A, torch.ones(2, 4, 5, device="meta")), "all tensors must be on one device, got .* and "),
]


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_special_value_reaches_the_sums_of_its_own_map_alone(special: float, layout: str, floor: Floors) -> None:
    a, g = normal(2, 20, 5, 6, layout=layout), normal(2, 20, 5, 6, seed=1, layout=layout)
    a[1, 17, 2, 3] = special
    moments = floor("channel_moments")(a, g, None)
    assert not moments[1, 17, :3].isfinite().any() and moments[1, 17, 3].isfinite()
    moments[1, 17] = 0
    assert moments.isfinite().all()


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_is_one_clear_sentence(args: tuple, message: str, floor: Floors) -> None:
    with pytest.raises(ValueError, match=f"channel_moments: .*{message}"):
        floor("channel_moments")(*args)
