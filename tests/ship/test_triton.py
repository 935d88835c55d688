"""Triton repositories: the configuration says what the engine's bindings are, in every variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vss.core.errors import VssError
from vss.deploy import Binding
from vss.ship import read
from vss.ship.triton import CONFIG, LABELS, Serving, parse, write_repository

IMAGE, LABEL = {"image": Binding((None, 32, 48, 3), "uint8")}, {"labels": Binding((None, 32, 48), "int32")}
UINT8, INT32, FP32 = 2, 8, 11  # model_config.proto, enum DataType
LATEST_KINDS = {"onnxruntime": 2, "python": 2, "tensorrt": 1}  # enum ModelInstanceGroup.Kind: KIND_CPU 2, KIND_GPU 1


def serving(**changes: Any) -> Serving:
    settings: dict[str, Any] = {"name": "net", "inputs": IMAGE, "outputs": LABEL, "labels": ["sky", "road"]}
    return Serving(**(settings | changes))


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "engine"
    path.write_bytes(b"engine")
    return path


@pytest.mark.parametrize("variant", ["onnxruntime", "python", "tensorrt"])
def test_config_says_what_the_engine_is(tmp_path: Path, engine: Path, variant: str) -> None:
    setting = serving(max_batch=4, delay_us=700, instances=3, threads=2)
    folder = write_repository(tmp_path / "models", variant, setting, engine)
    config = parse(folder / "net" / CONFIG)
    assert (config.name, config.max_batch_size) == ("net", 4)
    assert [(x.name, x.data_type, list(x.dims)) for x in config.input] == [("image", UINT8, [32, 48, 3])]
    assert [(x.name, x.data_type, list(x.dims)) for x in config.output] == [("labels", INT32, [32, 48])]
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (3, LATEST_KINDS[variant])
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert config.dynamic_batching.max_queue_delay_microseconds == 700
    assert config.version_policy.latest.num_versions == 1
    assert [warm.batch_size for warm in config.model_warmup] == [1, 4]
    assert list(config.model_warmup[1].inputs["image"].dims) == [32, 48, 3]
    assert config.output[0].label_filename == LABELS and (folder / "net" / LABELS).read_text() == "sky\nroad\n"
    assert (config.platform, config.backend) == (("tensorrt_plan", "") if variant == "tensorrt" else ("", variant))
    files = {path.name for path in (folder / "net/1").iterdir()}
    wanted = {
        "onnxruntime": {"model.onnx"},
        "python": {"model.onnx", "model.py", "onnx_runner.py"},
        "tensorrt": {"model.plan"},
    }
    assert files == wanted[variant] and config.optimization.cuda.graphs == (variant == "tensorrt")
    if variant == "onnxruntime":
        assert config.parameters["intra_op_thread_count"].string_value == "2"


def test_an_ensemble_leads_from_pixels_to_labels(logits_bundle: Path) -> None:
    folder = logits_bundle / "triton/python"
    ensemble = parse(folder / "logits" / CONFIG)
    steps = [(s.model_name, dict(s.input_map), dict(s.output_map)) for s in ensemble.ensemble_scheduling.step]
    assert steps == [
        ("logits_pre", {"image": "image"}, {"image": "normalised"}),
        ("logits_net", {"image": "normalised"}, {"logits": "logits"}),
        ("logits_post", {"logits": "logits"}, {"labels": "labels"}),
    ]
    assert (ensemble.input[0].data_type, list(ensemble.input[0].dims)) == (UINT8, [32, 48, 3])
    assert (ensemble.output[0].data_type, list(ensemble.output[0].dims)) == (UINT8, [32, 48])
    net = parse(folder / "logits_net" / CONFIG)
    assert (net.input[0].data_type, list(net.input[0].dims)) == (FP32, [3, 32, 48])
    values = parse(folder / "logits_pre" / CONFIG).parameters["mean"].string_value
    assert [float(x) for x in values.split()] == list(read(logits_bundle).image.mean)


def test_a_fixed_batch_of_one_has_no_batching(tmp_path: Path, engine: Path) -> None:
    config = parse(write_repository(tmp_path / "m", "python", serving(max_batch=1), engine) / "net" / CONFIG)
    assert not config.HasField("dynamic_batching") and len(config.model_warmup) == 1


def test_what_cannot_be_served_is_one_sentence(tmp_path: Path, engine: Path) -> None:
    with pytest.raises(VssError, match="expected one image"):
        serving(inputs={"x": Binding((None, 3), "float32")})
    with pytest.raises(VssError, match="'labels' is complex64"):
        serving(outputs={"labels": Binding((None, 3), "complex64")})
    with pytest.raises(VssError, match="max_batch 0"):
        serving(max_batch=0)
    with pytest.raises(VssError, match="free height or width"):
        free = serving(inputs={"image": Binding((None, None, None, 3), "uint8")})
        write_repository(tmp_path / "a", "python", free, engine)
    with pytest.raises(VssError, match=r"unknown Triton variant 'pythno'. Did you mean 'python'"):
        write_repository(tmp_path / "b", "pythno", serving(), engine)
    with pytest.raises(VssError, match="OpenVINO runs inside of the python backend: use the variant python"):
        write_repository(tmp_path / "b", "openvino", serving(), engine)


def test_a_config_against_the_schema_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / CONFIG
    path.write_text('name: "x"\nmax_batch: 3\n')
    with pytest.raises(VssError, match=r"config\.pbtxt does not follow Triton's schema \(2:1 .*max_batch"):
        parse(path)
