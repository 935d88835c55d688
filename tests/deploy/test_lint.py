"""vss.deploy.lint: a planted case for every rule, and files of ours that have none."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.deploy.lint_graphs import (
    F32,
    I32,
    I64,
    SCALE,
    U8,
    Case,
    cast,
    clash,
    computed_scale,
    convolution,
    half_scales,
    join,
    model,
    nine,
    one,
    pooled,
    quantised,
    resize,
    unmatched,
    value,
)
from vss.core.errors import VssError
from vss.deploy.lint import PLUGINS, QUANT_RULES, Finding, lint
from vss.deploy.lint_rules import RULES

PLANTED: dict[str, tuple[str, str, Case]] = {
    # rule: (node, words of the detail, graph)
    "unknown_op": ("planted", "op mine::Swirl", one("Swirl", domain="mine")),
    "name_clash": ("planted", "op mine::Relu", clash),
    "no_such_op": ("planted", "op Swirl", one("Swirl")),
    "unsupported_op": ("planted", "op Det", one("Det", out=(F32, ["batch", 4]))),
    "max_unpool": (
        "planted",
        "op MaxUnpool",
        one(
            "MaxUnpool",
            extra={"i": np.zeros((1, 4, 8, 8), np.int64)},
            inputs=("i",),
            kernel_shape=[2, 2],
            strides=[2, 2],
        ),
    ),
    "max_pool_indices": ("planted", "indices 'where'", one("MaxPool", outputs=["y", "where"], kernel_shape=[1, 1])),
    "pool_dilations": (
        "planted",
        r"dilations \[2, 2\]",
        one("MaxPool", kernel_shape=[3, 3], dilations=[2, 2], pads=[2] * 4),
    ),
    "resize_mode": ("planted", "mode cubic", resize(mode="cubic")),
    "resize_coordinate_transformation_mode": (
        "planted",
        "half_pixel_symmetric",
        resize(coordinate_transformation_mode="half_pixel_symmetric"),
    ),
    "resize_antialias": ("planted", "antialias 1", resize(antialias=1)),
    "resize_keep_aspect_ratio_policy": (
        "planted",
        "not_larger",
        one(
            "Resize",
            extra={"z": np.array([1, 4, 16, 16])},
            inputs=("", "", "z"),
            mode="linear",
            keep_aspect_ratio_policy="not_larger",
            image=(F32, [1, 4, 8, 8]),
            out=(F32, [1, 4, 16, 16]),
        ),
    ),
    "cast_uint8": ("planted", "Cast INT64 -> UINT8", cast(I64, U8)),
    "uint8_compute": (
        "planted",
        "Transpose on uint8 'x'",
        one("Transpose", perm=[0, 2, 3, 1], image=(U8, ["batch", 4, 8, 8]), out=(U8, ["batch", 8, 8, 4])),
    ),
    "foreign_type": ("y", "a tensor of uint16", cast(F32, TensorProto.UINT16)),
    "float64": ("y", "a tensor of float64", cast(F32, TensorProto.DOUBLE)),
    "int64_io": ("y", "int64", one("ArgMax", axis=1, keepdims=0, out=(I64, ["batch", 8, 8]))),
    "rank": ("deep", "rank 9", nine),
    "batch_lost": ("y", "first dimension 2", one("Relu", out=(F32, [2, 4, 8, 8]))),
    "opset_newer": ("opset_import", "opset 22", one("Relu", opset=22)),
    "opset": ("opset_import", "opset 26", one("Relu", opset=26)),
    "scatter_reduction": (
        "planted",
        "reduction add",
        one(
            "ScatterND",
            reduction="add",
            inputs=("i", "u"),
            extra={"i": np.zeros((1, 4), np.int64), "u": np.ones(1, np.float32)},
        ),
    ),
    "top_k": (
        "planted",
        "k 4000",
        one(
            "TopK",
            inputs=("k",),
            extra={"k": np.array([4000])},
            outputs=["y", "i"],
            image=(F32, ["batch", 5000]),
            out=(F32, ["batch", 4000]),
        ),
    ),
    "grid_sample": (
        "planted",
        "rank 5",
        one(
            "GridSample",
            inputs=("grid",),
            extra={"grid": np.zeros((1, 2, 2, 2, 3), np.float32)},
            image=(F32, [1, 4, 8, 8, 8]),
            out=(F32, [1, 4, 2, 2, 2]),
        ),
    ),
    "training_mode": (
        "planted",
        "Dropout in training mode",
        one("Dropout", inputs=("r", "t"), extra={"r": np.array(0.5, np.float32), "t": np.array(True)}),
    ),
    "q_zero_point": ("d.q", "zero point 3", quantised(zero=np.array(3, np.int8))),
    "q_type": ("d.q", "UINT8", quantised(zero=np.array(0, np.uint8))),
    "q_bias": ("bias.dq", "int32 bias", convolution(bias=True)),
    "q_scale_constant": ("d.q", "a scale that is computed", computed_scale),
    "q_scale_value": ("d.q", "scale nan", quantised(scale=np.array(np.nan, np.float32))),
    "q_activation_scale": (
        "d.q",
        "4 scales",
        quantised(scale=np.full(4, 0.1, np.float32), zero=np.zeros(4, np.int8)),
    ),
    "q_weight_axis": ("planted", "axis 1", convolution(axis=1)),
    "q_scale_count": ("w.dq", "3 scales for 4 channels", convolution(count=3)),
    "q_unmatched": ("planted", "an int8 tensor that Cast reads", unmatched),
    "q_half_opset": ("d.q", "a float16 scale at opset 18", half_scales),
    "q_half_quantised": ("planted", "only its weight quantised", convolution(image=False)),
    "q_add": ("planted", "both inputs", join("Add", "quantised", "quantised")),
    "q_concat": ("planted", "inputs with scales 0.02, 0.05", join("Concat", "quantised", "quantised", other=0.05)),
    "q_resize": ("planted", "stays floating point", pooled(None)),
    "q_normalisation": ("last", "Softmax on a dequantised tensor", convolution(norm="Softmax", after=True)),
}


def named(findings: list[Finding], rule: str) -> list[Finding]:
    return [finding for finding in findings if finding.rule == rule]


def test_every_rule_has_a_planted_case_and_a_name_of_its_own() -> None:
    names = [rule.name for rule in (*RULES, *QUANT_RULES)]
    assert len(set(names)) == len(names)
    assert set(PLANTED) == set(names)


@pytest.mark.parametrize("rule", sorted(PLANTED))
def test_planted(rule: str) -> None:
    node, words, make = PLANTED[rule]
    found = named(lint(make()), rule)
    assert found, rule
    assert found[0].node == node
    assert re.search(words, found[0].detail), found[0].detail
    assert found[0].reason and found[0].fix
    severity = {each.name: each.severity for each in (*RULES, *QUANT_RULES)}[rule]
    assert {finding.severity for finding in found} == {severity}


CLEAN: dict[str, Case] = {
    "relu": one("Relu"),
    "scalable resize": resize(coordinate_transformation_mode="align_corners"),
    "pooling": one("MaxPool", kernel_shape=[1, 1]),
    "uint8 in": cast(U8, F32),
    "uint8 out": cast(F32, U8),
    "int32 labels": cast(I64, I32),
    "quantised convolution": convolution(),
    "transposed": convolution("ConvTranspose", axis=1),
    "skip quantised": join("Add", "plain", "quantised"),
    "shared scale": join("Concat", "quantised", "quantised"),
    "pool in int8": pooled(0.02),
    "plugin": one("VssSegArgmax", domain="vss", out=(I32, ["batch", 16, 16])),
}


@pytest.mark.parametrize("name", sorted(CLEAN))
def test_legal_graphs_have_no_finding(name: str) -> None:
    assert [str(each) for each in lint(CLEAN[name]()) if each.rule != "int64_io"] == []


@pytest.mark.parametrize(
    ("rule", "make", "words"),
    [
        ("q_scale_value", quantised(scale=np.array(0.0, np.float32)), "scale 0.0"),
        ("q_scale_value", quantised(scale=np.array(-1.0, np.float32)), "scale -1.0"),
        ("q_concat", join("Concat", "plain", "quantised"), "1 of 2 inputs"),
        ("q_resize", pooled(0.5), "two different scales"),
        ("q_weight_axis", convolution("ConvTranspose", axis=0), "axis 0"),
        ("cast_uint8", cast(U8, I32), "Cast UINT8 -> INT32"),
        ("training_mode", one("BatchNormalization", inputs=("a", "a", "a", "a"), training_mode=1,
                              extra={"a": np.ones(4, np.float32)}), "BatchNormalization"),
        ("top_k", one("TopK", inputs=("k",), extra={"k": np.array([4])}, outputs=["y", "i"], sorted=0), "sorted 0"),
    ],
)  # fmt: skip
def test_other_forms_of_the_same_fault(rule: str, make: Case, words: str) -> None:
    assert any(words in finding.detail for finding in named(lint(make()), rule))


def test_no_zero_point_means_uint8() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], name="planted"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["y"]),
    ]
    found = named(lint(model(nodes, {"scale": SCALE})), "q_type")
    assert found[0].node == "planted" and "UINT8" in found[0].detail


def test_function_bodies_are_read_unless_a_plugin_replaces_them() -> None:
    def make(name: str) -> onnx.ModelProto:
        inner = helper.make_node("MaxPool", ["a"], ["b", "i"], name="inner", kernel_shape=[1, 1])
        opsets = [helper.make_opsetid("", 20)]
        function = helper.make_function("vss", name, ["a"], ["b"], [inner], opsets)
        call = helper.make_node(name, ["x"], ["y"], name="call", domain="vss")
        return model([call], domains=("vss",), functions=(function,))

    assert [finding.node for finding in lint(make("Pool"))] == ["inner"]
    assert lint(make("VssMaxPool")) == []
    assert lint(make("Pool"), plugins=["Pool"]) == []


def test_branches_are_read() -> None:
    def branch(op: str) -> Any:
        return helper.make_graph([helper.make_node(op, ["x"], [op], name=op)], op, [], [value(op, F32, ["n"])])

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch("Swirl"), else_branch=branch("Relu"))
    made = model([node], {"c": np.array(True)})
    assert [finding.node for finding in named(lint(made), "no_such_op")] == ["Swirl"]


def test_errors_come_first_and_a_finding_is_a_sentence() -> None:
    found = lint(one("ArgMax", axis=1, keepdims=0, out=(I64, ["batch", 8, 8]), opset=26)())
    assert [finding.severity for finding in found] == ["error", "warning"]
    assert str(found[0]) == "opset_import: opset 26: TensorRT reads opsets 9 to 25; export with opset 20."


def test_our_exports_are_clean(exported: SimpleNamespace) -> None:
    for path, _ in (exported.logits, exported.labels):
        assert [str(finding) for finding in lint(path)] == []


def test_files_that_are_no_onnx(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("not a graph at all")
    (tmp_path / "empty.onnx").write_bytes(b"")
    whole = one("Relu")().SerializeToString()
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) - 7])
    for name in ("text", "empty", "half"):
        with pytest.raises(VssError, match=rf"{name}.onnx (is no whole|holds no) ONNX"):
            lint(tmp_path / f"{name}.onnx")
    with pytest.raises(VssError, match=r"absent.onnx does not exist; expected an ONNX file"):
        lint(tmp_path / "absent.onnx")


def test_external_data_that_is_missing(tmp_path: Path) -> None:
    weights = np.ones((64, 4, 1, 1), np.float32)
    made = model([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": weights}, out=(F32, ["batch", 64, 8, 8]))
    path = tmp_path / "model.onnx"
    onnx.save(made, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert lint(path) == []
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(VssError, match=r"weights.bin"):
        lint(path)


def test_files_that_are_hostile(tmp_path: Path) -> None:
    call = helper.make_node("F", ["x"], ["y"], domain="local")
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    made = model([call], {})
    made.opset_import.extend(opsets[1:])
    made.functions.append(helper.make_function("local", "F", ["x"], ["y"], [call], opsets))
    onnx.save(made, str(tmp_path / "cycle.onnx"))
    with pytest.raises(VssError, match="functions that call themselves"):
        lint(tmp_path / "cycle.onnx")
    with pytest.raises(VssError, match="is a folder; expected an ONNX file"):
        lint(tmp_path)
    weights = np.ones((64, 4, 1, 1), np.float32)
    made = model([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": weights}, out=(F32, ["batch", 64, 8, 8]))
    path = tmp_path / "external.onnx"
    onnx.save(made, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(VssError, match="beyond the end of"):
        lint(path)
    (tmp_path / "weights.bin").unlink()
    (tmp_path / "weights.bin").symlink_to("/dev/zero")
    with pytest.raises(VssError, match="does not lie beside it"):
        lint(path)


def test_plugins_of_ours_are_known() -> None:
    assert PLUGINS == ("VssSegArgmax", "VssMaxPool", "VssMaxUnpool")
