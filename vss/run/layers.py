"""Why a cut network has more kernels than it need have, without a GPU: from the layers of engines that run elsewhere.

The uncut and the cut network are built, and the cut one again with its widths rounded up to multiples of 2, 4, 8 and
16, so nothing is guessed: a width costs the kernels that are gone at another one. What is read is the compiler's own
list; no engine runs and no time is measured.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vss.core.config import BuildConfig
from vss.core.errors import VssError
from vss.core.files import sha256_file
from vss.deploy.backends import inspected, of_tensorrt
from vss.deploy.backends.trt import TensorRTBackend, verdict
from vss.deploy.backends.trt_layers import nodes_of, summary
from vss.deploy.backends.trt_plan import BuildPlan
from vss.deploy.backends.trt_runner import read_about
from vss.deploy.onnx_file import load
from vss.deploy.profile.setting import Setting, SlicedVariants
from vss.deploy.profile.units import Graph, Shape, lookup_shape, unit_shapes
from vss.prune.plan import Plan
from vss.run.explain import EMPTY, finished, rounded_widths

STEPS = (2, 4, 8, 16)
GENERATED = re.compile(r"__\w+?_([A-Z]\w*?)_myl\d+_\d+")
WORDS = {"pad": ("Repl", "Conc"), "slice": ("Slic",), "transpose": ("Tran",), "copy": ("Move",)}
"""What a generated kernel does -> parts of its name."""


@dataclass(frozen=True)
class Engine:
    """The layers of an engine that was built of `model`, an ONNX file whose nodes they name."""

    version: str
    layers: Sequence[Mapping[str, object]]
    model: Any
    shapes: Callable[[], Mapping[str, Shape]]

    def kernels(self) -> dict[str, Counter[str]]:
        """Unit -> what its kernels do."""
        graph, found = Graph.of(self.model), dict[str, Counter[str]]()
        for layer in self.layers:
            for unit in graph.engine_layer(layer, self.shapes):
                found.setdefault(unit, Counter())[work_of(layer)] += 1
        return found

    def hosts(self) -> dict[str, set[str]]:
        """Node without weights -> layers with weights that it shares an engine layer with."""
        graph, found = Graph.of(self.model), dict[str, set[str]]()
        for layer in self.layers:
            units = {graph.unit(graph.nodes[name]) for name in nodes_of(layer) if name in graph.nodes}
            for unit in units:
                if ":" in unit:
                    found.setdefault(unit, set()).update(each for each in units if ":" not in each)
        return found


def work_of(layer: Mapping[str, Any]) -> str:
    """What a kernel does: pad, slice, transpose, copy, or its type."""
    name = GENERATED.fullmatch(layer["Name"])
    if name is None:
        return str(layer.get("LayerType") or "layer")
    return next((word for word, parts in WORDS.items() if all(part in name[1] for part in parts)), name[1])


@dataclass(frozen=True)
class Row:
    """A layer of the cut network that takes kernels which it did not take before, and a width that would not cost them,
    "" where none of those tried is."""

    unit: str
    cin: int
    cout: int
    kernels_before: int
    kernels_after: int
    extra: list[str]
    better: str


def explain_layers(run: Path, backend: str, *, precision: str = "fp32", targets: Sequence[str] = ()) -> dict[str, Any]:
    """Everything about the layers of both engines of a finished `vss run`, JSON-ready.

    `targets` are GPUs to build for, by default those of the recipe, else sm86; engines that the run has built for them
    are read and not built again.
    """
    runtime = of_tensorrt(backend)
    if runtime is None or not runtime.flavour.targets:
        raise VssError(
            f"--backend is {backend}; vss explain reads layers of engines that are built without their GPU: give "
            "--backend tensorrt_rtx, or leave it off to time the engines of the run."
        )
    report, paths = finished(run)
    build = BuildConfig(**report.get("recipe", {}).get("build", {}))
    where = tuple(targets or build.targets or ("sm86",))
    runtime.check(BuildPlan(targets=where))
    setting, plan = Setting(runtime.name, precision=precision), Plan.load(run / "plan.json")
    with tempfile.TemporaryDirectory() as name:

        def made(plain: Path, stem: str) -> Engine:
            return _built(runtime, plain, setting, Path(name) / stem, where)

        before, after = (
            _of_run(runtime, run, title, precision, where, plain) or made(plain, title)
            for title, plain in paths.items()
        )
        variants = SlicedVariants(paths["baseline"], plan.groups)
        widths = [len(group.kept) for group in plan.groups]
        tried: dict[int, Engine] = {}
        for step in STEPS:
            others = rounded_widths(plan.groups, widths, step, True)
            if others != widths and any(not row.better for row in rows(before, after, tried)):
                tried[step] = made(variants.write(others, Path(name) / f"plain-{step}.onnx"), f"up-{step}")
    return figures(before, after, tried) | {
        "precision": precision,
        "targets": list(where),
        "compiler": f"{runtime.title} {after.version}",
        "sentence": f"The layers are what the compiler of {runtime.title} {after.version} makes; another TensorRT "
        "fuses otherwise. No engine was run and no time was measured.",
    }


def _built(runtime: TensorRTBackend, plain: Path, setting: Setting, stem: Path, targets: Sequence[str]) -> Engine:
    """An engine of a float32 file in the precision of the setting, of which the layers alone are kept."""
    typed = setting.typed(plain, stem.with_suffix(".onnx"))
    found = verdict(typed, runtime.flavour, targets)
    if not found.built:
        raise VssError(f"{runtime.title} cannot build {plain.name} in {setting.precision} ({found.reason}).")
    return Engine(found.version, found.layers, load(typed), _shapes_of(plain))


def _of_run(
    runtime: TensorRTBackend, run: Path, title: str, precision: str, targets: Sequence[str], plain: Path
) -> Engine | None:
    """The engine that the run has built, where it is for these targets and its ONNX file is still the one that it was
    built of."""
    path = run / "engine" / f"{title}.{precision}.{runtime.name}.engine"
    layers, about = inspected(path), read_about(path)
    if layers is None or about is None or about["targets"] != list(targets):
        return None
    source = path.with_name(about["onnx"])
    if not source.is_file() or sha256_file(source) != about["onnx_sha256"]:
        return None
    return Engine(about["tensorrt"], layers["Layers"], load(source), _shapes_of(plain))


def _shapes_of(plain: Path) -> Callable[[], Mapping[str, Shape]]:
    return functools.cache(lambda: unit_shapes(load(plain), 1))


def rows(before: Engine, after: Engine, tried: Mapping[int, Engine]) -> list[Row]:
    """Layers with more kernels than before, in the order of the network."""
    old, new, shapes = before.kernels(), after.kernels(), dict(after.shapes())
    found = []
    for unit, works in new.items():
        was = old.get(unit, Counter[str]())
        extra = list((works - was).elements())
        if extra and works.total() > was.total() and not unit.endswith(":other"):
            shape = lookup_shape(unit, shapes) or EMPTY
            better = _better(unit, was.total(), tried)
            found.append(Row(unit, shape.cin, shape.cout, was.total(), works.total(), extra, better))
    return found


def _better(unit: str, kernels: int, tried: Mapping[int, Engine]) -> str:
    """The least rounding up that leaves a layer with no more kernels than before."""
    for step, engine in tried.items():
        if engine.kernels().get(unit, Counter[str]()).total() <= kernels:
            shape = lookup_shape(unit, dict(engine.shapes())) or EMPTY
            return f"{shape.cin} -> {shape.cout} (multiples of {step})"
    return ""


def figures(before: Engine, after: Engine, tried: Mapping[int, Engine]) -> dict[str, object]:
    """Types, rows, and fusions that the cut network lost, JSON-ready."""
    old, new = before.hosts(), after.hosts()
    lost = [
        {"node": node, "layer": host}
        for node, hosts in old.items()
        for host in sorted(hosts)
        if node in new and host not in new[node]
    ]
    return {
        "layers_before": summary(before.layers),
        "layers_after": summary(after.layers),
        "layers_rounded": {str(step): len(engine.layers) for step, engine in tried.items()},
        "rows": [asdict(row) for row in rows(before, after, tried)],
        "fusions_lost": lost,
    }
