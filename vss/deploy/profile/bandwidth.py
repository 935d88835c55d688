"""How fast memory is, by copying: what a unit that only moves data can be compared with."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

COPIES = 5
SIZES = {"cpu": 2**25, "cuda": 2**28}


def bandwidth(device: str) -> float:
    """Bytes read and written per millisecond by the fastest of some large copies on "cpu" (one thread) or "cuda"."""
    size = SIZES[device]
    copy = _on_gpu(size) if device == "cuda" else _on_cpu(size)
    return 2 * size / max(min(copy() for _ in range(COPIES)), 1e-6)


def _on_cpu(size: int) -> Callable[[], float]:
    source = np.ones(size, np.uint8)
    target = np.empty_like(source)

    def copy() -> float:
        start = time.thread_time_ns()
        np.copyto(target, source)
        return (time.thread_time_ns() - start) / 1e6

    return copy


def _on_gpu(size: int) -> Callable[[], float]:
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))

    return copy
