"""vss.deploy.backends.eager: torch behind the bindings of an engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vss.core.errors import VssError
from vss.deploy import BACKENDS, Binding, BuildSpec, TorchSession


def test_logits_session_equals_the_network(tiny: Any) -> None:
    session = TorchSession(tiny, (32, 48))
    assert session.inputs == {"image": Binding((None, 3, 32, 48), "float32")}
    assert session.outputs == {"logits": Binding((None, 5, 32, 48), "float32")}
    x = torch.randn(2, 3, 32, 48)
    assert np.array_equal(session.run({"image": x.numpy()})["logits"], tiny(x).detach().numpy())


def test_same_bindings_and_labels_as_the_engine(exported: SimpleNamespace, tiny: Any, preprocess: Any) -> None:
    engine = BACKENDS["onnxruntime"].open(exported.labels[0])
    session = TorchSession(tiny, (32, 48), preprocess=preprocess, labels=True, labels_dtype="uint8")
    assert (session.inputs, session.outputs) == (engine.inputs, engine.outputs)
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    found, expected = (each.run({"image": image})["labels"] for each in (session, engine))
    assert found.dtype == expected.dtype == np.uint8
    assert (found == expected).mean() > 0.999


def test_threads_are_set_while_it_runs_and_put_back(tiny: Any) -> None:
    seen: list[int] = []

    class Spy(type(tiny)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return super().forward(x)

    before = torch.get_num_threads()
    session = TorchSession(Spy(), (32, 48), threads=before + 1)
    session.run({"image": np.zeros((1, 3, 32, 48), np.float32)})
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
    assert session.describe()["threads"] == before + 1
    assert session.describe()["metadata"]["model"] == "tiny"


def test_backend_opens_networks_and_checkpoints(tiny: Any, tmp_path: Path) -> None:
    backend = BACKENDS["torch"]
    x = {"image": np.ones((1, 3, 32, 48), np.float32)}
    opened = [
        backend.open(tiny, size=(32, 48)),
        backend.open(tmp_path / "net", size=(32, 48), load=lambda path: tiny if path.name == "net" else None),
    ]
    first, second = (each.run(x)["logits"] for each in opened)
    assert np.array_equal(first, second)
    assert backend.unavailable() is None
    with pytest.raises(VssError, match="needs `load`"):
        backend.open(tmp_path / "net", size=(32, 48))
    with pytest.raises(VssError, match="runs checkpoints, it does not build"):
        backend.build(Path("a.onnx"), Path("b"), BuildSpec())


def test_float16_is_near_float32_and_leaves_the_network(tiny: Any) -> None:
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    x = {"image": np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)}
    whole, half = (TorchSession(tiny, (32, 48), precision=precision) for precision in ("fp32", "fp16"))
    assert half.outputs == whole.outputs and half.describe()["precision"] == "fp16"
    assert {p.dtype for p in half.graph.model.parameters()} == {torch.float16}
    expected, found = (session.run(x)["logits"] for session in (whole, half))
    assert found.dtype == np.float32 and not np.array_equal(found, expected)
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    assert all(torch.equal(before[name], value) for name, value in tiny.state_dict().items())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"precision": "int8"}, "precision is 'int8'; torch runs fp32 or fp16"),
        ({"cuda_graph": True}, "CUDA graphs need a CUDA device, and device is cpu"),
    ],
)
def test_what_torch_cannot_do_is_refused(options: dict[str, Any], sentence: str, tiny: Any) -> None:
    with pytest.raises(VssError, match=sentence):
        TorchSession(tiny, (32, 48), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_cuda_graph_gives_what_the_network_gives(precision: str, tiny: Any) -> None:
    options: dict[str, Any] = {"device": "cuda", "precision": precision}
    plain, recorded = (TorchSession(tiny, (32, 48), cuda_graph=graph, **options) for graph in (False, True))
    for step, batch in enumerate((1, 2, 1, 4, 2)):
        x = {"image": np.random.default_rng(step).standard_normal((batch, 3, 32, 48)).astype(np.float32)}
        expected, found = (session.run(x)["logits"] for session in (plain, recorded))
        assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()
