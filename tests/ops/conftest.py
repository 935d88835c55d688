"""Both floors of every op: the Python reference and, where it is built, the native kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import Floors

from vss import ops


@pytest.fixture(params=["reference", "native"])
def floor(request: pytest.FixtureRequest) -> Floors:
    """`floor(op)` is the function to test; the native floor is skipped where it is not built."""

    def pick(op: str) -> Callable[..., Any]:
        if request.param == "reference":
            return getattr(ops.reference, op)
        if ops.status()[op]["CPU"] != "native":
            pytest.skip("needs the extension vss._C (pip install --no-build-isolation -e .)")
        return getattr(torch.ops.vss, op)

    return pick


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
