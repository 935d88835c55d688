"""plugins_trt: built against the headers of TensorRT 10 and 11, driven by a C++ program, loaded by NVIDIA's registry.

The headers are in no Python wheel. Put those of a version (the include folder of its archive, of the development
package or of the public TensorRT repository) into trt-headers-10/include and trt-headers-11/include of the cache of
`trt_bindings`; without them these tests are skipped.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.trt_bindings import VERSIONS, UnavailableError, bindings, cache, run
from vss.deploy.backends.trt_aot import ENTRIES, read_ptx

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


@pytest.fixture(scope="module", params=sorted(VERSIONS))
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """(major, build folder) of the library with CPU kernels and its contract program."""
    folder = tmp_path_factory.mktemp(f"host{request.param}")
    said = configure(request.param, folder)
    assert f"TensorRT {request.param} headers" in said
    command("cmake", "--build", folder, "--target", "vss_trt_plugins", "trt_plugins_contract")
    return request.param, folder


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

    from vss.deploy.backends.trt_runner import EngineError, load_plugins

    major, folder = host
    path = library(folder, major)
    assert ctypes.CDLL(str(path)).vssTensorRTMajor() == major
    other = 21 - major
    loaded: list[str] = []
    registry = SimpleNamespace(load_library=lambda name: loaded.append(name) or object())
    module = SimpleNamespace(__version__=f"{other}.0.0", get_plugin_registry=lambda: registry)
    with pytest.raises(EngineError, match=rf"is built for TensorRT {major}, this is {other}.0.0; build it again"):
        load_plugins(module, [path])
    module.__version__ = f"{major}.9.9"
    load_plugins(module, [path])
    assert loaded == [str(path)]


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
