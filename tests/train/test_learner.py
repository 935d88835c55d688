"""Learners: the numbers they hand to `fit` are those of the loss and the metrics beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vss.train.losses import DefectLearner, Learner, SegLearner, SegLoss, distillation_loss
from vss.train.metrics import confusion_per_image, scores


class Fixed(torch.nn.Module):
    """A network whose labels are given."""

    def __init__(self, labels: torch.Tensor) -> None:
        super().__init__()
        self.labels = labels

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        return self.labels[: len(images)]


def heads(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 3, 5, 7, generator=generator) for name in ("out", "aux")}


@pytest.fixture
def mask() -> torch.Tensor:
    mask = torch.randint(0, 3, (2, 5, 7), generator=torch.Generator().manual_seed(9))
    mask[:, 0] = 255
    return mask


def test_segmentation_loss_and_score(mask: torch.Tensor) -> None:
    weights = torch.tensor([1.0, 2.0, 0.5])
    learner = SegLearner(3, SegLoss(weights=weights, aux_weight=0.3, label_smoothing=0.1))
    expected = SegLoss(weights=weights, aux_weight=0.3, label_smoothing=0.1)(heads(1), mask)
    assert torch.equal(learner(heads(1), {"mask": mask}, progress=0.2), expected)
    labels = heads(2)["out"].argmax(1)
    learner.update(Fixed(labels), torch.zeros(2, 3, 5, 7), {"mask": mask})
    assert learner.compute() == scores(confusion_per_image(labels, mask, 3).sum(0))["miou_pct"]
    learner.reset()
    learner.update(Fixed(mask.clamp(max=2)), torch.zeros(2, 3, 5, 7), {"mask": mask})
    assert learner.compute() == 100.0


def test_divergence_is_summed_over_the_heads_of_the_teacher(mask: torch.Tensor) -> None:
    student, teacher = heads(1), heads(2)
    settings: dict[str, Any] = {"temperature": 2.0, "ignore_index": 255}
    parts = {name: distillation_loss(student[name], teacher[name], mask, **settings) for name in student}
    learner = SegLearner(3)
    found = learner.distillation_loss(student, teacher, {"mask": mask}, temperature=2.0)
    assert float(found) == pytest.approx(float(parts["out"] + parts["aux"]))
    alone = learner.distillation_loss(student, {"out": teacher["out"]}, {"mask": mask}, temperature=2.0)
    assert float(alone) == pytest.approx(float(parts["out"]))


def test_one_channel_is_a_decision_between_two() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 1, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = torch.sigmoid(teacher / 3), torch.sigmoid(student / 3)
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    found = distillation_loss(student, teacher, torch.zeros(4, 3, 2), temperature=3.0, ignore_index=255)
    assert float(found) == pytest.approx(9 * float(kl), rel=1e-5)
    assert float(distillation_loss(teacher, teacher, torch.zeros(4, 3, 2), temperature=3.0, ignore_index=255)) < 1e-6


def test_a_learner_that_defines_nothing_is_refused() -> None:
    with pytest.raises(TypeError, match="abstract method"):
        Learner()  # type: ignore[abstract]


class Heads(torch.nn.Module):
    """A network whose heads are given."""

    def __init__(self, heads: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.heads = heads

    def forward_train(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.heads


def test_defect_score_gathers_batches_and_is_forgotten() -> None:
    learner, empty = DefectLearner(), torch.zeros(2, 3, 8, 8)
    for logits, labels in (([3.0, 1.0], [1.0, 0.0]), ([2.0, 0.5], [0.0, 1.0])):
        heads = Heads({"decision": torch.tensor(logits)[:, None]})
        learner.update(heads, empty, {"label": torch.tensor(labels)})
    assert learner.compute() == pytest.approx(100 * (1 / 2 + 1 / 2 * 2 / 4))
    learner.reset()
    learner.update(Heads({"decision": torch.tensor([[1.0], [0.0]])}), empty, {"label": torch.tensor([1.0, 0.0])})
    assert learner.compute() == 100.0


def test_defect_learner_compares_both_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        {"decision": torch.randn(2, 1, generator=generator), "seg": torch.randn(2, 1, 3, 4, generator=generator)}
        for _ in range(2)
    )
    batch = {"mask": torch.zeros(2, 24, 32, dtype=torch.int64)}
    parts = [
        distillation_loss(student[k], teacher[k], batch["mask"], temperature=2.0, ignore_index=255) for k in student
    ]
    learner = DefectLearner()
    assert learner.teacher_outputs(Heads(teacher), torch.zeros(2, 3, 24, 32)) == teacher
    found = learner.distillation_loss(student, teacher, batch, temperature=2.0)
    assert float(found) == pytest.approx(float(parts[0] + parts[1]))
    assert float(learner.distillation_loss(teacher, teacher, batch)) == pytest.approx(0, abs=1e-6)
