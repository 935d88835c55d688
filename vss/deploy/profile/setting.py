"""Where and how a network runs, and one network at many widths, as ONNX files, without tracing it again.

The exporter keeps the names of parameters, so a variant is the exported file with its initializers sliced through the
groups' slots: milliseconds in place of an export. The bias that folding a batch norm has made follows the output
channels of its layer. A network whose graph holds widths in other constants (a Reshape to a fixed shape) cannot be cut
so; `make_variants` finds that out by comparing one variant with the cut network in torch, and then exports every one.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vss.core.closeness import relative_difference
from vss.core.environment import environment
from vss.core.errors import VssError, need
from vss.core.files import atomic, sha256_file, sha256_json
from vss.deploy import BACKENDS, BuildPlan, BuildSpec, export, onnx_file, spans
from vss.deploy.backends import available, of_tensorrt
from vss.deploy.backends.base import Session
from vss.deploy.backends.eager import check_place
from vss.deploy.backends.trt_plan import declared
from vss.deploy.graph import SegGraph
from vss.deploy.onnx_file import PREFIX, load
from vss.deploy.profile.units import pinned, usable_threads
from vss.deploy.quantize.layers import Net, read_onnx
from vss.deploy.quantize.precision import Precision, convert
from vss.deploy.quantize.qdq import observed
from vss.deploy.quantize.ranges import Ranges
from vss.prune import find_groups
from vss.prune.apply import cut
from vss.prune.plan import Group, Slot

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto

    from vss.data.preprocess import Preprocess


log = logging.getLogger(__name__)
OUT_DIM = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}
MIN_AGREEMENT = 0.999
PLAIN = BuildPlan()


class Variants(Protocol):
    """What gives ONNX files of one network at any widths (channels kept per group, in the order of `groups`)."""

    groups: list[Group]

    def write(self, widths: Sequence[int], path: Path) -> Path: ...


class SlicedVariants:
    """Variants of the uncut network as `vss.deploy.export` wrote it; the groups' slots name parameters as the network
    does.
    """

    def __init__(self, onnx: Path, groups: Sequence[Group]) -> None:
        self._onnx = need("onnx", "latency tables")
        self.groups = list(groups)
        self.model = load(onnx)
        del self.model.graph.value_info[:]
        self._values = {each.name: each for each in self.model.graph.initializer}
        self._slots = _slots_by_initializer(self.model.graph, self.groups)
        self._sliced = {name: self._onnx.numpy_helper.to_array(self._values[name]) for name in self._slots}

    def write(self, widths: Sequence[int], path: Path) -> Path:
        model = self.graph(widths)
        with atomic(path) as temporary:
            self._onnx.save(model, str(temporary))
        return path

    def graph(self, widths: Sequence[int], *, empty: bool = False) -> ModelProto:
        """The ModelProto of those widths; with `empty`, sliced initializers are declared as inputs without values."""
        onnx = self._onnx
        model: ModelProto = onnx.ModelProto()
        model.CopyFrom(self._skeleton())
        for name, value in self._values.items():
            if name not in self._slots:
                if not (empty and value.data_type == onnx.TensorProto.FLOAT and len(value.dims) > 1):
                    model.graph.initializer.append(value)
                    continue
                shape = tuple(value.dims)
            else:
                stay = self._kept(name, widths)
                shape = tuple(len(kept) for kept in stay)
                if not empty:
                    array = np.ascontiguousarray(self._sliced[name][np.ix_(*stay)])
                    model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
                    continue
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, value.data_type, shape))
        self._regroup(model, widths)
        return model

    def _skeleton(self) -> ModelProto:
        if not hasattr(self, "_bare"):
            self._bare: ModelProto = self._onnx.ModelProto()
            self._bare.CopyFrom(self.model)
            del self._bare.graph.initializer[:]
        return self._bare

    def _kept(self, name: str, widths: Sequence[int]) -> list[np.ndarray]:
        """Positions that stay, for every dim of one initializer."""
        stay = [np.ones(side, bool) for side in self._values[name].dims]
        for index, slot in self._slots[name]:
            group = self.groups[index]
            start, end = (slot.offset + count * slot.block for count in (widths[index], group.channels))
            stay[slot.dim][start:end] = False
        return [np.flatnonzero(each) for each in stay]

    def _regroup(self, model: ModelProto, widths: Sequence[int]) -> None:
        """Grouped convolutions lose whole groups, as in `vss.prune.apply`."""
        for node in model.graph.node:
            if node.op_type in OUT_DIM and len(node.input) > 1 and node.input[1] in self._slots:
                for attribute in node.attribute:
                    if attribute.name == "group" and attribute.i > 1:
                        weight = node.input[1]
                        attribute.i = attribute.i * len(self._kept(weight, widths)[0]) // self._values[weight].dims[0]


def _slots_by_initializer(graph: GraphProto, groups: Sequence[Group]) -> dict[str, list[tuple[int, Slot]]]:
    """Initializer -> (index of group, slot); biases without a parameter's name follow their layer's outputs."""
    names = {each.name for each in graph.initializer}
    slots: dict[str, list[tuple[int, Slot]]] = defaultdict(list)
    for index, group in enumerate(groups):
        for slot in group.slots:
            if PREFIX + slot.tensor in names:
                slots[PREFIX + slot.tensor].append((index, slot))
    for node in graph.node:
        if node.op_type not in OUT_DIM or len(node.input) < 3 or node.input[2] not in names or node.input[2] in slots:
            continue
        dim = OUT_DIM[node.op_type]
        for index, slot in slots.get(node.input[1], []):
            if slot.dim == dim:
                slots[node.input[2]].append((index, Slot(slot.tensor, 0, slot.offset, slot.block, slot.role)))
    return dict(slots)


class ExportedVariants:
    """Variants by cutting the network in torch and exporting it: slower, and works for every network."""

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], *, preprocess: Preprocess, options: Mapping[str, Any]
    ) -> None:
        self.groups, self._network, self._preprocess, self._options = list(groups), model, preprocess, dict(options)

    def write(self, widths: Sequence[int], path: Path) -> Path:
        small = cut_to(self._network, self.groups, widths)
        size = self._preprocess.size
        export(small, path, size=size, preprocess=self._preprocess, parity_batches=(1,), **self._options)
        return path


def cut_to(model: nn.Module, groups: Sequence[Group], widths: Sequence[int]) -> nn.Module:
    """A copy of `model` in which group i keeps its first `widths[i]` channels."""
    kept = {group.id: torch.arange(int(count)) for group, count in zip(groups, widths, strict=True)}
    return cut(model, groups, kept)


def make_variants(
    model: nn.Module, groups: Sequence[Group], folder: Path, *, preprocess: Preprocess, options: Mapping[str, Any]
) -> Variants:
    """Export once into `folder` and slice, where a sliced file gives the labels of the cut network; else export every
    variant with the same `options` of `vss.deploy.export`.
    """
    base = folder / "uncut.onnx"
    export(model, base, size=preprocess.size, preprocess=preprocess, parity_batches=(1,), **options)
    sliced = SlicedVariants(base, groups)
    widths = [max(group.unit, group.channels * 5 // 8 // group.unit * group.unit) for group in groups]
    try:
        reason = _difference(model, sliced, widths, folder / "probe.onnx", preprocess, options)
    except VssError as error:
        reason = str(error)
    if not reason:
        return sliced
    log.info("every width is exported by itself, since the exported file cannot be sliced: %s", reason)
    return ExportedVariants(model, groups, preprocess=preprocess, options=options)


def _difference(
    model: nn.Module,
    sliced: SlicedVariants,
    widths: Sequence[int],
    path: Path,
    preprocess: Preprocess,
    options: Mapping[str, Any],
) -> str:
    """Why a sliced file is not the cut network; empty when it is."""
    image = np.random.default_rng(0).integers(0, 256, (1, *preprocess.size, 3), dtype=np.uint8)
    with BACKENDS["onnxruntime"].open(sliced.write(widths, path), threads=1) as session:
        got = list(session.run({"image": image}).values())
    small = SegGraph(cut_to(model, sliced.groups, widths), preprocess=preprocess, **options).cpu().eval()
    with torch.no_grad():
        found = small(torch.from_numpy(image))
    wanted = [value.numpy() for value in (found if isinstance(found, tuple) else (found,))]
    path.unlink()
    return "" if all(_same(a, b) for a, b in zip(got, wanted, strict=True)) else "its outputs differ"


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape:
        return False
    if a.dtype.kind == "f":
        return relative_difference(torch.from_numpy(b), torch.from_numpy(a)) <= 1e-3
    return bool((a == b).mean() >= MIN_AGREEMENT)


def example_of(size: tuple[int, int]) -> Tensor:
    return torch.zeros(1, 3, *size)


@dataclass(frozen=True)
class Setting:
    """Where and how a network runs.

    Attributes:
        backend: a runtime that times layers.
        device: "cpu" or "cuda"; "" is the usual one of the backend.
        precision: "fp32", "fp16" or "int8". All INT8 ranges are 1, since a time does not depend on them; what is not
            INT8 runs in what the runtime says of itself. float16 in torch is channels last.
        threads: on a CPU; None for one per usable core.
        batch: images.
        options: of the export, such as labels=True.
        keep: layers whose channels stay.
        plan: how TensorRT builds.
    """

    backend: str = "onnxruntime"
    device: str = ""
    precision: str = "fp32"
    threads: int | None = None
    batch: int = 1
    options: Mapping[str, Any] = field(default_factory=lambda: {"labels": True})
    keep: Sequence[str] = ()
    plan: BuildPlan = PLAIN

    def __post_init__(self) -> None:
        backend = BACKENDS.canonical(self.backend)
        runtime = BACKENDS[backend]
        devices, precisions = getattr(runtime, "devices", ()), getattr(runtime, "precisions", ())
        if not devices:
            timed = [name for name in BACKENDS.names() if getattr(BACKENDS[name], "devices", ())]
            raise VssError(f"the layers of {backend} cannot be timed; expected one of {', '.join(timed)}.")
        device = self.device or devices[0]
        if device not in devices or self.precision not in precisions:
            raise VssError(
                f"{backend} is timed in {' or '.join(precisions)} on {' or '.join(devices)}; got {self.precision} on "
                f"{device}."
            )
        object.__setattr__(self, "backend", backend)
        object.__setattr__(self, "device", device)

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def on_threads(self) -> int | None:
        """Threads that it runs on; None for what runs on a GPU."""
        return None if self.on_gpu else usable_threads(self.threads)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep what runs on a CPU on its cores."""
        with pinned(self.on_threads) if self.on_threads else contextlib.nullcontext():
            yield

    def check(self) -> None:
        available(self.backend)
        if self.backend == "torch":
            check_place(self.device, self.precision)

    def typed(self, source: Path, out: Path) -> Path:
        """A float32 ONNX file in this precision; `source` itself where that is float32."""
        if self.precision == "fp32":
            return source
        if self.precision == "fp16":
            convert(source, out, Precision("fp16"))
            return out
        self._quantised(source, out)
        return out

    def kept(self, source: Path) -> dict[str, str]:
        """Layers of a float32 file that its INT8 file leaves in floating point -> why."""
        with tempfile.TemporaryDirectory() as folder:
            kept: dict[str, str] = self._quantised(source, Path(folder) / "int8.onnx")["kept"]
        return kept

    def _quantised(self, source: Path, out: Path) -> dict[str, Any]:
        """Write the INT8 file; returns the facts of `convert`."""
        values = dict.fromkeys(observed(Net(read_onnx(source))), 1.0)
        precision = Precision("int8", elsewhere=BACKENDS[self.backend].beside_int8, target=self.backend)
        ranges = Ranges(method={"method": "minmax"}, onnx_sha256=sha256_file(source), values=values, calibration={})
        return convert(source, out, precision, ranges)

    def engine(self, onnx: Path, stem: Path) -> Session:
        """Built of a float32 ONNX file and opened; files are put beside `stem`."""
        backend = available(self.backend)
        source = self.typed(onnx, stem.with_name(f"{stem.name}.{self.precision}.onnx"))
        suffix, spec = ".engine.onnx", BuildSpec()
        if of_tensorrt(self.backend):
            profile = spans(declared(onnx_file.load(source)), [1, self.batch, max(8, self.batch)])
            suffix, spec = ".engine", BuildSpec(plan=self.plan.model_copy(update={"profiles": (profile,)}))
        built: Path = backend.build(source, stem.with_name(stem.name + suffix), spec)
        session: Session = backend.open(built, threads=self.on_threads)
        return session

    def module(self, model: nn.Module, preprocess: Preprocess) -> Session:
        """A network opened in torch, as its engine would be used."""
        assert self.backend == "torch"
        return BACKENDS["torch"].open(
            model, size=preprocess.size, preprocess=preprocess, device=self.device, precision=self.precision,
            cuda_graph=self.on_gpu, threads=self.on_threads, **self.options,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What a table of this holds for, besides the network: device, driver, versions and so on. All JSON types."""
        about = environment()
        packages = about["packages"]
        facts = {
            "device": about["machine"],
            "driver": about["devices"][0]["driver"] if self.on_gpu and about["devices"] else None,
            "versions": {name: packages[name] for name in BACKENDS[self.backend].packages if name in packages},
            "backend": self.backend,
            "precision": self.precision,
            "batch": self.batch,
            "threads": self.on_threads,
        }
        if of_tensorrt(self.backend):
            left_out = {
                "profiles",
                "timing_cache",
                "verbosity",
                "time_limit_s",
                *(() if self.plan.targets else ("targets",)),
            }
            facts["build"] = {key: value for key, value in self.plan.to_json().items() if key not in left_out}
        return facts

    def command(self, save: str) -> str:
        """The command that makes a table; CKPT stands for the uncut network."""
        usual = Setting(self.backend)
        parts = ["vss", "lut", "build", "--ckpt", "CKPT", "--save", save, "--backend", self.backend]
        for name in ("device", "precision"):
            parts += [f"--{name}", getattr(self, name)] if getattr(self, name) != getattr(usual, name) else []
        parts += ["--threads", str(self.threads)] if self.threads else []
        parts += [] if self.options.get("labels", True) else ["--no-labels"]
        dtype = self.options.get("labels_dtype", "int32")
        parts += ["--labels-dtype", dtype] if dtype != "int32" else []
        parts += self.plan.to_options()
        return shlex.join([*parts, *(part for name in self.keep for part in ("--keep", name))])


def table_key(model: Any, groups: Sequence[Group], size: tuple[int, int], setting: Setting) -> dict[str, Any]:
    """What a table holds for: the network's shapes, and where and how it runs. All JSON types."""
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    members = [[group.id, group.channels, group.unit] for group in groups]
    return setting.facts() | {
        "resolution": list(size),
        "network": getattr(model, "name", "") or type(model).__name__,
        "shapes_sha256": sha256_json([shapes, members, sorted(setting.options.items())]),
    }


def groups_and_key(model: nn.Module, size: tuple[int, int], setting: Setting) -> tuple[list[Group], dict[str, Any]]:
    """The groups of a network and what a table of it holds for, (H, W) pixels."""
    groups = list(find_groups(model, example_of(size), keep=setting.keep))
    return groups, table_key(model, groups, size, setting)
