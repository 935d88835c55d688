"""A clock that obeys a known law, read in place of a runtime."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vss.deploy.profile.units import Reading, Shape
from vss.prune.plan import Group, Slot


class Clockwork:
    """A chain 3 -> g0 -> g1 -> g2 -> 5 whose times follow a law: 16 channels at once, an unaligned one costs double.

    Read by `vss.deploy.profile.build` in place of a runtime; every reading is exact; `last` of them are all there are.
    """

    def __init__(self, channels: Sequence[int] = (64, 96, 128), block: int = 16, last: float = float("inf")) -> None:
        self.groups = [
            Group(f"g{i}", count, (Slot(f"l{i}.weight", 0), Slot(f"l{i + 1}.weight", 1)))
            for i, count in enumerate(channels)
        ]
        self.key: dict[str, Any] = {"device": "clockwork", "backend": "onnxruntime", "versions": {"law": "1"}}
        self.block, self.last, self.calls = block, last, 0

    def layers(self, widths: Sequence[int]) -> list[tuple[str, int, int]]:
        sides = [3, *widths, 5]
        return [(f"l{i}", a, b) for i, (a, b) in enumerate(itertools.pairwise(sides))]

    def read(self, widths: Sequence[int]) -> Reading:
        if self.calls == self.last:
            raise KeyboardInterrupt
        self.calls += 1
        units = {name: self.time(a, b) for name, a, b in self.layers(widths)} | {"ArgMax:labels": 0.5}
        return Reading(units, sum(units.values()) + 0.25)

    def time(self, a: int, b: int) -> float:
        odd = 2.0 if b % self.block and b != 5 else 1.0
        return 0.01 + 1e-4 * a * float(np.ceil(b / self.block)) * self.block * odd

    def shapes(self, widths: Sequence[int]) -> dict[str, Shape]:
        found = {name: Shape(a, b, 10, 10 * a * b, 4 * (a + b)) for name, a, b in self.layers(widths)}
        return found | {"ArgMax:labels": Shape(5, 1, 10, 0, 0)}
