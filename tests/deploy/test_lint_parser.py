"""The lint against the real parser and builder of TensorRT for RTX, on the graph of every rule and more: no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from tests.deploy import lint_table
from tests.deploy.lint_planted import CLEAN, NOT_BUILT
from tests.deploy.real_parser import CRASH, Verdict, parser_ops
from tests.deploy.rtx import needs_rtx
from vss.deploy.backends import trt
from vss.deploy.lint import QUANT_RULES
from vss.deploy.lint_rules import RULES

pytestmark = needs_rtx


@pytest.fixture(scope="module")
def graphs() -> dict[str, onnx.ModelProto]:
    return lint_table.graphs()


@pytest.fixture(scope="module")
def verdicts(graphs: dict[str, onnx.ModelProto]) -> dict[str, Verdict]:
    return lint_table.judged(graphs)


def test_no_graph_is_judged_otherwise_by_the_rules(
    graphs: dict[str, onnx.ModelProto], verdicts: dict[str, Verdict]
) -> None:
    assert {name: verdicts[name] for name in lint_table.disagreements(graphs, verdicts)} == {}


@pytest.mark.parametrize("rule", (*RULES, *QUANT_RULES), ids=lambda rule: rule.name)
def test_the_column_of_each_rule_is_what_happens(
    rule: object, graphs: dict[str, onnx.ModelProto], verdicts: dict[str, Verdict]
) -> None:
    """Refused by this rule and no other one, or built."""
    name, refused = rule.name, rule.does(["rtx"]).get("rtx") == "refused"  # type: ignore[attr-defined]
    assert verdicts[name].built is not refused, verdicts[name].reason
    assert bool(verdicts[name].reason) is refused
    assert (name in lint_table.refused_by_rules(name, graphs[name])) is refused


def test_fixes_and_graphs_without_findings_are_built(verdicts: dict[str, Verdict]) -> None:
    assert [name for name in CLEAN if name != "plugin" and not verdicts[f"clean: {name}"].built] == []


def test_a_builder_that_dies_is_told_apart(verdicts: dict[str, Verdict]) -> None:
    assert verdicts["op: Attention"] == Verdict(True, False, f"{CRASH} (signal 11)")
    assert verdicts["op: NonMaxSuppression"].parsed and not verdicts["op: NonZero"].parsed
    assert "3840" in verdicts["top_k"].reason and verdicts["top_k"].parsed


@pytest.mark.parametrize("name", ["scatter_elements", "mixed_types", "top_k", "name_clash", "op: Attention"])
def test_many_in_one_process_is_each_in_its_own(
    name: str, tmp_path: Path, graphs: dict[str, onnx.ModelProto], verdicts: dict[str, Verdict]
) -> None:
    onnx.save(graphs[name], str(tmp_path / "model.onnx"))
    alone = trt.verdict(tmp_path / "model.onnx")
    assert alone.built is verdicts[name].built and alone.crashed is verdicts[name].reason.startswith(CRASH)


def test_the_list_of_ops_is_the_parsers_own(verdicts: dict[str, Verdict]) -> None:
    stored, now = json.loads(lint_table.OPS.read_text()), lint_table.ops(verdicts)
    assert stored["not_built"].keys() == now["not_built"].keys() == NOT_BUILT.keys()
    assert now["tensorrt_rtx"] == stored["tensorrt_rtx"]
    known = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    assert now["unsupported"] == [name for name in stored["unsupported"] if name in known]


def test_the_page_is_as_new_as_the_rules(graphs: dict[str, onnx.ModelProto], verdicts: dict[str, Verdict]) -> None:
    made = lint_table.page(graphs, verdicts, parser_ops([])[0])
    assert lint_table.PAGE.read_text() == made, "run python -m tests.deploy.lint_table"
