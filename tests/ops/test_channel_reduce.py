"""channel_reduce on both floors against sums in float64."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Floors, deeplab_weights, normal, of
from torch import Tensor

from vss import ops

CASES = pytest.mark.parametrize("case", [c for c in of("channel_reduce") if not c.bench], ids=lambda case: case.name)


def definition(w: Tensor, g: Tensor | None, dim: int, mode: str) -> tuple[Tensor, Tensor]:
    """The sums in float64, and for every channel the sum of the sizes of its terms."""
    axes = [axis for axis in range(w.dim()) if axis != dim]
    terms = w.double() * (g.double() if g is not None else 1)
    if mode == "l2":
        norm = w.double().square().sum(axes).sqrt() if axes else w.double().abs()
        return norm, norm
    signed = terms if mode == "product" else terms.abs()
    return (signed.sum(axes), terms.abs().sum(axes)) if axes else (signed, terms.abs())


@CASES
def test_sums_are_those_of_float64(case: Case, floor: Floors) -> None:
    weights, grads, dims, mode = case.inputs()
    sums = floor("channel_reduce")(weights, grads, dims, mode)
    assert sums.dtype == torch.float32
    parts = sums.split([w.shape[dim] for w, dim in zip(weights, dims, strict=True)])
    for i, part in enumerate(parts):
        expected, size = definition(weights[i], grads[i] if grads else None, dims[i], mode)
        assert ((part.double() - expected).abs() <= 2e-6 * size).all()


def test_the_public_form_splits_by_layer_and_takes_parameters() -> None:
    layers = [torch.nn.Conv2d(3, 5, 3), torch.nn.Linear(7, 4)]
    weights = [layer.weight for layer in layers]
    first, second = ops.channel_reduce(weights, mode="l1")
    torch.testing.assert_close(first, weights[0].detach().abs().sum((1, 2, 3)))
    torch.testing.assert_close(second, weights[1].detach().abs().sum(1))
    inputs = ops.channel_reduce(weights, weights, mode="product", dims=[1, 1])
    torch.testing.assert_close(inputs[0], weights[0].detach().square().sum((0, 2, 3)))
    assert ops.channel_reduce([], mode="l1") == []


def test_nan_stays_in_its_own_channel(floor: Floors) -> None:
    weight = normal(6, 4, 3, 3)
    weight[2, 1, 0, 0] = float("nan")
    assert floor("channel_reduce")([weight], [], [0], "l2").isnan().tolist() == [i == 2 for i in range(6)]
    assert floor("channel_reduce")([weight], [], [1], "l1").isnan().tolist() == [i == 1 for i in range(4)]


def test_the_shapes_that_are_timed_are_those_of_the_network() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=12, aux_loss=True
    )
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sorted(deeplab_weights()) == sorted(shapes)


W = torch.zeros(3, 4)
BAD = [
    (([W], [], [0], "l3"), "mode must be 'l1', 'l2', 'product' or 'abs_product', got 'l3'"),
    (([W, W], [], [0], "l1"), "one dim per weight is needed, got 2 weights and 1 dims"),
    (([W], [], [0], "product"), "the mode needs 1 gradients, got 0"),
    (([W], [W], [0], "l1"), "the mode needs 0 gradients, got 1"),
    (([W], [torch.zeros(4, 3)], [0], "product"), r"a gradient must match its weight, got .*\[4, 3\] for .*\[3, 4\]"),
    (([W], [], [2], "l1"), r"dim 2 is outside a weight of shape \[3, 4\]"),
    (([W], [], [-1], "l1"), r"dim -1 is outside a weight of shape \[3, 4\]"),
    (([W, W.half()], [], [0, 0], "l1"), "all weights must have one dtype"),
    (([], [], [], "l1"), "at least one weight is needed, got none"),
    (([W, W[:0]], [], [0, 0], "l1"), r"a weight has no channels along dim 0, got shape \[0, 4\]"),
    (([W[:1, :1].expand(1, 2**31)], [], [1], "l1"), "has a side over the int32 range"),
    (([W], [W.to("meta")], [0], "product"), "all tensors must be on one device, got .* and "),
    (([W.double()], [], [0], "l1"), "must be float32, float16 or bfloat16"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_is_one_clear_sentence(args: tuple, message: str, floor: Floors) -> None:
    with pytest.raises(ValueError, match=f"channel_reduce: .*{message}"):
        floor("channel_reduce")(*args)
