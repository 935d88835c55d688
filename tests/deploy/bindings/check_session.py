"""Running engines: the two memories, CUDA graphs, layer times and every refusal, on a driver of a few lines of C."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recording import trt
from stub_driver import FakeCudaRuntime, FakePycuda, Gpu

from vss.core.errors import VssError
from vss.deploy import BACKENDS
from vss.deploy.backends import trt_session as sessions
from vss.deploy.backends.trt_device import CudaPythonMemory, Device, Driver, EngineError, PycudaMemory
from vss.deploy.backends.trt_runner import ALONE, Engine, check_about


def write(folder: Path, **changes: Any) -> Path:
    path, blob = folder / "model.engine", b"engine bytes"
    path.write_bytes(blob)
    about = {
        "kind": "vss.engine", "schema": 1, "bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest(),
        "tensorrt": trt.__version__, "device": {"name": "NVIDIA L4", "capability": [8, 9]},
        "plan": {"hardware": "NONE", "version_compatible": False}, "metadata": {"vss.model": "tiny"},
    } | changes  # fmt: skip
    path.with_name("model.engine.json").write_text(json.dumps(about))
    return path


@pytest.fixture(params=["torch", "pycuda", "cuda-python"])
def session(
    request: pytest.FixtureRequest, gpu: Gpu, pycuda: FakePycuda, cuda_python: FakeCudaRuntime, host_torch: None,
    tmp_path: Path,
) -> Iterator[Any]:  # fmt: skip
    with BACKENDS["tensorrt"].open(write(tmp_path), memory=request.param) as opened:
        yield opened


def feed(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(batch, 4)).astype(np.float32)}


def test_the_driver_is_read_without_a_context(gpu: Gpu) -> None:
    assert Driver().device() == Device(0, "NVIDIA L4", (8, 9), 23034)
    assert str(Driver().device()) == "NVIDIA L4 (sm 89)"
    with pytest.raises(EngineError, match="device 1 was asked for and 1 are visible"):
        Driver().device(1)
    gpu.cuda.set_devices(0)
    with pytest.raises(EngineError, match="device 0 was asked for and 0 are visible; see CUDA_VISIBLE_DEVICES"):
        Driver().device()
    gpu.cuda.set_devices(-1)
    with pytest.raises(EngineError, match=r"refuses cuInit \(CUDA error 999\); check nvidia-smi"):
        Driver()


def test_results_at_every_shape(session: Any, gpu: Gpu) -> None:
    assert {name: str(b) for name, b in session.inputs.items()} == {"x": "float32 (any, 4)"}
    assert session.outputs["y"].dtype == "float32"
    for step, batch in enumerate((2, 1, 8, 2, 2)):
        found = session.run(feed(batch, step))
        assert np.array_equal(found["y"], 2 * feed(batch, step)["x"])
    assert gpu.enqueued == 5
    assert gpu.log.of("IExecutionContext", "set_input_shape") == [
        ("x", (2, 4)), ("x", (1, 4)), ("x", (8, 4)), ("x", (2, 4)),
    ]  # fmt: skip
    assert gpu.log.asked_by_us() == []


def test_results_are_the_callers_own(session: Any) -> None:
    first = session.run(feed(2, 0))["y"]
    session.run(feed(2, 1))
    assert np.array_equal(first, 2 * feed(2, 0)["x"])


def test_a_shape_outside_the_profile_is_named_and_the_session_lives_on(session: Any) -> None:
    with pytest.raises(VssError, match=r"input 'x' is \(9, 4\); this engine takes \(1, 4\) to \(8, 4\)"):
        session.run(feed(9))
    with pytest.raises(VssError, match="takes float32"):
        session.run({"x": np.zeros((1, 4))})
    assert np.array_equal(session.run(feed(8))["y"], 2 * feed(8)["x"])


def test_a_failed_launch_is_a_sentence(session: Any, gpu: Gpu) -> None:
    gpu.works = False
    with pytest.raises(VssError, match="TensorRT could not run the engine"):
        session.run(feed(1))


@pytest.mark.parametrize("memory", ["torch", "pycuda", "cuda-python"])
def test_cuda_graphs_are_recorded_per_shape_and_replayed(
    memory: str, gpu: Gpu, pycuda: FakePycuda, cuda_python: FakeCudaRuntime, host_torch: None, tmp_path: Path
) -> None:
    with BACKENDS["tensorrt"].open(write(tmp_path), memory=memory, cuda_graph=True) as opened:
        for step, batch in enumerate((8, 2, 8, 2, 8)):
            assert np.array_equal(opened.run(feed(batch, step))["y"], 2 * feed(batch, step)["x"])
        assert (gpu.enqueued, gpu.replayed, len(gpu.recorded)) == (2, 5, 2)
    assert gpu.cuda.live_graphs() == 0


def test_graphs_are_dropped_when_a_buffer_moves(gpu: Gpu, host_torch: None, tmp_path: Path) -> None:
    with BACKENDS["tensorrt"].open(write(tmp_path), cuda_graph=True) as opened:
        for step, batch in enumerate((1, 8, 1)):
            assert np.array_equal(opened.run(feed(batch, step))["y"], 2 * feed(batch, step)["x"])
        assert len(gpu.recorded) == 3


def test_tensors_in_and_out(gpu: Gpu, host_torch: None, tmp_path: Path) -> None:
    opened: Any = BACKENDS["tensorrt"].open(write(tmp_path))
    x = torch.arange(8.0).view(2, 4)
    first = opened.run_tensors({"x": x})["y"]
    opened.run_tensors({"x": x + 1})
    assert torch.equal(first, 2 * x)
    with pytest.raises(VssError, match=r"takes float32 of 2 dimensions, got float64 \(2, 4\)"):
        opened.run_tensors({"x": x.double()})
    with pytest.raises(VssError, match=r"takes the inputs \['x'\], got \['z'\]"):
        opened.run_tensors({"z": x})


def test_pycuda_uses_the_primary_context(gpu: Gpu, pycuda: FakePycuda, tmp_path: Path) -> None:
    made = Engine(write(tmp_path))  # what a shipped runner does: no torch memory
    assert isinstance(made.memory, PycudaMemory)
    assert np.array_equal(made.run(feed(2))["y"], 2 * feed(2)["x"])
    made.close()
    assert pycuda.calls == ["init", "push", "synchronize", "pop"]
    assert [arguments for _, name, arguments in gpu.log.calls if name == "execute_async_v3"] == [(99,)]


def test_without_pycuda_cuda_python_is_used(
    gpu: Gpu, cuda_python: FakeCudaRuntime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    made = Engine(write(tmp_path))
    assert isinstance(made.memory, CudaPythonMemory)
    for batch in (2, 8, 1):
        assert np.array_equal(made.run(feed(batch))["y"], 2 * feed(batch)["x"])
    assert (len(cuda_python.kept), cuda_python.calls[:2]) == (4, ["cudaSetDevice", "cudaStreamCreate"])
    made.close()
    assert cuda_python.kept == {} and cuda_python.calls[-1] == "cudaStreamDestroy"
    assert [arguments for _, name, arguments in gpu.log.calls if name == "execute_async_v3"] == [(88,)] * 3
    cuda_python.refuses = "cudaMalloc"
    with pytest.raises(EngineError, match=r"CUDA refuses cudaMalloc \(cudaErrorMemoryAllocation\); check nvidia-smi"):
        Engine(write(tmp_path)).run(feed(2))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(EngineError, match=r"runs on memory of pycuda or cuda-python .* pip install either"):
        Engine(write(tmp_path))


def test_what_a_session_says_of_itself(session: Any) -> None:
    about = session.describe()
    assert (about["backend"], about["version"], about["device"]) == ("tensorrt", trt.__version__, "NVIDIA L4 (sm 89)")
    assert about["metadata"] == {"vss.model": "tiny"} and about["artefact_bytes"] == 12
    assert session.layers() == {"Layers": []}


def test_the_runner_needs_numpy_alone(tmp_path: Path) -> None:
    """In a process where torch, this package, pycuda and tensorrt cannot be imported the file still loads."""
    for name in ALONE:
        shutil.copyfile(Path(sessions.__file__).with_name(name), tmp_path / name)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'vss', 'pycuda', 'cuda', 'tensorrt', 'pydantic']));"
        "import trt_runner as runner; print([m for m in ('numpy', 'torch', 'vss') if sys.modules.get(m)])\n"
        "try: runner.load_tensorrt()\n"
        "except runner.EngineError as error: print(error)\n"
        "for kind in ('PycudaMemory', 'CudaPythonMemory', 'own_memory'):\n"
        " try: getattr(sys.modules['trt_device'], kind)()\n"
        " except runner.EngineError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env={"PATH": ""}
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "['numpy']", done.stderr
    assert "TensorRT cannot be imported" in lines[1] and "pip install tensorrt-cu13" in lines[1]
    assert "needs pycuda" in lines[2] and "pip install pycuda" in lines[2]
    assert "needs cuda-python" in lines[3] and "pip install cuda-python" in lines[3]
    assert "memory of pycuda or cuda-python" in lines[4]


# Engines that do not belong here

HERE = Device(0, "NVIDIA L4", (8, 9), 0)


@pytest.mark.parametrize(
    ("built", "level", "here", "fits"),
    [
        (("NVIDIA L4", [8, 9]), "NONE", HERE, True),
        (("NVIDIA RTX 4090", [8, 9]), "NONE", HERE, False),
        (("NVIDIA RTX 4090", [8, 9]), "SAME_COMPUTE_CAPABILITY", HERE, True),
        (("NVIDIA A100", [8, 0]), "SAME_COMPUTE_CAPABILITY", HERE, False),
        (("NVIDIA A100", [8, 0]), "AMPERE_PLUS", HERE, True),
        (("NVIDIA A100", [8, 0]), "AMPERE_PLUS", Device(0, "Tesla T4", (7, 5), 0), False),
        (("NVIDIA H200", [9, 0]), "NONE", HERE, False),
    ],
)
def test_which_gpu_may_run_it(built: tuple[str, list[int]], level: str, here: Device, fits: bool) -> None:
    about = {
        "device": {"name": built[0], "capability": built[1]},
        "plan": {"hardware": level, "version_compatible": False},
        "tensorrt": "10.16.1.11",
    }
    if fits:
        check_about(Path("m.engine"), about, here, "10.16.1.11")
        return
    with pytest.raises(EngineError, match=rf"m.engine was built on {built[0]} \(sm \d\d, .*this is {here.name} \(sm"):
        check_about(Path("m.engine"), about, here, "10.16.1.11")


@pytest.mark.parametrize(
    ("built", "here", "compatible", "fits"),
    [
        ("10.16.1.11", "10.16.1.11", False, True),
        ("10.13.0.35", "10.16.1.11", False, False),
        ("10.13.0.35", "10.16.1.11", True, True),
        ("10.16.1.11", "10.9.0.34", True, False),
        ("10.16.1.11", "11.4.0.106", True, False),
    ],
)
def test_which_tensorrt_may_run_it(built: str, here: str, compatible: bool, fits: bool) -> None:
    about = {
        "device": {"name": HERE.name, "capability": [8, 9]},
        "plan": {"hardware": "NONE", "version_compatible": compatible},
        "tensorrt": built,
    }
    if fits:
        check_about(Path("m.engine"), about, HERE, here)
        return
    with pytest.raises(EngineError, match=f"m.engine was built by TensorRT {built} and this is {here}"):
        check_about(Path("m.engine"), about, HERE, here)


def refused(path: Path, words: str, gpu: Gpu) -> None:
    with pytest.raises(VssError, match=words):
        BACKENDS["tensorrt"].open(path)
    assert gpu.log.of("Runtime", "deserialize_cuda_engine") == []


def test_a_truncated_engine(gpu: Gpu, host_torch: None, tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:5])
    refused(path, r"is not what was built \(5 bytes of 12\)", gpu)


def test_an_engine_of_another_gpu(gpu: Gpu, host_torch: None, tmp_path: Path) -> None:
    refused(write(tmp_path, device={"name": "NVIDIA H200", "capability": [9, 0]}), "built on NVIDIA H200", gpu)


def test_a_damaged_sidecar(gpu: Gpu, host_torch: None, tmp_path: Path) -> None:
    path = write(tmp_path)
    beside = path.with_name("model.engine.json")
    beside.write_text("{")
    refused(path, "model.engine.json is damaged", gpu)
    beside.write_text('{"kind": "other"}')
    refused(path, "is no vss.engine file of schema 2", gpu)


def test_an_engine_that_is_not_there(gpu: Gpu, host_torch: None, tmp_path: Path) -> None:
    refused(tmp_path / "absent.engine", "absent.engine cannot be read", gpu)


def test_an_engine_from_elsewhere_is_for_tensorrt_to_judge(
    gpu: Gpu, host_torch: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign.engine").write_bytes(b"x" * 100)
    assert BACKENDS["tensorrt"].open(tmp_path / "foreign.engine").describe()["metadata"] == {}
    monkeypatch.setattr(trt, "Runtime", lambda logger: types.SimpleNamespace(deserialize_cuda_engine=lambda blob: None))
    with pytest.raises(VssError, match=rf"TensorRT {trt.__version__} cannot load .*foreign.engine"):
        BACKENDS["tensorrt"].open(tmp_path / "foreign.engine")


def test_options_that_do_not_exist(gpu: Gpu, host_torch: None, tmp_path: Path) -> None:
    with pytest.raises(VssError, match="memory is 'cupy'; expected one of torch, pycuda, cuda-python"):
        BACKENDS["tensorrt"].open(write(tmp_path), memory="cupy")
    with pytest.raises(VssError, match="no optimisation profile 3"):
        BACKENDS["tensorrt"].open(write(tmp_path), profile=3)


def test_torch_without_cuda_says_so(gpu: Gpu, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this torch has a device")
    with pytest.raises(VssError, match="this torch sees no CUDA device; open the engine with memory='pycuda'"):
        BACKENDS["tensorrt"].open(write(tmp_path))


def test_other_versions_of_tensorrt_are_refused(
    in_process: None, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "__version__", "8.6.1")
    with pytest.raises(VssError, match=r"TensorRT 8.6.1 is installed; expected 10 or 11"):
        BACKENDS["tensorrt"].open(write(tmp_path))
    assert "8.6.1 is installed" in str(BACKENDS["tensorrt"].unavailable())
