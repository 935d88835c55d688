"""What a task teaches: its loss, how two networks are compared, and the score that chooses the best epoch.

A `Learner` is all that `vss.train.fit` knows of a task. Batches are dictionaries of tensors as the loaders give them,
outputs are {head: logits} as `forward_train` gives them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vss.core.errors import VssError
from vss.train.decisions import Decisions, average_precision
from vss.train.losses import DefectLoss, SegLoss, divergence
from vss.train.metrics import SegMetrics

Batch = dict[str, Tensor]
Heads = dict[str, Tensor]


class Learner(nn.Module):
    """Base of all tasks' training halves; a module, so that its tensors follow the network to its device.

    Attributes:
        metric: key of the validation score, in percent, higher is better.
    """

    metric: str = ""

    def forward(self, outputs: Heads, batch: Batch, *, progress: float = 1.0) -> Tensor:
        """The scalar loss over all heads; `progress` is the finished share of the training, 0..1."""
        raise TypeError(f"{type(self).__name__} must define forward")

    def teach(self, teacher: Any, images: Tensor) -> Heads:
        """The heads of a teacher that a student is compared with."""
        raise TypeError(f"{type(self).__name__} must define teach")

    def divergence(self, student: Heads, teacher: Heads, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """How far the student's heads are from the teacher's, summed over the heads that the teacher has."""
        raise TypeError(f"{type(self).__name__} must define divergence")

    def update(self, model: Any, images: Tensor, batch: Batch) -> None:
        """Add one validation batch."""
        raise TypeError(f"{type(self).__name__} must define update")

    def compute(self) -> float:
        """The validation score so far, in percent."""
        raise TypeError(f"{type(self).__name__} must define compute")

    def reset(self) -> None:
        """Forget the validation batches."""
        raise TypeError(f"{type(self).__name__} must define reset")


class SegLearner(Learner):
    """Segmentation: cross-entropy of label maps, mean IoU.

    Args:
        num_classes: K.
        ignore_index: label of void.
        weights: (K,) class weights or None.
        aux_weight, label_smoothing: see `SegLoss`.
    """

    metric = "miou_pct"

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        weights: Tensor | None = None,
        aux_weight: float = 0.4,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        settings = {"aux_weight": aux_weight, "label_smoothing": label_smoothing}
        self.loss = SegLoss(weights=weights, ignore_index=ignore_index, **settings)
        self.score = SegMetrics(num_classes, ignore_index)

    def forward(self, outputs: Heads, batch: Batch, *, progress: float = 1.0) -> Tensor:
        """outputs: {head: (N, K, H, W)}; batch: `mask` (N, H, W) int64."""
        return self.loss(outputs, batch["mask"])

    def teach(self, teacher: Any, images: Tensor) -> Heads:
        """The main head alone."""
        return {"out": teacher(images)}

    def divergence(self, student: Heads, teacher: Heads, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """Mean over the pixels that are not void, summed over the heads."""
        total = batch["mask"].new_zeros((), dtype=next(iter(student.values())).dtype)
        for head, soft in teacher.items():
            total = total + divergence(
                student[head], soft, batch["mask"], temperature=temperature, ignore_index=self.ignore_index
            )
        return total

    def update(self, model: Any, images: Tensor, batch: Batch) -> None:
        """images: (N, 3, H, W) float; batch: `mask`."""
        self.score.update(model.predict(images), batch["mask"])

    def compute(self) -> float:
        """Mean IoU in percent."""
        found = self.score.compute()["miou_pct"]
        if found is None:
            raise VssError(
                "no labelled pixel is left in the validation masks at the size of the network; set data.size."
            )
        return float(found)

    def reset(self) -> None:
        """Forget the confusion matrix."""
        self.score.reset()


class DefectLearner(Learner):
    """Defect networks: weighted map and decision, average precision of the decisions.

    Args:
        delta, dynamic: see `DefectLoss`.
    """

    metric = "ap_pct"

    def __init__(self, *, delta: float = 1.0, dynamic: bool = True) -> None:
        super().__init__()
        self.loss = DefectLoss(delta=delta, dynamic=dynamic)
        self.score = Decisions()

    def forward(self, outputs: Heads, batch: Batch, *, progress: float = 1.0) -> Tensor:
        """outputs: `decision` and `seg`; batch: as for `DefectLoss`."""
        loss: Tensor = self.loss(outputs, batch, progress=progress)
        return loss

    def teach(self, teacher: Any, images: Tensor) -> Heads:
        """Both heads."""
        heads: Heads = teacher.forward_train(images)
        return heads

    def divergence(self, student: Heads, teacher: Heads, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """Of both heads, each a mean over its values."""
        parts = [
            divergence(student[head], soft, batch["mask"], temperature=temperature, ignore_index=255)
            for head, soft in teacher.items()
        ]
        return torch.stack(parts).sum()

    def update(self, model: Any, images: Tensor, batch: Batch) -> None:
        """images: (N, 3, H, W) float; batch: `label`."""
        self.score.update(model.forward_train(images)["decision"].flatten(), batch["label"])

    def compute(self) -> float:
        """Average precision in percent."""
        labels, scores = self.score.compute()
        return average_precision(labels, scores)

    def reset(self) -> None:
        """Forget the decisions."""
        self.score.reset()
