"""vss.deploy.export: the module that is exported, against the expressions it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vss.core.errors import VssError
from vss.deploy.graph import SegGraph


def test_normalisation_in_the_graph_is_that_of_the_preprocess(tiny: Any, preprocess: Any) -> None:
    graph = SegGraph(tiny, preprocess=preprocess)
    nhwc = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (preprocess.mean, preprocess.std))
    exact = ((nhwc.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    folded = nhwc.float().permute(0, 3, 1, 2) * graph.scale + graph.shift
    assert float((folded - exact).abs().max()) < 1e-6
    with torch.inference_mode():
        difference = graph(nhwc) - tiny(preprocess.normalise(nhwc.permute(0, 3, 1, 2)))
    assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize(("name", "dtype"), [("int32", torch.int32), ("uint8", torch.uint8)])
@pytest.mark.parametrize("native", [False, True])
def test_labels_are_the_argmax(tiny: Any, name: str, dtype: torch.dtype, native: bool) -> None:
    x = torch.randn(2, 3, 32, 48)
    with torch.inference_mode():
        labels = SegGraph(tiny, labels=True, labels_dtype=name, native=native)(x)
        expected = tiny(x).argmax(1)
    assert labels.dtype == dtype
    assert torch.equal(labels.long(), expected)


def test_unknown_label_dtype(tiny: Any) -> None:
    with pytest.raises(VssError, match="labels_dtype is 'int64'; expected one of int32, uint8"):
        SegGraph(tiny, labels=True, labels_dtype="int64")
