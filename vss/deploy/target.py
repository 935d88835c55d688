"""What an ONNX file does not say of the runtime that it is for: widths that cost it extra kernels, ops that it never
runs in INT8, and how it wants INT8 written.

All are fields of a backend, and one without them has no such rule:

- `steps`: precision -> op of a convolution -> channels of which its widths are multiples; `steps_why` says why;
- `float_ops`: ONNX ops that it runs in floating point, quantised or not;
- `int8`: types and bits of Q/DQ that it computes as written, see `vss.deploy.backends.base.Int8`.

`title` is its name for people.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Set

from vss.core.errors import listed
from vss.deploy.backends import BACKENDS
from vss.deploy.backends.base import Int8


def float_ops(backend: str) -> dict[str, str]:
    """Op -> why it stays in floating point on a runtime."""
    runtime = BACKENDS[backend]
    why = f"{getattr(runtime, 'title', backend)} runs it in floating point"
    return dict.fromkeys(getattr(runtime, "float_ops", ()), why)


def int8_of(backend: str) -> Int8:
    """How a runtime wants INT8 written; "" is any."""
    return getattr(BACKENDS[backend], "int8", Int8()) if backend else Int8()


def step_for(backends: Iterable[str], precisions: Iterable[str], ops: Set[str]) -> tuple[int, str]:
    """The least channels of which all widths are multiples so that no convolution of `ops` costs an extra kernel in any
    engine, one a runtime and precision; and why."""
    step, reasons, kinds = 1, list[str](), list(precisions)
    for name in dict.fromkeys(map(BACKENDS.canonical, backends)):
        runtime = BACKENDS[name]
        steps = getattr(runtime, "steps", {})
        wanted = {kind: math.lcm(*(n for op, n in steps.get(kind, {}).items() if op in ops)) for kind in kinds}
        step = math.lcm(step, *wanted.values())
        texts = [f"{n} in {listed(k for k in kinds if wanted[k] == n)}" for n in dict.fromkeys(wanted.values())]
        why = getattr(runtime, "steps_why", "it says nothing of widths")
        reasons.append(f"{name} wants {' and '.join(texts)}: {why}")
    return step, "; ".join(reasons)
