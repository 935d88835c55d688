"""vss.deploy.parity: figures against numbers that are known beforehand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vss.deploy.graph import SegGraph
from vss.deploy.parity import Tolerance, noise, parity
from vss.errors import VssError


class Shifted(nn.Module):
    """The exported network with class 0 raised."""

    name, size_multiple, num_classes, options = "shifted", 4, 5, {}

    def __init__(self, source: nn.Module, by: float) -> None:
        super().__init__()
        self.source, self.by = source, by

    def forward(self, x: Tensor) -> Tensor:
        raised = torch.zeros(5)
        raised[0] = self.by
        return self.source(x) + raised.view(1, 5, 1, 1)


def test_known_shift_is_measured(exported: SimpleNamespace, tiny: Any) -> None:
    tolerance = Tolerance(relative=1.0, agreement=0.0)
    shifted = SegGraph(Shifted(tiny, 0.25)).eval()
    found = parity(shifted, exported.logits[0], [(2, (32, 48))], tolerance)
    x = noise(2, (32, 48), nhwc=False, seed=0)
    with torch.inference_mode():
        before, after = tiny(x), shifted(x)
    scale = float(after.abs().max())
    assert found["max_abs"] == pytest.approx(0.25, abs=1e-5)
    assert found["max_rel"] == pytest.approx(0.25 / scale, abs=1e-5)
    assert found["argmax_agreement"] == pytest.approx(float((before.argmax(1) == after.argmax(1)).double().mean()))
    assert 0 < found["max_lead"] <= 0.25 / scale + 1e-6


@pytest.mark.parametrize(
    ("tolerance", "words"),
    [
        (Tolerance(relative=1e-3, agreement=0.0), r"at \[1, 3, 32, 48\]: max_rel .* allowed 0.001"),
        (Tolerance(relative=1.0, agreement=1.0), r"labels agree on 0\.\d+ of the pixels, at least 1.0 expected"),
    ],
)
def test_outside_the_tolerance_is_refused(
    exported: SimpleNamespace, tiny: Any, tolerance: Tolerance, words: str
) -> None:
    with pytest.raises(VssError, match=words):
        parity(SegGraph(Shifted(tiny, 0.25)).eval(), exported.logits[0], [(1, (32, 48))], tolerance)


def test_a_wrong_label_is_no_tie(exported: SimpleNamespace, tiny: Any, preprocess: Any) -> None:
    graph = SegGraph(Shifted(tiny, 0.25), preprocess=preprocess, labels=True).eval()
    with pytest.raises(VssError, match="max_lead"):
        parity(graph, exported.labels[0], [(1, (32, 48))], Tolerance(agreement=0.0))


def test_noise_is_seeded() -> None:
    assert torch.equal(noise(2, (4, 6), nhwc=True, seed=3), noise(2, (4, 6), nhwc=True, seed=3))
    assert noise(2, (4, 6), nhwc=True, seed=3).shape == (2, 4, 6, 3)
    assert noise(2, (4, 6), nhwc=False, seed=3).shape == (2, 3, 4, 6)
