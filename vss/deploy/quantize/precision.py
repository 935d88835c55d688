"""Precision is a property of the ONNX file: float32, float16, or explicit INT8 with float32 or float16 elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vss.core.closeness import relative_difference
from vss.core.errors import NotFinite, VssError, need, unknown
from vss.core.files import atomic, sha256_file
from vss.core.networks import settled
from vss.deploy.backends import BACKENDS, float_ops, int8_of
from vss.deploy.backends.base import Int8
from vss.deploy.export import export
from vss.deploy.graph import SegGraph
from vss.deploy.lint import lint
from vss.deploy.parity import Images, Tolerance, noise, parity
from vss.deploy.quantize.layers import Net, check_names, kept_nodes, overflow, read_onnx, to_fp16
from vss.deploy.quantize.qdq import Placement, insert, observed, place, tied
from vss.deploy.quantize.ranges import Ranges

if TYPE_CHECKING:
    from onnx import ModelProto

GRAPH_OPTIONS = ("preprocess", "labels", "labels_dtype")
Measure = Callable[[Path, list[str]], Ranges]
"""(float32 file, tensors) -> their ranges."""
KINDS = ("fp32", "fp16", "int8")
SMALLEST_SCALE = 2.0**-18
"""Below it a float16 scale is off by more than 0.8 %, twice the error of rounding to INT8."""
ANY = Tolerance(relative=math.inf, agreement=0.0)
TOLERANCES = {"fp32": Tolerance(), "fp16": Tolerance(relative=0.02, agreement=0.98), "int8": ANY}
"""Of the comparison with torch. INT8 may lose anything by design: its figures are written down, and the gate judges."""
ALONE = 0.05
"""An image in a batch and alone may differ by so much of the logits' spread: a value rounded the other way."""


@dataclass(frozen=True)
class Precision:
    """What a file computes in.

    Args:
        kind: "fp32", "fp16" or "int8".
        keep: layers that stay in float32 ("fp16") or in what `elsewhere` says ("int8").
        elsewhere: of "int8": "fp32" or "fp16" for all that is not quantised.
        first, last: of "int8": whether the layers at the input and at the outputs are quantised.
        target: of "int8": runtime that the file is for; what it never runs in INT8 stays in floating point. "": any.
    """

    kind: str = "fp32"
    keep: tuple[str, ...] = ()
    elsewhere: str = "fp32"
    first: bool = True
    last: bool = False
    target: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("precision", self.kind, KINDS)
        if self.elsewhere not in KINDS[:2]:
            raise unknown("precision beside INT8", self.elsewhere, KINDS[:2])

    def left(self, net: Net) -> dict[str, str]:
        """Layers that the target would not run in INT8 -> why."""
        ops = float_ops(self.target) if self.kind == "int8" and self.target else {}
        return {layer.name: ops[layer.op] for layer in net.layers if layer.op in ops}

    @property
    def style(self) -> Int8:
        """How the target wants Q/DQ."""
        return int8_of(self.target)

    def suits(self, net: Net) -> list[str]:
        """Runtimes that want this very file in INT8: the same Q/DQ in the same layers."""
        able = [name for name in BACKENDS.names() if "int8" in getattr(BACKENDS[name], "precisions", ())]
        others = {name: dataclasses.replace(self, target=name) for name in able}
        return [name for name, each in others.items() if (each.style, each.left(net)) == (self.style, self.left(net))]


@dataclass
class _Typed:
    model: ModelProto
    int8: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """layer -> why it is not in INT8, or not in float16."""
    ranges: Ranges | None = None
    suits: list[str] = field(default_factory=list)


def convert(source: Path | str, out: Path | str, precision: Precision, ranges: Ranges | None = None) -> dict[str, Any]:
    """Write `out` (whole or not at all), a float32 file `source` in another precision.

    `ranges`, of "int8", were measured on this very file. Returns JSON: kind, layers (their number), int8 (names), kept
    (name -> why), pairs (activations with Q/DQ), casts, nodes, bytes, sha256, source_sha256, and of INT8 elsewhere, the
    method, style, runtimes that it suits, and hashes of ranges and images. Raises `VssError` for a file with unknown
    operators, ranges of another file, layers that do not exist, a result that TensorRT would refuse.
    """
    onnx = need("onnx", "precision")
    net = Net(read_onnx(source))
    if precision.kind == "int8":
        typed = _int8(net, Path(source), precision, ranges)
    else:
        check_names(net, precision.keep)
        half = precision.kind == "fp16"
        model = to_fp16(net.model, kept_nodes(net, precision.keep)) if half else net.model
        typed = _Typed(model, kept=dict.fromkeys(precision.keep, "asked for") if half else {})
    for key, value in _metadata(precision, typed).items():
        typed.model.metadata_props.add(key=key, value=value)
    _check_legal(onnx, typed.model, Path(source), precision)
    with atomic(out) as temporary:
        onnx.save(typed.model, str(temporary))
        written = {"bytes": temporary.stat().st_size, "sha256": sha256_file(temporary)}
    return _report(net, precision, typed) | written | {"source_sha256": sha256_file(source)}


def _int8(net: Net, source: Path, precision: Precision, ranges: Ranges | None) -> _Typed:
    if ranges is None:
        raise VssError(f"{source} cannot be quantised without ranges; calibrate it first.")
    if ranges.onnx_sha256 != sha256_file(source):
        raise VssError(f"the ranges belong to another file than {source}; calibrate this one.")
    kept = precision.left(net) | dict.fromkeys(precision.keep, "asked for")
    floats = list(kept)
    kept |= {} if precision.first else dict.fromkeys(net.first, "first layer")
    kept |= {} if precision.last else dict.fromkeys(net.last, "last layer")
    placement = place(net, floats, first=precision.first, last=precision.last, tied=precision.style.tied)
    if precision.elsewhere == "fp16":
        levels = 255.0 if precision.style.unsigned else 127.0
        small = dict.fromkeys(_small_scales(net, placement, ranges, levels), "a scale below what float16 can hold")
        kept = small | kept
        placement = place(net, {*floats, *small}, first=precision.first, last=precision.last, tied=precision.style.tied)
    halves = kept_nodes(net) if precision.elsewhere == "fp16" else set()
    model = insert(net, placement, ranges.values, source, precision.style)
    if precision.elsewhere == "fp16":
        model = to_fp16(model, halves)
    return _Typed(model, placement.layers, kept, ranges, precision.suits(net))


def _small_scales(net: Net, placement: Placement, ranges: Ranges, levels: float) -> list[str]:
    """Layers of which a scale cannot be written in float16; `levels` of an activation lie between 0 and its range."""
    onnx = need("onnx", "precision")
    values = tied(placement, ranges.values)
    tensors = {tensor.name: tensor for tensor in net.model.graph.initializer}
    small = []
    for layer in net.layers:
        if layer.name not in placement.layers:
            continue
        weight = np.abs(onnx.numpy_helper.to_array(tensors[layer.weight]))
        axis = 1 if layer.op in ("ConvTranspose", "MatMul") else 0
        largest = weight.max(axis=tuple(i for i in range(weight.ndim) if i != axis))
        scales = np.append(largest[largest > 0] / 127, values.get(layer.source, levels) / levels)
        if scales.min() < SMALLEST_SCALE:
            small.append(layer.name)
    return small


def _metadata(precision: Precision, typed: _Typed) -> dict[str, str]:
    data = {"vss.precision": precision.kind}
    if precision.kind == "int8" and typed.ranges is not None:
        data |= {"vss.elsewhere": precision.elsewhere, "vss.ranges_sha256": typed.ranges.sha256()}
        data["vss.calibration_sha256"] = typed.ranges.calibration.get("sha256", "")
        data["vss.int8_for"] = ", ".join(typed.suits)
    return {key: value for key, value in data.items() if value}


def _check_legal(onnx: ModuleType, model: ModelProto, source: Path, precision: Precision) -> None:
    """Valid ONNX, and nothing in its Q/DQ that TensorRT refuses, unless the target wants what that does."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VssError(f"{source} in {precision.kind} is no valid ONNX ({str(error).splitlines()[0]}).") from error
    if precision.kind == "int8" and not precision.style.unsigned:
        faults = [finding for finding in lint(model) if finding.severity == "error"]
        if faults:
            raise VssError(f"{source} in int8 would be refused by TensorRT: {faults[0]}")


def _report(net: Net, precision: Precision, typed: _Typed) -> dict[str, object]:
    ops = [node.op_type for node in typed.model.graph.node]
    report: dict[str, object] = {
        "kind": precision.kind,
        "layers": len(net.layers),
        "int8": typed.int8,
        "kept": typed.kept,
        "pairs": ops.count("QuantizeLinear"),
        "casts": ops.count("Cast"),
        "nodes": len(ops),
    }
    if typed.ranges is not None:
        calibration = {key: value for key, value in typed.ranges.calibration.items() if key != "files"}
        report |= {
            "elsewhere": precision.elsewhere,
            "target": precision.target,
            "suits": typed.suits,
            "style": dataclasses.asdict(precision.style),
            "ranges_sha256": typed.ranges.sha256(),
            **typed.ranges.method,
        }
        report["calibration"] = calibration
    return report


def export_as(
    model: nn.Module,
    path: Path | str,
    precision: Precision,
    *,
    ranges: Measure | None = None,
    images: Images | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`vss.deploy.export` (which takes `options`) in a precision: write float32, then `retype` it."""
    if precision.kind == "fp32":
        return export(model, path, **options)
    with tempfile.TemporaryDirectory(prefix="vss-precision-") as folder:
        plain = Path(folder) / "fp32.onnx"
        report = export(model, plain, **options)
        graph = graph_of(model, **{name: options[name] for name in GRAPH_OPTIONS if name in options})
        return retype(graph, plain, path, precision, report, ranges=ranges, images=images)


def graph_of(model: nn.Module, **options: Any) -> SegGraph:
    """What was exported: a copy of the network on the CPU with its pre- and post-processing."""
    return SegGraph(settled(model), **options).eval()


def retype(
    graph: SegGraph,
    plain: Path,
    path: Path | str,
    precision: Precision,
    report: Mapping[str, Any],
    *,
    ranges: Measure | None = None,
    images: Images | None = None,
    tolerance: Tolerance | None = None,
) -> dict[str, Any]:
    """Write `path` from an exported float32 file, and compare it with torch at the same batches and sizes.

    Args:
        graph: what was exported, see `graph_of`.
        plain, report: the float32 file and the report of its export.
        ranges: of "int8": called with the file and the tensors that may be quantised.
        images: for the comparison; noise lies outside of the ranges that images gave.
        tolerance: in place of the precision's own; with `ANY` an overflow is reported, not refused.

    Returns:
        `report` with `parity`, `sha256` and `bytes` of the new file, and `precision`, see `convert`; in it `fp32` is
        what the float32 file was, and `overflow` why float16 cannot hold the values of a layer, or None.

    Raises:
        NotFinite: float16 cannot hold the values of a layer.
    """
    measured, beyond = None, None
    if precision.kind == "int8":
        if ranges is None:
            raise VssError("int8 needs ranges; calibrate on training images first.")
        measured = ranges(plain, observed(Net(read_onnx(plain))))
    shapes = [_shape(row["input"], graph.nhwc) for row in report["parity"]["shapes"]]
    if "fp16" in (precision.kind, precision.elsewhere):
        draw = images or functools.partial(noise, nhwc=graph.nhwc)
        beyond = overflow(plain, precision.keep, draw(*shapes[0], 0).numpy())
    if beyond and tolerance is not ANY:
        raise NotFinite(beyond)
    with atomic(path) as temporary:
        typed = convert(plain, temporary, precision, measured)
        compared = parity(graph, temporary, shapes, tolerance or TOLERANCES[precision.kind], images=images)
        compared["alone_max_rel"] = alone(graph, temporary, shapes, images)
    typed["fp32"] = {key: report[key] for key in ("sha256", "bytes", "nodes_before", "nodes_after", "parity")}
    typed["overflow"] = beyond
    written = {key: typed.pop(key) for key in ("sha256", "bytes")}
    return {**report, **written, "onnx": Path(path).name, "parity": compared, "precision": typed}


def alone(
    graph: SegGraph, path: Path, shapes: Sequence[tuple[int, tuple[int, int]]], images: Images | None = None
) -> float:
    """Largest difference between an image in a batch and by itself, relative to their spread; over all shapes. More
    than `ALONE` is refused.
    """
    draw = images or functools.partial(noise, nhwc=graph.nhwc)
    worst = 0.0
    with BACKENDS["onnxruntime"].open(path) as session:
        for batch, size in shapes:
            image = draw(batch, size, 0).numpy()
            together, single = session.run({"image": image}), session.run({"image": image[-1:].copy()})
            for name, value in together.items():
                last, own = value[-1:].astype(np.float64), single[name].astype(np.float64)
                if name == "labels":
                    worst = max(worst, float((last != own).mean()))
                else:
                    worst = max(worst, relative_difference(torch.from_numpy(own), torch.from_numpy(last)))
    if not worst <= ALONE:
        raise VssError(
            f"the file gives an image other results in a batch than alone (by {worst:.3g}); export it again."
        )
    return worst


def _shape(shape: Sequence[int], nhwc: bool) -> tuple[int, tuple[int, int]]:
    return shape[0], (shape[1], shape[2]) if nhwc else (shape[2], shape[3])


def decide(rows: Sequence[Mapping[str, Any]], *, stable: bool = True) -> dict[str, Any]:
    """Choose among engines of one network that were timed in one interleaved run: other precisions, other runtimes.

    An engine is kept when it passes its gate and is faster than all before it that do: float16, INT8, then those of
    further runtimes. Where the run gave an interval, "faster" means that all of it lies above 1.

    Args:
        rows: {"precision", "latency_ms_p50", "passed"}, of all but "fp32" also "sentence" of the gate, and "speedup"
            {"ratio", "low", "high"} over "fp32" when it was measured. "fp32" must be there.
        stable: whether the times stood still; else float32 stays, whatever they are.

    Returns:
        {"chosen": precision, "why": {precision: sentence of each that was not chosen}, "sentence"}.
    """
    table = {row["precision"]: row for row in rows}
    chosen, why = "fp32", dict[str, str]()
    usual = [kind for kind in KINDS if kind in table]
    for kind in [*usual[1:], *(name for name in table if name not in KINDS)]:
        reason = _refusal(table[kind], table["fp32"], table[chosen])
        if table[kind]["passed"] and not stable:
            reason = "the machine is too noisy to time it; the same command times again"
        if reason:
            why[kind] = reason
        else:
            why[chosen] = f"{kind} is faster and inside the gate"
            chosen = kind
    others = "; ".join(f"{kind} not: {reason}" for kind, reason in why.items())
    times = f"{table[chosen]['latency_ms_p50']:.2f} ms" if stable else "not timed"
    return {"chosen": chosen, "why": why, "sentence": f"{chosen} is kept ({times}){'; ' + others if others else ''}."}


def _refusal(row: Mapping[str, Any], plain: Mapping[str, object], best: Mapping[str, object]) -> str:
    """Why a row is not taken over the best one so far; empty when it is."""
    if not row["passed"]:
        return str(row["sentence"]).rstrip(".")
    mine, theirs, speedup = row["latency_ms_p50"], best["latency_ms_p50"], row.get("speedup") or {}
    if mine >= theirs:
        return f"{mine:.2f} ms is not faster than the {theirs:.2f} ms of {best['precision']} on this machine"
    low = speedup.get("low")
    if best is plain and low is not None and low <= 1:
        return (
            f"{speedup['ratio']:.3f}x over {best['precision']} is inside the noise of this machine "
            f"({low:.3f} to {speedup['high']:.3f})"
        )
    return ""
