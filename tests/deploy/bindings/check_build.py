"""Building, from the command's plan to the files beside the engine, through the real bindings of one version."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shlex
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import onnx
import pytest
import tensorrt as trt
from onnx import helper
from recording import Install

from vss.core.errors import VssError
from vss.deploy import BACKENDS, BuildPlan, BuildSpec, Span
from vss.deploy.backends.trt_child import TimingCache, member
from vss.deploy.backends.trt_device import Device
from vss.deploy.backends.trt_flavour import TENSORRT
from vss.deploy.backends.trt_plan import PRECISION_FLAGS, TRTEXEC_FLAGS, commands

MAJOR = int(trt.__version__.split(".")[0])
FULL: dict[str, Any] = {
    "profiles": ({"image": Span((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))},),
    "workspace_mib": 512,
    "optimisation_level": 4,
    "tf32": False,
    "hardware": "AMPERE_PLUS",
    "version_compatible": True,
    "flags": ("SPARSE_WEIGHTS", "EXCLUDE_LEAN_RUNTIME"),
    "auxiliary_streams": 2,
}


def build(model: Path, out: Path | None = None, **plan: Any) -> Path:
    return BACKENDS["tensorrt"].build(model, out or model.with_suffix(".engine"), BuildSpec(plan=BuildPlan(**plan)))


def test_the_versions_differ_as_this_project_believes() -> None:
    assert hasattr(trt.BuilderFlag, "FP16") == (MAJOR == 10)
    assert hasattr(trt.ICudaEngine, "device_memory_size") == (MAJOR == 10)
    assert all(hasattr(trt.BuilderFlag, name) for name in (*TRTEXEC_FLAGS, "TF32", "VERSION_COMPATIBLE"))
    with pytest.raises(TypeError, match="returned nullptr"):
        trt.Builder(trt.Logger())


def test_a_whole_plan_on_the_real_enums(device: Device, fakes: Install, model: Path) -> None:
    build(model, **FULL)
    log = fakes.log
    assert log.of("Builder", "create_network") == [(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),)]
    assert fakes.state["flags"] == {
        trt.BuilderFlag.SPARSE_WEIGHTS, trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME, trt.BuilderFlag.VERSION_COMPATIBLE,
    }  # fmt: skip
    assert log.of("IOptimizationProfile", "set_shape") == [("image", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))]
    assert log.of("IBuilderConfig", "set_memory_pool_limit") == [(trt.MemoryPoolType.WORKSPACE, 512 << 20)]
    assert log.of("IBuilderConfig", "builder_optimization_level") == [(4,)]
    assert log.of("IBuilderConfig", "max_aux_streams") == [(2,)]
    assert log.of("IBuilderConfig", "hardware_compatibility_level") == [(trt.HardwareCompatibilityLevel.AMPERE_PLUS,)]
    assert log.of("IBuilderConfig", "profiling_verbosity") == [(trt.ProfilingVerbosity.DETAILED,)]
    assert log.of("Runtime", "engine_host_code_allowed") == [(True,)]
    assert log.asked_by_us() == []


def test_the_name_of_an_engine_says_where_it_belongs(device: Device, fakes: Install, model: Path) -> None:
    runtime: Any = BACKENDS["tensorrt"]
    path = runtime.named(model.with_suffix(".engine"))
    assert path == model.with_name(f"model--nvidia-l4-sm89-trt{trt.__version__}.engine")
    assert build(model, path) == path and path.is_file()


def test_the_default_plan(device: Device, fakes: Install, model: Path) -> None:
    build(model)
    assert fakes.state["flags"] == {trt.BuilderFlag.TF32}
    assert fakes.log.of("IOptimizationProfile", "set_shape") == [("image", (1, 3, 8, 8), (1, 3, 8, 8), (8, 3, 8, 8))]
    assert fakes.log.of("IBuilderConfig", "set_memory_pool_limit") == []
    assert fakes.log.asked_by_us() == []


def test_no_removed_symbol_of_the_module_is_touched(
    device: Device, fakes: Install, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that vss takes from the module exists on both majors; the list is short enough to read."""
    asked = set()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            asked.add(name)
            return getattr(trt, name)

    monkeypatch.setattr("vss.deploy.backends.trt_child.load_tensorrt", lambda flavour: Watched())
    build(model, **FULL)
    expected = {
        "__version__", "get_plugin_registry", "init_libnvinfer_plugins", "Logger", "Runtime", "BuilderFlag",
        "ILogger", "MemoryPoolType", "ProfilingVerbosity", "HardwareCompatibilityLevel", "LayerInformationFormat",
    }  # fmt: skip
    assert asked == expected


def test_what_lies_beside_the_engine(device: Device, fakes: Install, model: Path) -> None:
    path = build(model)
    about = json.loads(path.with_name(path.name + ".json").read_text())
    assert path.read_bytes() == b"engine bytes"
    assert (about["kind"], about["schema"], about["bytes"]) == ("vss.engine", 2, 12)
    assert about["sha256"] == hashlib.sha256(b"engine bytes").hexdigest()
    assert about["tensorrt"] == trt.__version__
    assert about["device"] == {"name": "NVIDIA L4", "capability": [8, 9], "memory_mib": 23034}
    assert about["metadata"] == {"vss.model": "tiny"}
    assert about["plan"]["profiles"] == [{"image": {"low": [1, 3, 8, 8], "best": [1, 3, 8, 8], "high": [8, 3, 8, 8]}}]
    layers = json.loads(path.with_name(path.name + ".layers.json").read_text())
    assert (layers, about["layers"]) == ({"Layers": []}, {"total": 0})
    script = path.with_name(path.name + ".sh").read_text()
    assert script.startswith("# trtexec\ntrtexec --onnx=") and "\n# polygraphy\npolygraphy convert " in script
    assert sorted(each.name for each in path.parent.glob("model.engine*")) == [
        path.name, f"{path.name}.json", f"{path.name}.layers.json", f"{path.name}.sh",
    ]  # fmt: skip


@pytest.mark.parametrize("plan", [{}, FULL])
def test_polygraphy_accepts_its_command_line(plan: dict[str, Any], tmp_path: Path) -> None:
    import argparse

    from polygraphy.tools.registry import TOOL_REGISTRY

    paths = (tmp_path / "m.onnx", tmp_path / "m.engine", tmp_path / "t.cache")
    line = commands(BuildPlan(**plan), *paths, TENSORRT)["polygraphy"]
    parser = argparse.ArgumentParser()
    tools = parser.add_subparsers()
    for tool in TOOL_REGISTRY:
        tool.setup_parser(tools)
    args, strange = parser.parse_known_args(shlex.split(line)[1:])
    assert strange == []
    (tmp_path / "m.onnx").touch()
    args.subcommand.parse(args)  # resolves every name in the enums of this TensorRT
    config = args.subcommand.arg_groups
    names = {type(group).__name__: group for group in config.values()}
    assert names["TrtLoadNetworkArgs"].strongly_typed is True
    assert names["TrtConfigArgs"].tf32 is BuildPlan(**plan).tf32 or plan


@pytest.mark.parametrize("flag", PRECISION_FLAGS)
def test_precision_is_no_flag_on_any_version(flag: str) -> None:
    with pytest.raises(ValueError, match="precision is that of the ONNX file"):
        BuildPlan(flags=(flag,))


def test_a_flag_that_this_version_lacks_is_named(device: Device, fakes: Install, model: Path) -> None:
    with pytest.raises(
        VssError, match=r"unknown BuilderFlag of this TensorRT 'SPARSE_WEIGHT'\. Did you mean 'SPARSE_W"
    ):
        build(model, flags=("SPARSE_WEIGHT",))
    with pytest.raises(VssError, match="BuilderFlag"):
        member(trt.BuilderFlag, "WEIGHTLESS" if MAJOR == 11 else "NEW_FLAG")


# What TensorRT and the machine refuse


def test_lint_findings_stop_a_build(device: Device, fakes: Install, model: Path) -> None:
    made = onnx.load(str(model))
    made.graph.node.append(helper.make_node("Swirl", ["logits"], ["z"], name="layer9", domain="their.ops"))
    onnx.save(made, str(model))
    with pytest.raises(VssError, match=r"layer9: op their.ops::Swirl: TensorRT has no such op"):
        build(model)
    assert fakes.parsed == []


def test_bodies_of_plugins_are_taken_out_and_others_stay(
    device: Device, fakes: Install, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = onnx.load(str(model))
    opsets = [helper.make_opsetid("", 20)]
    for name in ("Mine", "Theirs"):
        made.functions.append(
            helper.make_function("vss", name, ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opsets)
        )
    made.graph.node[0].output[0] = "c"
    made.graph.node.append(helper.make_node("Mine", ["c"], ["d"], domain="vss"))
    made.graph.node.append(helper.make_node("Theirs", ["d"], ["logits"], domain="vss"))
    made.opset_import.append(helper.make_opsetid("vss", 1))
    onnx.save(made, str(model))
    creator = namedtuple("creator", "name")
    registry = namedtuple("registry", "all_creators")([creator("Mine")])
    monkeypatch.setattr(trt, "get_plugin_registry", lambda: registry)
    path = build(model)
    assert [each.name for each in onnx.load_from_string(fakes.parsed[0]).functions] == ["Theirs"]
    assert [each.name for each in onnx.load(str(model)).functions] == ["Mine", "Theirs"]
    assert json.loads(path.with_name(path.name + ".json").read_text())["plugins"] == ["Mine"]


def test_a_build_that_fails_leaves_nothing(
    device: Device, in_process: None, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    Install(monkeypatch, plan=b"")
    with pytest.raises(VssError, match=rf"TensorRT {trt.__version__} cannot build model.onnx \(Invalid Engine"):
        build(model)
    assert list(model.parent.glob("model.engine*")) == []


def test_no_disk(device: Device, fakes: Install, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(100))
    with pytest.raises(VssError, match="has 0 MiB left and the engine may take 1; free some space"):
        build(model)
    assert fakes.parsed == []


def test_a_plugin_library_that_is_none(device: Device, fakes: Install, model: Path, tmp_path: Path) -> None:
    with pytest.raises(VssError, match=r"absent.so does not exist"):
        build(model, plugins=(tmp_path / "absent.so",))
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(VssError, match=rf"text.so holds no plugins for TensorRT {trt.__version__}"):
        build(model, plugins=(tmp_path / "text.so",))


# Timing cache


def test_a_second_build_gets_what_the_first_measured(
    device: Device, fakes: Install, model: Path, own_cache: Path
) -> None:
    path = build(model)
    cache = own_cache / f"nvidia-l4-sm89-trt{trt.__version__}.cache"
    assert cache.read_bytes() == b"measured|"
    assert json.loads(path.with_name(path.name + ".json").read_text())["timing_cache"] == {
        "file": cache.name, "bytes": 9,
    }  # fmt: skip
    build(model)
    assert fakes.log.of("IBuilderConfig", "create_timing_cache")[-2] == (b"measured|",)  # the last is the merge
    assert cache.read_bytes().count(b"measured|") > 2  # what another build wrote meanwhile is kept


@pytest.mark.parametrize(("content", "words"), [(b"broken", "is damaged"), (b"other device", "another device or")])
def test_a_cache_that_does_not_fit(
    content: bytes, words: str, device: Device, fakes: Install, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "timing.cache").write_bytes(content)
    with pytest.raises(VssError, match=f"timing.cache {words}|timing.cache is of {words}"):
        build(model, timing_cache=tmp_path / "timing.cache")


def test_a_truncated_cache(device: Device, fakes: Install, model: Path, own_cache: Path) -> None:
    build(model)
    cache = own_cache / f"nvidia-l4-sm89-trt{trt.__version__}.cache"
    cache.write_bytes(cache.read_bytes()[:-3])
    with pytest.raises(VssError, match=r"timing cache .* is damaged \(6 bytes\); remove it"):
        build(model)


def test_a_locked_cache(device: Device, fakes: Install, model: Path, own_cache: Path) -> None:
    build(model)
    cache = own_cache / f"nvidia-l4-sm89-trt{trt.__version__}.cache"
    with open(cache.with_name(cache.name + ".lock")) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(VssError, match=r"is locked by another process \(waited 0.1 s\)"):
            TimingCache(cache, wait=0.1).read()


def test_an_engine_survives_a_cache_that_cannot_be_saved(
    device: Device, fakes: Install, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: TimingCache, before: bytes, data: bytes) -> None:
        raise VssError("no space left")

    monkeypatch.setattr(TimingCache, "_write", full)
    path = build(model)
    about = json.loads(path.with_name(path.name + ".json").read_text())
    assert about["timing_cache"]["not_saved"] == "no space left"


def test_without_a_device_nothing_of_tensorrt_is_made(fakes: Install, model: Path) -> None:
    """The real driver probe of this machine; skipped where there is a driver."""
    try:
        import ctypes

        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(VssError, match=r"no libcuda.so.1 here; run this on a GPU machine"):
            build(model)
        assert "libcuda" in str(BACKENDS["tensorrt"].unavailable())
        (model.parent / "x.engine").write_bytes(b"anything")
        with pytest.raises(VssError, match=r"no libcuda.so.1 here"):
            BACKENDS["tensorrt"].open(model.parent / "x.engine")
        assert (fakes.runtimes, fakes.log.calls) == ([], [])
        return
    pytest.skip("this machine has a driver")


def test_what_happens_without_the_probe() -> None:
    """Why the probe comes first: without a device the real trt.Runtime does not raise, it breaks the process."""
    code = "import tensorrt as trt; r = trt.Runtime(trt.Logger(trt.Logger.ERROR)); r.deserialize_cuda_engine(b'x' * 64)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "CUDA initialization failure" not in done.stdout + done.stderr:
        pytest.skip("this machine has a driver")
    assert done.returncode != 0
