"""A latency target as a user types it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from vss.core.errors import VssError


@dataclass(frozen=True)
class Target:
    """A time: `value` of the uncut network's (`relative`), or milliseconds.

    >>> Target.parse("0.5x"), Target.parse("12 ms")
    (Target(value=0.5, relative=True), Target(value=12.0, relative=False))
    """

    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "0.5x" or "12ms"; anything else is refused."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(x|ms)\s*", text.lower())
        value = float(match[1]) if match else 0.0
        if match is None or not value > 0 or (match[2] == "x" and value > 1):
            raise VssError(
                f"the latency target is {text!r}; expected a fraction as 0.5x (at most 1x) or a time as 12ms."
            )
        return cls(value, match[2] == "x")

    def ratio(self, uncut_ms: float) -> float:
        """Share of the uncut network's time."""
        return self.value if self.relative else self.value / uncut_ms
