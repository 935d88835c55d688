"""vss.deploy.quantize.layers on a graph whose answers can be read off."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import helper

from tests.deploy.nets import conv_graph
from vss.core.errors import VssError
from vss.deploy.quantize.layers import Net, check_names, groups_of, read_onnx, sort_nodes

NAMES = ["stem", "main.0", "main.1", "project", "down", "mix", "head"]


def test_layers_have_the_names_of_their_modules_and_ends_are_found() -> None:
    net = Net(conv_graph())
    assert [layer.name for layer in net.layers] == NAMES
    assert net.layers[1].source == "stem" and net.layers[1].output == "m0" and net.layers[1].op == "Conv"
    assert net.first == {"stem"} and net.last == {"head"}
    assert net.depth["n_add"] == 1 + net.depth["n_main.1"] == 6
    assert net.outer == set()


def test_pre_and_post_processing_is_outside(exported: SimpleNamespace) -> None:
    net = Net(read_onnx(exported.labels[0]))
    ops = {node.op_type for node in net.nodes if node.name in net.outer}
    assert ops == {"Cast", "Transpose", "Mul", "Add", "Resize", "ArgMax"}
    assert net.first == {"first.0"} and net.last == {"head"}
    assert sum(node.op_type == "Resize" and node.name not in net.outer for node in net.nodes) == 1


def test_groups_are_as_fine_as_allowed() -> None:
    net = Net(conv_graph())
    assert groups_of(net, 7) == {name: [name] for name in NAMES}
    assert groups_of(net, 6)["main"] == ["main.0", "main.1"]
    runs = groups_of(net, 2)
    assert list(runs) == ["stem..project", "down..head"] and [name for run in runs.values() for name in run] == NAMES


def test_nodes_without_names_get_some_and_order_is_mended() -> None:
    model = conv_graph()
    for node in model.graph.node:
        node.ClearField("name")
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    sort_nodes(model)
    onnx.checker.check_model(model, full_check=True)
    net = Net(model)
    assert len({node.name for node in net.nodes}) == len(net.nodes) and all(node.name for node in net.nodes)
    assert sorted(layer.name for layer in net.layers) == sorted(NAMES)


def test_files_that_cannot_be_worked_on(tmp_path: Path) -> None:
    with pytest.raises(VssError, match=r"no\.onnx does not exist"):
        read_onnx(tmp_path / "no.onnx")
    (tmp_path / "text.onnx").write_bytes(b"\x0a\xffhello")
    with pytest.raises(VssError, match=r"text\.onnx is no whole ONNX file"):
        read_onnx(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(VssError, match="holds no ONNX graph"):
        read_onnx(tmp_path / "empty.onnx")


def test_an_operator_that_nothing_defines_is_named(tmp_path: Path) -> None:
    model = conv_graph()
    model.graph.node.append(helper.make_node("Sharpen", ["logits"], ["y"], "n_sharp", domain="acme"))
    model.opset_import.append(helper.make_opsetid("acme", 1))
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(VssError, match=r"operator acme\.Sharpen \(node n_sharp\), which ONNX does not define"):
        read_onnx(tmp_path / "x.onnx")
    body = helper.make_function(
        "acme", "Sharpen", ["a"], ["b"], [helper.make_node("Neg", ["a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    model.functions.append(body)
    onnx.save(model, tmp_path / "x.onnx")
    assert len(read_onnx(tmp_path / "x.onnx").functions) == 1
    model.graph.node[-1].CopyFrom(helper.make_node("Convv", ["logits"], ["y"], "typo"))
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(VssError, match=r"operator Convv \(node typo\)"):
        read_onnx(tmp_path / "x.onnx")


def test_a_layer_that_does_not_exist_is_named() -> None:
    with pytest.raises(VssError, match=r"unknown layer 'main.2'. Did you mean 'main.\d'"):
        check_names(Net(conv_graph()), ["stem", "main.2"])


def test_a_weight_that_serves_twice_gives_two_names() -> None:
    model = conv_graph()
    model.graph.node[2].input[1] = model.graph.node[4].input[1]
    assert [layer.name for layer in Net(model).layers][1:3] == ["main.1", "main.1#2"]
