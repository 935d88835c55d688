"""The floors of every op: the Python reference, the native CPU kernel and the CUDA kernel, where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Floors, on_cuda

from vss import ops

FLOORS = ["reference", "native", pytest.param("cuda", marks=pytest.mark.gpu)]


def on_cpu(value: Any) -> Any:
    return tuple(map(on_cpu, value)) if isinstance(value, tuple) else None if value is None else value.cpu()


def cuda_floor(op: str) -> Callable[..., Any]:
    """The op on copies of its arguments on the device; what it writes in place comes back, too."""

    def call(*args: Any) -> Any:
        moved = on_cuda(args)
        result = on_cpu(getattr(torch.ops.vss, op)(*moved))
        if op == "gram_accumulate":
            args[0].copy_(moved[0])
        return result

    return call


def reference_of(op: str) -> Callable[..., Any]:
    """The Python reference of an op."""
    return getattr(ops.reference, op, None) or getattr(ops.reference_pruning, op)


@pytest.fixture(params=FLOORS)
def floor(request: pytest.FixtureRequest) -> Floors:
    """`floor(op)` is the function to test; it takes and gives tensors on the CPU. What is not there is skipped."""

    def pick(op: str) -> Callable[..., Any]:
        if request.param == "reference":
            return reference_of(op)
        if request.param == "cuda":
            if ops.status()[op]["CUDA"] != "native":
                pytest.skip("needs the extension vss._C with CUDA (VSS_CUDA=1 pip install --no-build-isolation -e .)")
            return cuda_floor(op)
        if ops.status()[op]["CPU"] == "reference":
            pytest.skip("needs the extension vss._C (pip install --no-build-isolation -e .)")
        return getattr(torch.ops.vss, op)

    return pick


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
