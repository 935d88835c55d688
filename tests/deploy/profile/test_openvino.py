"""Readings of OpenVINO: its primitives under the names of our layers, at every width and in both precisions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.deploy.marks import needs_openvino
from vss.deploy.profile.setting import Setting
from vss.deploy.profile.subject import open_subject
from vss.deploy.profile.units import Graph, Reading, lookup_shape, read_engine

pytestmark = needs_openvino
AROUND = {"Transpose:permute", "Reorder:add", "Reorder:conv2d_10", "TopK:conv2d_10"}
"""What is no layer of the network: pixels to a blocked layout, and the labels."""


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_units_are_the_same_at_every_width(precision: str, net: Any, preprocess: Any, tmp_path: Path) -> None:
    setting = Setting("openvino", precision=precision, threads=1)
    subject = open_subject(net, tmp_path, preprocess, setting, seconds=0.02)
    full = [group.channels for group in subject.groups]
    whole, narrow = (subject.read(widths) for widths in (full, [count * 5 // 8 for count in full]))
    assert whole.units.keys() == narrow.units.keys()
    layers = {name.removesuffix(".weight") for name, p in net.named_parameters() if p.ndim == 4}
    pools = {"MaxPool:max_pool2d", "MaxPool:max_pool2d_1", "Concat:cat", "Concat:cat_1"}
    free = ("relu_1", "relu_3", "convolution", "convolution_1")  # inputs of a concat, each with its own range
    quantised = (
        {"QuantizeLinear:permute", *(f"Subgraph:{name}" for name in free)} if precision == "int8" else set[str]()
    )
    assert whole.units.keys() == layers | pools | quantised | AROUND
    shapes = subject.shapes(full)
    assert all(lookup_shape(unit, shapes) for unit in whole.units)
    ran = {unit: whole.kernels[unit][0] for unit in layers}
    assert ran == dict.fromkeys(layers, precision) | {"classifier": "fp32"}
    assert whole.kernels["classifier"][1].endswith("_f32") and whole.kernels["TopK:conv2d_10"][0] == "fp32"
    for reading in (whole, narrow):
        assert 0.5 * reading.total < sum(reading.units.values()) <= 1.001 * reading.total


def test_runs_are_told_from_the_means_of_the_counters(net: Any, preprocess: Any, tmp_path: Path) -> None:
    """A counter is the mean since the model was loaded: the slow first runs would be in all that come after."""
    setting = Setting("openvino", threads=1)
    subject: Any = open_subject(net, tmp_path, preprocess, setting, seconds=0.02)
    path = subject.variants.write([group.channels for group in subject.groups], tmp_path / "v.onnx")
    session: Any = setting.engine(path, tmp_path / "v")
    feed = {"image": np.zeros((1, *preprocess.size, 3), np.uint8)}
    times = session.profile(feed, 20)
    assert {len(each) for each in times.values()} == {20}
    request = session._counted(feed).create_infer_request()
    for _ in range(6):
        request.infer(feed)
    slow = {each.node_name: each.real_time.total_seconds() * 1e3 for each in request.profiling_info}
    heavy = sorted(times, key=lambda name: -min(times[name]))[:4]
    assert sum(min(times[name]) for name in heavy) < sum(slow[name] for name in heavy)


class Waits:
    """A session of two layers that waits for its core while they are timed."""

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        sum(range(200_000))
        return {}

    def profile(self, feed: Mapping[str, np.ndarray], runs: int) -> dict[str, list[float]]:
        return {"a": [300.0] * runs, "b": [100.0] * runs}

    def layers(self, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {"Layers": [{"Name": name, "LayerType": name, "Metadata": ""} for name in "ab"]}


def test_units_take_no_longer_than_their_thread() -> None:
    alone, wall = (
        read_engine(Waits(), {}, graph=Graph(), shapes=dict, seconds=0.05, alone=alone) for alone in (True, False)
    )
    assert sum(alone.units.values()) == pytest.approx(alone.total)
    assert alone.units["a:other"] == pytest.approx(3 * alone.units["b:other"])
    assert wall.units == {"a:other": 300.0, "b:other": 100.0}
    assert Reading.of([("a", 1.0, ("", ""))], 2.0, alone=True).units == {"a": 1.0}
