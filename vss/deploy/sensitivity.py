"""Which layers may be INT8? What each group of layers costs by the task's own metric, and how far to retreat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vss.core.errors import VssError
from vss.core.files import read_json, write_json

KIND, SCHEMA = "vss.precision_choice", 1
Score = Callable[[Sequence[str]], float]
"""Layers that stay in floating point -> metric of the INT8 file, in percent, higher is better."""
Tick = Callable[[], None]


def scan(groups: Mapping[str, Sequence[str]], score: Score, baseline: float, tick: Tick | None = None) -> list[dict]:
    """The metric when only one group is in INT8, for every group.

    Args:
        groups: name -> layers; together all layers that INT8 is considered for.
        baseline: metric with every layer in floating point.
        tick: called after each group.

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

    A row may hold `gain_ms`, the measured time that INT8 saves in its group. A group that saves nothing costs nothing
    to free and goes before all that save, the one that loses most first. Without times the points alone decide.
    """

    def key(row: Mapping[str, Any]) -> tuple[float, float]:
        gain = row.get("gain_ms")
        if gain is None:
            return 0.0, -row["drop"]
        return (0.0, -row["drop"]) if gain <= 0 else (1.0, -row["drop"] / gain)

    return [row["group"] for row in sorted(rows, key=key)]


def retreat(rows: Sequence[Mapping[str, Any]], score: Score, baseline: float, max_drop: float) -> dict[str, Any]:
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
    """What a search decided, as a file that the export takes.

    Attributes:
        weights_sha256: of the network that it is for.
        keep: layers that stay in floating point.
        facts: everything that was measured on the way.
    """

    weights_sha256: str
    keep: tuple[str, ...]
    facts: dict[str, Any]

    def save(self, path: Path | str) -> Path:
        """Write JSON, whole or not at all."""
        body = {"weights_sha256": self.weights_sha256, "keep": list(self.keep), "facts": self.facts}
        return write_json(path, {"kind": KIND, "schema": SCHEMA, **body})

    @classmethod
    def load(cls, path: Path | str, weights_sha256: str) -> Choice:
        """Read one for the network with these weights; raises `VssError` for another network's."""
        data = read_json(path, kind=KIND, schema=SCHEMA)
        wanted = {"weights_sha256": str, "keep": list, "facts": dict}
        wrong = [key for key, kind in wanted.items() if not isinstance(data.get(key), kind)]
        if wrong or not all(isinstance(layer, str) for layer in data["keep"]):
            raise VssError(f"{path} has no whole {' and '.join(wrong or ['keep'])}; search again: vss sensitivity.")
        if data["weights_sha256"] != weights_sha256:
            raise VssError(f"{path} was chosen for other weights than these; run vss sensitivity on this checkpoint.")
        return cls(weights_sha256, tuple(data["keep"]), data["facts"])
