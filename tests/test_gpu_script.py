"""benchmarks/gpu.sh: its dry run on a CPU, what it says where it cannot begin, and that what was measured stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from gpu_check import WHEELS, Machine, problems

ROOT = Path(__file__).resolve().parents[1]
GOOD = Machine("2.11.0", "13.0", True, "A card", (9, 0), "13.0", lambda module: True)


def call(part: int, results: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "VSS_RESULTS": str(results)} | more
    command = ["bash", "benchmarks/gpu.sh", str(part), "--cpu", "--quick"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_fitting_machine_has_no_problems(part: int, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert problems(part, GOOD, cpu=False, data=str(tmp_path)) == []


BAD = [
    (1, {"capability": (7, 5)}, "A card has compute capability 7.5 and the kernels need 8.0 or later"),
    (
        1,
        {"nvcc": "12.8"},
        "torch is built for CUDA 13.0 and nvcc is of CUDA 12.8: set CUDA_HOME to a toolkit of CUDA 13",
    ),
    (1, {"nvcc": None}, "nvcc was not found and part 1 builds the kernels"),
    (1, {"ninja": False}, "part 1 needs ninja, without which building takes longer than a call"),
    (2, {"built_for": None}, "torch 2.11.0 is built without CUDA"),
    (2, {"available": False}, "built for CUDA 13.0, sees no GPU"),
    (2, {"torch": "2.9.1"}, "torch is 2.9.1 and 2.11 or later is needed"),
    (3, {}, "part 3 needs DATA, the folder of CamVid"),
    (2, {"has": lambda module: module not in ("pydantic", "scipy")}, "part 2 needs pydantic scipy, not installed"),
]


@pytest.mark.parametrize(("part", "change", "sentence"), BAD)
def test_what_is_missing_is_one_sentence(part: int, change: dict, sentence: str) -> None:
    (found,) = problems(part, Machine(**vars(GOOD) | change), cpu=False, data=None)
    assert sentence in found and "\n" not in found


def test_a_data_folder_that_is_not_there_is_named() -> None:
    (found,) = problems(3, GOOD, cpu=True, data="/nowhere")
    assert found.startswith("DATA is /nowhere and there is no folder /nowhere/train")


def test_parts_name_wheels_that_the_product_depends_on() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert all(f'"{wheel}>=' in text for part in WHEELS.values() for wheel in part.values())


def test_an_unknown_part_or_option_ends_with_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(["bash", "benchmarks/gpu.sh", "4"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "give the part, 1, 2 or 3" in done.stderr
    done = subprocess.run(["bash", "benchmarks/gpu.sh", "1", "--fast"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown option --fast" in done.stderr
    done = call(1, tmp_path, LIMIT="4 min")
    assert done.returncode == 2 and done.stderr == "LIMIT is 4 min; expected whole seconds, such as 235\n"


HIDE = """
import sys
from importlib.machinery import PathFinder
class Hidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {names} else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Hidden if finder is PathFinder else finder for finder in sys.meta_path]
"""
SCRIPTS = {1: "bench_ops", 2: "gpu_nets", 3: "gpu_camvid"}


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_part_begins_with_the_wheels_that_it_names_and_no_others(part: int, tmp_path: Path) -> None:
    every = {wheel for wheels in WHEELS.values() for wheel in wheels} - {"numpy", "pytest"}
    every |= {"onnxruntime", "onnxscript", "openvino", "ray", "torch_pruning"}
    (tmp_path / "sitecustomize.py").write_text(HIDE.replace("{names}", repr(every - set(WHEELS[part]))))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}:{ROOT / 'benchmarks'}"}
    run = partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True)
    done = run([sys.executable, "-c", f"import {SCRIPTS[part]}"])
    assert done.returncode == 0, done.stderr
    if part == 1:
        line = next(x for x in (ROOT / "benchmarks/gpu.sh").read_text().splitlines() if x.startswith("export pytest="))
        options = line.split('"')[1].split()
        done = run([sys.executable, "-m", "pytest", *options, "--collect-only", "tests/ops"])
        assert done.returncode == 0, done.stdout


def test_without_kernels_no_step_begins_and_no_op_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    done = call(1, tmp_path, LIMIT="15")
    assert done.returncode == 1 and "build: left out" in done.stdout
    assert "the kernels are not built: nothing else is begun" in done.stdout and "== tests" not in done.stdout
    import bench_ops

    monkeypatch.setattr(bench_ops.ops, "status", lambda: {"map_stats": {"CPU": "reference"}})
    monkeypatch.setattr(sys, "argv", ["bench_ops.py", "--op", "map_stats"])
    with pytest.raises(SystemExit) as end:
        bench_ops.main()
    assert end.value.code == 2 and "no kernel for cpu is loaded of map_stats" in caplog.text


def test_no_compute_sanitizer_is_said_with_the_fix() -> None:
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    function = text[text.index("sanitize() {") : text.index("\nexport -f build")]
    done = subprocess.run(["bash", "-c", f"{function}\nSANITIZER=/nowhere sanitize memcheck"], capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 1
    assert "compute-sanitizer was not found (looked for /nowhere): install it with the CUDA toolkit" in done.stdout


def test_steps_for_which_no_time_is_left_are_named_and_what_was_measured_stays(tmp_path: Path) -> None:
    done = call(2, tmp_path, LIMIT="15")
    assert done.returncode == 1
    assert "nets: left out, " in done.stdout and "the same call goes on with it" in done.stdout
    (log,) = tmp_path.glob("*/gpu-2--cpu.txt")
    assert "nets: left out" in log.read_text() and "nvidia-smi" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("part", "suites"), [(1, ["importance", "ops-max_unpool", "sirfp"]), (3, ["camvid"])])
def test_a_dry_run_leaves_results(part: int, suites: list[str], tmp_path: Path) -> None:
    done = call(part, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in suites:
        (path,) = tmp_path.glob(f"*/*--{name}.json")
        assert json.loads(path.read_text())["rows"]
    assert "done before" not in done.stdout


@pytest.mark.slow
def test_networks_stop_in_time_and_a_dry_run_goes_on_and_is_not_repeated(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_nets.py", "--device", "cpu", "--quick", "--write"]
    environment = os.environ | {"VSS_RESULTS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = partial(subprocess.run, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    first = run([*command, "--seconds-left", "8"])
    assert first.returncode == 75 and "what is measured stays, the same call goes on" in first.stderr
    (path,) = tmp_path.glob("*/*--nets.json")
    before = json.loads(path.read_text())["rows"]
    assert before and set(before) < {"unet macs 0.5 align 1", "unet macs 0.5 align 8", "unet latency 0.8x"}
    second = call(2, tmp_path)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "done before" not in second.stdout
    after = json.loads(path.read_text())["rows"]
    assert len(after) == 3 and all(after[key] == row for key, row in before.items())
    row = after["unet macs 0.5 align 8"]
    assert row["macs_factor"] > 1.8 and row["efficiency"] == pytest.approx(row["speedup"] / row["macs_factor"])
    again = call(2, tmp_path)
    assert again.returncode == 0 and "== nets: done before" in again.stdout
