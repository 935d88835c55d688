"""Similarity of the channels of a group: Gram matrices of their unpooled maps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vss import ops
from vss.core.errors import unknown
from vss.prune.groups import Group
from vss.prune.stats.base import COLLECTORS, TapCollector
from vss.prune.stats.moving import Average
from vss.prune.stats.sites import Tap

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
