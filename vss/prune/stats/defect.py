"""Activity of channels where the defects are."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss import ops
from vss.core.errors import VssError, unknown
from vss.prune.groups import Group
from vss.prune.stats.base import COLLECTORS, TapCollector
from vss.prune.stats.batch import Batch, require_labels
from vss.prune.stats.filters import DTYPES
from vss.prune.stats.processes import sum_over_processes
from vss.prune.stats.sites import Tap

Mode = Literal["grad_act", "act"]
Resize = Literal["area", "bilinear"]
EPS = 1e-8


def masked_means(maps: Tensor, grads: Tensor | None, mask: Tensor) -> Tensor:
    """(N, C) float64 mean of |maps| or, with gradients, of |maps * grads| over positions of weights mask (N, H, W)."""
    column = ops.MOMENTS.index("abs_activation_sum" if grads is None else "abs_product_sum")
    maps = maps if maps.dtype in DTYPES else maps.float()
    sums = ops.channel_moments(maps, maps if grads is None else grads.to(maps.dtype), mask)[..., column]
    return sums.double() / (mask.double().sum(dim=(1, 2))[:, None] + EPS)


@COLLECTORS.register("defect_activity")
class DefectActivity(TapCollector):
    """(C,) mean over defective images of the mean over defect pixels of |A * dL/dA| or |A|.

    Gradients are multiplied by the batch size, so that with a loss that is a mean over images the batching does not
    matter. Images without a defect, and those whose defect vanishes when its mask is resized to the map, do not count.
    Members of a group add.

    Args:
        model: the network.
        groups: its groups.
        site: where to look.
        mode: "grad_act" or "act"; the latter needs no gradient.
        background: subtract this times the same mean over the other pixels.
        resize: of the mask to the map: "area" keeps every small defect, "bilinear" is the published choice.
        positive: labels that are defects; None takes all but 0 and `ignore_index`.
        ignore_index: label of void pixels.
    """

    gradients = True
    labels = True

    def __init__(
        self,
        model: nn.Module,
        groups: list[Group],
        *,
        site: str,
        mode: Mode = "grad_act",
        background: float = 0.0,
        resize: Resize = "area",
        positive: tuple[int, ...] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(model, groups, site=site)
        if mode not in ("grad_act", "act"):
            raise unknown("mode", mode, ("grad_act", "act"))
        self.gradients = mode == "grad_act"
        self.background, self.resize, self.positive, self.ignore_index = background, resize, positive, ignore_index
        self.total = {group.id: self.zeros(group.channels) for group in groups}
        self.count = {group.id: self.zeros() for group in groups}
        self.moved = {group.id: self.zeros() for group in groups}
        self.waiting: dict[tuple[str, int], Tap] = {}
        self.mask = torch.zeros(0)

    def begin(self, batch: Batch) -> None:
        """Read the defect masks."""
        labels = require_labels(batch, "a criterion that looks at defects").to(self.device)
        if self.positive is None:
            defect = (labels > 0) & (labels != self.ignore_index)
        else:
            defect = torch.isin(labels, torch.tensor(self.positive, device=labels.device, dtype=labels.dtype))
        self.mask = defect[:, None].float()
        self.waiting = {}

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        """Add a tensor, now or when its gradient comes."""
        if not self.gradients:
            self._add(group, number, tap.maps(x.detach()), None)
            return
        self.waiting[group.id, number] = tap
        kept = x.detach() if tap.side == "input" else x.detach().clone()  # an output may be overwritten in place

        def arrive(grad: Tensor) -> None:
            self.waiting.pop((group.id, number), None)
            self.moved[group.id] += tap.maps(grad).abs().amax() > 0
            self._add(group, number, tap.maps(kept), tap.maps(grad))

        if x.requires_grad:
            x.register_hook(arrive)

    def _add(self, group: Group, number: int, maps: Tensor, grads: Tensor | None) -> None:
        mask = _resized(self.mask, (maps.shape[2], maps.shape[3]), self.resize)[:, 0]
        valid = mask.sum(dim=(1, 2)) > 0
        if not valid.any():
            return
        scale = 1 if grads is None else len(grads)
        maps, mask, grads = maps[valid], mask[valid], None if grads is None else grads[valid]
        found = masked_means(maps, grads, mask)
        if self.background:
            found = found - self.background * masked_means(maps, grads, 1 - mask)
        self.total[group.id] += found.sum(dim=0) * scale
        if number == 0:
            self.count[group.id] += int(valid.sum())

    def step(self) -> None:
        """Every tap must have got its gradient."""
        for tap in self.waiting.values():
            raise self.no_gradient(tap)

    def finish(self) -> dict[str, Tensor]:
        """(C,) float64 per group."""
        found = {}
        for group in self.groups:
            count, total = sum_over_processes(self.count[group.id]), sum_over_processes(self.total[group.id])
            if count == 0:
                raise VssError("the calibration set shows no defect; give training images that do, with their masks.")
            if self.gradients and not sum_over_processes(self.moved[group.id]):
                raise VssError(
                    f"the gradient at layer {self.taps[group.id][0].module!r} is zero throughout: a gradient "
                    "multiplier of 0, or a loss that does not depend on it; set multipliers to 1 for scoring."
                )
            found[group.id] = total / count
        return found


def _resized(mask: Tensor, size: tuple[int, int], resize: Resize) -> Any:
    """(N, 1, H, W) weights in [0, 1] at another size."""
    if tuple(mask.shape[-2:]) == size:
        return mask
    if resize == "area":
        return F.adaptive_avg_pool2d(mask, size)
    return F.interpolate(mask, size=size, mode="bilinear", align_corners=False)
