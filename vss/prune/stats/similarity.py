"""Similarity of the channels of a group: Gram matrices of their unpooled maps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss import ops
from vss.core.errors import VssError, unknown
from vss.prune.plan import Group
from vss.prune.stats.base import COLLECTORS, Average, TapCollector, max_over_processes, sum_over_processes
from vss.prune.stats.taps import DTYPES, Batch, Tap, heads_of, require_labels

Metric = Literal["l1gram", "cosine", "pearson"]
METRICS = ("l1gram", "cosine", "pearson")


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
    either = dead[:, None] | dead[None, :]
    return matrix.masked_fill(either, 1.0)


@COLLECTORS.register("similarity")
class Similarity(TapCollector):
    """(C, C) similarity of channels over all positions and images; members of a group are averaged.

    Args:
        model: the network.
        groups: its groups.
        site: where to look.
        metric: "l1gram": products of maps that are divided by their sum of absolutes (plus 1e-5), averaged over images
            (the published form); "cosine": of the maps of all images as one vector; "pearson": the same, centred.
            A channel that is always zero (always constant, for "pearson") is given similarity 1 with every other one,
            since it adds nothing to any of them.
        per_image: average |similarity| of single images, so that opposite signs do not cancel ("abs before").
        ema: decay of a moving average over batches, from zero and without bias correction; None takes the mean.
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
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        self.metric, self.per_image, self.ema = metric, per_image, ema
        self.grams: dict[str, list[_Gram]] = {}

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        """Add one tensor."""
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
        norms = _norms(maps, self.metric)
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
        """(C, C) float64 per group."""
        found = {}
        for group in self.groups:
            members = [self._result(gram) for gram in self.grams[group.id]]
            found[group.id] = torch.stack(members).mean(dim=0)
        return found

    def _result(self, gram: _Gram) -> Tensor:
        if self.metric == "l1gram":
            return gram.matrix.result()
        if self.per_image:
            matrix = gram.matrix.result()
            return _fill_dead(matrix, matrix.diagonal() == 0)
        return gram.pooled(centred=self.metric == "pearson")


def _norms(maps: Tensor, metric: Metric) -> Tensor:
    """(B, C) float32, what each map is divided by; never zero."""
    sums = ops.map_stats(maps)
    if metric == "l1gram":
        return sums[..., ops.STATS.index("abs_sum")] + 1e-5
    return sums[..., ops.STATS.index("square_sum")].sqrt().clamp(min=1e-30)


# Which channels support which class: feature times gradient, class by class.


_log = logging.getLogger(__name__)
Masks = Literal["truth", "predicted"]


@dataclass
class _Seen:
    """One look at a tap in the forward at hand: sums over positions of max(A, 0), max(-A, 0) and of dy/dA."""

    tap: Tap
    positive: Tensor
    negative: Tensor
    positions: int
    gradient: Tensor | None = None


@COLLECTORS.register("class_support")
class ClassSupport(TapCollector):
    """(K, C): for each class c and channel k the sum over images and positions of ReLU(alpha * A).

    y_c is the sum of class c's logits over the pixels of class c; alpha (image, channel) is the mean over positions of
    dy_c/dA. Since alpha is constant over a map, the sum is alpha+ * sum max(A, 0) + alpha- * sum max(-A, 0), and no map
    per class exists. Every head counts, auxiliary ones with `aux_weight`. Members of a group add.

    Costs one forward a batch and one backward (to the images, no weight gradients) for each class in it.

    Args:
        model: the network.
        groups: its groups.
        site: where to look.
        masks: pixels of a class, by "truth" or as "predicted" by the network.
        aux_weight: factor of heads other than the main one.
        ignore_index: label of void pixels.
    """

    labels = True
    outputs = True

    def __init__(
        self,
        model: nn.Module,
        groups: list[Group],
        *,
        site: str,
        masks: Masks = "truth",
        aux_weight: float = 0.4,
        ignore_index: int = 255,
    ) -> None:
        super().__init__(model, groups, site=site)
        self.labels = masks == "truth"
        self.aux_weight, self.ignore_index = aux_weight, ignore_index
        self.seen: list[tuple[Group, _Seen]] = []
        self.total: dict[str, Tensor] = {}
        self.pixels = self.zeros(0)

    def begin(self, batch: Batch) -> None:
        """Forget the last forward."""
        self.seen = []
        if self.labels:
            require_labels(batch, "a criterion with class masks from the truth")

    def see(self, group: Group, number: int, tap: Tap, x: Tensor) -> None:
        """Reduce the maps now and their gradient when it comes."""
        maps = tap.maps(x.detach())
        sums = ops.map_stats(maps if maps.dtype in DTYPES else maps.float()).double()
        positive, negative = (sums[..., ops.STATS.index(name)] for name in ("positive_sum", "negative_sum"))
        seen = _Seen(tap, positive, negative, maps.shape[2] * maps.shape[3])
        self.seen.append((group, seen))

        def arrive(grad: Tensor) -> None:
            seen.gradient = tap.maps(grad).sum(dim=(2, 3), dtype=torch.float64)

        if x.requires_grad:
            x.register_hook(arrive)

    def examine(self, images: Tensor, outputs: Any, batch: Batch) -> None:
        """One backward for each class of the batch."""
        heads = heads_of(outputs)
        classes = heads[0].shape[1]
        if not self.total:
            self.total = {group.id: self.zeros(classes, group.channels) for group in self.groups}
            self.pixels = self.zeros(classes)
        labels = self._labels(heads[0], batch)
        for c in range(classes):
            mask = (labels == c)[:, None]
            pixels = int(mask.sum())
            if pixels:
                self.pixels[c] += pixels
                torch.autograd.grad(self._target(heads, mask, c), images, retain_graph=True)
                self._take(c)

    def _labels(self, main: Tensor, batch: Batch) -> Tensor:
        """(N, H, W) classes, those of one logit being 0 for "there is something"."""
        if not self.labels:
            logits = main.detach()
            return (logits[:, 0] <= 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)
        labels = require_labels(batch, "a criterion with class masks from the truth").to(main.device).long()
        labels = labels.masked_fill(labels == self.ignore_index, -1)
        if main.shape[1] == 1:
            labels = torch.where(labels > 0, 0, 1)
        return labels

    def _target(self, heads: list[Tensor], mask: Tensor, c: int) -> Tensor:
        """y_c; a head of another size takes the pixels whose cell holds one of the class."""
        total = heads[0].new_zeros((), dtype=torch.float32)
        for number, head in enumerate(heads):
            size = tuple(head.shape[-2:])
            own = mask.float()
            own = own if tuple(mask.shape[-2:]) == size else F.adaptive_max_pool2d(own, size)
            total = total + (self.aux_weight if number else 1.0) * (head[:, c : c + 1].float() * own).sum()
        return total

    def _take(self, c: int) -> None:
        for group, seen in self.seen:
            if seen.gradient is None:
                raise self.no_gradient(seen.tap)
            alpha = seen.gradient / seen.positions
            support = alpha.clamp(min=0) * seen.positive + (-alpha).clamp(min=0) * seen.negative
            self.total[group.id][c] += support.sum(dim=0)
            seen.gradient = None

    def step(self) -> None:
        """Let go of the forward."""
        self.seen = []

    def finish(self) -> dict[str, Tensor]:
        """(K, C) float64 per group; a class without pixels is a row of zeros and named in a warning."""
        classes = int(max_over_processes(torch.tensor(float(len(self.pixels)))))
        if len(self.pixels) != classes:
            raise VssError(f"processes saw networks of {len(self.pixels)} and {classes} classes.")
        pixels = sum_over_processes(self.pixels)
        absent = [str(c) for c in range(classes) if not pixels[c]]
        if len(absent) == classes:
            raise VssError("no pixel of any class was found in the calibration set; check its labels.")
        if absent:
            _log.warning("classes absent from the calibration set do not count: %s", ", ".join(absent))
        return {group.id: sum_over_processes(self.total[group.id]) for group in self.groups}
