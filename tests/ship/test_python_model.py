"""The model of Triton's python backend, called as the server calls it, without a server."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vss.data.preprocess import Preprocess
from vss.ship import read
from vss.ship.check import open_engine
from vss.ship.python_model import TritonPythonModel
from vss.ship.triton import parse


class Tensor:
    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name, self.value = name, value

    def as_numpy(self) -> np.ndarray:
        return self.value


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = ModuleType("triton_python_backend_utils")
    fake: dict[str, Any] = {
        "Tensor": Tensor,
        "InferenceResponse": lambda tensors: {tensor.name: tensor.value for tensor in tensors},
        "get_input_tensor_by_name": lambda request, name: Tensor(name, request[name]),
    }
    vars(utils).update(fake)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)


def model(role: str, inputs: list[str], outputs: list[str], folder: Path = Path(), **values: str) -> TritonPythonModel:
    parameters = {key: {"string_value": value} for key, value in {"role": role, **values}.items()}
    config = {
        "parameters": parameters,
        "input": [{"name": n} for n in inputs],
        "output": [{"name": n} for n in outputs],
        "max_batch_size": 2,
    }
    made = TritonPythonModel()
    made.initialize({"model_config": json.dumps(config), "model_repository": str(folder), "model_version": "1"})
    return made


def test_pre_is_the_preprocessing_of_training() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    made = Preprocess(size=(8, 6))
    mean, std = (" ".join(map(repr, values)) for values in (made.mean, made.std))
    (answer,) = model("pre", ["image"], ["image"], mean=mean, std=std).execute([{"image": images}])
    want = made.normalise(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert answer["image"].dtype == np.float32 and np.array_equal(answer["image"], want)


def test_one_run_for_all_requests_and_every_client_gets_its_own() -> None:
    post, calls = model("post", ["logits"], ["labels"]), []
    compute = post.compute
    post.compute = lambda arrays: calls.append(len(arrays[0])) or compute(arrays)  # type: ignore[method-assign,func-returns-value]
    parts = [np.random.default_rng(n).standard_normal((n, 5, 4, 3)).astype(np.float32) for n in (1, 3, 2)]
    answers = post.execute([{"logits": part} for part in parts])
    assert calls == [6]
    for part, answer in zip(parts, answers, strict=True):
        assert answer["labels"].dtype == np.uint8 and np.array_equal(answer["labels"], part.argmax(1))


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """A copy of a model's folder, as a server has it; what it imports from there is forgotten."""
    monkeypatch.delitem(sys.modules, "onnx_runner", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "model"))


def test_the_engine_is_the_file_beside_it(defect_bundle: Path, served: Callable[[Path], Path]) -> None:
    folder = served(defect_bundle / "triton/python/defects")
    options = {"runtime": "onnxruntime", "threads": "1", "as_written": "0"}
    engine = model("engine", ["image"], ["decision", "seg"], folder, **options)
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 64, 3), dtype=np.uint8)
    both = engine.execute([{"image": images[:1]}, {"image": images[1:]}])
    assert [SimpleNamespace(**answer).seg.shape for answer in both] == [(1, 1, 16, 8)] * 2
    whole = engine.engine.session.run(None, {"image": images})
    assert np.array_equal(np.concatenate([answer["decision"] for answer in both]), whole[0])


def test_openvino_is_the_engine_where_the_bundle_says_so(
    openvino_bundle: Path, served: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = served(openvino_bundle / "triton/python/intel")
    said = parse(folder / "config.pbtxt").parameters
    options = {key: said[key].string_value for key in ("runtime", "threads", "as_written")}
    assert options == {"runtime": "openvino", "threads": "0", "as_written": "0"}
    engine = model("engine", ["image"], ["labels"], folder, **options)
    assert (engine.engine.device, engine.engine.precision) == ("CPU", "f32")
    ready = set(engine.engine._requests)
    assert ready == {((1, 32, 48, 3),), ()}, "one for single images, one for batches of any size"
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    answers = engine.execute([{"image": images[:1]}, {"image": images[1:]}])
    with open_engine(openvino_bundle, read(openvino_bundle)) as session:
        want = session.run({"image": images})["labels"]
    assert np.array_equal(np.concatenate([answer["labels"] for answer in answers]), want)
    assert set(engine.engine._requests) == ready, "no request waits for a compilation"
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"the engine needs openvino .*; run: pip install openvino"):
        model("engine", ["image"], ["labels"], folder, **options)
