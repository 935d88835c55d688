"""Which layer is the first to diverge? Two files of one network, compared inside, by halving."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vss.core.errors import VssError
from vss.deploy.layers import Net, read_onnx
from vss.deploy.ranges import tap

ROUNDING = 1e-5
"""Two float32 runs of one layer, optimised differently, are this close; a smaller error is none."""


def first_diverging(
    reference: Path | str,
    candidate: Path | str,
    feed: Mapping[str, np.ndarray],
    *,
    limit: float | None = None,
    optimisation: str = "all",
) -> dict[str, Any]:
    """Name the layer at which a converted or built file leaves the float32 file it came from.

    Args:
        reference: float32 ONNX.
        candidate: ONNX of the same network in another precision; tensors keep their names.
        feed: what both take; real images.
        limit: relative error, root of mean squares, above which a layer's result diverges; the default is half of the
            error at the last layer, so that the layer is named at which most of it has come together.
        optimisation: at which the candidate runs, see `vss.deploy.ort`; the reference runs as written.

    Returns:
        {"layer", "error", "before": {"layer", "error"} of the layer in front, "end": error at the last layer, "limit",
        "probes"}; `layer` is None, with `reason`, when nothing diverges.
    """
    models = [read_onnx(path) for path in (reference, candidate)]
    net = Net(models[0])
    names = [{name for node in model.graph.node for name in node.output} for model in models]
    points = {layer.name: layer.output for layer in net.layers if _there(layer.output, names[1])}
    if not points:
        raise VssError(f"{candidate} has no layer of {reference} in it; compare two files of one network.")

    def error_of(layer: str) -> float:
        return _error(models, points[layer], _there(points[layer], names[1]), feed, optimisation)

    return halve(list(points), error_of, limit)


def _there(tensor: str, names: set[str]) -> str:
    """The name under which a candidate has a tensor; a float32 layer of a float16 file gives it before the cast."""
    return next((name for name in (tensor, f"{tensor}_cast_to_fp16") if name in names), "")


def _error(models: Sequence[Any], here: str, there: str, feed: Mapping[str, np.ndarray], optimisation: str) -> float:
    with tempfile.TemporaryDirectory(prefix="vss-bisect-") as folder:
        levels = ("disabled", optimisation)
        values = [
            tap(model, [name], Path(folder) / f"{index}.onnx", levels[index]).run([name], dict(feed))[0]
            for index, (model, name) in enumerate(zip(models, (here, there), strict=True))
        ]
    return relative_error(values[0], values[1])


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    """Root of the mean squared difference over that of the expected values; infinite where one is not finite."""
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    if not np.isfinite(found).all():
        return math.inf
    size = float(np.sqrt(np.mean(expected**2)))
    return float(np.sqrt(np.mean((found - expected) ** 2))) / max(size, 1e-30)


def halve(layers: Sequence[str], error_of: Callable[[str], float], limit: float | None) -> dict[str, Any]:
    """Find neighbours in `layers` of which the first is inside the limit and the second is not.

    Errors need not grow from layer to layer: at every moment the layer at the lower end is inside and the one at the
    upper end outside, so that the pair that is found has this property.

    Args:
        layers: in the order of the computation.
        error_of: relative error of a layer's result; costly, asked about log2(n) times.
        limit: None is half of the error of the last layer.
    """
    seen = {layers[-1]: error_of(layers[-1])}
    end = seen[layers[-1]]
    bound = limit if limit is not None else (end / 2 if math.isfinite(end) else 1.0)
    if end <= max(bound, ROUNDING):
        return {"layer": None, "end": end, "limit": bound, "probes": 1, "reason": _reason(end, bound)}
    low, high = -1, len(layers) - 1
    while high - low > 1:
        middle = (low + high) // 2
        seen[layers[middle]] = error_of(layers[middle])
        low, high = (middle, high) if seen[layers[middle]] <= bound else (low, middle)
    before = {"layer": layers[low], "error": seen[layers[low]]} if low >= 0 else None
    found = {"layer": layers[high], "error": seen[layers[high]], "before": before}
    return found | {"end": end, "limit": bound, "probes": len(seen)}


def _reason(end: float, bound: float) -> str:
    if end <= ROUNDING:
        return "every layer gives the same; what differs is behind the last one"
    return f"the last layer is off by {end:.3g}, inside the limit of {bound:.3g}"


def sentence(found: Mapping[str, Any]) -> str:
    """What was found, for a person."""
    if found["layer"] is None:
        return f"No layer diverges: {found['reason']}."
    before = found["before"]
    start = f"{before['error']:.3g} at {before['layer']}" if before else "nothing at the input"
    return f"The first layer to diverge is {found['layer']}: relative error {found['error']:.3g}, after {start}."
