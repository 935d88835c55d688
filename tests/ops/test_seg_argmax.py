"""seg_argmax on both floors against interpolate and argmax in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Floors, arrange, normal, of
from torch import Tensor

from vss import ops

CASES = pytest.mark.parametrize("case", of("seg_argmax"), ids=lambda case: case.name)


def scores64(logits: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=align_corners)


def regret(scores: Tensor, labels: Tensor) -> float:
    """How much the best class beats the chosen one, at the worst pixel."""
    chosen = scores.gather(1, labels.long()[:, None])[:, 0]
    return (scores.amax(1) - chosen).max().item() if labels.numel() else 0.0


@CASES
def test_labels_are_the_argmax_of_the_float64_oracle(case: Case, floor: Floors) -> None:
    logits, size, align = case.inputs()
    labels = floor("seg_argmax")(logits, size, align)
    scores = scores64(logits, size, align)
    assert labels.dtype == torch.uint8 and labels.is_contiguous()
    assert labels.shape == (logits.shape[0], *size)
    assert regret(scores, labels) < 2e-4
    assert (labels != scores.argmax(1)).float().sum().item() <= 1e-4 * labels.numel()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_an_exact_tie_goes_to_the_lowest_class(layout: str, floor: Floors) -> None:
    # Small integers and weights of eighths: every sum is exact in float32, and many pixels tie.
    logits = arrange(normal(4, 9, 12, 12).round(), layout)
    scores = scores64(logits, (48, 48), False)
    ties = (scores == scores.amax(1, keepdim=True)).sum(1) > 1
    assert ties.sum() > 300
    assert torch.equal(floor("seg_argmax")(logits, (48, 48)).long(), scores.argmax(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_behave_as_in_torch(value: float, floor: Floors) -> None:
    logits = normal(2, 6, 12, 13)
    logits[0, 3, 5, 6] = logits[0, 1, 5, 7] = logits[1, 5, 0, 0] = logits[1, 2, 11, 12] = value
    expected = F.interpolate(logits, size=(50, 54), mode="bilinear").argmax(1)
    labels = floor("seg_argmax")(logits, (50, 54)).long()
    touched = (
        F.interpolate((~logits.isfinite()).float().amax(1, keepdim=True), size=(50, 54), mode="bilinear")[:, 0] > 0
    )
    assert touched.sum() > 50
    assert torch.equal(labels[touched], expected[touched])
    if value != value:
        assert set(labels[0][touched[0]].tolist()) == {1, 3}, "the first NaN class wins"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_give_the_labels_of_their_float32_values(dtype: torch.dtype, floor: Floors) -> None:
    logits = (normal(1, 9, 20, 21) * 1e-3).to(dtype)  # float16 subnormals among them
    logits[0, :, 0, 0] = torch.tensor([65504.0, 1, -1, 2, 0, -0.0, 3e-8, 6e-8, 5]).to(dtype)
    assert torch.equal(floor("seg_argmax")(logits, (77, 80)), floor("seg_argmax")(logits.float(), (77, 80)))


@pytest.mark.usefixtures("two_threads")
def test_threads_do_not_change_the_labels(floor: Floors) -> None:
    logits = normal(3, 8, 40, 50)
    two = floor("seg_argmax")(logits, (300, 310))
    torch.set_num_threads(1)
    assert torch.equal(two, floor("seg_argmax")(logits, (300, 310)))


BAD = [
    ((torch.zeros(3, 4, 5), (8, 8)), r"logits must be \(N, K, h, w\), got shape \[3, 4, 5\]"),
    ((torch.zeros(1, 3, 4, 5, dtype=torch.float64), (8, 8)), "must be float32, float16 or bfloat16"),
    ((torch.zeros(1, 3, 4, 5, dtype=torch.int64), (8, 8)), "must be float32, float16 or bfloat16"),
    ((torch.zeros(1, 257, 2, 2), (8, 8)), "1 to 256 classes, got 257"),
    ((torch.zeros(1, 0, 2, 2), (8, 8)), "1 to 256 classes, got 0"),
    ((torch.zeros(1, 3, 0, 2), (8, 8)), r"no pixels, got shape \[1, 3, 0, 2\]"),
    ((torch.zeros(1, 3, 2, 2), (0, 8)), r"size must be two positive integers \(H, W\), got \[0, 8\]"),
    ((torch.zeros(1, 3, 2, 2), (8, -1)), r"size must be two positive integers \(H, W\), got \[8, -1\]"),
    ((torch.zeros(1, 3, 2, 2), (8, 2**31)), r"size must be two positive integers"),
    ((torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 2**31), (8, 8)), "has a side over the int32 range"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_input_is_one_clear_sentence(args: tuple, message: str, floor: Floors) -> None:
    with pytest.raises(ValueError, match=f"seg_argmax: .*{message}"):
        floor("seg_argmax")(*args)


def test_exports_with_dynamic_sides() -> None:
    class Labels(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.seg_argmax(x, (4 * x.shape[2], 4 * x.shape[3]))

    side = torch.export.Dim("h", min=2, max=64)
    program = torch.export.export(Labels(), (normal(2, 3, 6, 8),), dynamic_shapes=({2: side},))
    x = normal(2, 3, 11, 8, seed=1)
    assert torch.equal(program.module()(x), ops.seg_argmax(x, (44, 32)))
