"""What TensorRT for RTX is not for, is not given whole, or is not there: one sentence, on the command line and in a
recipe. Most of this needs no TensorRT."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from tests.deploy.lint_graphs import one
from tests.deploy.rtx import needs_rtx, nothing_left, vss_cli
from vss.core.config import BuildConfig
from vss.core.errors import VssError
from vss.deploy import BACKENDS, BuildPlan, BuildSpec
from vss.deploy.backends import build_spec
from vss.deploy.backends.trt_device import Device, EngineError
from vss.deploy.backends.trt_flavour import TENSORRT, TENSORRT_RTX
from vss.deploy.backends.trt_runner import check_about, load_tensorrt, read_about, read_engine

__all__ = ["nothing_left"]
RTX: Any = BACKENDS["tensorrt_rtx"]
L4, T4, A100 = (
    Device(0, f"NVIDIA {name}", capability, 23034)
    for name, capability in (("L4", (8, 9)), ("T4", (7, 5)), ("A100", (8, 0)))
)
H100 = Device(0, "NVIDIA H100", (9, 0), 81559)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    onnx.save(one("Relu")(), str(tmp_path / "plain.onnx"))
    return tmp_path / "plain.onnx"


# Targets and options, by flag and by key

TARGETS = [
    (("sm90",), r"--targets sm90 \(H100, H200\) is served by TensorRT \(--backend tensorrt, on that GPU\) and not by"),
    (("sm86", "sm100"), r"--targets sm100 \(B200, GB200\) is served by TensorRT"),
    (("sm87",), r"--targets sm87 \(Orin\) is served by TensorRT"),
    (("sm88",), r"unknown --targets of TensorRT for RTX \(build.targets\) 'sm88'.* Known: sm120 \(RTX 50\), sm121"),
    (("8.6",), r"unknown --targets of TensorRT for RTX \(build.targets\) '8.6'.* Known: sm120 \(RTX 50\), sm121"),
    (("sm86", "sm86"), r"--targets \(build.targets\) is sm86, sm86; give each once"),
    (("ampere",), r"unknown --targets of TensorRT for RTX \(build.targets\) 'ampere'"),
]
LACKS = [
    (["--hardware", "AMPERE_PLUS"], {"hardware": "AMPERE_PLUS"}, "run on every GPU of their targets"),
    (["--version-compatible"], {"version_compatible": True}, "run on the very version that built them"),
    (["--flag", "REFIT"], {"flags": ("REFIT",)}, "needs a GPU while building"),
    (["--flag", "REFIT_IDENTICAL"], {"flags": ("REFIT_IDENTICAL",)}, "needs a GPU while building"),
    (["--flag", "STRIP_PLAN"], {"flags": ("STRIP_PLAN",)}, "needs a GPU while building"),
    (["--flag", "EXCLUDE_LEAN_RUNTIME"], {"flags": ("EXCLUDE_LEAN_RUNTIME",)}, "it has no lean runtime"),
]


@pytest.mark.parametrize(("targets", "words"), TARGETS, ids=[",".join(targets) for targets, _ in TARGETS])
def test_targets_that_it_does_not_serve(targets: tuple[str, ...], words: str, plain: Path) -> None:
    rtx = ("build", "--onnx", plain, "--backend", "tensorrt_rtx")
    assert re.search(words, vss_cli(*rtx, "--targets", ",".join(targets), "--dry-run", code=2))
    with pytest.raises(VssError, match=words):
        build_spec(BuildConfig(backend="tensorrt_rtx", targets=targets))
    with pytest.raises(VssError, match=words):
        RTX.build(plain, plain.with_name("out.engine"), BuildSpec(plan=BuildPlan(targets=targets)))


@pytest.mark.parametrize(("flags", "keys", "why"), LACKS, ids=[" ".join(flags) for flags, *_ in LACKS])
def test_options_that_it_lacks(flags: list[str], keys: dict[str, Any], why: str, plain: Path) -> None:
    said = vss_cli("build", "--onnx", plain, "--backend", "tensorrt_rtx", *flags, "--dry-run", code=2)
    assert f"{flags[0]} " in said and "is not for TensorRT for RTX: it" in said and why in said
    assert said.endswith("; leave it off.")
    with pytest.raises(VssError, match=why):
        build_spec(BuildConfig.model_validate({"backend": "tensorrt_rtx", "tensorrt": keys}))


@pytest.mark.parametrize(
    ("option", "name", "why"),
    [("--timing-cache", "t.cache", "it measures no layer"), ("--aot-ptx", "a.ptx", "no plugins that are written in")],
)
def test_files_that_it_lacks(option: str, name: str, why: str, plain: Path) -> None:
    plain.with_name(name).write_text(".version 8.0")
    words = ["--backend", "tensorrt_rtx", option, plain.with_name(name), "--dry-run"]
    said = vss_cli("build", "--onnx", plain, *words, code=2)
    assert f"{option} is not for TensorRT for RTX: " in said and why in said


@pytest.mark.parametrize(("flag", "option"), [("TF32", "--no-tf32"), ("VERSION_COMPATIBLE", "--version-compatible")])
def test_flags_that_are_options(flag: str, option: str, plain: Path) -> None:
    said = vss_cli("build", "--onnx", plain, "--backend", "tensorrt_rtx", "--flag", flag, "--dry-run", code=2)
    assert f"{flag} has an option of its own: " in said and option in said


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_targets_are_for_rtx(backend: str, plain: Path) -> None:
    said = vss_cli("build", "--onnx", plain, "--backend", backend, "--targets", "sm86", code=2)
    assert "--targets" in said and backend in said
    also = BuildConfig(backend=backend, targets=("sm86",), also=("tensorrt_rtx",))
    plan = build_spec(also, "tensorrt_rtx").plan
    assert plan is not None and plan.targets == ("sm86",)


def test_what_is_for_another_runtime(plain: Path) -> None:
    rtx = ("build", "--onnx", plain, "--backend", "rtx")
    assert "--optimise is for --backend onnxruntime" in vss_cli(*rtx, "--optimise", "extended", code=2)
    with pytest.raises(VssError, match="optimise is for backend onnxruntime; tensorrt_rtx takes a BuildPlan"):
        RTX.build(plain, plain.with_name("x.engine"), BuildSpec(optimise="basic"))


@needs_rtx
def test_a_flag_that_this_version_has_not(plain: Path, nothing_left: Path) -> None:
    """Of the real enum."""
    plan = BuildPlan(targets=("sm86",), flags=("REFIT_INDIVIDUALLY",))
    with pytest.raises(VssError, match=r"unknown BuilderFlag of this TensorRT.* Did you mean 'REFIT_INDIVIDUAL'"):
        RTX.build(plain, nothing_left / "x.engine", BuildSpec(plan=plan))


# Files


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_truncated_onnx_file(share: float, plain: Path, nothing_left: Path) -> None:
    blob = plain.read_bytes()
    plain.write_bytes(blob[: int(len(blob) * share)])
    out = nothing_left / "x.engine"
    said = vss_cli("build", "--onnx", plain, "--backend", "tensorrt_rtx", "--targets", "sm86", "--save", out, code=2)
    assert "plain.onnx" in said


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine of 1.7.1.116 for sm86 and sm89, as far as its facts go."""
    path, blob = tmp_path / "model.engine", b"vtrt" + bytes(range(256))
    path.write_bytes(blob)
    about = {
        "kind": "vss.engine", "schema": 2, "flavour": "tensorrt_rtx", "tensorrt": "1.7.1.116", "device": None,
        "targets": ["sm86", "sm89"], "sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob),
        "plan": BuildPlan(targets=("sm86", "sm89")).to_json(),
    }  # fmt: skip
    path.with_name("model.engine.json").write_text(json.dumps(about))
    return path


def test_a_truncated_engine(engine: Path) -> None:
    about = read_about(engine)
    assert read_engine(engine, about) == engine.read_bytes()
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"model.engine is not what was built \(259 bytes of 260\); copy it again"):
        read_engine(engine, about)
    engine.unlink()
    with pytest.raises(EngineError, match=r"model.engine cannot be read \(No such file or directory\)"):
        read_engine(engine, about)


@pytest.mark.parametrize(
    ("device", "targets", "version", "words"),
    [
        (L4, None, "1.7.1.116", ""),
        (A100, [], "1.7.1.116", ""),
        (A100, None, "1.7.1.116", r"was built for sm86, sm89 and this is .*; build it with --targets sm86,sm89,sm80\."),
        (T4, [], "1.7.1.116", r"was built for sm80 and newer and this is .*T4.*; build it with --targets sm75\."),
        (
            H100,
            None,
            "1.7.1.116",
            r"does not run on .*H100.*; it serves sm75, .*; TensorRT \(backend tensorrt\) serves",
        ),
        (L4, None, "1.7.2.1", r"by TensorRT for RTX 1.7.1.116 and this is 1.7.2.1; build it again, or install that"),
        (L4, None, "1.6.0", r"by TensorRT for RTX 1.7.1.116 and this is 1.6.0; build it again, or install that ver"),
    ],
)
def test_an_engine_of_another_gpu_or_version(
    device: Device, targets: list[str] | None, version: str, words: str, engine: Path
) -> None:
    about = read_about(engine) or {}
    about |= {} if targets is None else {"targets": targets}
    if not words:
        check_about(engine, about, device, version)
        return
    with pytest.raises(EngineError, match=words):
        check_about(engine, about, device, version)


@pytest.mark.parametrize(
    "changes", [{"targets": ["8.6"]}, {"targets": None}, {"flavour": "tensorrt_ultra"}, {"schema": 99}, {"sha256": 3}]
)
def test_facts_that_are_damaged(changes: dict[str, Any], engine: Path) -> None:
    beside = engine.with_name("model.engine.json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | changes))
    with pytest.raises(EngineError, match=r"model.engine.json is .*; build the engine again"):
        read_about(engine)


# The package


def test_no_package(plain: Path, nothing_left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "tensorrt" in name else real(name, *a))
    words = ["--backend", "tensorrt_rtx", "--targets", "sm86", "--save", nothing_left / "x.engine"]
    said = vss_cli("build", "--onnx", plain, *words, code=2)
    assert "TensorRT for RTX cannot be imported (No module named 'tensorrt_rtx'); pip install tensorrt-rtx-cu13" in said
    vss_cli("build", "--onnx", plain, *words, "--dry-run")  # needs none


def test_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    for name in ("tensorrt", "tensorrt_rtx_bindings"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(EngineError, match=r"^TensorRT for RTX cannot be imported \(.*tensorrt_rtx.*\); pip install"):
        load_tensorrt(TENSORRT_RTX)


def module(name: str, version: str) -> ModuleType:
    made = ModuleType(name)
    made.__version__ = version  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("flavour", "version", "words"),
    [
        (TENSORRT_RTX, "2.0.0.1", "TensorRT for RTX 2.0.0.1 is installed; expected 1: pip install"),
        (TENSORRT, "9.3.0", "TensorRT 9.3.0 is installed; expected 10 or 11: pip install"),
    ],
)
def test_a_version_that_is_not_known(flavour: Any, version: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, flavour.module, module(flavour.module, version))
    with pytest.raises(EngineError, match=words):
        load_tensorrt(flavour)


@pytest.mark.parametrize(("first", "second"), [(TENSORRT, TENSORRT_RTX), (TENSORRT_RTX, TENSORRT)])
def test_one_tensorrt_in_a_process(first: Any, second: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, second.module, raising=False)
    monkeypatch.setitem(sys.modules, first.module, module(first.module, "1.7" if first.targets else "10.16"))
    assert load_tensorrt(first).__version__
    with pytest.raises(EngineError, match=f"{first.title} is in use in this process, and a process holds one TensorRT"):
        load_tensorrt(second)
