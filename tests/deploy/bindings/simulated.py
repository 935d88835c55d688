"""A TensorRT whose engines take what a law says: fused convolutions in blocks of 16 channels, copies, one Myelin layer.

It stands behind the builder, the parser and the runtime of the real bindings. An engine is made of the very file that
was parsed; its inspector and its profiler speak of its layers as TensorRT's do.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import tensorrt as trt
from onnx import helper
from recording import Host, Install, Recorder, Tensors, engine

BLOCK = 16
PER_MAC, START = 2e-9, 1e-3  # milliseconds
DTYPES = {1: "FLOAT", 2: "UINT8", 6: "INT32", 7: "INT64", 10: "HALF"}
SEPARATOR = "\x1e"


class Simulated(Install):
    """Builders and runtimes whose engines follow the law; `times` of the last one loaded, `spent` by all their runs."""

    def __init__(self, monkeypatch: Any, size: tuple[int, int]) -> None:
        super().__init__(monkeypatch, image=(-1, *size, 3))
        self.plan = lambda: str(len(self.parsed) - 1).encode()
        self.deserialise = self.load
        self.times: dict[str, float] = {}
        self.spent = 0.0

    def _config(self) -> Recorder:
        """A timing cache that does not grow, since many engines are built."""
        made = super()._config()
        cache = Recorder(
            trt.ITimingCache,
            self.log,
            serialize=lambda: Host(b"measured|"),
            combine=lambda other, ignore_mismatch: True,
        )
        object.__getattribute__(made, "_state")[2]["create_timing_cache"] = lambda data: cache
        return made

    def load(self, blob: bytes) -> Recorder:
        """An engine of the file that was parsed as number `blob`."""
        model = onnx.load_from_string(self.parsed[int(blob)])
        layers = layers_of(model)
        self.times = {layer["Name"]: ms for layer, ms in layers}
        inspector = json.dumps({"Layers": [layer for layer, _ in layers], "Bindings": []})
        whole = sum(self.times.values())
        return engine(self.log, tensors_of(model), lambda *_: self.run(whole), inspector, self.times)

    def run(self, ms: float) -> bool:
        """Spin for as long as the engine takes."""
        end = time.perf_counter() + ms / 1e3
        while time.perf_counter() < end:
            pass
        self.spent += ms
        return True


def conv_ms(cin: int, cout: int, kernel: int, positions: int) -> float:
    """Milliseconds of a convolution, in whole blocks of channels."""
    sides = [math.ceil(side / BLOCK) * BLOCK for side in (cin, cout)]
    return START + PER_MAC * math.prod(sides) * kernel * positions


def layers_of(model: onnx.ModelProto) -> list[tuple[dict[str, Any], float]]:
    """Inspector layers and their times: a convolution with its activation, one copy, all else in a Myelin layer."""
    shapes, weights = shapes_of(model), {each.name: list(each.dims) for each in model.graph.initializer}
    weight_of = {out: weights.get(node.input[0]) for node in model.graph.node for out in node.output if node.input}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found, rest = [], []
    taken: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "Conv":
            behind = [each for each in readers.get(node.output[0], []) if each.op_type == "Relu"]
            nodes = [node, *behind[:1]]
            taken |= {each.name for each in nodes}
            cout, cin, *kernel = weights.get(node.input[1]) or weight_of[node.input[1]]
            ms = conv_ms(cin, cout, math.prod(kernel), math.prod(shapes[node.output[0]][2:]))
            name = " + ".join(each.name for each in nodes)
            found.append((layer_of(name, "CaskConvolution", nodes, node.input[0], nodes[-1].output[0]), ms))
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    copy = layer_of(f"Reformatting CopyNode for Input Tensor 0 to {first.name}", "Reformat", [], first.input[0], "")
    rest = [node for node in model.graph.node if node.name not in taken]
    myelin = layer_of("__myl_CastTranMulAdd_myl0_0", "kgen", rest, rest[0].input[0], rest[-1].output[0])
    return [(copy, 0.002), *found, (myelin, 0.005)]


def layer_of(name: str, kind: str, nodes: list[Any], source: str, target: str) -> dict[str, Any]:
    """As the engine inspector describes a layer in detail."""
    said = SEPARATOR.join(f"[ONNX Layer: {node.name}]" for node in nodes)
    sides = {"Inputs": [{"Name": source}], "Outputs": [{"Name": target}]}
    return {"Name": name, "LayerType": kind, "Metadata": said, **sides}


def shapes_of(model: onnx.ModelProto) -> Mapping[str, list[int]]:
    """Shapes of all tensors for one image."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = 1
    del fixed.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in values}


def tensors_of(model: onnx.ModelProto) -> Tensors:
    """Inputs that take 1 to 8 images, and outputs that follow."""

    def dims(value: Any) -> tuple[int, ...]:
        return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)[1:]

    def dtype(value: Any) -> Any:
        return getattr(trt.DataType, DTYPES[value.type.tensor_type.elem_type])

    inputs = {v.name: (dtype(v), tuple((n, *dims(v)) for n in (1, 1, 8))) for v in model.graph.input}
    first = next(iter(inputs))

    def follows(rest: tuple[int, ...]) -> Any:
        return lambda shapes: (shapes[first][0], *rest)

    return Tensors(inputs, {v.name: (dtype(v), follows(dims(v))) for v in model.graph.output})


def pixels(size: tuple[int, int]) -> dict[str, np.ndarray]:
    """One image."""
    return {"image": np.zeros((1, *size, 3), helper.tensor_dtype_to_np_dtype(2))}
