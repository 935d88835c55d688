"""vss.deploy.lint: a planted case for every rule, and files of ours that have none."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vss.deploy.lint import PLUGINS, Finding, lint
from vss.deploy.lint_quant import QUANT_RULES
from vss.deploy.lint_rules import RULES
from vss.errors import VssError

F32, F16, U8, I8, I32, I64 = (getattr(TensorProto, n) for n in ("FLOAT", "FLOAT16", "UINT8", "INT8", "INT32", "INT64"))
Case = Callable[[], onnx.ModelProto]


def value(name: str, dtype: int, shape: list[int | str]) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(
    nodes: list[Any],
    constants: dict[str, np.ndarray] | None = None,
    *,
    image: tuple[int, list[int | str]] = (F32, ["batch", 4, 8, 8]),
    out: tuple[int, list[int | str]] = (F32, ["batch", 4, 8, 8]),
    opset: int = 20,
    domains: tuple[str, ...] = (),
    functions: tuple[Any, ...] = (),
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", [value("x", *image)], [value("y", *out)], initializers)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def one(op: str, *, extra: dict[str, np.ndarray] | None = None, inputs: tuple[str, ...] = (), **attributes: Any) -> Any:
    """A graph of one node, y = op(x, further inputs)."""
    where = {key: attributes.pop(key) for key in ("image", "out", "opset") if key in attributes}
    domain = attributes.pop("domain", "")
    outputs = attributes.pop("outputs", ["y"])
    node = helper.make_node(op, ["x", *inputs], outputs, name="planted", domain=domain, **attributes)
    return lambda: model([node], extra, domains=(domain,) if domain else (), **where)


def resize(**attributes: Any) -> Case:
    scales = np.array([1, 1, 2, 2], np.float32)
    out = (F32, ["batch", 4, 16, 16])
    return one("Resize", extra={"s": scales}, inputs=("", "s"), out=out, **{"mode": "linear"} | attributes)


def cast(source: int, target: int) -> Case:
    return one("Cast", image=(source, ["batch", 4]), out=(target, ["batch", 4]), to=target)


SCALE, ZERO = np.array(0.02, np.float32), np.array(0, np.int8)


def pair(name: str, source: str, *, scale: str = "scale", zero: str = "zero") -> list[Any]:
    """Quantise and dequantise `source` into NAME."""
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero], [f"{name}_q"], name=f"{name}.q"),
        helper.make_node("DequantizeLinear", [f"{name}_q", scale, zero], [name], name=f"{name}.dq"),
    ]


def quantised(**constants: np.ndarray) -> Case:
    """x -> Q -> DQ -> Relu -> y with other constants."""
    return lambda: model(
        [*pair("d", "x"), helper.make_node("Relu", ["d"], ["y"])], {"scale": SCALE, "zero": ZERO} | constants
    )


def convolution(
    op: str = "Conv",
    *,
    axis: int = 0,
    count: int = 4,
    bias: bool = False,
    image: bool = True,
    norm: str = "",
    after: bool = False,
) -> Case:
    """A convolution with an int8 weight, as TensorRT wants it unless an argument says otherwise."""

    def make() -> onnx.ModelProto:
        constants = {"scale": SCALE, "zero": ZERO, "w_q": np.ones((4, 4, 1, 1), np.int8)}
        constants |= {"ws": np.full(count, 0.1, np.float32), "wz": np.zeros(count, np.int8)}
        nodes = [*pair("d", "x")] if image else []
        nodes += [helper.make_node("DequantizeLinear", ["w_q", "ws", "wz"], ["w"], name="w.dq", axis=axis)]
        inputs = ["d" if image else "x", "w"]
        if bias:
            constants |= {"b_q": np.ones(4, np.int32), "bs": np.array(0.01, np.float32)}
            nodes += [helper.make_node("DequantizeLinear", ["b_q", "bs"], ["b"], name="bias.dq")]
            inputs.append("b")
        nodes += [helper.make_node(op, inputs, ["c"], name="planted")]
        last = "c"
        if after:
            nodes += pair("e", "c")
            last = "e"
        nodes += [helper.make_node(norm or "Relu", [last], ["y"], name="last")]
        return model(nodes, constants)

    return make


def join(op: str, first: str, second: str, *, other: float = 0.02) -> Case:
    """y = op of two branches of x; a branch is "plain" or "quantised"."""

    def make() -> onnx.ModelProto:
        nodes, names = [], []
        for index, kind in enumerate((first, second)):
            nodes.append(helper.make_node("Relu", ["x"], [f"r{index}"]))
            if kind == "quantised":
                nodes += pair(f"d{index}", f"r{index}", scale=f"scale{index}")
            names.append(f"d{index}" if kind == "quantised" else f"r{index}")
        attributes = {"axis": 1} if op == "Concat" else {}
        nodes.append(helper.make_node(op, names, ["y"], name="planted", **attributes))
        scales = {"scale0": SCALE, "scale1": np.array(other, np.float32), "zero": ZERO}
        return model(nodes, scales, out=(F32, ["batch", 8 if op == "Concat" else 4, 8, 8]))

    return make


def pooled(after: float | None) -> Case:
    """Q, DQ, MaxPool, and then Q and DQ with another scale or nothing."""

    def make() -> onnx.ModelProto:
        nodes = [*pair("d", "x"), helper.make_node("MaxPool", ["d"], ["p"], name="planted", kernel_shape=[1, 1])]
        nodes += pair("e", "p", scale="after") if after else []
        nodes += [helper.make_node("Relu", ["e" if after else "p"], ["y"])]
        return model(nodes, {"scale": SCALE, "zero": ZERO, "after": np.array(after or 1.0, np.float32)})

    return make


def computed_scale() -> onnx.ModelProto:
    nodes = [helper.make_node("ReduceMax", ["x"], ["scale"], keepdims=0), *pair("d", "x")]
    return model([*nodes, helper.make_node("Relu", ["d"], ["y"])], {"zero": ZERO})


def unmatched() -> onnx.ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="planted"),
        helper.make_node("Cast", ["q"], ["y"], to=F32),
    ]
    return model(nodes, {"scale": SCALE, "zero": ZERO})


def half_scales() -> onnx.ModelProto:
    nodes = [*pair("d", "x"), helper.make_node("Relu", ["d"], ["y"])]
    made = model(
        nodes, {"scale": SCALE.astype(np.float16), "zero": ZERO}, image=(F16, ["b", 4, 8, 8]), out=(F16, ["b", 4, 8, 8])
    )
    made.opset_import[0].version = 18
    return made


def clash() -> onnx.ModelProto:
    return model([helper.make_node("Relu", ["x"], ["y"], name="planted", domain="mine")], domains=("mine",))


def nine() -> onnx.ModelProto:
    shape = np.array([-1, *([2] * 8)], np.int64)
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["deep"]),
        helper.make_node("ReduceMax", ["deep", "axes"], ["y"], keepdims=0),
    ]
    axes = np.arange(4, 9)
    return model(nodes, {"shape": shape, "axes": axes}, out=(F32, ["batch", 2, 2, 2]))


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


def test_plugins_of_ours_are_known() -> None:
    assert PLUGINS == ("VssSegArgmax", "VssMaxPool", "VssMaxUnpool")
