"""vss.deploy.quantize.ranges: what is measured is what the graph computes, kept by hash; dead tensors are named."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tests.deploy.nets import conv_graph
from vss.core.errors import VssError
from vss.deploy.quantize.layers import Net, read_onnx
from vss.deploy.quantize.qdq import observed
from vss.deploy.quantize.ranges import Method, Ranges, cache_key, measure, ranges_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(conv_graph(), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


def feeds(count: int = 6, batch: int = 2) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield {"image": rng.standard_normal((batch, 3, 16, 16)).astype(np.float32)}


def activations(path: Path, name: str) -> np.ndarray:
    """|tensor| over all feeds, from a session of its own."""
    model = onnx.load(path)
    model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return np.abs(np.concatenate([session.run([name], feed)[0].ravel() for feed in feeds()]))


def test_minmax_and_percentile_are_those_of_all_data_at_once(path: Path) -> None:
    tensors = observed(Net(read_onnx(path)))
    histograms = measure(path, feeds(), tensors)
    largest = ranges_of(path, histograms, Method("minmax"))
    inside = ranges_of(path, histograms, Method("percentile", 99.0))
    entropy = ranges_of(path, histograms, Method("entropy"))
    for name in tensors:
        values = activations(path, name)
        assert largest.values[name] == pytest.approx(values.max(), rel=1e-5)
        exact = np.quantile(values, 0.99, method="inverted_cdf")
        assert exact * 0.999 <= inside.values[name] <= exact + histograms[name].limit / 4096 + 1e-4
        assert 0 < entropy.values[name] <= largest.values[name]
    assert inside.method == {"method": "percentile", "percent": 99.0} and largest.method == {"method": "minmax"}


def test_onnxruntime_finds_the_same_largest_values(path: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        source = feeds()

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.source, None)

    theirs = create_calibrator(
        path, ["Conv"], str(tmp_path / "augmented.onnx"), CalibrationMethod.MinMax, extra_options={"symmetric": True}
    )
    theirs.collect_data(Reader())
    expected = {name: float(np.max(data.range_value[1])) for name, data in theirs.compute_data().items()}
    tensors = observed(Net(read_onnx(path)))
    ours = ranges_of(path, measure(path, feeds(), tensors), Method("minmax")).values
    shared = ours.keys() & expected.keys()
    assert {"stem", "m0r", "m1", "image"} <= shared
    assert {name: ours[name] for name in shared} == pytest.approx({name: expected[name] for name in shared}, rel=1e-5)


def test_memory_does_not_grow_with_the_data(path: Path) -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        measure(path, feeds(count), ["stem", "res", "up"])
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(2)
    assert peak(60) < 1.2 * peak(6)


def test_ranges_come_back_from_their_file(path: Path, tmp_path: Path) -> None:
    tensors = observed(Net(read_onnx(path)))
    ranges = ranges_of(path, measure(path, feeds(), tensors), Method(), calibration={"sha256": "a" * 64, "images": 12})
    assert Ranges.load(ranges.save(tmp_path / "ranges.json")) == ranges
    changed = ranges.model_copy(update={"values": ranges.values | {"stem": 9.0}})
    assert changed.sha256() != ranges.sha256() == Ranges.load(tmp_path / "ranges.json").sha256()
    (tmp_path / "bad.json").write_text((tmp_path / "ranges.json").read_text().replace('"stem": ', '"stem": -'))
    with pytest.raises(VssError, match=r"bad\.json was changed after it was written"):
        Ranges.load(tmp_path / "bad.json")
    data = json.loads((tmp_path / "bad.json").read_text())
    del data["sha256"]
    for values in (data["values"], {"stem": 0}, {"stem": "1"}, {"stem": True}, {"stem": 1e300}, ["stem"], None):
        (tmp_path / "bad.json").write_text(json.dumps(data | {"values": values}))
        with pytest.raises(VssError, match=r"bad\.json holds no ranges: values"):
            Ranges.load(tmp_path / "bad.json")


def test_the_cache_key_changes_with_everything_it_stands_for(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    onnx.save(conv_graph(seed=1), other)
    keys = {
        cache_key(path, Method(), "set", "pre"), cache_key(other, Method(), "set", "pre"),
        cache_key(path, Method("entropy"), "set", "pre"), cache_key(path, Method(percent=99.0), "set", "pre"),
        cache_key(path, Method(), "other", "pre"), cache_key(path, Method(), "set", "other"),
    }  # fmt: skip
    assert len(keys) == 6 and cache_key(path, Method(), "set", "pre") in keys


@pytest.mark.parametrize(("scale", "shown"), [(0.0, "0.0"), (np.nan, "nan")])
def test_a_range_of_zero_or_nan_names_the_layer(tmp_path: Path, scale: float, shown: str) -> None:
    model = conv_graph()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "model.main.0.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(scale), weight.name))
    path = tmp_path / "dead.onnx"
    onnx.save(model, path)
    histograms = measure(path, feeds(2), ["stem", "m0r"])
    with pytest.raises(VssError, match=rf"tensor 'm0r', which feeds layer 'main\.1', is {shown}") as caught:
        ranges_of(path, histograms, Method("entropy"))
    assert "--keep main.1" in str(caught.value)
    assert ranges_of(path, histograms, Method(), allow_dead=["main.1"]).values.keys() == {"stem"}


def test_bad_requests(path: Path) -> None:
    with pytest.raises(VssError, match="the calibration set is empty"):
        measure(path, [], ["stem"])
    with pytest.raises(VssError, match=r"unknown calibration method 'minimax'. Did you mean 'minmax'"):
        Method("minimax")
    with pytest.raises(VssError, match=r"percentile is 0\.99; expected 50 to 100"):
        Method("percentile", 0.99)
