"""`vss lint` as people use it: a table, figures as JSON, exit codes 0, 1 and 2."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests.deploy.lint_graphs import one
from tests.deploy.lint_planted import CLEAN, PLANTED
from vss.cli.main import main


def lint(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vss", "lint", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A file from elsewhere with an op that nobody here knows."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    node = helper.make_node("Swirl", ["x"], ["y"], name="layer3", domain="their.ops")
    graph = helper.make_graph([node], "g", [ends[0]], [ends[1]])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("their.ops", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(tmp_path / "foreign.onnx"))
    return tmp_path / "foreign.onnx"


def test_an_error_is_named_and_exits_with_1(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = foreign.with_suffix(".json")
    assert lint(monkeypatch, foreign, "--report", figures) == 1
    said = capsys.readouterr()
    assert "layer3" in said.out and "their.ops::Swirl" in said.out and "1 errors, 0 warnings" in said.out
    assert "TensorRT would not build" in said.err
    data = json.loads(figures.read_text())
    assert (data["kind"], data["errors"], data["findings"][0]["rule"]) == ("vss.lint", 1, "unknown_op")


def test_a_declared_plugin_is_no_error(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lint(monkeypatch, foreign, "--plugin-op", "Swirl") == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out


def test_an_error_of_the_other_backend_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, figures = tmp_path / "reduced.onnx", tmp_path / "figures.json"
    onnx.save(PLANTED["scatter_elements"][2](), str(path))
    assert lint(monkeypatch, path, "--backend", "tensorrt") == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out
    assert lint(monkeypatch, path, "--report", figures) == lint(monkeypatch, path, "--backend", "tensorrt_rtx") == 1
    said = capsys.readouterr()
    assert "rtx: refused" in said.out and "(TensorRT for RTX)" in said.err
    assert json.loads(figures.read_text())["findings"][0]["flavours"] == {"rtx": "refused"}


def test_flags_that_no_tensorrt_has_are_refused(
    foreign: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert lint(monkeypatch, foreign, *words) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "is tensorrt or tensorrt_rtx, and got 'onnxruntime'" in refused("--backend", "onnxruntime")
    assert "sm90 (H100, H200) is served by TensorRT" in refused("--targets", "sm90")
    assert "an engine of TensorRT is built on its GPU" in refused("--backend", "tensorrt", "--targets", "sm86")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx: pip install .[rtx]")
def test_the_real_parser_stands_beside_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, model in (
        ("good", CLEAN["relu"]()),
        ("crash", PLANTED["rtx_op"][2]()),
        ("pool", one("LpPool", kernel_shape=[1, 1], p=3)()),
    ):
        onnx.save(model, str(tmp_path / f"{name}.onnx"))
    good, crash, pool = (tmp_path / f"{name}.onnx" for name in ("good", "crash", "pool"))
    figures = tmp_path / "figures.json"
    assert lint(monkeypatch, good, "--parser", "--targets", "sm86,sm89", "--report", figures) == 0
    assert re.search(r"TensorRT for RTX 1\.\d+\S* builds it for sm86, sm89: \d+ engine layers", capsys.readouterr().out)
    assert json.loads(figures.read_text())["parser"]["built"] is True
    assert lint(monkeypatch, crash, "--parser", "--report", figures) == 1
    assert "crashed (segmentation fault)" in " ".join(capsys.readouterr().out.split())
    assert json.loads(figures.read_text())["parser"]["crashed"] is True
    assert lint(monkeypatch, crash, "--parser", "--backend", "tensorrt") == 0  # another product's builder crashed
    capsys.readouterr()
    assert lint(monkeypatch, pool, "--parser", "--backend", "tensorrt_rtx") == 1  # no rule knows this one
    said = capsys.readouterr()
    assert "0 errors, 0 warnings" in said.out and "does not build" in said.err and "Only L1 and L2" in said.err


def test_no_onnx_is_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.onnx").write_text("not a graph")
    assert lint(monkeypatch, tmp_path / "text.onnx") == 2
    assert "export it again" in " ".join(capsys.readouterr().err.split())
