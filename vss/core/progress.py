"""Lines for work that takes long, through `logging`, so that they are there without a terminal too."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)
EVERY_S = 30.0
T = TypeVar("T")


def steadily(items: Iterable[T], what: str, total: int, *, every: float = EVERY_S) -> Iterator[T]:
    """The items; every half minute a line says how many of `total` are done and how long the rest will take."""
    start = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - told >= every:
            told = now
            log.info("%s: %d of %d, %s left", what, done, total, duration((now - start) * (total - done) / done))
        yield item


def duration(seconds: float) -> str:
    """Seconds for people.

    >>> duration(9.6), duration(150), duration(7200)
    ('10 s', '2.5 min', '2.0 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
