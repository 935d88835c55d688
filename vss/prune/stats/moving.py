"""Means over images, or moving averages over batches, that add up over processes."""

from __future__ import annotations

from torch import Tensor

from vss.prune.stats.processes import sum_over_processes


class Average:
    """A mean of what is added; with `ema` a moving average over the calls, from zero and without bias correction.

    Args:
        total: a zero tensor to sum into.
        ema: decay in [0, 1) or None.
    """

    def __init__(self, total: Tensor, ema: float | None = None) -> None:
        self.total, self.ema = total, ema
        self.count = total.new_zeros(())

    def add(self, values: Tensor, count: float) -> None:
        """Add a sum of `count` values."""
        if self.ema is None:
            self.total += values
            self.count += count
        else:
            self.total.mul_(self.ema).add_(values / count, alpha=1 - self.ema)
            self.count.fill_(1)

    def result(self) -> Tensor:
        """The mean over all processes; zeros where nothing was added."""
        return sum_over_processes(self.total) / sum_over_processes(self.count).clamp(min=1e-300)
