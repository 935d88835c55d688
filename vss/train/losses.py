"""Losses over label maps with void pixels, and over decisions with defect maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss.core.errors import VssError
from vss.train.metrics import average_precision, scores

Batch = dict[str, Tensor]
Heads = dict[str, Tensor]


class SegLoss(nn.Module):
    """Mean per-pixel cross-entropy over non-void pixels, plus weighted auxiliary heads.

    Args:
        weights: (K,) class weights or None.
        ignore_index: label of void pixels.
        aux_weight: factor of every head other than `out` (0.4 in DeepLabV3 and PSPNet).
        label_smoothing: as in `torch.nn.functional.cross_entropy`.
    """

    def __init__(
        self,
        *,
        weights: Tensor | None = None,
        ignore_index: int = 255,
        aux_weight: float = 0.4,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.weights: Tensor | None
        self.register_buffer("weights", weights, persistent=False)
        self.ignore_index, self.aux_weight, self.label_smoothing = ignore_index, aux_weight, label_smoothing

    def forward(self, outputs: dict[str, Tensor], target: Tensor) -> Tensor:
        """outputs: {head: (N, K, H, W)}, target: (N, H, W) int64. Returns a scalar; 0 where all pixels are void."""
        total = torch.zeros((), device=target.device)
        for head, logits in outputs.items():
            total = total + (1.0 if head == "out" else self.aux_weight) * self._cross_entropy(logits.float(), target)
        return total

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        settings: Any = {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}
        loss = F.cross_entropy(logits, target, weight=self.weights, **settings)
        return torch.where((target != self.ignore_index).any(), loss, logits.sum() * 0.0)  # no wait for the device


class DefectLoss(nn.Module):
    """Loss of a decision and a defect map (Bozic et al. 2021, section 3.3), a mean over images.

    Of one image: w_seg * mean(weight * BCE(map, target)) + w_dec * BCE(decision, label), the first term where the map
    is annotated. The published balance moves from the map to the decision: w_seg = 1 - p, w_dec = delta * p, p the
    finished share of the training. The published code adds over a batch instead of averaging: its learning rate at
    batch size n is ours divided by n.

    Args:
        delta: weight of the decision.
        dynamic: move the balance; without it w_seg = 1 and w_dec = delta throughout.
    """

    def __init__(self, *, delta: float = 1.0, dynamic: bool = True) -> None:
        super().__init__()
        self.delta, self.dynamic = delta, dynamic

    def forward(self, outputs: dict[str, Tensor], batch: dict[str, Tensor], *, progress: float = 1.0) -> Tensor:
        """The scalar loss.

        Args:
            outputs: `decision` (N, 1) and `seg` (N, 1, h, w), logits.
            batch: `label` (N,), `target` and `weight` (N, h, w), `annotated` (N,), all float.
            progress: p, 0..1.
        """
        decision, seg = outputs["decision"].float().flatten(), outputs["seg"].float().squeeze(1)
        w_seg, w_dec = (1 - progress, self.delta * progress) if self.dynamic else (1.0, self.delta)
        pixels = F.binary_cross_entropy_with_logits(seg, batch["target"], weight=batch["weight"], reduction="none")
        maps = (pixels.mean(dim=(1, 2)) * batch["annotated"]).mean()
        return w_seg * maps + w_dec * F.binary_cross_entropy_with_logits(decision, batch["label"])


def distillation_loss(
    student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float, ignore_index: int
) -> Tensor:
    """KL(teacher || student) at a temperature, times its square (Hinton et al., 2015), a mean over non-void pixels.

    Args:
        student, teacher: (N, K, H, W) logits; a head of one channel is a decision between two, a mean over its values.
        target: (N, H, W) int64; only its void pixels matter here.
    """
    student, teacher = student.float() / temperature, teacher.float() / temperature
    if student.shape[1] == 1:
        soft = torch.sigmoid(teacher)
        own = F.binary_cross_entropy(soft, soft)
        return temperature**2 * (F.binary_cross_entropy_with_logits(student, soft) - own)
    valid = (target != ignore_index).float()  # a half-precision count of pixels would overflow
    soft, hard = F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1)
    pixels = F.kl_div(hard, soft, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * (pixels * valid).sum() / valid.sum().clamp(min=1)


# -- what a task teaches: its loss, how two networks are compared, and the score that chooses the best epoch -----------


class Learner(nn.Module, ABC):
    """Base of all tasks' training halves; a module, so that its tensors follow the network to its device.

    Attributes:
        metric: key of the validation score, in percent, higher is better.
    """

    metric: ClassVar[str]

    @abstractmethod
    def forward(self, outputs: Heads, batch: Batch, *, progress: float = 1.0) -> Tensor:
        """The scalar loss over all heads; `progress` is the finished share of the training, 0..1."""

    @abstractmethod
    def teacher_outputs(self, teacher: object, images: Tensor) -> Heads:
        """The heads of a teacher that a student is compared with."""

    @abstractmethod
    def distillation_loss(self, student: Heads, teacher: Heads, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """How far the student's heads are from the teacher's, summed over the heads that the teacher has."""

    @abstractmethod
    def update(self, model: object, images: Tensor, batch: Batch) -> None:
        """Add one validation batch; images: (N, 3, H, W) float."""

    @abstractmethod
    def compute(self) -> float:
        """The validation score so far, in percent."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the validation batches."""


class SegLearner(Learner):
    """Segmentation: `SegLoss` and mean IoU; batches have `mask` (N, H, W) int64."""

    metric = "miou_pct"

    def __init__(self, num_classes: int, loss: SegLoss | None = None) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix  # seconds of import, for trainings alone

        super().__init__()
        self.loss = loss or SegLoss()
        self.ignore_index = self.loss.ignore_index
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=self.ignore_index, validate_args=False)

    def forward(self, outputs: Heads, batch: Batch, *, progress: float = 1.0) -> Tensor:
        return self.loss(outputs, batch["mask"])

    def teacher_outputs(self, teacher: Any, images: Tensor) -> Heads:
        """The main head alone."""
        return {"out": teacher(images)}

    def distillation_loss(self, student: Heads, teacher: Heads, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        total = batch["mask"].new_zeros((), dtype=next(iter(student.values())).dtype)
        for head, soft in teacher.items():
            total = total + distillation_loss(
                student[head], soft, batch["mask"], temperature=temperature, ignore_index=self.ignore_index
            )
        return total

    def update(self, model: Any, images: Tensor, batch: Batch) -> None:
        self.confusion.update(model.predict(images), batch["mask"])

    def compute(self) -> float:
        found = scores(self.confusion.compute())["miou_pct"]
        if found is None:
            raise VssError(
                "no labelled pixel is left in the validation masks at the size of the network; set data.size."
            )
        return float(found)

    def reset(self) -> None:
        self.confusion.reset()


class DefectLearner(Learner):
    """Defect networks: `DefectLoss`, and average precision of the decisions."""

    metric = "ap_pct"

    def __init__(self, loss: DefectLoss | None = None) -> None:
        from torchmetrics import CatMetric

        super().__init__()
        self.loss = loss or DefectLoss()
        self.scores, self.labels = CatMetric(nan_strategy="disable"), CatMetric(nan_strategy="disable")

    def forward(self, outputs: Heads, batch: Batch, *, progress: float = 1.0) -> Tensor:
        """outputs: `decision` and `seg`; batch: as for `DefectLoss`."""
        loss: Tensor = self.loss(outputs, batch, progress=progress)
        return loss

    def teacher_outputs(self, teacher: Any, images: Tensor) -> Heads:
        """Both heads."""
        heads: Heads = teacher.forward_train(images)
        return heads

    def distillation_loss(self, student: Heads, teacher: Heads, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        parts = [
            distillation_loss(student[head], soft, batch["mask"], temperature=temperature, ignore_index=255)
            for head, soft in teacher.items()
        ]
        return torch.stack(parts).sum()

    def update(self, model: Any, images: Tensor, batch: Batch) -> None:
        self.scores.update(model.forward_train(images)["decision"].flatten().float())
        self.labels.update((batch["label"] > 0).float())

    def compute(self) -> float:
        return average_precision(*(torch.as_tensor(m.compute()).cpu().numpy() for m in (self.labels, self.scores)))

    def reset(self) -> None:
        self.scores.reset()
        self.labels.reset()
