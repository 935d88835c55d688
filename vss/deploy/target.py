"""What an ONNX file does not say of the runtime that it is for: widths that cost it extra kernels, and ops that it
never runs in INT8.

Both are fields of a backend, and one without them has no such rule:

- `steps`: precision -> op of a convolution -> channels of which its widths are multiples; `steps_why` says why;
- `float_ops`: ONNX ops that it runs in floating point, quantised or not.

`title` is its name for people.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Set

from vss.core.errors import listed
from vss.deploy.backends import BACKENDS


def float_ops(backend: str) -> dict[str, str]:
    """Op -> why it stays in floating point on a runtime."""
    runtime = BACKENDS[backend]
    why = f"{getattr(runtime, 'title', backend)} runs it in floating point"
    return dict.fromkeys(getattr(runtime, "float_ops", ()), why)


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
