"""A histogram of absolute values that grows with the range and never with the data, and INT8 ranges from it."""

from __future__ import annotations

import math

import numpy as np

BINS = 4096
LEVELS = 128
"""Magnitudes of symmetric INT8: 0..127."""
STRIDE = 16
"""Entropy tries every so many-th edge, as TensorRT's calibrator does not say and common implementations choose."""


class AbsHistogram:
    """Counts of |x| over everything that was shown to it, in `BINS` equal bins from 0 to `limit`.

    `limit` is a power of two: when a larger value comes it doubles and pairs of bins become one. So bin edges, and with
    them every figure, do not depend on the order of the data, and at least half of the bins cover the seen range.

    Attributes:
        counts: (BINS,) int64.
        limit: upper edge; 0 until a value above 0 is seen.
        amax: largest |x|, exact; NaN or infinite as soon as one such value was seen.
        zeros: how many values were 0 while `limit` was 0 still; they lie in the first bin afterwards.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.limit = 0.0
        self.amax = 0.0
        self.zeros = 0

    def update(self, values: np.ndarray) -> None:
        """Add an array of any shape, float16 or float32."""
        magnitudes = np.abs(values, dtype=np.float32).ravel()
        top = float(magnitudes.max()) if magnitudes.size else 0.0
        if not math.isfinite(top) or not math.isfinite(self.amax):
            self.amax = math.nan if math.isnan(top) or math.isnan(self.amax) else math.inf
            return
        self.amax = max(self.amax, top)
        if top == 0 and not self.limit:
            self.zeros += magnitudes.size
            return
        self._reach(top)
        self.counts += np.histogram(magnitudes, bins=BINS, range=(0.0, self.limit))[0]

    def _reach(self, top: float) -> None:
        if not self.limit:
            self.limit = 2.0 ** math.ceil(math.log2(top))
            self.counts[0] = self.zeros
        while self.limit < top:
            self.counts[: BINS // 2] = self.counts.reshape(-1, 2).sum(1)
            self.counts[BINS // 2 :] = 0
            self.limit *= 2

    def percentile(self, percent: float) -> float:
        """The smallest bin edge that at least `percent` of all |x| lie below; at most `amax`."""
        if not self.limit:
            return self.amax
        reached = np.cumsum(self.counts)
        index = int(np.searchsorted(reached, percent / 100 * reached[-1], side="left"))
        return min(self.amax, (index + 1) * self.limit / BINS)

    def entropy(self) -> float:
        """The range whose 128 INT8 magnitudes lose the least information, by Kullback-Leibler divergence.

        S. Migacz, 8-bit inference with TensorRT, GTC 2017. The reference is the clipped histogram with what lies
        outside in its last bin, the candidate the same counts spread over 128 levels. Deviation: the first bin is left
        out of both, since the exact zeros behind a ReLU are represented at every range.
        """
        if not self.limit:
            return self.amax
        last = int(np.flatnonzero(self.counts)[-1]) + 1
        if last <= LEVELS:
            return self.amax
        edges = [*range(LEVELS, last, STRIDE), last]
        losses = [self._divergence(edge) for edge in edges]
        best = edges[int(np.argmin(losses))]
        return min(self.amax, best * self.limit / BINS)

    def _divergence(self, edge: int) -> float:
        """Kullback-Leibler divergence of 128 levels over the first `edge` bins; infinite when nothing is inside."""
        inside = self.counts[:edge].astype(np.float64)
        inside[0] = 0
        reference = inside.copy()
        reference[-1] += self.counts[edge:].sum()
        level = np.arange(edge) * LEVELS // edge
        filled = inside > 0
        mass = np.bincount(level, weights=inside, minlength=LEVELS)
        bins = np.bincount(level, weights=filled, minlength=LEVELS)
        spread = np.divide(mass, bins, out=np.zeros(LEVELS), where=bins > 0)
        candidate = np.where(filled, spread[level], 0.0)
        if not candidate.sum():
            return math.inf
        p, q = reference / reference.sum(), candidate / candidate.sum()
        used = p > 0
        floor = 1e-12  # the last bin can hold outliers where the candidate has nothing
        return float(np.sum(p[used] * np.log(p[used] / np.maximum(q[used], floor))))
