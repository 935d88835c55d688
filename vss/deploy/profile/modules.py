"""Times of torch modules inside of the whole network: hooks with CUDA events on a GPU, with the clock on a CPU.

Leaf modules are units; what lies between them (normalisation, concatenation, resize, argmax, copies from and to the
host) is the unit `between`. On a GPU a kernel that only spins holds the stream back while all others are put on it, so
that they run one after another as in a CUDA graph, and the time of launching them is in no unit.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vss.deploy.backends.eager import TorchSession, torch_threads
from vss.deploy.profile.setting import Setting
from vss.deploy.profile.units import WARM_RUNS, Reading, Shape, least_ms
from vss.deploy.profile.variants import cut_to
from vss.prune.budget import CostModel
from vss.prune.plan import Group

if TYPE_CHECKING:
    from vss.data.transforms import Preprocess


CYCLES_PER_SECOND = 2e9
HELD_BACK = 1.5


class TorchSubject:
    """A network in torch, from uint8 pixels to labels (or to a decision).

    Args:
        model: the network.
        groups, key: see `vss.deploy.profile.setting`.
        setting: where it runs.
        preprocess: size and normalisation.
        seconds: length of one reading.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        key: dict[str, Any],
        setting: Setting,
        *,
        preprocess: Preprocess,
        seconds: float = 0.4,
    ) -> None:
        self.groups, self.key, self._model = list(groups), key, model
        self._setting, self._preprocess, self._seconds = setting, preprocess, seconds
        shape = (setting.batch, *preprocess.size, 3)
        self._feed = {"image": np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)}

    def _session(self, widths: Sequence[int]) -> Any:
        return self._setting.module(cut_to(self._model, self.groups, widths), self._preprocess)

    def read(self, widths: Sequence[int]) -> Reading:
        """Run one variant until the time is up."""
        session = self._session(widths)
        with self._setting.held():
            return read_modules(session, self._feed, seconds=self._seconds)

    def shapes(self, widths: Sequence[int]) -> dict[str, Shape]:
        """Sizes of every leaf module that runs."""
        model, found = cut_to(self._model, self.groups, widths).cpu().eval(), {}
        images = torch.zeros(self._setting.batch, 3, *self._preprocess.size)
        cost = CostModel.measure(model, images, forward=_labels)
        item = 2 if self._setting.precision == "fp16" else 4

        def hook(name: str) -> Callable[..., None]:
            def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
                    found[name] = _shape(cost, name, module, inputs[0], output, item)

            return note

        handles = [module.register_forward_hook(hook(name)) for name, module in _leaves(model)]
        with torch.inference_mode():
            _labels(model, images)
        for handle in handles:
            handle.remove()
        return found | {"between": Shape(1, 1, 1, 0, 0)}


def _labels(model: Any, images: Tensor) -> Any:
    return model.predict(images) if hasattr(model, "predict") else model(images)


def _leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if name and not list(module.children())]


def _shape(cost: CostModel, name: str, module: nn.Module, x: Tensor, y: Tensor, item: int) -> Shape:
    weights = sum(p.numel() for p in module.parameters(recurse=False))
    macs = cost.positions.get(f"{name}.weight", 0) * x.shape[0]
    weight = getattr(module, "weight", None)
    macs *= weight.numel() if isinstance(weight, Tensor) else 0
    sides = [int(t.shape[1]) if t.ndim > 1 else 1 for t in (x, y)]
    moved = item * (x.numel() + y.numel() + weights)
    return Shape(sides[0], sides[1], y.numel() // max(1, sides[1]), macs, moved)


def read_modules(session: TorchSession, feed: Mapping[str, np.ndarray], *, seconds: float, least: int = 5) -> Reading:
    """Least milliseconds of every leaf module, and of a whole run without hooks.

    Args:
        session: the network.
        feed: its input.
        seconds, least: whole runs are timed for so long, and so are runs with hooks; at least so many of each.
    """
    total = least_ms(lambda: session.run(feed), seconds / 2, least, alone=False)
    image = torch.from_numpy(feed["image"]).to(session.device)
    model, held, runs = session.graph.model, 0.0, list[dict[str, float]]()
    end = time.perf_counter() + seconds / 2
    with torch.inference_mode(), torch_threads(session.threads):
        while len(runs) < least + WARM_RUNS or time.perf_counter() < end:
            run, launched = _one_run(model, lambda: session.graph(image), session.device, held)
            runs.append(run)
            held = HELD_BACK * launched
    units = {name: min(run[name] for run in runs[WARM_RUNS:]) for name in runs[-1]}
    units["between"] = max(0.0, total - sum(units.values()))
    return Reading(units, total)


def _one_run(
    model: nn.Module, call: Callable[[], Any], device: torch.device, held: float
) -> tuple[dict[str, float], float]:
    """Milliseconds of every leaf module, and the seconds that launching took; a GPU first waits for `held` seconds."""
    gpu = device.type == "cuda"
    mark: Callable[[], Any] = _cuda_mark if gpu else time.perf_counter_ns
    marks: dict[str, list[Any]] = defaultdict(list)
    handles = []
    for name, module in _leaves(model):
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: marks[name].append(mark())))
        handles.append(module.register_forward_hook(lambda *_, name=name: marks[name].append(mark())))
    try:
        if gpu:
            torch.cuda.synchronize(device)
            torch.cuda._sleep(int(held * CYCLES_PER_SECOND))
        start = time.perf_counter()
        call()
        launched = time.perf_counter() - start
        if gpu:
            torch.cuda.synchronize(device)
    finally:
        for handle in handles:
            handle.remove()
    span: Callable[[Any, Any], float] = _cuda_span if gpu else (lambda first, last: (last - first) / 1e6)
    times = {n: sum(span(a, b) for a, b in zip(each[::2], each[1::2], strict=True)) for n, each in marks.items()}
    return times, launched


def _cuda_mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _cuda_span(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(start.elapsed_time(end))


# How fast memory is, by copying: what a unit that only moves data can be compared with.


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
