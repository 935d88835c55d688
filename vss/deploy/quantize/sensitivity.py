"""Which layers may be INT8? What each group of layers costs by the task's own metric, and which go back first."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vss.core.errors import VssError
from vss.core.files import read_json, write_json
from vss.deploy.backends import BACKENDS
from vss.deploy.backends.ort import extended, tapped
from vss.deploy.quantize.layers import Net, read_onnx

if TYPE_CHECKING:
    from onnx import ModelProto

KIND, SCHEMA = "vss.precision_choice", 1
Score = Callable[[Sequence[str]], float]
"""Layers that stay in floating point -> metric of the INT8 file, in percent, higher is better."""
Tick = Callable[[], None]
ROUNDING = 1e-5
"""Two float32 runs of one layer, optimised differently, are this close; a smaller error is none."""


def scan(
    groups: Mapping[str, Sequence[str]], score: Score, baseline: float, tick: Tick | None = None
) -> list[dict[str, Any]]:
    """The metric when only one group of layers is in INT8, for every group; `tick` is called after each.

    Args:
        groups: name -> layers; together all layers that INT8 is considered for.
        baseline: metric with every layer in floating point.

    Returns:
        Rows {"group", "layers", "metric", "drop"}, `drop` in points.
    """
    everything = [layer for layers in groups.values() for layer in layers]
    rows = []
    for name, layers in groups.items():
        metric = score([layer for layer in everything if layer not in set(layers)])
        rows.append({"group": name, "layers": list(layers), "metric": metric, "drop": baseline - metric})
        if tick:
            tick()
    return rows


def first_to_free(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Groups in the order in which they go back to floating point: most points lost for the time saved first.

    A row may hold `gain_ms`, the measured time that INT8 saves in its group. A group that saves nothing goes before all
    that save. Without times the points alone decide.
    """

    def key(row: Mapping[str, Any]) -> tuple[float, float]:
        gain = row.get("gain_ms")
        if gain is None:
            return 0.0, -row["drop"]
        return (0.0, -row["drop"]) if gain <= 0 else (1.0, -row["drop"] / gain)

    return [row["group"] for row in sorted(rows, key=key)]


def greedy_fallback(
    rows: Sequence[Mapping[str, Any]], score: Score, baseline: float, max_drop: float
) -> dict[str, Any]:
    """Free as few groups as keep the drop within `max_drop`, in the order of `first_to_free`, found by halving.

    What is returned has been measured: losses of single groups do not add up, so they order the groups and decide
    nothing else.

    Returns:
        {"freed": groups, "keep": their layers, "metric", "drop", "within", "tried": [{"freed": number, "metric",
        "drop"}, ...]}; when nothing but all of them will do, `within` is False and `metric` None.
    """
    order, layers = first_to_free(rows), {row["group"]: row["layers"] for row in rows}
    tried: dict[int, float] = {}

    def keep(count: int) -> list[str]:
        return [layer for group in order[:count] for layer in layers[group]]

    def passes(count: int) -> bool:
        tried[count] = score(keep(count))
        return baseline - tried[count] <= max_drop

    low, high = 0, len(order)
    if passes(0):
        high = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    metric = tried.get(high)
    return {
        "freed": order[:high],
        "keep": keep(high),
        "metric": metric,
        "drop": None if metric is None else baseline - metric,
        "within": metric is not None,
        "tried": [{"freed": count, "metric": tried[count], "drop": baseline - tried[count]} for count in sorted(tried)],
    }


@dataclass(frozen=True)
class Choice:
    """What a search decided, as a file that the export takes: the network that it is for, the layers that stay in
    floating point, and everything that was measured on the way.
    """

    weights_sha256: str
    keep: tuple[str, ...]
    facts: dict[str, Any]

    def save(self, path: Path | str) -> Path:
        body = {"weights_sha256": self.weights_sha256, "keep": list(self.keep), "facts": self.facts}
        return write_json(path, {"kind": KIND, "schema": SCHEMA, **body})

    @classmethod
    def load(cls, path: Path | str, weights_sha256: str) -> Choice:
        """Raises `VssError` for one of another network."""
        data = read_json(path, kind=KIND, schema=SCHEMA)
        wanted = {"weights_sha256": str, "keep": list, "facts": dict}
        wrong = [key for key, kind in wanted.items() if not isinstance(data.get(key), kind)]
        if wrong or not all(isinstance(layer, str) for layer in data["keep"]):
            raise VssError(f"{path} has no whole {' and '.join(wrong or ['keep'])}; search again: vss sensitivity.")
        if data["weights_sha256"] != weights_sha256:
            raise VssError(f"{path} was chosen for other weights than these; run vss sensitivity on this checkpoint.")
        return cls(weights_sha256, tuple(data["keep"]), data["facts"])


def first_diverging(
    reference: Path | str,
    candidate: Path | str,
    feed: Mapping[str, np.ndarray],
    *,
    limit: float | None = None,
    optimisation: str = "all",
    runtime: str = "onnxruntime",
) -> dict[str, Any]:
    """Name the layer at which a converted or built file leaves the float32 file it came from.

    Args:
        reference: float32 ONNX, run as written.
        candidate: ONNX of the same network in another precision, run by `runtime`, onnxruntime at `optimisation`;
            tensors keep their names.
        feed: what both take; real images.
        limit: relative error, root of mean squares, above which a layer's result diverges; the default is half of the
            error at the last layer, so that the layer is named at which most of it has come together.

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
        return _error(models, points[layer], _there(points[layer], names[1]), feed, optimisation, runtime)

    return halve(list(points), error_of, limit)


def _there(tensor: str, names: set[str]) -> str:
    """The name under which a candidate has a tensor; a float32 layer of a float16 file gives it before the cast."""
    return next((name for name in (tensor, f"{tensor}_cast_to_fp16") if name in names), "")


def _error(
    models: Sequence[ModelProto], here: str, there: str, feed: Mapping[str, np.ndarray], optimisation: str, runtime: str
) -> float:
    with tapped(models[0], [here], "disabled") as session:
        expected = session.run([here], dict(feed))[0]
    if runtime == "onnxruntime":
        with tapped(models[1], [there], optimisation) as session:
            return relative_error(expected, session.run([there], dict(feed))[0])
    with tempfile.TemporaryDirectory(prefix="vss-bisect-") as folder:
        path = extended(models[1], [there], Path(folder) / "candidate.onnx")
        with BACKENDS[runtime].open(path) as session:
            return relative_error(expected, session.run(feed)[there])


def relative_error(expected: np.ndarray, found: np.ndarray) -> float:
    """Root of the mean squared difference over that of the expected values; infinite where one is not finite."""
    expected, found = expected.astype(np.float64), found.astype(np.float64)
    if not np.isfinite(found).all():
        return math.inf
    size = float(np.sqrt(np.mean(expected**2)))
    return float(np.sqrt(np.mean((found - expected) ** 2))) / max(size, 1e-30)


def halve(layers: Sequence[str], error_of: Callable[[str], float], limit: float | None) -> dict[str, Any]:
    """Find neighbours in `layers` of which the first is inside the limit and the second is not: at every moment the
    layer at the lower end is inside and the one at the upper end outside, although errors need not grow from layer to
    layer. `error_of` is costly, and asked about log2(n) times.
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
    if found["layer"] is None:
        return f"No layer diverges: {found['reason']}."
    before = found["before"]
    start = f"{before['error']:.3g} at {before['layer']}" if before else "nothing at the input"
    return f"The first layer to diverge is {found['layer']}: relative error {found['error']:.3g}, after {start}."
