"""Does an engine compute with numbers? NaN and infinity become labels like any other value; their score is none.

An engine that ends in labels hides its logits. Of an ONNX file they are looked at on the side; of a runtime that shows
none (TensorRT), what can be checked are the file that it was built from and the network in torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vss.core.closeness import ENGINE, refuse_not_finite
from vss.core.errors import NotFinite, need
from vss.deploy.backends.base import Session

BEHIND_LABELS = ("Cast", "Squeeze", "Unsqueeze", "Reshape", "Identity", "Transpose")
"""Operators that may stand between the choice of a label and the output."""


def check_finite(session: Session, feed: Mapping[str, np.ndarray], what: str = "the engine") -> dict[str, np.ndarray]:
    """Run once and give the outputs; raises `NotFinite` where they, or the logits behind labels, are not finite."""
    found = session.run(feed)
    floats = {name: value for name, value in found.items() if value.dtype.kind == "f"}
    refuse_not_finite((floats or session.probe(feed)).values(), what, ENGINE)
    return found


def logits_of(path: Path, feed: Mapping[str, np.ndarray], level: Any) -> dict[str, np.ndarray]:
    """What an ONNX file chooses its labels by, on a feed; empty where no such choice is found.

    Args:
        path: the file; weights that are NaN are refused as they are.
        feed: of its inputs.
        level: `onnxruntime.GraphOptimizationLevel` that the engine runs at.
    """
    onnx, ort = need("onnx", "looking into ONNX files"), need("onnxruntime", "running ONNX files")
    model = onnx.load(str(path))
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.dtype.kind == "f" and np.isnan(value).any():
            raise NotFinite(f"{path} holds NaN in {tensor.name}; {ENGINE}.")
    source = deciding(model.graph, "labels")
    if source is None:
        return {}
    model.graph.output.extend([onnx.ValueInfoProto(name=source)])
    options = ort.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 3, level
    with tempfile.TemporaryDirectory(prefix="vss-probe-") as folder:
        tapped = Path(folder) / "tapped.onnx"
        onnx.save(model, str(tapped))
        session = ort.InferenceSession(str(tapped), options, providers=["CPUExecutionProvider"])
        return {source: session.run([source], dict(feed))[0]}


def deciding(graph: Any, output: str) -> str | None:
    """The tensor that labels are chosen by: the first input of the last node that does more than cast and reshape."""
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(output)
    while node is not None and node.op_type in BEHIND_LABELS:
        node = makers.get(node.input[0])
    return str(node.input[0]) if node is not None and node.input else None
