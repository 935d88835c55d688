"""plugins_trt: built against the headers of TensorRT 10 and 11, driven by a C++ program, loaded by NVIDIA's registry,
and in engines that TensorRT for RTX builds without a GPU.

The headers are in no Python wheel. Put those of a version (the include folder of its archive, of the development
package or of the public TensorRT repository) into trt-headers-10/include and trt-headers-11/include of the cache of
`trt_bindings`; without them these tests are skipped.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper

from tests.deploy.rtx import needs_rtx
from tests.deploy.trt_bindings import VERSIONS, UnavailableError, bindings, cache, run
from vss import models, prune
from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.data import Preprocess
from vss.deploy import BACKENDS, BuildPlan, BuildSpec, export, onnx_file, spans
from vss.deploy.backends import inspected, trt_child
from vss.deploy.backends.trt_aot import ENTRIES, read_ptx
from vss.deploy.backends.trt_plan import declared
from vss.deploy.backends.trt_runner import read_about
from vss.run.job import run as run_recipe
from vss.ship import read as read_manifest
from vss.ship import ship
from vss.ship.check import rebuild_elsewhere

ROOT = Path(__file__).parents[2]
PLUGINS = ["VssMaxPool", "VssMaxUnpool", "VssSegArgmax"]


def headers(major: int) -> Path:
    folder = cache() / f"trt-headers-{major}"
    if not (folder / "include" / "NvInferRuntime.h").is_file():
        pytest.skip(f"needs the headers of TensorRT {major}: put NvInferRuntime.h and the rest into {folder}/include")
    return folder


def command(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def configure(major: int, folder: Path, *options: str) -> str:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    return command(
        "cmake", "-S", ROOT, "-B", folder, "-DVSS_TENSORRT=ON", f"-DTENSORRT_ROOT={headers(major)}", *options
    )


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Build folder of the library with CPU kernels and its contract program, for a major version; made once."""

    @functools.cache
    def made(major: int) -> Path:
        folder = tmp_path_factory.mktemp(f"host{major}")
        assert f"TensorRT {major} headers" in configure(major, folder)
        command("cmake", "--build", folder, "--target", "vss_trt_plugins", "trt_plugins_contract")
        return folder

    return made


@pytest.fixture(scope="module", params=sorted(VERSIONS))
def host(request: pytest.FixtureRequest, hosts: Callable[[int], Path]) -> tuple[int, Path]:
    """(major, build folder)."""
    return request.param, hosts(request.param)


def library(folder: Path, major: int) -> Path:
    return folder / f"libvss_trt_plugins-trt{major}.so"


def foreign_symbols(path: Path) -> list[str]:
    """Undefined symbols that are neither libc's, libstdc++'s nor the compiler's."""
    lines = command("nm", "-D", "--undefined-only", path).splitlines()
    names = [line.split()[-1] for line in lines]
    return [name for name in names if "@" not in name and not name.startswith(("_ITM_", "__gmon", "__cxa", "_Z"))]


@pytest.mark.slow
def test_contract(host: tuple[int, Path]) -> None:
    """Creators, fields, types, shapes, serialisation, refusals with their messages, and the kernels on host memory."""
    major, folder = host
    assert "100% tests passed, 0 tests failed out of 1" in command("ctest", "--test-dir", folder, "-R", "contract")
    program, path = folder / "trt_plugins_contract", library(folder, major)
    assert subprocess.run([program, path], check=False, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lean", "full"])
def test_the_registry_of_nvidia_takes_it(host: tuple[int, Path], kind: str) -> None:
    major, folder = host
    check_registry(major, kind, library(folder, major))


def check_registry(major: int, kind: str, path: Path) -> None:
    try:
        bindings(major)
    except UnavailableError as error:
        pytest.skip(f"needs NVIDIA's wheels of TensorRT {VERSIONS[major]}: {error}")
    done = run(major, Path(__file__).with_name("trt_registry.py"), kind, path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["version"], found["loaded"], found["creators"]) == (VERSIONS[major], True, PLUGINS)
    expected = {"VssSegArgmax": ["out_h", "out_w", "align_corners"], "VssMaxPool": ["kernel"]}
    for name, names in (expected | {"VssMaxUnpool": ["extra_h", "extra_w"]}).items():
        assert found[name] == {
            "fields": names, "created": [True, True], "capabilities": [True] * 3, "core": [name, "1", ""],
            "refused": True,
        }  # fmt: skip
    known = ", ".join(expected["VssSegArgmax"])
    assert f"VssSegArgmax: unknown field 'colour'; known: {known}." in done.stdout + done.stderr


@pytest.mark.slow
def test_no_library_of_tensorrt_is_needed(host: tuple[int, Path]) -> None:
    major, folder = host
    path = library(folder, major)
    exported = command("nm", "-D", "--defined-only", path)
    assert sorted(re.findall(r" T (\w+)", exported)) == ["getCreators", "setLoggerFinder", "vssTensorRTMajor"]
    assert foreign_symbols(path) == []
    assert "libnvinfer" not in command("ldd", path) and "gomp" not in command("ldd", path)


@pytest.mark.slow
def test_a_library_of_the_other_major_is_refused_by_name(host: tuple[int, Path]) -> None:
    import ctypes
    from types import SimpleNamespace

    from vss.deploy.backends.trt_device import EngineError
    from vss.deploy.backends.trt_runner import load_plugins

    major, folder = host
    path = library(folder, major)
    assert ctypes.CDLL(str(path)).vssTensorRTMajor() == major
    other = 21 - major
    loaded: list[str] = []
    registry = SimpleNamespace(load_library=lambda name: loaded.append(name) or object())
    module = SimpleNamespace(__version__=f"{other}.0.0", get_plugin_registry=lambda: registry)
    with pytest.raises(
        EngineError, match=rf"is built for TensorRT {major}, and TensorRT {other}\.0\.0 takes plugins of"
    ):
        load_plugins(module, [path])
    module.__version__ = f"{major}.9.9"
    load_plugins(module, [path])
    assert loaded == [str(path)]


# Engines of TensorRT for needs_rtx, which are built without a GPU

SIZE = (64, 96)


def build(onnx: Path, *libraries: Path, sizes: list[tuple[int, int]] | None = None) -> list[dict[str, Any]]:
    """The layers of an engine for two GPUs."""
    profile = spans(declared(onnx_file.load(onnx)), (1, 2, 4), sizes)
    plan = BuildPlan(targets=("sm86", "sm89"), plugins=libraries, profiles=(profile,))
    made = BACKENDS["tensorrt_rtx"].build(onnx, onnx.with_suffix(".engine"), BuildSpec(plan=plan))
    return list((inspected(made) or {})["Layers"])


def pruned(name: str) -> torch.nn.Module:
    """At half its MACs, in widths that are all odd."""
    model = models.build(name, 5, width=8)
    budget = {"kind": "macs", "keep": 0.5, "align": 1}
    return prune.apply_plan(model, prune.make_plan(model, torch.zeros(1, 3, *SIZE), criterion="l1", budget=budget))


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cut", "options", "plugins"),
    [
        ("unet", False, {"labels": True, "preprocess": Preprocess(size=SIZE)}, {"VssSegArgmax": 1}),
        ("segnet", True, {"labels": True}, {"VssMaxPool": 5, "VssMaxUnpool": 5, "VssSegArgmax": 1}),
        ("segnet", False, {"dynamic_size": True}, {"VssMaxPool": 5, "VssMaxUnpool": 5}),
    ],
)
def test_plugins_in_real_engines(
    name: str, cut: bool, options: dict[str, Any], plugins: dict[str, int], hosts: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    free = "dynamic_size" in options
    model = pruned(name) if cut else models.build(name, 5, width=8, **({"multiple": 32} if free else {}))
    export(model, tmp_path / "m.onnx", size=SIZE, plugins=True, parity_batches=(1,), **options)
    layers = build(tmp_path / "m.onnx", library(hosts(11), 11), sizes=[(32, 32), SIZE, (96, 128)] if free else None)
    found = [layer for layer in layers if layer["LayerType"] == "custom_layer"]
    assert len(found) == sum(plugins.values())
    about = read_about(tmp_path / "m.engine")
    assert about is not None and about["plugins"] == sorted(plugins)
    assert all(check["passed"] for check in about["checks"]), about["checks"]
    if "labels" in options:
        (labels,) = found[-1]["Outputs"]
        assert labels["Dimensions"] == [-1, *SIZE] and labels["Format/Datatype"].startswith("Int32")


@needs_rtx
@pytest.mark.slow
def test_without_the_library_the_bodies_are_built(tmp_path: Path) -> None:
    """Of labels; those of SegNet's pooling hold ops that count, which are for onnxruntime."""
    model = models.build("unet", 3, width=4)
    export(model, tmp_path / "m.onnx", size=SIZE, labels=True, plugins=True, parity_batches=(1,))
    assert not [layer for layer in build(tmp_path / "m.onnx") if layer["LayerType"] == "custom_layer"]


def one_node(path: Path, op: str, inputs: list[tuple[int, list[Any]]], outputs: int, **attributes: Any) -> Path:
    """A file of one plugin node: (type, shape) of its inputs, and how many outputs it has."""
    ends = [helper.make_tensor_value_info(f"x{i}", kind, shape) for i, (kind, shape) in enumerate(inputs)]
    kinds = [TensorProto.INT32 if op == "VssSegArgmax" else TensorProto.FLOAT, TensorProto.INT32]
    rank = 3 if op == "VssSegArgmax" else 4
    results = [helper.make_tensor_value_info(f"y{i}", kinds[i], [None] * rank) for i in range(outputs)]
    node = helper.make_node(op, [e.name for e in ends], [e.name for e in results], "node", domain="vss", **attributes)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("vss", 1)]
    model = helper.make_model(helper.make_graph([node], "g", ends, results), opset_imports=imports, ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


FLOATS, PLACES = TensorProto.FLOAT, TensorProto.INT32
FREE = ["n", 4, "h", "w"]


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "words"),
    [
        ("VssMaxPool", [(FLOATS, [1, 4, 8, 8])], {"kernel": 99}, r"the kernel 99 does not fit into maps \(1, 4, 8, "),
        ("VssMaxPool", [(FLOATS, FREE)], {"kernel": 9}, r"the kernel 9 does not fit into maps \(1, 4, 8, 8\)"),
        ("VssMaxUnpool", [(FLOATS, [1, 4, 8, 8]), (PLACES, [1, 4, 4, 4])], {"extra_h": 0, "extra_w": 0},
         r"values \(1, 4, 8, 8\) and places \(1, 4, 4, 4\) do not belong together"),
        ("VssSegArgmax", [(FLOATS, [1, 300, 8, 8])], {"out_h": 8, "out_w": 8, "align_corners": 0},
         r"logits \(1, 300, 8, 8\) must have 1 to 256 classes"),
        ("VssSegArgmax", [(FLOATS, [1, 3, 8])], {"out_h": 8, "out_w": 8, "align_corners": 0},
         "input 0 has 3 dimensions, expected 4"),
    ],
)  # fmt: skip
def test_shapes_that_cannot_run_are_refused_while_building(
    op: str, inputs: Any, attributes: dict[str, int], words: str, hosts: Any, tmp_path: Path
) -> None:
    onnx = one_node(tmp_path / "m.onnx", op, inputs, 2 if op == "VssMaxPool" else 1, **attributes)
    sizes = [(8, 8), (32, 32), (64, 64)] if inputs[0][1] == FREE else None
    with pytest.raises(VssError, match=rf"cannot build m.onnx \(.*{op}: {words}"):
        build(onnx, library(hosts(11), 11), sizes=sizes)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@needs_rtx
@pytest.mark.slow
def test_a_parser_that_does_not_find_its_library_is_one_sentence(
    hosts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It aborts the process that adds a plugin; with the link that a build makes it does not."""
    onnx = one_node(tmp_path / "m.onnx", "VssMaxPool", [(FLOATS, [1, 4, 8, 8])], 2, kernel=2)
    monkeypatch.setattr(trt_child, "library_path", lambda flavour, folder: {})
    with pytest.raises(VssError, match=r"^building m.onnx: TensorRT for RTX aborted"):
        build(onnx, library(hosts(11), 11))
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    monkeypatch.undo()
    assert "custom_layer" in [layer["LayerType"] for layer in build(onnx, library(hosts(11), 11))]


@needs_rtx
@pytest.mark.slow
def test_rtx_takes_plugins_of_tensorrt_11(hosts: Any) -> None:
    rtx: Any = BACKENDS["tensorrt_rtx"]
    assert set(PLUGINS) <= set(rtx.about(BuildPlan(plugins=(library(hosts(11), 11),)))["creators"])
    with pytest.raises(VssError, match=r"is built for TensorRT 10, and TensorRT for RTX 1\.\S+ takes plugins of 11"):
        rtx.about(BuildPlan(plugins=(library(hosts(10), 10),)))


@needs_rtx
@pytest.mark.slow
def test_a_recipe_builds_engines_with_plugins_and_they_ship(hosts: Any, street_root: Path, tmp_path: Path) -> None:
    """The library stays with the engines of the run, goes into the bundle, and builds the next engine there."""
    libraries = [str(library(hosts(11), 11))]
    recipe = Recipe.model_validate({
        "data": {"dataset": "camvid", "root": str(street_root), "size": [32, 48]}, "control": False, "panels": 0,
        "model": {"name": "unet", "options": {"width": 4, "depth": 2}}, "bench": {"min_seconds": 0.1, "max_seconds": 1},
        "train": {"epochs": 1, "lr": 0.05, "accelerator": "cpu"}, "finetune": {"epochs": 1, "accelerator": "cpu"},
        "prune": {"criterion": "l1", "recalibrate": 2}, "gate": {"max_drop_from_baseline": None},
        "export": {"plugins": True},
        "build": {"also": ["tensorrt_rtx"], "targets": ["sm86"], "tensorrt": {"plugins": libraries}},
    })  # fmt: skip
    report = run_recipe(recipe, tmp_path / "run", progress=False)
    assert [row["passed"] for row in report["built"]] == [True, True]
    about = read_about(tmp_path / "run" / report["built"][1]["file"]) or {}
    assert (about["plugins"], about["plan"]["plugins"]) == (["VssSegArgmax"], [Path(libraries[0]).name])
    steps = {step["name"]: step["status"] for step in run_recipe(recipe, tmp_path / "run", progress=False)["steps"]}
    assert steps["tensorrt_rtx-finetuned"] == steps["engine-finetuned"] == "skipped"
    ship(tmp_path / "run", tmp_path / "bundle", samples=0, force=True)
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.plugins() == [f"engine/{Path(libraries[0]).name}"]
    again = rebuild_elsewhere(tmp_path / "bundle", "tensorrt_rtx", ["sm89"])
    about = read_about(tmp_path / "bundle" / again.elsewhere[0].file) or {}
    assert (about["plugins"], about["targets"]) == (["VssSegArgmax"], ["sm89"])
    assert "--backend-config" not in (tmp_path / "bundle" / "README.md").read_text()  # Triton runs the ONNX file


@pytest.mark.slow
@pytest.mark.parametrize("major", sorted(VERSIONS))
def test_with_cuda_kernels(major: int, tmp_path: Path) -> None:
    """nvcc for one architecture; a static cudart, so that it loads where there is no driver."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    configure(major, tmp_path, "-DVSS_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=80-real", "-DVSS_TESTS=OFF")
    command("cmake", "--build", tmp_path, "--target", "vss_trt_plugins")
    path = library(tmp_path, major)
    assert foreign_symbols(path) == []
    linked = command("ldd", path)
    assert "libcudart" not in linked and "libnvinfer" not in linked and "libcuda.so" not in linked
    check_registry(major, "lean", path)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_without_headers_cmake_says_what_to_do(tmp_path: Path) -> None:
    if any(Path(place).exists() for place in ("/usr/include/x86_64-linux-gnu/NvInfer.h", "/usr/include/NvInfer.h")):
        pytest.skip("this machine has TensorRT's headers in a system folder")
    options = ["-S", ROOT, "-B", tmp_path, f"-DTENSORRT_ROOT={tmp_path}"]
    done = subprocess.run(["cmake", *map(str, options), "-DVSS_TENSORRT=ON"], capture_output=True, text=True)
    assert done.returncode != 0 and "-DTENSORRT_ROOT=FOLDER" in " ".join(done.stderr.split())
    (tmp_path / "include").mkdir()
    for name in ("NvInferRuntime.h", "NvInferVersion.h"):
        (tmp_path / "include" / name).write_text("#define NV_TENSORRT_MAJOR 8\n")
    done = subprocess.run(["cmake", *map(str, options), "-DVSS_TENSORRT=ON"], capture_output=True, text=True)
    assert done.returncode != 0 and "is of TensorRT 8; the plugins need 10 or 11" in " ".join(done.stderr.split())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_ahead_of_time_kernels_compile_to_ptx(tmp_path: Path) -> None:
    """Nine arguments each: logits, seven integers, labels; what `vss build --aot-ptx` takes."""
    path = tmp_path / "seg_argmax.ptx"
    source = ROOT / "plugins_trt" / "seg_argmax_aot.cu"
    options = ["-ptx", "-std=c++17", "-arch=compute_80", "-Werror=all-warnings", "-I", ROOT / "csrc/kernels"]
    command("nvcc", *options, source, "-o", path)
    text = read_ptx(path)
    for entry in ENTRIES.values():
        parameters = re.search(rf"\.entry {entry}\((.*?)\)", text, re.DOTALL)
        assert parameters is not None
        kinds = re.findall(r"\.param (?:\.align \d+ )?\.(\w+)", parameters[1])
        assert kinds == ["u64", *["u32"] * 7, "u64"]
