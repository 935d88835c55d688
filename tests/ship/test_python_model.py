"""The model of Triton's python backend, called as the server calls it, without a server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vss.data.transforms import Preprocess
from vss.ship.python_model import TritonPythonModel


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


def test_the_engine_is_the_file_beside_it(defect_bundle: Path) -> None:
    folder = defect_bundle / "triton/python/defects"
    engine = model("engine", ["image"], ["decision", "seg"], folder, threads="1", as_written="0")
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 64, 3), dtype=np.uint8)
    both = engine.execute([{"image": images[:1]}, {"image": images[1:]}])
    assert [SimpleNamespace(**answer).seg.shape for answer in both] == [(1, 1, 16, 8)] * 2
    whole = engine.session.run(None, {"image": images})
    assert np.array_equal(np.concatenate([answer["decision"] for answer in both]), whole[0])
