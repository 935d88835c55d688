"""Running engines of TensorRT for RTX: which GPUs and versions, CUDA graphs and the runtime cache, on its real classes.

Run with VSS_TEST_TENSORRT=tensorrt_rtx; see `recording`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recording import Recorder, trt
from stub_driver import FakeCudaRuntime, FakePycuda, Gpu

from vss.core.errors import VssError
from vss.deploy import BACKENDS
from vss.deploy.backends.trt_runner import Engine, EngineError

STRATEGY = trt.CudaGraphStrategy
KEPT = b"kernels of this GPU"


def write(folder: Path, **changes: Any) -> Path:
    path, blob = folder / "model.engine", b"engine bytes"
    path.write_bytes(blob)
    about = {
        "kind": "vss.engine", "schema": 2, "bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest(),
        "flavour": "tensorrt_rtx", "tensorrt": trt.__version__, "device": None, "targets": ["sm86", "sm89"],
        "plan": {"hardware": "NONE", "version_compatible": False}, "metadata": {"vss.model": "tiny"},
    } | changes  # fmt: skip
    path.with_name("model.engine.json").write_text(json.dumps(about))
    return path


def feed(batch: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(batch).normal(size=(batch, 4)).astype(np.float32)}


@pytest.mark.parametrize("memory", ["torch", "pycuda", "cuda-python"])
def test_a_session(
    memory: str, gpu: Gpu, pycuda: FakePycuda, cuda_python: FakeCudaRuntime, host_torch: None, tmp_path: Path
) -> None:
    with BACKENDS["tensorrt_rtx"].open(write(tmp_path), memory=memory) as opened:
        assert {name: str(b) for name, b in opened.inputs.items()} == {"x": "float32 (any, 4)"}
        for batch in (2, 8, 2):
            assert np.array_equal(opened.run(feed(batch))["y"], 2 * feed(batch)["x"])
        assert opened.describe()["backend"] == "tensorrt_rtx"
        with pytest.raises(VssError, match=r"input 'x' is \(9, 4\); this engine takes \(1, 4\) to \(8, 4\)"):
            opened.run(feed(9))
    assert gpu.log.of("IRuntimeConfig", "cuda_graph_strategy") == [(STRATEGY.DISABLED,)]
    assert gpu.log.of("IRuntimeConfig", "create_runtime_cache") == []
    assert gpu.log.asked_by_us() == []


def test_graphs_are_left_to_the_product(gpu: Gpu, pycuda: FakePycuda, tmp_path: Path) -> None:
    engine = Engine(write(tmp_path), cuda_graph=True)
    for batch in (2, 2, 8):
        assert np.array_equal(engine.run(feed(batch))["y"], 2 * feed(batch)["x"])
    assert (gpu.enqueued, gpu.replayed, gpu.recorded) == (3, 0, [])
    assert gpu.log.of("IRuntimeConfig", "cuda_graph_strategy") == [(STRATEGY.WHOLE_GRAPH_CAPTURE,)]
    ((config,),) = gpu.log.of("ICudaEngine", "create_execution_context")
    assert isinstance(config, Recorder)


def test_layers_are_timed_without_graphs(gpu: Gpu, host_torch: None, tmp_path: Path) -> None:
    opened: Any = BACKENDS["tensorrt_rtx"].open(write(tmp_path), cuda_graph=True)
    opened.profile(feed(2), runs=2)
    said = [strategy for (strategy,) in gpu.log.of("IRuntimeConfig", "cuda_graph_strategy")]
    assert said == [STRATEGY.WHOLE_GRAPH_CAPTURE, STRATEGY.DISABLED]
    assert np.array_equal(opened.run(feed(4))["y"], 2 * feed(4)["x"])


def test_the_runtime_cache_is_kept(gpu: Gpu, pycuda: FakePycuda, tmp_path: Path) -> None:
    kept = tmp_path / "kernels.cache"
    engine = Engine(write(tmp_path), runtime_cache=kept)
    assert gpu.log.of("IRuntimeCache", "deserialize") == [] and not kept.exists()
    engine.run(feed(2))
    engine.close()
    assert kept.read_bytes() == KEPT
    Engine(write(tmp_path), runtime_cache=kept).close()
    assert gpu.log.of("IRuntimeCache", "deserialize") == [(KEPT,)]
    assert len(gpu.log.of("IRuntimeConfig", "set_runtime_cache")) == 2
    assert sorted(path.name for path in tmp_path.glob("*ernels*")) == ["kernels.cache"]
    assert gpu.log.asked_by_us() == []


def test_a_runtime_cache_of_another_gpu_is_made_again(
    gpu: Gpu, pycuda: FakePycuda, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = tmp_path / "kernels.cache"
    kept.write_bytes(b"of another GPU")
    with caplog.at_level(logging.WARNING):
        Engine(write(tmp_path), runtime_cache=kept).close()
    assert "kernels.cache is of another GPU, driver or version and is made again" in caplog.text
    assert kept.read_bytes() == KEPT


def test_a_runtime_cache_that_cannot_be_written(
    gpu: Gpu, pycuda: FakePycuda, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(write(tmp_path), runtime_cache=tmp_path / "gone" / "kernels.cache")
    with pytest.raises(
        EngineError, match=r"kernels.cache cannot be written \(No such file or directory\); name another"
    ):
        engine.keep_cache()
    engine.close()
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ["sm86"]}, r"was built for sm86 and this is NVIDIA L4 \(sm 89\); build it with --targets "),
        ({"tensorrt": "1.6.1.120"}, rf"was built by TensorRT for RTX 1.6.1.120 and this is {trt.__version__}"),
        ({"bytes": 7}, r"is not what was built \(12 bytes of 7\)"),
        ({"flavour": "tensorrt_xt"}, "is no vss.engine file"),
    ],
)  # fmt: skip
def test_engines_that_do_not_belong_here(
    changes: dict[str, Any], words: str, gpu: Gpu, host_torch: None, tmp_path: Path
) -> None:
    with pytest.raises(VssError, match=words):
        BACKENDS["tensorrt_rtx"].open(write(tmp_path, **changes))
    assert gpu.log.of("Runtime", "deserialize_cuda_engine") == []
