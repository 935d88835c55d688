"""The torch-free kernel library: CMake builds it and its own tests pass. CUDA sources compile where nvcc is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "csrc" / "kernels"


def run(*command: object, **environment: str) -> str:
    done = subprocess.run([str(part) for part in command], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_builds_the_library_and_its_tests_pass(tmp_path: Path) -> None:
    run("cmake", "-S", ROOT, "-B", tmp_path)
    run("cmake", "--build", tmp_path)
    report = run("ctest", "--test-dir", tmp_path, "--output-on-failure", OMP_NUM_THREADS="2")
    tests = sorted(path.stem for path in (ROOT / "csrc" / "tests").glob("test_*.cpp"))
    assert f"100% tests passed, 0 tests failed out of {len(tests)}" in report
    assert all(name in report for name in tests)


@pytest.mark.parametrize("source", sorted(KERNELS.glob("*")), ids=lambda path: path.name)
def test_a_kernel_includes_neither_torch_nor_tensorrt(source: Path) -> None:
    included = [line.split()[1] for line in source.read_text().splitlines() if line.startswith("#include")]
    own = {f'"{path.name}"' for path in KERNELS.glob("*")}
    standard = [name for name in included if name not in own]
    assert all(name.startswith("<") and not name.startswith(("<torch", "<ATen", "<c10", "<Nv")) for name in standard)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted(KERNELS.glob("*.cu")), ids=lambda path: path.name)
def test_cuda_sources_compile_without_warnings(source: Path, tmp_path: Path) -> None:
    run("nvcc", "-std=c++17", "-O1", "-arch=sm_80", "-Werror=all-warnings", "-c", source, "-o", tmp_path / "kernel.o")


def test_the_table_of_registers_is_that_of_these_sources_and_nothing_spills() -> None:
    from ptxas import ARCHITECTURES, TABLE, sources_hash

    table = json.loads(TABLE.read_text())
    assert table["sources"] == sources_hash(), "the kernels have changed: python benchmarks/ptxas.py --write"
    for source in KERNELS.glob("*.cu"):
        names = set(re.findall(r"__global__[^;{(]*(?:\([^)]*\))?\s+(\w+)\(", source.read_text()))
        assert names
        for architecture in ARCHITECTURES:
            rows = [row for row in table["rows"] if (row["source"], row["architecture"]) == (source.name, architecture)]
            assert names <= {row["kernel"].partition("<")[0] for row in rows}
    spills = ("stack_bytes", "spill_store_bytes", "spill_load_bytes")
    assert all(row[key] == 0 for row in table["rows"] for key in spills)
    assert all(row["registers"] <= 224 and row["shared_bytes"] <= 48 * 1024 for row in table["rows"])
