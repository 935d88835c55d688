"""vss.deploy.quantize.sensitivity: a damaged layer is found in few probes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.deploy.nets import conv_graph
from vss.core.errors import VssError
from vss.deploy.quantize.layers import Net, kept_nodes, to_fp16
from vss.deploy.quantize.sensitivity import first_diverging, halve, relative_error, sentence

NAMES = ["stem", "main.0", "main.1", "project", "down", "mix", "head"]
FEED = {"image": np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)}


def pair(folder: Path, layer: str, factor: float) -> tuple[Path, Path]:
    """The graph, and one whose layer has scaled weights."""
    model = conv_graph()
    onnx.save(model, folder / "a.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == f"model.{layer}.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))
    onnx.save(model, folder / "b.onnx")
    return folder / "a.onnx", folder / "b.onnx"


@pytest.mark.parametrize("layer", ["stem", "main.0", "down", "head"])
def test_the_damaged_layer_is_named(tmp_path: Path, layer: str) -> None:
    found = first_diverging(*pair(tmp_path, layer, -1.0), FEED)
    assert found["layer"] == layer and found["error"] == pytest.approx(2.0)
    if layer != "stem":
        assert found["before"]["error"] < 1e-5
    assert found["probes"] <= 4 and layer in sentence(found)


def test_float16_of_the_same_network_stays_inside_a_limit(tmp_path: Path) -> None:
    model = conv_graph()
    onnx.save(model, tmp_path / "a.onnx")
    onnx.save(to_fp16(model, kept_nodes(Net(model), ["main.1"])), tmp_path / "b.onnx")
    found = first_diverging(tmp_path / "a.onnx", tmp_path / "b.onnx", FEED, limit=0.01)
    assert found["layer"] is None and 0 < found["end"] < 0.01 and "inside the limit" in sentence(found)
    same = first_diverging(tmp_path / "a.onnx", tmp_path / "a.onnx", FEED)
    assert same["end"] < 1e-5 and "behind the last one" in sentence(same)


@pytest.mark.parametrize("first", range(9))
def test_halving_finds_the_step_in_few_probes(first: int) -> None:
    layers = [f"l{i}" for i in range(9)]
    asked: list[str] = []

    def error_of(name: str) -> float:
        asked.append(name)
        return 1.0 if int(name[1:]) >= first else 0.01

    found = halve(layers, error_of, None)
    assert found["layer"] == f"l{first}" and len(asked) == found["probes"] <= 5
    assert (found["before"] is None) == (first == 0)


def test_errors_that_come_and_go_still_give_neighbours_that_differ() -> None:
    errors = [0.0, 0.9, 0.1, 0.8, 0.2, 1.0]
    found = halve([str(i) for i in range(6)], lambda name: errors[int(name)], 0.5)
    low, high = int(found["before"]["layer"]), int(found["layer"])
    assert high == low + 1 and errors[low] <= 0.5 < errors[high]


def test_not_finite_is_infinitely_wrong() -> None:
    assert relative_error(np.ones(3), np.array([1, np.nan, 1])) == math.inf
    assert relative_error(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(0.1)
    found = halve(["a", "b"], lambda name: math.inf if name == "b" else 0.2, None)
    assert found["layer"] == "b" and found["before"] == {"layer": "a", "error": 0.2}


def test_files_of_two_networks_are_refused(tmp_path: Path) -> None:
    model = conv_graph()
    onnx.save(model, tmp_path / "a.onnx")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["image"], ["other"], "n")], "g", list(model.graph.input),
        [onnx.helper.make_tensor_value_info("other", 1, ["batch", 3, 16, 16])],
    )  # fmt: skip
    onnx.save(onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=10), tmp_path / "b.onnx")
    with pytest.raises(VssError, match="compare two files of one network"):
        first_diverging(tmp_path / "a.onnx", tmp_path / "b.onnx", FEED)
