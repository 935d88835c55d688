"""Which channels support which class: feature times gradient, class by class."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vss import ops
from vss.core.errors import VssError
from vss.prune.groups import Group
from vss.prune.stats.base import COLLECTORS, TapCollector
from vss.prune.stats.batch import Batch, heads_of, require_labels
from vss.prune.stats.filters import DTYPES
from vss.prune.stats.processes import max_over_processes, sum_over_processes
from vss.prune.stats.sites import Tap

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
