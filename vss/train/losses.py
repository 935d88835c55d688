"""Losses over label maps with void pixels, and over decisions with defect maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        if not (target != self.ignore_index).any():
            return logits.sum() * 0.0
        return F.cross_entropy(
            logits,
            target,
            weight=self.weights,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )


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


def divergence(student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float, ignore_index: int) -> Tensor:
    """`distillation` of one head of any number of classes; a head of one channel is a decision between two."""
    if student.shape[1] == 1:
        soft = torch.sigmoid(teacher.float() / temperature)
        own = F.binary_cross_entropy(soft, soft)
        return temperature**2 * (F.binary_cross_entropy_with_logits(student.float() / temperature, soft) - own)
    return distillation(student, teacher, target, temperature=temperature, ignore_index=ignore_index)


def distillation(student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float, ignore_index: int) -> Tensor:
    """Per-pixel KL(teacher || student) at a temperature, times its square (Hinton et al., 2015), over non-void pixels.

    Args:
        student, teacher: (N, K, H, W) logits.
        target: (N, H, W) int64; only its void pixels matter here.
    """
    valid = (target != ignore_index).float()  # a half-precision count of pixels would overflow
    soft = F.log_softmax(teacher.float() / temperature, dim=1)
    pixels = F.kl_div(F.log_softmax(student.float() / temperature, dim=1), soft, reduction="none", log_target=True).sum(
        dim=1
    )
    return temperature**2 * (pixels * valid).sum() / valid.sum().clamp(min=1)
