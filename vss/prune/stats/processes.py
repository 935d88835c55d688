"""Sums over the processes of a distributed run; every process must ask in the same order."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum over processes where a process group runs.

    NCCL only moves device memory, so a value on the CPU travels by way of the current CUDA device.
    """
    return _reduce(value, "SUM")


def max_over_processes(value: Tensor) -> Tensor:
    """Largest value over processes, as `sum_over_processes`."""
    return _reduce(value, "MAX")


def _reduce(value: Tensor, operation: str) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    home = value.device
    if home.type == "cpu" and torch.distributed.get_backend() == "nccl":
        value = value.cuda()
    torch.distributed.all_reduce(value, op=getattr(torch.distributed.ReduceOp, operation))
    return value.to(home)
