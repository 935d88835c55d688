"""What a latency table is made of: one network that can be run, timed and measured up at any widths.

Times of torch modules inside of the whole network come from hooks, with CUDA events on a GPU, with the clock on a CPU.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vss.core.networks import hooked
from vss.deploy.backends.eager import TorchSession, torch_threads
from vss.deploy.profile.setting import Setting, SlicedVariants, Variants, cut_to, groups_and_key, make_variants
from vss.deploy.profile.units import (
    WARM_RUNS,
    Graph,
    Reading,
    Shape,
    least_ms,
    lookup_shape,
    read_engine,
    read_onnxruntime,
    unit_shapes,
)
from vss.prune.budget import CostModel
from vss.prune.latency import Affine
from vss.prune.plan import Group

if TYPE_CHECKING:
    from onnx import ModelProto

    from vss.data.preprocess import Preprocess
CYCLES_PER_SECOND = 2e9
HELD_BACK = 1.5
COPIES = 5
SIZES = {"cpu": 2**25, "cuda": 2**28}


class Subject(Protocol):
    """A network under measurement; widths are channels kept per group, in the order of `groups`."""

    groups: list[Group]
    key: dict[str, Any]

    def read(self, widths: Sequence[int]) -> Reading: ...
    def shapes(self, widths: Sequence[int]) -> dict[str, Shape]: ...


class OnnxSubject:
    """A network in onnxruntime or in TensorRT, from uint8 pixels to labels (or to a decision); one reading takes
    `seconds`.
    """

    def __init__(
        self,
        variants: Variants,
        key: dict[str, object],
        setting: Setting,
        *,
        size: tuple[int, int],
        seconds: float = 0.4,
    ) -> None:
        self.variants, self.groups, self.key = variants, variants.groups, key
        self._setting, self._seconds = setting, seconds
        pixels = np.random.default_rng(0).integers(0, 256, (setting.batch, *size, 3), dtype=np.uint8)
        self._feed, self._graph = {"image": pixels}, Graph.of(self._model([g.channels for g in self.groups]))

    def _model(self, widths: Sequence[int]) -> ModelProto:
        import onnx

        if isinstance(self.variants, SlicedVariants):
            return self.variants.graph(widths, empty=True)
        with tempfile.TemporaryDirectory() as folder:
            return onnx.load(str(self.variants.write(widths, Path(folder) / "variant.onnx")))

    def read(self, widths: Sequence[int]) -> Reading:
        with tempfile.TemporaryDirectory() as folder:
            path = self.variants.write(widths, Path(folder) / "variant.onnx")
            return read_file(
                path, self._feed, self._setting, graph=self._graph, shapes=lambda: self.shapes(widths),
                seconds=self._seconds,
            )  # fmt: skip

    def shapes(self, widths: Sequence[int]) -> dict[str, Shape]:
        return unit_shapes(self._model(widths), self._setting.batch)


def read_file(
    path: Path,
    feed: Mapping[str, np.ndarray],
    setting: Setting,
    *,
    graph: Graph,
    shapes: Callable[[], Mapping[str, Shape]],
    seconds: float,
) -> Reading:
    """Time a float32 ONNX file, unit by unit, in the precision and the runtime of a setting; what is made of it is put
    beside it. `graph` and `shapes`: see `read_engine`.
    """
    if setting.backend == "onnxruntime":
        source = setting.typed(path, path.with_suffix(f".{setting.precision}.onnx"))
        with setting.held():
            return read_onnxruntime(source, feed, threads=setting.on_threads or 1, graph=graph, seconds=seconds)
    engine: Any = setting.engine(path, path.with_suffix(""))
    with setting.held(), engine as session:
        alone = setting.on_threads == 1
        return read_engine(session, feed, graph=graph, shapes=shapes, seconds=seconds, alone=alone)


def open_subject(
    model: nn.Module, folder: Path, preprocess: Preprocess, setting: Setting, *, seconds: float = 0.4
) -> Subject:
    """A network, uncut or cut before, ready to be measured. Its file is in `folder`, which must last as long."""
    setting.check()
    groups, key = groups_and_key(model, preprocess.size, setting)
    if setting.backend == "torch":
        return TorchSubject(model, groups, key, setting, preprocess=preprocess, seconds=seconds)
    variants = make_variants(model, groups, folder, preprocess=preprocess, options=setting.options)
    return OnnxSubject(variants, key, setting, size=preprocess.size, seconds=seconds)


def channels(subject: Subject, units: Sequence[str]) -> tuple[Affine, Affine]:
    """Channels that units read and write, as functions of widths, from the uncut network and one probe per group."""
    full = [group.channels for group in subject.groups]
    whole = subject.shapes(full)
    known = [lookup_shape(unit, whole) or Shape(0, 0, 0, 0, 0) for unit in units]
    slopes = np.zeros((2, len(units), len(full)))
    for index, group in enumerate(subject.groups):
        if group.channels == group.unit:
            continue
        less = subject.shapes([count - group.unit * (i == index) for i, count in enumerate(full)])
        for row, unit in enumerate(units):
            now = lookup_shape(unit, less)
            if now is not None:
                slopes[0, row, index] = (known[row].cin - now.cin) / group.unit
                slopes[1, row, index] = (known[row].cout - now.cout) / group.unit
    widths = np.array(full, float)
    cin, cout = (np.array([getattr(each, side) for each in known], float) for side in ("cin", "cout"))
    return Affine(np.maximum(cin, 1), slopes[0], widths), Affine(np.maximum(cout, 1), slopes[1], widths)


class TorchSubject:
    """A network in torch, from uint8 pixels to labels (or to a decision); one reading takes `seconds`."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        key: dict[str, object],
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
            def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
                if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
                    found[name] = _shape(cost, name, module, inputs[0], output, item)

            return note

        handles = [module.register_forward_hook(hook(name)) for name, module in _leaves(model)]
        with hooked(handles), torch.inference_mode():
            _labels(model, images)
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
    """Minimum milliseconds of every leaf module in passes with hooks, and of a whole pass without them.

    Leaf modules are units; what lies between them (normalisation, concatenation, resize, argmax, copies from and to the
    host) is the unit `between`. On a GPU a kernel that only spins holds the stream back while all others are put on it,
    so that they run one after another as in a CUDA graph, and the time of launching them is in no unit.
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
    model: nn.Module, call: Callable[[], object], device: torch.device, held: float
) -> tuple[dict[str, float], float]:
    """Milliseconds of every leaf module, and the seconds that launching took; a GPU first waits for `held` seconds."""
    gpu = device.type == "cuda"
    mark: Callable[[], Any] = _cuda_mark if gpu else time.perf_counter_ns
    marks: dict[str, list[Any]] = defaultdict(list)
    handles = []
    for name, module in _leaves(model):
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: marks[name].append(mark())))
        handles.append(module.register_forward_hook(lambda *_, name=name: marks[name].append(mark())))
    with hooked(handles):
        if gpu:
            torch.cuda.synchronize(device)
            torch.cuda._sleep(int(held * CYCLES_PER_SECOND))
        start = time.perf_counter()
        call()
        launched = time.perf_counter() - start
        if gpu:
            torch.cuda.synchronize(device)
    span: Callable[[Any, Any], float] = _cuda_span if gpu else (lambda first, last: (last - first) / 1e6)
    times = {n: sum(span(a, b) for a, b in zip(each[::2], each[1::2], strict=True)) for n, each in marks.items()}
    return times, launched


def _cuda_mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _cuda_span(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return float(start.elapsed_time(end))


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
