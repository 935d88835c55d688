"""INT8 that ONNX Runtime computes in INT8, and its answer is what the Q/DQ of the file say."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from tests.deploy.nets import conv_graph
from vss.deploy.backends.base import INT8_OF_CPUS, Int8
from vss.deploy.backends.ort import OnnxRuntimeSession
from vss.deploy.quantize.layers import Net
from vss.deploy.quantize.qdq import insert, observed, place
from vss.deploy.quantize.sensitivity import relative_error

STYLE = INT8_OF_CPUS
IMAGE = np.random.default_rng(0).uniform(-2, 2, (1, 3, 16, 16)).astype(np.float32)


def written(style: Int8, path: Path) -> onnx.ModelProto:
    """Quantised by the largest values of this very image."""
    net, tapped = Net(copy.deepcopy(conv_graph())), conv_graph()
    wanted = [name for name in observed(net) if name != "image"]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    names = [each.name for each in tapped.graph.output]
    found = dict(zip(names, ReferenceEvaluator(tapped).run(None, {"image": IMAGE}), strict=True)) | {"image": IMAGE}
    values = {name: float(np.abs(found[name]).max()) for name in observed(net)}
    model = insert(net, place(net, tied=style.tied), values, Path("graph.onnx"), style)
    onnx.save(model, path)
    return model


def kernels(path: Path) -> Counter[str]:
    """Operators of the graph as onnxruntime runs it."""
    optimised = path.with_suffix(".optimised.onnx")
    OnnxRuntimeSession(path, optimisation="extended", write=optimised).close()
    return Counter(node.op_type for node in onnx.load(optimised).graph.node)


def test_convolutions_run_in_int8_with_uint8_behind_relu(tmp_path: Path) -> None:
    model = written(STYLE, tmp_path / "own.onnx")
    expected = np.asarray(ReferenceEvaluator(model).run(None, {"image": IMAGE})[0])
    found = OnnxRuntimeSession(tmp_path / "own.onnx", threads=1).run({"image": IMAGE})["logits"]
    assert relative_error(expected, found) < 0.01  # it rounds the bias to INT32, and half a level the other way
    written(Int8(), tmp_path / "tensorrt.onnx")
    assert kernels(tmp_path / "own.onnx")["QLinearConv"] == 3
    # of the file for TensorRT none does: a ReLU in front of signed Q/DQ is not one with it
    assert kernels(tmp_path / "tensorrt.onnx")["QLinearConv"] == 0


def test_only_the_inputs_of_a_concat_are_set_free() -> None:
    net = Net(conv_graph())
    tied, free = place(net), place(net, tied=False)
    assert (free.edges, free.layers, free.skips) == (tied.edges, tied.layers, tied.skips)
    concats = [set(node.input) for node in net.nodes if node.op_type == "Concat"]
    assert concats
    assert all(any(inputs <= tie for tie in tied.ties) for inputs in concats)
    assert not any(inputs <= tie for inputs in concats for tie in free.ties)
