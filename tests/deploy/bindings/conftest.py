"""A driver for TensorRT's bindings to meet: a device that is not there, and a small ONNX file."""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from recording import Install, Recorder, engine, trt
from stub_driver import LIBCUDA, FakeCudaRuntime, FakePycuda, Gpu, HostTorch

from vss.deploy.backends import trt_child, trt_runner
from vss.deploy.backends import trt_session as sessions
from vss.deploy.backends.trt_device import Device

L4 = Device(0, "NVIDIA L4", (8, 9), 23034)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """From here on this machine has an L4, as far as the driver's answers go."""

    class Driver:
        def device(self, index: int = 0) -> Device:
            return L4

    monkeypatch.setattr(trt_runner, "Driver", Driver)
    monkeypatch.setattr("vss.deploy.backends.trt.Driver", Driver)
    return L4


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds run in this process, where recorders stand for the builder; requests and answers pass through JSON."""

    def answer(request: dict[str, Any], what: str, limit: int | None = None) -> dict[str, Any]:
        return json.loads(json.dumps(trt_child.answer(json.loads(json.dumps(request)))))

    monkeypatch.setattr("vss.deploy.backends.trt.in_child", answer)


@pytest.fixture
def fakes(in_process: None, monkeypatch: pytest.MonkeyPatch) -> Install:
    return Install(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """conv(image), dynamic batch."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 8, 8]) for name in ("image", "logits")]
    weight = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
    graph = helper.make_graph([helper.make_node("Conv", ["image", "w"], ["logits"])], "g", ends[:1], ends[1:], [weight])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    made.metadata_props.add(key="vss.model", value="tiny")
    path = tmp_path / "model.onnx"
    onnx.save(made, str(path))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VSS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "timing"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "cuda.c").write_text(LIBCUDA)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so"), str(folder / "cuda.c")], check=True)
    return folder / "libcuda.so"


@pytest.fixture
def driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the stub is the driver."""
    real = ctypes.CDLL
    monkeypatch.setattr(
        ctypes, "CDLL", lambda name, **o: real(str(library)) if name == "libcuda.so.1" else real(name, **o)
    )


@pytest.fixture
def gpu(library: Path, driver: None, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu(library)
    runtime = Recorder(
        trt.Runtime, made.log, deserialize_cuda_engine=lambda blob: engine(made.log, made.tensors, made.run)
    )
    monkeypatch.setattr(trt, "Runtime", lambda logger: runtime)
    return made


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> FakePycuda:
    made = FakePycuda()
    monkeypatch.setitem(sys.modules, "pycuda", types.ModuleType("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", made)
    return made


@pytest.fixture
def cuda_python(monkeypatch: pytest.MonkeyPatch) -> FakeCudaRuntime:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python, which a torch with CUDA brings")
    made = FakeCudaRuntime()
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", made)
    monkeypatch.setattr("cuda.bindings.runtime", made)
    return made


@pytest.fixture
def host_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "TorchMemory", HostTorch)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(wait_stream=lambda s: None))
