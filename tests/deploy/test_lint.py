"""vss.deploy.lint: a planted case for every rule, and files of ours that have none."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from tests.deploy.lint_graphs import (
    F32,
    I64,
    SCALE,
    Case,
    model,
    one,
    value,
)
from tests.deploy.lint_planted import CLEAN, OTHERS, PLANTED
from vss.core.errors import VssError
from vss.deploy.lint import PLUGINS, QUANT_RULES, Finding, lint
from vss.deploy.lint_rules import RULES


def named(findings: list[Finding], rule: str) -> list[Finding]:
    return [finding for finding in findings if finding.rule == rule]


def test_every_rule_has_a_planted_case_and_a_name_of_its_own() -> None:
    names = [rule.name for rule in (*RULES, *QUANT_RULES)]
    assert len(set(names)) == len(names)
    assert set(PLANTED) == set(names)


@pytest.mark.parametrize("rule", sorted(PLANTED))
def test_planted(rule: str) -> None:
    node, words, make = PLANTED[rule]
    found = named(lint(make(), targets=["sm86"] if rule == "fp8_target" else []), rule)
    assert found, rule
    assert found[0].node == node
    assert re.search(words, found[0].detail), found[0].detail
    assert found[0].reason and found[0].fix
    does = {each.name: each.does() for each in (*RULES, *QUANT_RULES)}[rule]
    assert {finding.severity for finding in found} == {"warning" if set(does.values()) == {"warning"} else "error"}
    assert found[0].flavours == does


@pytest.mark.parametrize("name", sorted(CLEAN))
def test_legal_graphs_have_no_finding(name: str) -> None:
    assert [str(each) for each in lint(CLEAN[name]()) if each.rule != "int64_io"] == []


@pytest.mark.parametrize(("rule", "words", "make"), OTHERS, ids=lambda value: value if isinstance(value, str) else "")
def test_other_forms_of_the_same_fault(rule: str, words: str, make: Case) -> None:
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


def test_an_error_of_one_flavour_stops_no_other_one() -> None:
    def errors(model: onnx.ModelProto, *flavours: str) -> list[str]:
        return [each.rule for each in lint(model, flavours=flavours) if each.severity == "error"]

    scales = PLANTED["q_activation_scale"][2]()
    assert errors(scales, "rtx") == errors(scales, "11") == []
    assert set(errors(scales, "10")) == set(errors(scales, "10", "rtx")) == {"q_activation_scale"}
    attention = PLANTED["rtx_op"][2]()
    assert errors(attention, "10", "11") == [] and errors(attention, "rtx") == ["rtx_op"]
    assert lint(PLANTED["cast_uint8"][2](), flavours=["rtx"])[0].rule == "int64_io"
    found = named(lint(attention, flavours=["11", "rtx"]), "rtx_op")[0]
    assert found.flavours == {"rtx": "refused"} and str(found).endswith("before the export (TensorRT for RTX).")


def test_float8_is_judged_by_the_targets() -> None:
    made = PLANTED["fp8"][2]()
    assert [each.rule for each in lint(made, targets=["sm89", "sm120"])] == []
    (found,) = lint(made, targets=["sm89", "sm86", "sm80"])
    assert (found.rule, found.detail, found.flavours) == ("fp8_target", "float8 for sm86, sm80", {"rtx": "refused"})


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


@pytest.mark.parametrize("op", ["Resize", "QuantizeLinear", "Conv", "MaxPool", "ReduceMax", "GridSample"])
def test_nodes_without_what_their_op_needs_are_refused(op: str) -> None:
    for inputs, outputs in (([], ["y"]), (["x"], [])):
        made = model([helper.make_node(op, inputs, outputs, name="bare")])
        with pytest.raises(
            VssError, match=rf"the node bare has {len(inputs)} inputs and {len(outputs)} outputs; {op} takes"
        ):
            lint(made)
    inner = helper.make_function("own", "F", ["a"], ["b"], [helper.make_node("Conv", ["a"], ["b"])],
                                 [helper.make_opsetid("", 20)])  # fmt: skip
    with pytest.raises(VssError, match="the node Conv of b has 1 inputs"):
        lint(model([helper.make_node("F", ["x"], ["y"], domain="own")], domains=("own",), functions=(inner,)))


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
