"""vss.train.evaluate: torch and engines through one function, against metrics computed by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from vss.core.errors import NotFinite, VssError
from vss.data.preprocess import Preprocess
from vss.deploy import BACKENDS, Binding, Session, TorchSession, export
from vss.models import build
from vss.train.evaluate import engine_predictor, evaluate, torch_predictor
from vss.train.gate import gate
from vss.train.metrics import scores

SIZE, CLASSES = (32, 48), ["road", "sky", "car", "tree"]


class Split(Dataset):
    """Seeded images, truth that follows the colours, some void."""

    def __init__(self, count: int = 7) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, *SIZE), dtype=torch.uint8, generator=generator)
        self.masks = self.images.float().mean(1).sub(90).div(25).clamp(0, 3).long()
        self.masks[:, :2] = 255

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "mask": self.masks[index], "index": index}


def by_colour(images: Tensor) -> Tensor:
    return images[:, 0].float().sub(90).div(25).clamp(0, 3).to(torch.uint8)


def run(predict: Any, **options: Any) -> dict[str, Any]:
    arguments = {"num_classes": 4, "class_names": CLASSES, "batch_size": 3} | options
    return evaluate(predict, Split(), **arguments)


@pytest.fixture(scope="module")
def preprocess() -> Preprocess:
    return Preprocess(size=SIZE)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return build("unet", 4, width=4, depth=2)


def test_scores_of_the_whole_split() -> None:
    split = Split()
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    for truth, guess in zip(split.masks.flatten().tolist(), by_colour(split.images).flatten().tolist(), strict=True):
        if truth != 255:
            confusion[truth, guess] += 1
    found = run(by_colour)
    boundary = found.pop("boundary_iou_pct")
    assert 0 < boundary < 100
    assert found == {**scores(confusion), "classes": CLASSES, "images": 7, "resolution": [32, 48]}


def test_result_does_not_depend_on_the_batch_size() -> None:
    assert run(by_colour, batch_size=1) == run(by_colour, batch_size=7)


def test_per_image_matrices_sum_to_the_score_and_feed_the_gate() -> None:
    found = run(by_colour, per_image=True, boundary=False)
    each = found["confusion_per_image"]
    assert each.shape == (7, 4, 4)
    assert each.dtype == np.int64
    assert scores(torch.from_numpy(each.sum(0)))["miou_pct"] == found["miou_pct"]
    result = gate(found, found)
    assert result["passed"] and result["drop_interval"] == [0.0, 0.0]
    assert "boundary_iou_pct" not in found


def test_torch_predictor_uses_eval_mode(network: nn.Module, preprocess: Preprocess) -> None:
    images = Split().images
    labels = torch_predictor(network.train(), preprocess)(images)
    assert not network.training
    with torch.inference_mode():
        expected = network(preprocess.normalise(images)).argmax(1)
    assert (labels == expected).double().mean() > 0.9999


@pytest.mark.parametrize(
    "options",
    [{}, {"labels": True}, {"preprocess": True}, {"preprocess": True, "labels": True, "labels_dtype": "uint8"}],
)
def test_engine_scores_what_torch_scores(
    network: nn.Module, preprocess: Preprocess, options: dict, tmp_path: Any
) -> None:
    if options.get("preprocess"):
        options = options | {"preprocess": preprocess}
    export(network, tmp_path / "x.onnx", size=SIZE, **options)
    expected = run(torch_predictor(network, preprocess))
    for session in (BACKENDS["onnxruntime"].open(tmp_path / "x.onnx"), TorchSession(network, SIZE, **options)):
        found = run(engine_predictor(session, preprocess))
        assert found["miou_pct"] == pytest.approx(expected["miou_pct"], abs=0.05)
        assert found["pixel_acc_pct"] == pytest.approx(expected["pixel_acc_pct"], abs=0.05)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_network_of_nan_has_no_score(network: nn.Module, preprocess: Preprocess, value: float) -> None:
    broken = copy.deepcopy(network)
    with torch.no_grad():
        broken.classifier.bias[0] = value
    for session in (None, TorchSession(broken, SIZE), TorchSession(broken, SIZE, labels=True)):
        predict = torch_predictor(broken, preprocess) if session is None else engine_predictor(session, preprocess)
        with pytest.raises(NotFinite, match="gives NaN or infinity, so its results mean nothing"):
            run(predict)
    assert run(engine_predictor(TorchSession(network, SIZE, labels=True), preprocess))["images"] == 7


class FakeSession(Session):
    """Red over 64 as the label, from a fixed batch of 4; remembers the batches it was given."""

    def __init__(self, **bindings: Any) -> None:
        self.inputs = bindings.get("inputs", {"image": Binding((4, *SIZE, 3), "uint8")})
        self.outputs = bindings.get("outputs", {"labels": Binding((4, *SIZE), "int32")})
        self.feeds: list[np.ndarray] = []

    def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.feeds.append(feed["image"])
        return {"labels": (feed["image"][..., 0] // 64).astype(np.int32)}

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("count", [1, 4, 7])
def test_fixed_batch_is_split_and_padded(preprocess: Preprocess, count: int) -> None:
    session = FakeSession()
    images = Split().images[:count]
    labels = engine_predictor(session, preprocess)(images)
    assert torch.equal(labels, (images[:, 0] // 64).int())
    assert [len(feed) for feed in session.feeds] == [4] * -(-count // 4)


def test_small_logits_are_resized_bilinearly(preprocess: Preprocess) -> None:
    logits = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))

    class Small(FakeSession):
        def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"logits": logits.numpy()}

    session = Small(
        inputs={"image": Binding((None, 3, *SIZE), "float32")}, outputs={"logits": Binding((None, 4, 8, 12), "float32")}
    )
    labels = engine_predictor(session, preprocess)(Split().images[:2])
    expected = F.interpolate(logits, size=SIZE, mode="bilinear").argmax(1)
    assert labels.shape == (2, *SIZE)
    assert (labels == expected).double().mean() > 0.999


@pytest.mark.parametrize(
    ("bindings", "words"),
    [
        ({"inputs": {"x": Binding((None, *SIZE, 3), "uint8")}}, "expected one input 'image'"),
        ({"inputs": {"image": Binding((None, 10), "float32")}}, "of four dimensions"),
        ({"inputs": {"image": Binding((None, *SIZE, 1), "uint8")}}, r"expected uint8 \(N, H, W, 3\)"),
        (
            {"inputs": {"image": Binding((None, 64, 48, 3), "uint8")}},
            "built for 64 x 48 and the preprocessing gives 32",
        ),
        ({"outputs": {"y": Binding((None, 4, *SIZE), "float32")}}, r"gives \['y'\]; expected 'labels' or 'logits'"),
    ],
)
def test_foreign_engines_are_refused(preprocess: Preprocess, bindings: dict, words: str) -> None:
    with pytest.raises(VssError, match=words):
        engine_predictor(FakeSession(**bindings), preprocess)


def test_bad_requests() -> None:
    with pytest.raises(VssError, match="the split holds no images"):
        evaluate(by_colour, Split(0), num_classes=4, class_names=CLASSES)
    with pytest.raises(VssError, match="3 class names for 4 classes"):
        run(by_colour, class_names=CLASSES[:3])
    with pytest.raises(
        VssError, match=r"gave torch.uint8 \(3, 16, 48\); expected integer labels of shape \(3, 32, 48\)"
    ):
        run(lambda images: by_colour(images)[:, ::2])
    with pytest.raises(VssError, match=r"gave torch.float32"):
        run(lambda images: by_colour(images).float())
    with pytest.raises(VssError, match="prediction labels reach from 0 to 9"):
        run(lambda images: by_colour(images) * 3)
