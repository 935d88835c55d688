"""Statistics of feature maps: means, positions, spreads, edges, similarity of channels, activity on defects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from vss import ops
from vss.core.errors import VssError, unknown
from vss.prune.plan import Group
from vss.prune.stats import READS
from vss.prune.stats.base import (
    COLLECTORS,
    DTYPES,
    Average,
    Collector,
    TapCollector,
    no_gradient,
    on_gradient,
    sum_over_processes,
)
from vss.prune.stats.taps import Batch, Layout, Tap, norm_slots, require_labels

EPS = 1e-3  # of SegDecNet's feature norm, where the layer does not say its own
MASK_EPS = 1e-8
Metric = Literal["l1gram", "cosine", "pearson"]
Activity = Literal["grad_act", "act"]
Resize = Literal["area", "bilinear"]


@COLLECTORS.register("mean")
class MapMean(TapCollector):
    """(C,) mean of each channel, or with `power` 2 of its square, over images and positions; members of a group are
    averaged."""

    def __init__(self, model: nn.Module, groups: list[Group], *, site: str, power: Literal[1, 2] = 1) -> None:
        super().__init__(model, groups, site=site)
        self.power = power

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        maps = tap.maps(x.detach()).double()
        maps = maps.square() if self.power == 2 else maps
        self.average[group.id].add(maps.sum(dim=(0, 2, 3)), maps.shape[0] * maps.shape[2] * maps.shape[3])


@COLLECTORS.register("positions")
class Positions(Collector):
    """The minimum number of positions of a group's maps where they are made and where they are looked at, () float64.

    A pooled branch that is resized afterwards counts as what it is: one position.
    """

    layout = True

    def __init__(self, model: nn.Module, groups: list[Group], *, site: str) -> None:
        super().__init__(model, groups)
        self.site = site
        self.found: dict[str, Tensor] = {}

    def prepare(self, layout: Layout) -> None:
        counts = {group.id: float(layout.positions(group, self.site)) for group in self.groups}
        self.found = {name: torch.tensor(count, dtype=torch.float64) for name, count in counts.items()}

    def finish(self) -> dict[str, Tensor]:
        return self.found


@COLLECTORS.register("feature_norm_std")
class FeatureNormStd(Collector):
    """(M, C) mean over images of sd / sqrt(sd + eps), one row for each of the group's M feature norm layers.

    A feature norm computes scale * (x - mean) / sqrt(sd + eps) + bias with sd the unbiased standard deviation over
    positions, so |scale| times this is the standard deviation of what it puts out. It is recognised by its parameter
    `scale`. A map of one position has no spread and counts as 0.
    """

    def __init__(self, model: nn.Module, groups: list[Group]) -> None:
        super().__init__(model, groups)
        self.slots = {group.id: [s for s in norm_slots(model, group) if s.leaf == "scale"] for group in groups}
        self.passed = {
            group.id: [Average(self.zeros(group.channels)) for _ in self.slots[group.id]] for group in groups
        }

    def attach(self) -> list[RemovableHandle]:
        handles = []
        for group in self.groups:
            for slot, average in zip(self.slots[group.id], self.passed[group.id], strict=True):
                tap = Tap(slot.layer, "input", group.channels, slot.offset, slot.block)
                handles.append(tap.hook(self.model, self._watch(tap, average)))
        return handles

    @staticmethod
    def _watch(tap: Tap, average: Average) -> Callable[[nn.Module, Tensor], None]:
        def call(module: nn.Module, x: Tensor) -> None:
            maps = tap.maps(x.detach()).flatten(2).double()
            passed = maps.new_zeros(maps.shape[:2])
            if maps.shape[2] > 1:
                sd = maps.std(dim=2)
                passed = sd / (sd + float(getattr(module, "eps", EPS))).sqrt()
            average.add(passed.sum(dim=0), maps.shape[0])

        return call

    def finish(self) -> dict[str, Tensor]:
        rows = {group.id: [average.result() for average in self.passed[group.id]] for group in self.groups}
        return {g.id: torch.stack(rows[g.id]) if rows[g.id] else self.zeros(0, g.channels) for g in self.groups}


@COLLECTORS.register("texture")
class Texture(TapCollector):
    """(C,) standard deviation over positions of the Sobel magnitude, averaged over images and members.

    Args:
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
        super().__init__(model, groups, site=site, ema=ema)
        self.padding, self.relative = padding, relative

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        maps = tap.maps(x.detach())
        maps = maps.float() if maps.element_size() > 4 else maps
        sums = ops.map_stats(maps, padding=self.padding).double() / (maps.shape[2] * maps.shape[3])
        columns = ("square_sum", "edge_sum", "edge_square_sum")
        square, edge, edge_square = (sums[..., ops.STATS.index(name)] for name in columns)
        deviation = (edge_square - edge.square()).clamp(min=0).sqrt()
        if self.relative:
            deviation = (deviation / square.sqrt()).nan_to_num(0.0, 0.0, 0.0)
        self.average[group.id].add(deviation.sum(dim=0), len(deviation))


class _Gram:
    """Sums of one tap. `means`, and `weight` to undo a moving average's start, are for the pooled metrics alone."""

    def __init__(self, zeros: Tensor, ema: float | None) -> None:
        self.matrix = Average(zeros, ema)
        self.means = Average(zeros.new_zeros(len(zeros)), ema)
        self.weight = Average(zeros.new_zeros(()), ema)

    def pooled(self, *, centred: bool) -> Tensor:
        """Cosine or Pearson matrix of everything seen; a channel without energy (spread) is like every other one."""
        weight = self.weight.result()
        gram, means = self.matrix.result() / weight, self.means.result() / weight
        energy = gram.diagonal().clone()
        if centred:
            gram = gram - means[:, None] * means[None, :]
        diagonal = gram.diagonal()
        dead = diagonal <= (1e-12 * energy if centred else 0 * energy)
        scale = diagonal.clamp(min=0).rsqrt().masked_fill(dead, 0)
        return _fill_dead((gram * scale[:, None] * scale[None, :]).clamp(-1, 1), dead)


def _fill_dead(matrix: Tensor, dead: Tensor) -> Tensor:
    return matrix.masked_fill(dead[:, None] | dead[None, :], 1.0)


@COLLECTORS.register("similarity")
class Similarity(TapCollector):
    """(C, C) similarity of channels over all positions and images; members of a group are averaged.

    Args:
        metric: "l1gram": products of maps that are divided by their sum of absolutes (plus 1e-5), averaged over images
            (the published form); "cosine": of the maps of all images as one vector; "pearson": the same, centred.
            A channel that is always zero (always constant, for "pearson") is given similarity 1 with every other one,
            since it adds nothing to any of them.
        per_image: average |similarity| of single images, so that opposite signs do not cancel ("abs before").
        ema: as for "texture".
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[Group],
        *,
        site: str,
        metric: Metric = "cosine",
        per_image: bool = False,
        ema: float | None = None,
    ) -> None:
        super().__init__(model, groups, site=site)
        if metric not in get_args(Metric):
            raise unknown("metric", metric, get_args(Metric))
        self.metric, self.per_image, self.ema = metric, per_image, ema
        self.grams: dict[str, list[_Gram]] = {}

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        grams = self.grams.setdefault(group.id, [])
        while len(grams) <= number:
            grams.append(_Gram(self.zeros(group.channels, group.channels), self.ema))
        maps = tap.maps(x.detach())
        maps = maps.float() if maps.element_size() > 4 else maps
        with torch.autocast(maps.device.type, enabled=False):
            if self.per_image or self.metric == "l1gram":
                self._add_per_image(grams[number], maps)
            else:
                self._add_pooled(grams[number], maps)

    def _add_per_image(self, gram: _Gram, maps: Tensor) -> None:
        if self.metric == "pearson":
            maps = maps.float()
            maps = maps - maps.mean(dim=(2, 3), keepdim=True)
        sums = ops.map_stats(maps)
        if self.metric == "l1gram":
            norms = sums[..., ops.STATS.index("abs_sum")] + 1e-5
        else:
            norms = sums[..., ops.STATS.index("square_sum")].sqrt().clamp(min=1e-30)
        if not self.per_image:
            gram.matrix.add(ops.gram(maps, norms=norms).double(), len(maps))
            return
        images = [ops.gram(maps[b : b + 1], norms=norms[b : b + 1]).double().abs() for b in range(len(maps))]
        gram.matrix.add(torch.stack(images).sum(dim=0), len(maps))

    def _add_pooled(self, gram: _Gram, maps: Tensor) -> None:
        count = maps.shape[0] * maps.shape[2] * maps.shape[3]
        means = maps.double().mean(dim=(0, 2, 3))
        if self.metric == "pearson":  # products of centred maps in float32, the means put back in float64
            centre = means.float()
            total = ops.gram(maps, means=centre).double()
            rest = means - centre.double()
            total = total - count * rest[:, None] * rest[None, :] + count * means[:, None] * means[None, :]
        else:
            total = ops.gram(maps).double()
        gram.matrix.add(total, count)
        gram.means.add(means * count, count)
        gram.weight.add(gram.weight.total.new_tensor(count), count)

    def finish(self) -> dict[str, Tensor]:
        results = {group.id: [self._result(gram) for gram in self.grams[group.id]] for group in self.groups}
        return {name: torch.stack(members).mean(dim=0) for name, members in results.items()}

    def _result(self, gram: _Gram) -> Tensor:
        if self.metric == "l1gram":
            return gram.matrix.result()
        if self.per_image:
            matrix = gram.matrix.result()
            return _fill_dead(matrix, matrix.diagonal() == 0)
        return gram.pooled(centred=self.metric == "pearson")


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
        mode: "grad_act" or "act"; the latter needs no gradient.
        background: subtract this times the same mean over the other pixels.
        resize: of the mask to the map: "area" keeps every small defect, "bilinear" is the published choice.
        positive: labels that are defects; None takes all but 0 and `ignore_index`.
        ignore_index: label of void pixels.
    """

    gradients, labels, outputs = READS["defect_activity"]

    def __init__(
        self,
        model: nn.Module,
        groups: list[Group],
        *,
        site: str,
        mode: Activity = "grad_act",
        background: float = 0.0,
        resize: Resize = "area",
        positive: tuple[int, ...] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(model, groups, site=site)
        if mode not in get_args(Activity):
            raise unknown("mode", mode, get_args(Activity))
        self.gradients = mode == "grad_act"
        self.background, self.resize, self.positive, self.ignore_index = background, resize, positive, ignore_index
        self.total = {group.id: self.zeros(group.channels) for group in groups}
        self.count = {group.id: self.zeros() for group in groups}
        self.moved = {group.id: self.zeros() for group in groups}
        self.waiting: dict[tuple[str, int], Tap] = {}
        self.mask = torch.zeros(0)

    def begin(self, batch: Batch) -> None:
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
            on_gradient(x, arrive)

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
            raise no_gradient(tap.module)

    def finish(self) -> dict[str, Tensor]:
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


def _resized(mask: Tensor, size: tuple[int, int], resize: Resize) -> Tensor:
    """(N, 1, H, W) weights in [0, 1] at another size."""
    if tuple(mask.shape[-2:]) == size:
        return mask
    if resize == "area":
        return F.adaptive_avg_pool2d(mask, size)
    return F.interpolate(mask, size=size, mode="bilinear", align_corners=False)
