"""Losses against float64 formulas written out pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from vss.train.losses import DefectLoss, SegLoss, distillation_loss

VOID = 255


def batch(seed: int = 0, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, classes, 5, 6, generator=generator)
    other = 3 * torch.randn(2, classes, 5, 6, generator=generator)
    target = torch.randint(classes, (2, 5, 6), generator=generator)
    target[torch.rand(2, 5, 6, generator=generator) < 0.3] = VOID
    return logits, other, target


def cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, weights: list[float] | None = None, smoothing: float = 0.0
) -> float:
    """Weighted mean over non-void pixels; smoothing spreads its share evenly over the classes."""
    scores = log_softmax(logits.double().numpy(), axis=1)
    classes, total, norm = scores.shape[1], 0.0, 0.0
    weight = weights or [1.0] * classes
    for n, y, x in np.ndindex(*target.shape):
        label = int(target[n, y, x])
        if label == VOID:
            continue
        row = scores[n, :, y, x]
        even = sum(w * r for w, r in zip(weight, row, strict=True)) / classes
        total -= (1 - smoothing) * weight[label] * row[label] + smoothing * even
        norm += weight[label]
    return total / norm


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 3.0, 0.7]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_by_the_formula(weights: list[float] | None, smoothing: float) -> None:
    logits, _, target = batch()
    loss = SegLoss(weights=None if weights is None else torch.tensor(weights), label_smoothing=smoothing)
    assert float(loss({"out": logits}, target)) == pytest.approx(
        cross_entropy(logits, target, weights, smoothing), rel=1e-5
    )


def test_heads_add_with_their_weight() -> None:
    logits, other, target = batch()
    outputs = {"out": logits, "aux": other, "deep": logits}
    wanted = 1.25 * cross_entropy(logits, target) + 0.25 * cross_entropy(other, target)
    assert float(SegLoss(aux_weight=0.25)(outputs, target)) == pytest.approx(wanted, rel=1e-5)
    only = cross_entropy(logits, target)
    assert float(SegLoss(aux_weight=0.0)(outputs, target)) == pytest.approx(only, rel=1e-5)


def test_void_pixels_get_no_gradient() -> None:
    logits, _, target = batch()
    logits.requires_grad_()
    SegLoss()({"out": logits}, target).backward()
    void = (target == VOID)[:, None].expand_as(logits)
    assert not logits.grad[void].any() and logits.grad[~void].abs().min() > 0
    shifted = torch.where(void, logits + 7, logits)
    assert torch.equal(SegLoss()({"out": shifted}, target), SegLoss()({"out": logits}, target))


def test_another_void_label() -> None:
    logits, _, target = batch()
    moved = torch.where(target == VOID, 0, target + 1)  # label 0 is void: classes shift
    wide = torch.cat([torch.full_like(logits[:, :1], -1e9), logits], dim=1)
    loss = SegLoss(ignore_index=0)({"out": wide}, moved)
    assert float(loss) == pytest.approx(cross_entropy(logits, target), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2.0, 0.5, 3.0])])
def test_a_batch_of_void_alone_is_zero_with_zero_gradient(weights: torch.Tensor | None, smoothing: float) -> None:
    logits, other, target = batch()
    logits.requires_grad_()
    function = SegLoss(weights=weights, label_smoothing=smoothing)
    loss = function({"out": logits, "aux": other}, torch.full_like(target, VOID))
    loss.backward()
    assert float(loss.detach()) == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
    value = distillation_loss(logits, other, torch.full_like(target, VOID), temperature=2.0, ignore_index=VOID)
    assert float(value) == 0


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, _, target = batch()
    loss = SegLoss()({"out": logits.half()}, target)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(cross_entropy(logits.half().float(), target), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation_by_the_formula(temperature: float) -> None:
    student, teacher, target = batch()
    p = log_softmax(teacher.double().numpy() / temperature, axis=1)
    q = log_softmax(student.double().numpy() / temperature, axis=1)
    divergence = (np.exp(p) * (p - q)).sum(axis=1)
    valid = target.numpy() != VOID
    wanted = temperature**2 * divergence[valid].mean()
    value = distillation_loss(student, teacher, target, temperature=temperature, ignore_index=VOID)
    assert float(value) == pytest.approx(wanted, rel=1e-5)
    assert wanted > 0.1


def test_a_student_that_equals_its_teacher_has_nothing_to_learn() -> None:
    student, _, target = batch()
    assert abs(float(distillation_loss(student, student.clone(), target, temperature=2.0, ignore_index=VOID))) < 1e-6


def test_the_gradient_keeps_its_size_over_temperatures() -> None:
    student, teacher, target = batch()
    sizes = []
    for temperature in (20.0, 40.0):  # at high temperature T^2 KL tends to a fixed quadratic form
        x = (0.01 * student).requires_grad_()
        distillation_loss(x, 0.01 * teacher, target, temperature=temperature, ignore_index=VOID).backward()
        sizes.append(float(x.grad.norm()))
    assert math.isclose(sizes[0], sizes[1], rel_tol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_pixels_in_half_precision_do_not_overflow_the_mean(dtype: torch.dtype) -> None:
    # 90,000 pixels: more than float16 can count
    student = torch.zeros(1, 2, 300, 300, dtype=dtype)
    teacher = torch.zeros(1, 2, 300, 300, dtype=dtype)
    teacher[:, 0] = 2
    target = torch.zeros(1, 300, 300, dtype=torch.int64)
    p = math.exp(2) / (math.exp(2) + 1)
    wanted = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    value = distillation_loss(student, teacher, target, temperature=1.0, ignore_index=VOID)
    assert float(value) == pytest.approx(wanted, rel=1e-4)


def defect_batch(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    outputs = {"decision": torch.randn(3, 1, generator=generator), "seg": torch.randn(3, 1, 4, 5, generator=generator)}
    batch = {
        "label": torch.tensor([1.0, 0.0, 1.0]),
        "target": torch.rand(3, 4, 5, generator=generator),
        "weight": 3 * torch.rand(3, 4, 5, generator=generator),
        "annotated": torch.tensor([1.0, 1.0, 0.0]),
    }
    return outputs, batch


def binary(logit: float, target: float) -> float:
    return math.log1p(math.exp(-abs(logit))) + max(logit, 0) - logit * target


@pytest.mark.parametrize("delta", [1.0, 0.25])
@pytest.mark.parametrize(("dynamic", "progress"), [(True, 0.0), (True, 0.3), (True, 0.98), (False, 0.3)])
def test_defect_loss_image_by_image(delta: float, dynamic: bool, progress: float) -> None:
    outputs, batch = defect_batch()
    w_seg, w_dec = (1 - progress, delta * progress) if dynamic else (1.0, delta)
    total = 0.0
    for image in range(3):
        pixels = [
            float(batch["weight"][image, y, x])
            * binary(float(outputs["seg"][image, 0, y, x]), float(batch["target"][image, y, x]))
            for y in range(4)
            for x in range(5)
        ]
        total += w_seg * float(batch["annotated"][image]) * sum(pixels) / 20
        total += w_dec * binary(float(outputs["decision"][image, 0]), float(batch["label"][image]))
    found = DefectLoss(delta=delta, dynamic=dynamic)(outputs, batch, progress=progress)
    assert float(found) == pytest.approx(total / 3, rel=1e-5)


def test_an_image_without_annotation_teaches_its_decision_alone() -> None:
    outputs, batch = defect_batch()
    for value in outputs.values():
        value.requires_grad_()
    DefectLoss()(outputs, batch, progress=0.5).backward()
    seg, decision = outputs["seg"].grad, outputs["decision"].grad
    assert seg is not None and decision is not None
    assert bool((seg[2] == 0).all()) and bool((seg[:2] != 0).all()) and bool((decision != 0).all())


def test_the_first_epoch_teaches_the_map_alone() -> None:
    outputs, batch = defect_batch()
    first = DefectLoss()(outputs, batch, progress=0.0)
    outputs["decision"] = outputs["decision"] + 5
    assert torch.equal(first, DefectLoss()(outputs, batch, progress=0.0))
