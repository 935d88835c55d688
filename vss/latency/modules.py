"""Times of torch modules inside of the whole network: hooks with CUDA events on a GPU, with the clock on a CPU.

Leaf modules are units; what lies between them (concatenation, resize, argmax) is the unit `between`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vss.deploy.eager import _torch_threads
from vss.latency.reading import WARM_RUNS, Reading, pinned
from vss.latency.units import Shape
from vss.latency.variants import cut_to
from vss.prune.cost import CostModel
from vss.prune.groups import Group


class TorchSubject:
    """A network in torch, from normalised float images to labels.

    Args:
        model: the network.
        groups, key: see `vss.latency.subject`.
        device, precision: default the CPU; "fp32" or "fp16" (channels last).
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        key: dict[str, Any],
        *,
        size: tuple[int, int],
        threads: int,
        batch: int = 1,
        device: torch.device | None = None,
        precision: str = "fp32",
        seconds: float = 0.4,
    ) -> None:
        self.groups, self.key, self._model = list(groups), key, model
        self._threads, self._seconds, self._device = threads, seconds, device or torch.device("cpu")
        self._dtype = torch.float16 if precision == "fp16" else torch.float32
        images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
        self._images = self._placed(images)

    def _placed(self, value: Any) -> Any:
        layout = torch.channels_last if self._dtype == torch.float16 else torch.preserve_format
        return value.to(self._device, self._dtype, memory_format=layout)

    def _cut(self, widths: Sequence[int]) -> Any:
        return self._placed(cut_to(self._model, self.groups, widths)).eval()

    def read(self, widths: Sequence[int]) -> Reading:
        """Run one variant until the time is up."""
        model = self._cut(widths)
        with pinned(self._threads), _torch_threads(self._threads), torch.inference_mode():
            return read_modules(model, lambda: _labels(model, self._images), self._device, seconds=self._seconds)

    def shapes(self, widths: Sequence[int]) -> dict[str, Shape]:
        """Sizes of every leaf module that runs."""
        model, found = self._cut(widths), {}
        cost = CostModel.measure(model, self._images, forward=_labels)

        def hook(name: str) -> Callable[..., None]:
            def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
                    found[name] = _shape(cost, name, module, inputs[0], output)

            return note

        handles = [module.register_forward_hook(hook(name)) for name, module in _leaves(model)]
        with torch.inference_mode():
            _labels(model, self._images)
        for handle in handles:
            handle.remove()
        return found | {"between": Shape(1, 1, 1, 0, 0)}


def _labels(model: Any, images: Tensor) -> Any:
    return model.predict(images) if hasattr(model, "predict") else model(images)


def _leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if name and not list(module.children())]


def _shape(cost: CostModel, name: str, module: nn.Module, x: Tensor, y: Tensor) -> Shape:
    weights = sum(p.numel() for p in module.parameters(recurse=False))
    macs = cost.positions.get(f"{name}.weight", 0) * x.shape[0]
    weight = getattr(module, "weight", None)
    macs *= weight.numel() if isinstance(weight, Tensor) else 0
    sides = [int(t.shape[1]) if t.ndim > 1 else 1 for t in (x, y)]
    moved = x.element_size() * (x.numel() + y.numel() + weights)
    return Shape(sides[0], sides[1], y.numel() // max(1, sides[1]), macs, moved)


def read_modules(model: nn.Module, call: Callable[[], Any], device: torch.device, *, seconds: float) -> Reading:
    """Least milliseconds of every leaf module and of the whole, over as many calls as fit into `seconds`, at least 5.

    The whole is timed in calls without hooks, in turns with those that have them.
    """
    mark: Callable[[], Any] = _cuda_mark if device.type == "cuda" else time.perf_counter_ns
    span: Callable[[Any, Any], float] = (
        _cuda_span if device.type == "cuda" else (lambda start, end: (end - start) / 1e6)
    )
    runs: list[dict[str, float]] = []
    totals: list[float] = []
    end = time.perf_counter() + seconds
    while len(totals) < 5 + WARM_RUNS or time.perf_counter() < end:
        start = mark()
        call()
        stop = mark()
        _finish(device)
        totals.append(span(start, stop))
        runs.append(_one_run(model, call, device, mark, span))
    units = {name: min(run[name] for run in runs[WARM_RUNS:]) for name in runs[-1]}
    total = min(totals[WARM_RUNS:])
    units["between"] = max(0.0, total - sum(units.values()))
    return Reading(units, total)


def _one_run(model: nn.Module, call: Callable[[], Any], device: torch.device, mark: Any, span: Any) -> dict[str, float]:
    marks: dict[str, list[Any]] = defaultdict(list)
    handles = []
    for name, module in _leaves(model):
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: marks[name].append(mark())))
        handles.append(module.register_forward_hook(lambda *_, name=name: marks[name].append(mark())))
    try:
        call()
        _finish(device)
    finally:
        for handle in handles:
            handle.remove()
    return {n: sum(span(a, b) for a, b in zip(each[::2], each[1::2], strict=True)) for n, each in marks.items()}


def _cuda_mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _cuda_span(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(start.elapsed_time(end))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
