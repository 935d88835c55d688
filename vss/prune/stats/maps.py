"""Mean of every channel over images and positions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from vss import ops
from vss.core.errors import VssError, unknown
from vss.prune.plan import Group
from vss.prune.stats.base import COLLECTORS, Average, Collector, TapCollector, sum_over_processes
from vss.prune.stats.taps import DTYPES, Batch, Layout, Tap, norm_slots, require_labels


@COLLECTORS.register("mean")
class MapMean(TapCollector):
    """(C,) mean value of each channel over images and positions; members of a group are averaged."""

    def __init__(self, model: nn.Module, groups: list[Group], *, site: str) -> None:
        super().__init__(model, groups, site=site)
        self.total = {group.id: self.zeros(group.channels) for group in groups}
        self.count = {group.id: self.zeros() for group in groups}

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        """Add the sums of one tensor."""
        maps = tap.maps(x.detach())
        self.total[group.id] += maps.double().sum(dim=(0, 2, 3))
        self.count[group.id] += maps.shape[0] * maps.shape[2] * maps.shape[3]

    def finish(self) -> dict[str, Tensor]:
        """(C,) float64 per group."""
        return {
            group.id: sum_over_processes(self.total[group.id]) / sum_over_processes(self.count[group.id])
            for group in self.groups
        }


# How many positions the maps of a group have.


@COLLECTORS.register("positions")
class Positions(Collector):
    """The least number of positions of a group's maps where they are made and where they are looked at, () float64.

    A pooled branch that is resized afterwards counts as what it is: one position.
    """

    layout = True

    def __init__(self, model: nn.Module, groups: list[Group], *, site: str) -> None:
        super().__init__(model, groups)
        self.site = site
        self.found: dict[str, Tensor] = {}

    def prepare(self, layout: Layout) -> None:
        """Read the shapes."""
        self.found = {
            group.id: torch.tensor(float(layout.positions(group, self.site)), dtype=torch.float64)
            for group in self.groups
        }

    def finish(self) -> dict[str, Tensor]:
        """Group id -> count."""
        return self.found


# How much a feature norm layer lets through of each channel's spread.


EPS = 1e-3  # of SegDecNet's feature norm, where the layer does not say its own


@COLLECTORS.register("feature_norm_std")
class FeatureNormStd(Collector):
    """(M, C) mean over images of sd / sqrt(sd + eps), one row for each of the group's M feature norm layers.

    A feature norm computes scale * (x - mean) / sqrt(sd + eps) + bias with sd the unbiased standard deviation over
    positions, so |scale| times this is the standard deviation of what it puts out. It is recognised by its parameter
    `scale`. A map of one position has no spread and counts as 0.
    """

    def __init__(self, model: nn.Module, groups: list[Group]) -> None:
        super().__init__(model, groups)
        self.slots = {
            group.id: [slot for slot in norm_slots(model, group) if slot.tensor.rpartition(".")[2] == "scale"]
            for group in groups
        }
        self.total = {group.id: self.zeros(len(self.slots[group.id]), group.channels) for group in groups}
        self.count = {group.id: self.zeros(len(self.slots[group.id])) for group in groups}

    def attach(self) -> list[RemovableHandle]:
        """One hook for each feature norm layer."""
        handles = []
        for group in self.groups:
            for number, slot in enumerate(self.slots[group.id]):
                name = slot.tensor.rpartition(".")[0]
                tap = Tap(name, "input", group.channels, slot.offset, slot.block)
                handles.append(tap.hook(self.model, self._watch(group, number, tap)))
        return handles

    def _watch(self, group: Group, number: int, tap: Tap) -> Any:
        def call(module: nn.Module, x: Tensor) -> None:
            maps = tap.maps(x.detach()).flatten(2).double()
            if maps.shape[2] > 1:
                sd = maps.std(dim=2)
                passed = sd / (sd + float(getattr(module, "eps", EPS))).sqrt()
                self.total[group.id][number] += passed.sum(dim=0)
            self.count[group.id][number] += maps.shape[0]

        return call

    def finish(self) -> dict[str, Tensor]:
        """(M, C) float64 per group."""
        found = {}
        for group in self.groups:
            total, count = sum_over_processes(self.total[group.id]), sum_over_processes(self.count[group.id])
            found[group.id] = total / count.clamp(min=1)[:, None]
        return found


# How much a channel's edge strength varies over its map.


@COLLECTORS.register("texture")
class Texture(TapCollector):
    """(C,) standard deviation over positions of the Sobel magnitude, averaged over images and members.

    Args:
        model: the network.
        groups: its groups.
        site: where to look.
        padding: around a map; "replicate", or the "zeros" of the published code, which sees edges at every border.
        relative: divide by the root mean square of the map, so that a channel's scale does not count.
        ema: decay of a moving average over batches from zero, without bias correction; None takes the mean.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[Group],
        *,
        site: str,
        padding: Literal["replicate", "zeros"] = "replicate",
        relative: bool = False,
        ema: float | None = None,
    ) -> None:
        super().__init__(model, groups, site=site)
        self.padding, self.relative = padding, relative
        self.average = {group.id: Average(self.zeros(group.channels), ema) for group in groups}

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        """Add the edge strength of one tensor."""
        maps = tap.maps(x.detach())
        maps = maps.float() if maps.element_size() > 4 else maps
        positions = maps.shape[2] * maps.shape[3]
        sums = ops.map_stats(maps, padding=self.padding).double() / positions
        square, edge, edge_square = (sums[..., ops.STATS.index(n)] for n in _COLUMNS)
        deviation = (edge_square - edge.square()).clamp(min=0).sqrt()
        if self.relative:
            deviation = (deviation / square.sqrt()).nan_to_num(0.0, 0.0, 0.0)
        self.average[group.id].add(deviation.sum(dim=0), len(deviation))

    def finish(self) -> dict[str, Tensor]:
        """(C,) float64 per group."""
        return {group.id: self.average[group.id].result() for group in self.groups}


_COLUMNS = ("square_sum", "edge_sum", "edge_square_sum")


# Activity of channels where the defects are.


Mode = Literal["grad_act", "act"]
Resize = Literal["area", "bilinear"]
MASK_EPS = 1e-8


def masked_means(maps: Tensor, grads: Tensor | None, mask: Tensor) -> Tensor:
    """(N, C) float64 mean of |maps| or, with gradients, of |maps * grads| over positions of weights mask (N, H, W)."""
    column = ops.MOMENTS.index("abs_activation_sum" if grads is None else "abs_product_sum")
    maps = maps if maps.dtype in DTYPES else maps.float()
    sums = ops.channel_moments(maps, maps if grads is None else grads.to(maps.dtype), mask)[..., column]
    return sums.double() / (mask.double().sum(dim=(1, 2))[:, None] + MASK_EPS)


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
