"""A histogram of absolute values that grows with the range and never with the data, and INT8 ranges from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vss.core.errors import VssError, fault, unknown
from vss.core.files import read_json, sha256_file, sha256_json, write_json
from vss.deploy.backends.ort import tapped
from vss.deploy.quantize.layers import Net, read_onnx

BINS = 4096
LEVELS = 128
"""Magnitudes of symmetric INT8: 0..127."""
STRIDE = 16
"""Entropy tries every so many-th edge, as TensorRT's calibrator does not say and common implementations choose."""
KIND, SCHEMA = "vss.ranges", 1
METHODS = ("minmax", "percentile", "entropy")
Feed = Mapping[str, np.ndarray]


class AbsHistogram:
    """Counts of |x| over everything that was shown to it, in `BINS` equal bins from 0 to `limit`.

    `limit` is a power of two: when a larger value comes it doubles and pairs of bins become one. So the figures do not
    depend on the order of the data, and memory does not grow with it. onnxruntime's calibrators give other figures:
    their bins have the width that the first batch asks for, more of them are added for every larger value, and all
    intermediate results of a calibration are kept.

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
        outside in its last bin. Deviation: the first bin is left out, since the zeros behind a ReLU are represented at
        every range.
        """
        if not self.limit:
            return self.amax
        last = int(np.flatnonzero(self.counts)[-1]) + 1
        if last <= LEVELS:
            return self.amax
        edges = [*range(LEVELS, last, STRIDE), last]
        losses = [self._divergence(edge) for edge in edges]
        best = edges[int(np.argmin(losses))]
        return float(min(self.amax, best * self.limit / BINS))

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


@dataclass(frozen=True)
class Method:
    """How a range is read off what was seen.

    Args:
        name: "minmax" (the largest magnitude), "percentile" or "entropy" (see `vss.deploy.quantize.ranges`).
        percent: of "percentile": how many of all magnitudes lie inside.
    """

    name: str = "percentile"
    percent: float = 99.99

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise unknown("calibration method", self.name, METHODS)
        if not 50 <= self.percent <= 100:
            raise VssError(f"the percentile is {self.percent}; expected 50 to 100 percent of the magnitudes.")

    def range_of(self, histogram: AbsHistogram) -> float:
        """One number, above 0 for a tensor that can be quantised."""
        if self.name == "minmax" or not math.isfinite(histogram.amax):
            return histogram.amax
        return histogram.percentile(self.percent) if self.name == "percentile" else histogram.entropy()

    def facts(self) -> dict[str, Any]:
        return {"method": self.name} | ({"percent": self.percent} if self.name == "percentile" else {})


class Ranges(BaseModel):
    """Ranges of one ONNX file.

    Attributes:
        method: see `Method.facts`.
        onnx_sha256: of the float32 file that they were measured on.
        values: tensor -> range, above 0 and finite.
        calibration: manifest of the calibration set.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    method: dict[str, Any]
    onnx_sha256: str
    values: dict[str, Annotated[float, Field(gt=0, lt=1e38)]]
    calibration: dict[str, Any]

    def sha256(self) -> str:
        return sha256_json([self.method, self.onnx_sha256, self.values, self.calibration.get("sha256")])

    def save(self, path: Path | str) -> Path:
        return write_json(path, {"kind": KIND, "schema": SCHEMA, **self.model_dump()}, sealed=True)

    @classmethod
    def load(cls, path: Path | str) -> Ranges:
        data = read_json(path, kind=KIND, schema=SCHEMA, sealed=True)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise VssError(f"{path} holds no ranges: {fault(error)}; calibrate again.") from error


def _usable(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def measure(onnx: Path | str, feeds: Iterable[Feed], tensors: Sequence[str]) -> dict[str, AbsHistogram]:
    """Histogram the magnitudes of these tensors of a float32 file over all feeds, one batch in memory at a time."""
    histograms = {name: AbsHistogram() for name in tensors}
    seen = 0
    with tapped(read_onnx(onnx), tensors, "disabled") as session:
        for seen, feed in enumerate(feeds, start=1):  # noqa: B007
            for name, value in zip(tensors, session.run(list(tensors), dict(feed)), strict=True):
                histograms[name].update(value)
    if not seen:
        raise VssError("the calibration set is empty; give at least one training image.")
    return histograms


def ranges_of(
    onnx: Path | str,
    histograms: Mapping[str, AbsHistogram],
    method: Method,
    *,
    calibration: Mapping[str, object] | None = None,
    allow_dead: Iterable[str] = (),
) -> Ranges:
    """Turn what was measured into ranges. What feeds `allow_dead` layers alone, which will not be quantised, may have
    none.

    Raises:
        VssError: a range that is zero or not finite, with the tensor and the layer that it feeds.
    """
    net = Net(read_onnx(onnx))
    spared = set(allow_dead)
    values = {name: method.range_of(histogram) for name, histogram in histograms.items()}
    for name in [name for name, value in values.items() if not _usable(value)]:
        layer = reader_of(net, name)
        if layer not in spared:
            raise VssError(
                f"the range of tensor {name!r}, which feeds layer {layer!r}, is {values[name]} over the calibration "
                f"images; INT8 needs a number above 0: keep that layer in floating point (--keep {layer}), or find out "
                "why it gives nothing but that."
            )
        del values[name]
    return Ranges(
        method=method.facts(), onnx_sha256=sha256_file(onnx), values=values, calibration=dict(calibration or {})
    )


def reader_of(net: Net, tensor: str) -> str:
    """The first layer that a tensor reaches; its own name where it reaches none."""
    by_node = {layer.node: layer.name for layer in net.layers}
    queue, seen = [tensor], set[str]()
    while queue:
        for node in net.consumers.get(queue.pop(0), []):
            if node.name in by_node:
                return by_node[node.name]
            if node.name not in seen:
                seen.add(node.name)
                queue += node.output
    return tensor


def cache_key(onnx: Path | str, method: Method, calibration_sha256: str, preprocess_sha256: str) -> str:
    """What ranges depend on, as one hash."""
    return sha256_json([KIND, SCHEMA, sha256_file(onnx), method.facts(), calibration_sha256, preprocess_sha256])
