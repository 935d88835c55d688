"""vss.deploy.backends: what a session refuses, whatever the runtime."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import pytest

from vss.core.errors import VssError, need
from vss.deploy.backends import Binding, Session


class Double(Session):
    inputs = {"image": Binding((None, 3, 4, 4), "float32")}  # noqa: RUF012
    outputs = {"logits": Binding((None, 3, 4, 4), "float32")}  # noqa: RUF012

    def _run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": 2 * feed["image"]}

    def describe(self) -> dict:
        return {}


def test_good_feed_goes_through() -> None:
    x = np.ones((5, 3, 4, 4), np.float32)
    assert np.array_equal(Double().run({"image": x})["logits"], 2 * x)


@pytest.mark.parametrize(
    ("feed", "words"),
    [
        ({"x": np.ones((1, 3, 4, 4), np.float32)}, r"takes the inputs \['image'\], got \['x'\]"),
        ({}, r"got \[\]"),
        ({"image": np.ones((1, 3, 4, 4))}, r"takes float32 \(any, 3, 4, 4\), got float64 \(1, 3, 4, 4\)"),
        ({"image": np.ones((1, 3, 4, 5), np.float32)}, r"got float32 \(1, 3, 4, 5\)"),
        ({"image": np.ones((3, 4, 4), np.float32)}, r"got float32 \(3, 4, 4\)"),
    ],
)
def test_bad_feed_is_one_sentence(feed: dict, words: str) -> None:
    with pytest.raises(VssError, match=words):
        Double().run(feed)


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_graphsurgeon", None)
    with pytest.raises(VssError, match=r"export needs onnx_graphsurgeon .* run: pip install onnx-graphsurgeon"):
        need("onnx_graphsurgeon", "export")
