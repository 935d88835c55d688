"""INT8 ranges: the largest magnitude of every tensor that will be quantised, measured on images and kept by hash."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vss.core.errors import VssError, fault, need, unknown
from vss.core.files import read_json, sha256_file, sha256_json, write_json
from vss.deploy.histogram import AbsHistogram
from vss.deploy.layers import Net, read_onnx
from vss.deploy.ort import OPTIMISATION

KIND, SCHEMA = "vss.ranges", 1
METHODS = ("minmax", "percentile", "entropy")
Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Method:
    """How a range is read off what was seen.

    Args:
        name: "minmax" (the largest magnitude), "percentile" or "entropy" (see `vss.deploy.histogram`).
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
        """JSON-ready; `percent` only where it matters."""
        return {"method": self.name} | ({"percent": self.percent} if self.name == "percentile" else {})


@dataclass(frozen=True)
class Ranges:
    """Ranges of one ONNX file.

    Attributes:
        method: see `Method.facts`.
        onnx_sha256: of the float32 file that they were measured on.
        values: tensor -> range, above 0 and finite.
        calibration: manifest of the calibration set.
    """

    method: dict[str, Any]
    onnx_sha256: str
    values: dict[str, float]
    calibration: dict[str, Any] = field(default_factory=dict)

    def sha256(self) -> str:
        """Hex SHA-256 of method, file, values and the set's hash."""
        return sha256_json([self.method, self.onnx_sha256, self.values, self.calibration.get("sha256")])

    def save(self, path: Path | str) -> Path:
        """Write JSON, whole or not at all."""
        body = {"method": self.method, "onnx_sha256": self.onnx_sha256, "values": self.values}
        whole = {"kind": KIND, "schema": SCHEMA, **body, "calibration": self.calibration}
        return write_json(path, whole, sealed=True)

    @classmethod
    def load(cls, path: Path | str) -> Ranges:
        """Read what `save` wrote; raises `VssError` for another file or values that are no ranges."""
        data = read_json(path, kind=KIND, schema=SCHEMA, sealed=True)
        try:
            found = _File.model_validate(data)
        except ValidationError as error:
            raise VssError(f"{path} holds no ranges: {fault(error)}; calibrate again.") from error
        return cls(found.method, found.onnx_sha256, found.values, found.calibration)


class _File(BaseModel):
    """The schema of a file of ranges."""

    model_config = ConfigDict(strict=True)

    method: dict[str, Any]
    onnx_sha256: str
    values: dict[str, Annotated[float, Field(gt=0, lt=1e38)]]
    calibration: dict[str, Any]


def _usable(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def measure(onnx: Path | str, feeds: Iterable[Feed], tensors: Sequence[str]) -> dict[str, AbsHistogram]:
    """Run the file over all feeds and histogram the magnitudes of these tensors.

    One batch is in memory at a time, and histograms have a fixed size: memory does not grow with the data.

    Args:
        onnx: a float32 file.
        feeds: input name -> array, as the file takes them.
        tensors: names of activations.

    Raises:
        VssError: no feed at all.
    """
    histograms = {name: AbsHistogram() for name in tensors}
    with tempfile.TemporaryDirectory(prefix="vss-calibrate-") as folder:
        session = tap(read_onnx(onnx), tensors, Path(folder) / "tapped.onnx")
        seen = 0
        for seen, feed in enumerate(feeds, start=1):  # noqa: B007
            for name, value in zip(tensors, session.run(list(tensors), dict(feed)), strict=True):
                histograms[name].update(value)
    if not seen:
        raise VssError("the calibration set is empty; give at least one training image.")
    return histograms


def tap(model: Any, tensors: Sequence[str], path: Path, optimisation: str = "disabled") -> Any:
    """An onnxruntime session, not optimised unless asked, of a model that also gives these tensors.

    Args:
        path: where the extended model is written.
        optimisation: see `vss.deploy.ort`.
    """
    onnx, ort = need("onnx", "looking into ONNX files"), need("onnxruntime", "running ONNX files")
    tapped = copy.deepcopy(model)
    own = {value.name for value in tapped.graph.output}
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors if name not in own)
    onnx.save(tapped, str(path))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMISATION[optimisation])
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def ranges_of(
    onnx: Path | str,
    histograms: Mapping[str, AbsHistogram],
    method: Method,
    *,
    calibration: Mapping[str, Any] | None = None,
    allow_dead: Iterable[str] = (),
) -> Ranges:
    """Turn what was measured into ranges.

    Args:
        calibration: manifest of the images.
        allow_dead: layers that will not be quantised; what feeds them alone may have no range.

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
    return Ranges(method.facts(), sha256_file(onnx), values, dict(calibration or {}))


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
    """What ranges depend on, as one hash: the file's bytes, the method, the images and their preprocessing."""
    return sha256_json([KIND, SCHEMA, sha256_file(onnx), method.facts(), calibration_sha256, preprocess_sha256])
