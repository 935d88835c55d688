"""The C++ examples of a bundle: compiled, and the one for ONNX Runtime run against the Python one.

The headers are in no Python wheel. Put ONNX Runtime's C header into ort-headers/include, and TensorRT's into
trt-headers-10/include and trt-headers-11/include, of the folder VSS_TEST_CACHE (default: vss-test in the user's cache);
without them these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import vss.ship
from vss.ship import read
from vss.ship.load import pixels
from vss.ship.samples import load_expected

CPP = Path(vss.ship.__file__).parent / "cpp"
USER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
CACHE = Path(os.environ.get("VSS_TEST_CACHE") or USER / "vss-test")


def need(path: Path, what: str) -> Path:
    if not path.is_file():
        pytest.skip(f"needs {what}: put {path.name} into {path.parent}")
    return path


def compiler() -> str:
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("needs a C++ compiler")
    return found


def command(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_example_of_onnxruntime_counts_the_labels_of_a_sample(seg_bundle: Path, tmp_path: Path) -> None:
    header = need(CACHE / "ort-headers/include/onnxruntime_c_api.h", "the C header of ONNX Runtime")
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None
    library = next((Path(spec.origin).parent / "capi").glob("libonnxruntime.so.*"))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libonnxruntime.so").symlink_to(library)
    (tmp_path / f"lib/{library.name.rsplit('.', 2)[0]}").symlink_to(library)
    program = tmp_path / "ort_example"
    command(
        compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{header.parent}",
        seg_bundle / "cpp/ort_example.cpp", f"-L{tmp_path / 'lib'}", "-lonnxruntime",
        f"-Wl,-rpath,{tmp_path / 'lib'}", "-o", program,
    )  # fmt: skip
    manifest = read(seg_bundle)
    for image, files in zip(manifest.samples.images, manifest.samples.expected, strict=True):
        (tmp_path / "frame.rgb").write_bytes(pixels(seg_bundle / image, manifest).tobytes())
        said = command(program, seg_bundle / manifest.engine.file, tmp_path / "frame.rgb", *manifest.image.size)
        counts = {int(line.split()[0]): int(line.split()[1]) for line in said.splitlines()}
        labels, amounts = np.unique(load_expected(seg_bundle, files)["labels"], return_counts=True)
        assert counts == dict(zip(labels.tolist(), amounts.tolist(), strict=True))
    (tmp_path / "short.rgb").write_bytes(b"abc")
    words = [program, seg_bundle / manifest.engine.file, tmp_path / "short.rgb", *map(str, manifest.image.size)]
    short = subprocess.run(words, capture_output=True, text=True, check=False)
    assert short.returncode == 2 and "does not hold" in short.stderr


@pytest.mark.parametrize("major", [10, 11])
def test_the_example_of_tensorrt_compiles(major: int, tmp_path: Path) -> None:
    header = need(CACHE / f"trt-headers-{major}/include/NvInfer.h", f"the headers of TensorRT {major}")
    roots = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr")]
    cuda = next((root / "include" for root in roots if (root / "include/cuda_runtime_api.h").is_file()), None)
    if cuda is None:
        pytest.skip("needs the headers of CUDA: set CUDA_HOME")
    words = [compiler(), "-std=c++17", "-Wall", "-Wextra", "-Wno-deprecated-declarations", "-Werror"]
    command(
        *words, f"-isystem{header.parent}", f"-isystem{cuda}", "-c", CPP / "trt_example.cpp", "-o", tmp_path / "t.o"
    )
    assert (tmp_path / "t.o").stat().st_size > 1000
