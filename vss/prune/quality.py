"""How good a criterion is on a network, before any fine-tuning.

* `oracle`: the loss without one channel minus the loss with all, channel by channel on a seeded sample. `oracle_cost`
  says beforehand how many forwards that takes. `overlap` says how many of the oracle's best a criterion finds.
* `reconstruction`: how far the outputs move when all channels that a criterion gives up are zeroed.
* `rank_correlation`: whether two criteria order channels alike.
* `sensitivity`: loss or metric when one group alone loses its lowest channels.

Nothing here changes the network: channels are zeroed in a copy, and put back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vss.core.closeness import duplicate, evaluating
from vss.core.errors import VssError
from vss.core.example import Forward, call, logits_of
from vss.prune.apply import tensors_of, zero_channels
from vss.prune.budget import top_channels
from vss.prune.plan import Group
from vss.prune.stats.run import Loss
from vss.prune.stats.taps import Batch, images_of

Scores = Mapping[str, Tensor]


@contextmanager
def zeroed(model: nn.Module, removed: Iterable[tuple[Group, Tensor]]) -> Iterator[nn.Module]:
    """Zero (group, channel numbers int64) pairs in place, as removing them would, and put every bit back."""
    removed, tensors = list(removed), tensors_of(model)
    before = {slot.tensor: tensors[slot.tensor].detach().clone() for group, _ in removed for slot in group.slots}
    zero_channels(model, removed)
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, value in before.items():
                tensors[name].copy_(value)


def mean_loss(model: nn.Module, batches: Sequence[Batch], loss: Loss) -> float:
    """Mean over batches of `loss(model, batch)` in evaluation mode, no gradients. One forward a batch."""
    with torch.no_grad(), evaluating(model):
        values = [float(loss(model, batch)) for batch in batches]
    if not values:
        raise VssError("the calibration set is empty; give at least one batch.")
    return math.fsum(values) / len(values)


@dataclass(frozen=True)
class Oracle:
    """What single channels are worth.

    Attributes:
        sample: (group id, channel number) of each sampled channel; of a unit of channels, the first.
        change: (n,) float64, loss without the channel minus loss with all.
        loss: with all channels.
        forwards: that it took.
    """

    sample: tuple[tuple[str, int], ...]
    change: Tensor
    loss: float
    forwards: int


def sample_channels(groups: Sequence[Group], count: int, *, seed: int = 0) -> list[tuple[str, int]]:
    """`count` of all channels (or units of them) without repeats, evenly drawn; all of them where there are fewer."""
    if count < 1:
        raise VssError(f"a sample of {count} channels says nothing; give at least 1.")
    table = [(group.id, channel) for group in groups for channel in range(0, group.channels, group.unit)]
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))[:count]
    return [table[index] for index in sorted(order.tolist())]


def oracle_cost(sample: Sequence[tuple[str, int]], batches: Sequence[Batch]) -> int:
    """Forwards that `oracle` will take: one a batch for each channel, and for the whole network."""
    return (len(sample) + 1) * len(batches)


def oracle(
    model: nn.Module,
    groups: Iterable[Group],
    sample: Sequence[tuple[str, int]],
    batches: Sequence[Batch],
    loss: Loss,
    *,
    tick: Callable[[], None] | None = None,
) -> Oracle:
    """Leave each sampled channel out in turn; the network is not changed.

    Args:
        model, groups: the network and its groups.
        sample: of `sample_channels`.
        batches, loss: as for `mean_loss`; all batches for every channel.
        tick: called after every channel, for a progress bar.
    """
    net, table = duplicate(model), {group.id: group for group in groups}
    base = mean_loss(net, batches, loss)
    change = torch.zeros(len(sample), dtype=torch.float64)
    for index, (group_id, channel) in enumerate(sample):
        group = table[group_id]
        with zeroed(net, [(group, torch.arange(channel, channel + group.unit))]):
            change[index] = mean_loss(net, batches, loss) - base
        if tick is not None:
            tick()
    return Oracle(tuple(sample), change, base, oracle_cost(sample, batches))


def sampled_scores(groups: Iterable[Group], scores: Scores, sample: Sequence[tuple[str, int]]) -> Tensor:
    """(n,) float64 scores of the sampled channels; the mean of a unit."""
    units = {group.id: group.unit for group in groups}
    return torch.stack([scores[name][channel : channel + units[name]].double().mean() for name, channel in sample])


def overlap(scores: Tensor, truth: Tensor, *, share: float) -> float:
    """Fraction of the k best by `truth` (n,) that are among the k best by `scores` (n,).

    k = round(share * n), at least 1. A random order is expected to reach k / n. Of equal values the later channel
    counts as better, as in a budget.
    """
    count = max(1, round(share * len(truth)))
    mine, wanted = top_channels(scores, count), top_channels(truth, count)
    return float(torch.isin(mine, wanted).double().mean())


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rho of two (n,) tensors, ties by mean rank; None where it is not defined (all equal, or n < 2)."""
    from scipy.stats import spearmanr  # a second of imports

    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    return float(spearmanr(a.double().cpu().numpy(), b.double().cpu().numpy()).statistic)


def correlations(a: Scores, b: Scores) -> dict[str, float | None]:
    """Rank correlation of two criteria: `global` over all channels, and `within`, the mean over groups by channels."""
    pairs = [(len(a[name]), rank_correlation(a[name], b[name])) for name in a]
    known = [(count, rho) for count, rho in pairs if rho is not None]
    total = sum(count for count, _ in known)
    within = sum(count * rho for count, rho in known) / total if total else None
    return {"global": rank_correlation(torch.cat(list(a.values())), torch.cat([b[name] for name in a])),
            "within": within}  # fmt: skip


def reconstruction(
    model: nn.Module,
    groups: Iterable[Group],
    kept: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    forward: Forward | None = None,
) -> dict[str, float]:
    """Outputs with all channels but `kept` (group id -> channel numbers) zeroed against those of the whole network.

    `forward`: (network, images of a batch) -> outputs; default: the network is called.

    Returns:
        `mse` over all values of all outputs, and `relative`, the same divided by their mean square: 0 is perfect, 1 is
        what zero outputs would have.
    """
    net, forward = duplicate(model).eval(), forward or call
    removed = [(group, group.others(kept[group.id])) for group in groups]
    error = power = count = 0.0
    with torch.no_grad():
        for batch in batches:
            images = images_of(batch, net)
            wanted = logits_of(forward(net, images))
            with zeroed(net, removed):
                got = logits_of(forward(net, images))
            for a, b in zip(wanted, got, strict=True):
                error += float((a.double() - b.double()).square().sum())
                power += float(a.double().square().sum())
                count += a.numel()
    if not count:
        raise VssError("the calibration set is empty; give at least one batch.")
    if not power:
        raise VssError("the network's outputs are all zero; a relative error has no meaning there.")
    return {"mse": error / count, "relative": error / power}


def sensitivity(
    model: nn.Module,
    groups: Iterable[Group],
    scores: Scores,
    measure: Callable[[nn.Module], float],
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75),
) -> list[dict[str, Any]]:
    """One group at a time loses its lowest channels, all others stay; the network is not changed.

    Args:
        model, groups: the network and its groups.
        scores: group id -> (C,).
        measure: network -> loss or metric; called once for the whole network and once a row.
        ratios: fractions to remove, in (0, 1); at least one unit of channels always stays.

    Returns:
        Rows {"group", "channels", "ratio", "removed", "value", "change"}; change is against the whole network.
    """
    bad = [ratio for ratio in ratios if not 0 < ratio < 1]
    if bad:
        raise VssError(f"a ratio of removed channels is {bad[0]}; expected above 0 and below 1.")
    net = duplicate(model).eval()
    base = measure(net)
    rows = []
    for group in groups:
        for ratio in ratios:
            units = group.channels // group.unit
            left = max(1, units - int(units * ratio + 1e-9)) * group.unit
            with zeroed(net, [(group, group.others(top_channels(scores[group.id], left, group.unit)))]):
                value = measure(net)
            rows.append({"group": group.id, "channels": group.channels, "ratio": ratio,
                         "removed": group.channels - left, "value": value, "change": value - base})  # fmt: skip
    return rows
