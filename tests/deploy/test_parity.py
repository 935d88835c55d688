"""vss.deploy.parity: figures against numbers that are known beforehand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vss.core.closeness import spread
from vss.core.errors import VssError
from vss.deploy.graph import SegGraph
from vss.deploy.parity import Tolerance, _against_float64, _fault, noise, parity


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
    scale = spread(after)
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


class Jumping(Shifted):
    """Differs from the exported network at every pixel of class 0, or on the first image drawn alone."""

    jumps = True

    def __init__(self, source: nn.Module, by: float, *, calls: int) -> None:
        super().__init__(source, by)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        return super().forward(x) if self.calls >= 0 else self.source(x)


def test_a_network_that_jumps_is_drawn_again_and_a_wrong_file_still_fails(exported: SimpleNamespace, tiny: Any) -> None:
    shapes = [(1, (32, 48))]
    found = parity(SegGraph(Jumping(tiny, 0.25, calls=2)).eval(), exported.logits[0], shapes)
    assert found["shapes"][0]["draws"] == 3 and found["max_rel"] < 1e-4
    with pytest.raises(VssError, match="p99_rel"):
        parity(SegGraph(Jumping(tiny, 0.25, calls=100)).eval(), exported.logits[0], shapes)


def test_the_99_percent_figure_is_the_quantile(exported: SimpleNamespace, tiny: Any) -> None:
    """A shift of one class of five is 20 % of the logits: in the 99 % figure; none of it is rounding."""
    tolerance = Tolerance(relative=1.0, agreement=0.0)
    row = parity(SegGraph(Shifted(tiny, 0.25)).eval(), exported.logits[0], [(1, (32, 48))], tolerance)["shapes"][0]
    assert row["p99_rel"] == pytest.approx(row["max_rel"], rel=1e-3) and "draws" not in row


def test_noise_is_seeded() -> None:
    assert torch.equal(noise(2, (4, 6), nhwc=True, seed=3), noise(2, (4, 6), nhwc=True, seed=3))
    assert noise(2, (4, 6), nhwc=True, seed=3).shape == (2, 4, 6, 3)
    assert noise(2, (4, 6), nhwc=False, seed=3).shape == (2, 3, 4, 6)


def test_float64_judges_where_float32_is_the_larger_part(tiny: Any) -> None:
    network, x = SegGraph(tiny).eval(), noise(1, (32, 48), 0, nhwc=False)
    with torch.inference_mode():
        expected = network(x)
    scale = spread(expected)
    found = _against_float64(network, x, expected, expected + 1e-4 * scale)
    assert found["exact_rel"] == pytest.approx(1e-4, rel=0.02) and 0 < found["own_rel"] < 1e-6
    row = {"input": [1, 3, 32, 48], "max_rel": 1.2e-4, "max_lead": 0.0, "argmax_agreement": 1.0}
    assert "max_rel 0.00012, allowed 0.0001" in _fault(row, Tolerance(), False)
    assert _fault(row | {"own_rel": 8e-5, "exact_rel": 1.2e-4}, Tolerance(), False) == ""
    assert "exact_rel 0.0002, allowed 0.00016" in _fault(row | {"own_rel": 8e-5, "exact_rel": 2e-4}, Tolerance(), False)
    assert "exact_rel" in _fault(row | {"own_rel": 1e-6, "exact_rel": 1.2e-4}, Tolerance(), False)
