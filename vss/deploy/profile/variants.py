"""One network at many widths, as ONNX files, without tracing it again.

The exporter keeps the names of parameters, so a variant is the exported file with its initializers sliced through the
groups' slots: milliseconds in place of an export. The bias that folding a batch norm has made follows the output
channels of its layer. A network whose graph holds widths in other constants (a Reshape to a fixed shape) cannot be cut
so; `make_variants` finds that out by comparing one variant with the cut network in torch, and then exports every one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vss.core.closeness import relative_difference
from vss.core.errors import VssError, need
from vss.core.files import atomic
from vss.deploy import BACKENDS, export
from vss.deploy.graph import SegGraph
from vss.deploy.onnx_file import load
from vss.prune.apply import apply_plan
from vss.prune.plan import Group, Plan, Slot, plan_group

if TYPE_CHECKING:
    from vss.data.transforms import Preprocess

log = logging.getLogger(__name__)
PREFIX = "model."
OUT_DIM = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0}
MIN_AGREEMENT = 0.999


class Variants(Protocol):
    """What gives ONNX files of one network at any widths (channels kept per group, in the order of `groups`)."""

    groups: list[Group]

    def write(self, widths: Sequence[int], path: Path) -> Path: ...


class SlicedVariants:
    """Variants of an exported file.

    Args:
        onnx: the uncut network, as `vss.deploy.export` wrote it.
        groups: its groups; their slots name parameters as the network does.
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
        """The network in which group i keeps its first `widths[i]` channels."""
        model = self.graph(widths)
        with atomic(path) as temporary:
            self._onnx.save(model, str(temporary))
        return path

    def graph(self, widths: Sequence[int], *, empty: bool = False) -> Any:
        """The ModelProto of those widths; with `empty`, sliced initializers are declared as inputs without values."""
        onnx = self._onnx
        model = onnx.ModelProto()
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

    def _skeleton(self) -> Any:
        if not hasattr(self, "_bare"):
            self._bare = self._onnx.ModelProto()
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

    def _regroup(self, model: Any, widths: Sequence[int]) -> None:
        """Grouped convolutions lose whole groups, as in `vss.prune.apply`."""
        for node in model.graph.node:
            if node.op_type in OUT_DIM and len(node.input) > 1 and node.input[1] in self._slots:
                for attribute in node.attribute:
                    if attribute.name == "group" and attribute.i > 1:
                        weight = node.input[1]
                        attribute.i = attribute.i * len(self._kept(weight, widths)[0]) // self._values[weight].dims[0]


def _slots_by_initializer(graph: Any, groups: Sequence[Group]) -> dict[str, list[tuple[int, Slot]]]:
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
        """The network in which group i keeps its first `widths[i]` channels."""
        cut = cut_to(self._network, self.groups, widths)
        size = self._preprocess.size
        export(cut, path, size=size, preprocess=self._preprocess, parity_batches=(1,), **self._options)
        return path


def cut_to(model: nn.Module, groups: Sequence[Group], widths: Sequence[int]) -> nn.Module:
    """A copy of `model` in which group i keeps its first `widths[i]` channels."""
    return apply_plan(model, first_channels(model, groups, widths), check_weights=False)


def first_channels(model: nn.Module, groups: Sequence[Group], widths: Sequence[int]) -> Plan:
    """A plan that keeps the first channels of every group; for measuring, not for accuracy."""
    return Plan(
        model=getattr(model, "name", "") or type(model).__name__,
        weights_sha256="0" * 64,
        criterion="none",
        budget={"kind": "widths"},
        groups=tuple(plan_group(g, torch.arange(int(count))) for g, count in zip(groups, widths, strict=True)),
    )


def make_variants(
    model: nn.Module, groups: Sequence[Group], folder: Path, *, preprocess: Preprocess, options: Mapping[str, Any]
) -> Variants:
    """Export once and slice, where a sliced file gives the labels of the cut network; else export every variant.

    Args:
        model: the uncut network.
        groups: of `find_groups`.
        folder: for the exported file and the probe of it.
        preprocess: of the engine: size and normalisation.
        options: of `vss.deploy.export`, such as labels=True.
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
    session = BACKENDS["onnxruntime"].open(sliced.write(widths, path), threads=1)
    image = np.random.default_rng(0).integers(0, 256, (1, *preprocess.size, 3), dtype=np.uint8)
    got = list(session.run({"image": image}).values())
    session.close()
    cut = SegGraph(cut_to(model, sliced.groups, widths), preprocess=preprocess, **options).cpu().eval()
    with torch.no_grad():
        found = cut(torch.from_numpy(image))
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
    """(1, 3, H, W) zeros, for tracing."""
    return torch.zeros(1, 3, *size)
