"""`vss build --backend tensorrt` on a machine without TensorRT: the plan as commands, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from vss.cli.main import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, "h", 8]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [ends[0]], [ends[1]])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(tmp_path / "m.onnx"))
    return tmp_path / "m.onnx"


def build(monkeypatch: pytest.MonkeyPatch, model: Path, *words: object) -> int:
    command = ["vss", "build", "--onnx", model, "--save", model.with_suffix(".engine"), "--backend", "trt", *words]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_a_dry_run_prints_both_commands(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--batch", "1,2,4", "--sizes", "8x8,16x8,32x8", "--workspace-mib", 64, "--flag", "refit", "--no-tf32"]
    assert build(monkeypatch, model, *words, "--dry-run") == 0
    first, second = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("trtexec --onnx=") and second.startswith("polygraphy convert ")
    assert "--minShapes=x:1x3x8x8 --optShapes=x:2x3x16x8 --maxShapes=x:4x3x32x8" in first
    assert "--memPoolSize=workspace:64M" in first and "--noTF32" in first and "--refittable" in second
    assert not model.with_suffix(".engine").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give smallest, usual and largest H x W"),
        (["--batch", "1,2"], "--batch takes smallest,usual,largest, or one number"),
        (["--batch", "a"], "--batch takes smallest,usual,largest"),
        (["--sizes", "8"], "--sizes takes HxW"),
        (["--sizes", "8x8", "--hardware", "hopper"], "Invalid value for '--hardware'"),
        (["--sizes", "8x8", "--flag", "fp16"], "FP16 is no build option here"),
        (["--optimise", "basic"], "--optimise is for --backend onnxruntime"),
    ],
)
def test_refusals(
    words: list[str], said: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(monkeypatch, model, *words, "--dry-run") == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_without_tensorrt_it_says_what_to_install(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert build(monkeypatch, model, "--sizes", "8x8") == 2
    assert "pip install tensorrt-cu13" in " ".join(capsys.readouterr().err.split())


def test_an_engine_is_opened_by_tensorrt_whatever_it_holds(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    engine = model.with_suffix(".engine")
    engine.write_bytes(b"plan")
    monkeypatch.setattr(sys, "argv", ["vss", "evaluate", "--candidate", str(engine)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "TensorRT cannot be imported" in " ".join(capsys.readouterr().err.split())
