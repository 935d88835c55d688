"""Builders that refuse, crash, abort, hang or are killed: one sentence that names the reason, exit code 2, and nothing
left behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.deploy.lint_graphs import F32, SCALE, model, one, resize
from tests.deploy.rtx import (
    alive,
    builder_of,
    needs_rtx,
    nothing_left,
    sent_to_the_builder,
    stop_at_work,
    vss_cli,
    wait_for,
)
from vss.core.errors import VssError
from vss.deploy import BACKENDS, BuildPlan, BuildSpec
from vss.deploy.backends import trt_child
from vss.deploy.backends.trt import verdict

__all__ = ["nothing_left"]
pytestmark = needs_rtx
BUILD = ("build", "--backend", "tensorrt_rtx", "--targets", "sm86")
SIDES = (F32, ["batch", 64, 32, 32])


def attention() -> onnx.ModelProto:
    """TensorRT for RTX 1.7 supports and parses it, and its builder crashes."""
    sides = F32, [1, 2, 8, 16]
    return one("Attention", inputs=("x", "x"), image=sides, out=sides, opset=23)()


def top_k() -> onnx.ModelProto:
    node = helper.make_node("TopK", ["x", "k"], ["y", "i"], name="planted")
    return model([node], {"k": np.array([4000])}, image=(F32, ["batch", 1, 5000]), out=(F32, ["batch", 1, 4000]))


def fp8() -> onnx.ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="planted"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="after"),
        helper.make_node("Relu", ["d"], ["y"], name="last"),
    ]
    made = model(nodes, {"scale": SCALE})
    made.graph.initializer.append(helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    return made


def saved(made: onnx.ModelProto, path: Path) -> Path:
    onnx.save(made, str(path))
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A convolution whose engine takes more than 64 KiB and 1 MiB of workspace."""
    weight = {"w": np.ones((64, 64, 3, 3), np.float32)}
    made = one("Conv", extra=weight, inputs=("w",), pads=[1] * 4, image=SIDES, out=SIDES)()
    return saved(made, tmp_path / "plain.onnx")


def build(path: Path, out: Path, **plan: Any) -> Path:
    spec = BuildSpec(plan=BuildPlan(targets=("sm86",), **plan))
    return BACKENDS["tensorrt_rtx"].build(path, out / "model.engine", spec)


def refusal(path: Path, out: Path, **plan: Any) -> str:
    """Why a build is refused, one sentence with exit code 2."""
    with pytest.raises(VssError) as caught:
        build(path, out, **plan)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


# What the parser and the builder say of a file, in their own words


@pytest.mark.parametrize(
    ("graph", "targets", "parsed", "words"),
    [
        (top_k, ("sm86",), True, "K exceeds the maximum value allowed (3840)"),
        (resize(antialias=1), ("sm86",), False, "Antialiasing is not supported currently."),
        (fp8, ("sm86", "sm89"), True, "Cannot compile for target(s) sm86, because the model contains HW-specific"),
    ],
    ids=["top_k", "antialias", "fp8"],
)
def test_the_reason_is_that_of_tensorrt(
    graph: Any, targets: tuple[str, ...], parsed: bool, words: str, tmp_path: Path
) -> None:
    found = verdict(saved(graph(), tmp_path / "m.onnx"), targets=targets)
    assert (found.parsed, found.built, found.crashed, found.layers) == (parsed, False, False, ())
    assert words in found.reason and "\n" not in found.reason and "cudaError" not in found.reason


def test_a_target_decides_on_fp8(tmp_path: Path) -> None:
    found = verdict(saved(fp8(), tmp_path / "m.onnx"), targets=("sm89",))
    assert found.built and found.layers


def test_too_little_workspace(plain: Path, nothing_left: Path) -> None:
    said = refusal(plain, nothing_left, workspace_mib=1)
    assert "TensorRT for RTX 1." in said and "cannot build plain.onnx (" in said
    assert "no tactics to implement the operation within workspace limit" in said


# Builders that end without an answer


def test_a_builder_that_crashes(tmp_path: Path, nothing_left: Path) -> None:
    """A segmentation fault of the real builder, which takes nothing else with it."""
    path = saved(attention(), tmp_path / "attention.onnx")
    found = verdict(path)
    assert (found.built, found.crashed) == (False, True) and "crashed (segmentation fault)" in found.reason
    said = vss_cli(*BUILD, "--onnx", path, "--save", nothing_left / "model.engine", code=2)
    assert "segmentation fault" in said


def test_a_builder_that_aborts(plain: Path, tmp_path: Path, nothing_left: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, library = tmp_path / "abort.c", tmp_path / "libabort.so"
    source.write_text("#include <stdlib.h>\n__attribute__((constructor)) static void at_once(void) { abort(); }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    said = refusal(plain, nothing_left, plugins=(library,))
    assert "TensorRT for RTX aborted; an op of the file or a plugin library may be what it cannot do" in said


def test_a_builder_that_is_killed(plain: Path, nothing_left: Path) -> None:
    with sent_to_the_builder(signal.SIGKILL):
        said = vss_cli(*BUILD, "--onnx", plain, "--save", nothing_left / "model.engine", code=2)
    assert "building plain.onnx: TensorRT for RTX was killed; where nobody did so there was too little memory" in said


def test_a_builder_that_hangs(plain: Path, nothing_left: Path) -> None:
    with sent_to_the_builder(signal.SIGSTOP):
        said = refusal(plain, nothing_left, time_limit_s=2)
    assert said == (
        "TensorRT for RTX was stopped: building plain.onnx took more than 2 s; allow more with --time-limit-s "
        "(build.tensorrt.time_limit_s)."
    )


def test_no_disk_for_the_engine(plain: Path, nothing_left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of more than 64 KiB cannot be written: by the builder itself, after its build."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        said = refusal(plain, nothing_left)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said == f"{nothing_left} cannot be written (File too large); free some space or choose another place."


def test_no_disk_before_a_build(plain: Path, nothing_left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    assert "has 0 MiB left and the engine may take 1; free some space" in refusal(plain, nothing_left)


# Several at once, and from outside


def test_two_builds_of_one_name(plain: Path, tmp_path: Path) -> None:
    """The second is refused while the first is at work; a later one that fails leaves the engine that is there."""
    out = tmp_path / "out"
    first = threading.Thread(target=build, args=(plain, out))
    with sent_to_the_builder(signal.SIGSTOP) as stopped:
        first.start()
        wait_for(lambda: stopped)
        said = refusal(plain, out)
        os.kill(stopped[0], signal.SIGCONT)
        first.join()
    assert said == f"another vss command is at work on {out / 'model.engine'}; wait for it, or choose another name."
    files = {each.name: each.read_bytes() for each in out.iterdir()}
    assert files.keys() == {f"model.engine{suffix}" for suffix in ("", ".json", ".layers.json", ".sh")}
    assert "within workspace limit" in refusal(plain, out, workspace_mib=1)
    assert {each.name: each.read_bytes() for each in out.iterdir()} == files


def test_ctrl_c_and_sigterm_end_the_builder_too(plain: Path, nothing_left: Path) -> None:
    """A process that runs a real command twice, whose builders hang. What runs in the background does not hear Ctrl-C
    by itself."""
    line = """
import signal, sys
from vss.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
for _ in range(2):
    try:
        main()
    except SystemExit as end:
        print(end.code, file=sys.stderr)
"""
    words = [sys.executable, "-c", line, *BUILD, "--onnx", plain, "--save", nothing_left / "model.engine"]
    with subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True) as process:
        for number in (signal.SIGINT, signal.SIGTERM):
            builder = builder_of(process.pid, 120)
            stop_at_work(builder)
            process.send_signal(number)
            wait_for(lambda ended=builder: not alive(ended))
        _, said = process.communicate(timeout=60)
    assert said.split() == ["interrupted", "130", "interrupted", "143"]


@pytest.mark.parametrize("early", [True, False])
def test_a_builder_ends_with_the_process_that_started_it(early: bool, plain: Path, tmp_path: Path) -> None:
    """Which a SIGKILL gave no time to end it: as soon as the builder has started, and once it holds TensorRT."""
    plan = BuildPlan(targets=("sm86",)).model_dump(mode="json")
    request: dict[str, Any] = {"flavour": "tensorrt_rtx", "plugins": [], "aot": None, "plan": plan, "onnx": str(plain)}
    request |= {"out": str(tmp_path / "model.engine")}
    line = """
import json, os, pathlib, subprocess, sys
path = pathlib.Path(sys.argv[3], "request.json")
path.write_text(json.dumps(json.loads(path.read_text()) | {"parent": os.getpid()}))
subprocess.run(sys.argv[1:])
"""
    (tmp_path / "request.json").write_text(json.dumps(request))
    words = [sys.executable, "-c", line, sys.executable, trt_child.__file__, tmp_path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(list(map(str, words)), env=environment) as process:
        builder = builder_of(process.pid)
        if early:
            os.kill(builder, signal.SIGSTOP)
        else:
            stop_at_work(builder)
        process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.kill(builder, signal.SIGCONT)
    wait_for(lambda: not alive(builder))
    assert not (tmp_path / "model.engine").exists() and not (tmp_path / "answer.json").exists()
