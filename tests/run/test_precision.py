"""vss.run.precision on a trained network: ranges by hash, INT8 that collapses, the search that saves it, the gate."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import vss
from vss.core.config import Recipe
from vss.core.errors import VssError
from vss.deploy import BACKENDS
from vss.deploy.onnx_file import metadata
from vss.deploy.quantize.ranges import Ranges
from vss.run.precision import PrecisionExporter, judge, load_choice
from vss.run.project import Project

Make = Callable[..., PrecisionExporter]


def blown_up(model: nn.Module, factor: float = 4096.0) -> nn.Module:
    """The same function in float32 to the bit: one channel times a power of two, and divided by it in the next layer.

    Its range hides all other channels of the tensor from INT8.
    """
    twin: Any = copy.deepcopy(model)
    norm, after = twin.encoder[0][0][1], twin.encoder[0][1][0]
    with torch.no_grad():
        channel = int((norm.bias.abs() + norm.weight.abs()).argmax())
        norm.weight[channel] *= factor
        norm.bias[channel] *= factor
        after.weight[:, channel] /= factor
    return twin


@pytest.fixture(scope="module")
def project(street_root: Path) -> Project:
    return Project.open(
        Recipe.model_validate(
            {
                "split": "val",
                "data": {"dataset": "camvid", "root": str(street_root), "size": [48, 64], "augment": {"scale": [1, 1]}},
                "model": {"name": "unet", "options": {"width": 8, "depth": 2}},
                "train": {"epochs": 6, "batch_size": 4, "lr": 0.05, "precision": "32-true", "accelerator": "cpu"},
                "bench": {"min_seconds": 0.1, "max_seconds": 1.0},
            }
        )
    )


@pytest.fixture(scope="module")
def model(project: Project, tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    net = project.build_model()
    project.train(net, project.recipe.train, tmp_path_factory.mktemp("fit"), progress=False)
    return net.eval()


@pytest.fixture(scope="module")
def make(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """PrecisionExporter of a network, with settings of the section `precision`; each network is exported once."""
    exported: dict[int, PrecisionExporter] = {}

    def exporter(model: nn.Module, **settings: Any) -> PrecisionExporter:
        config = project.recipe.precision.model_copy(update={"images": 8, "max_drop": 0.5, "groups": 8} | settings)
        if id(model) not in exported:
            folder = tmp_path_factory.mktemp("typed")
            exported[id(model)] = PrecisionExporter.export(project, model, config, folder, folder / "ranges")
        first = exported[id(model)]
        return PrecisionExporter(project, model, config, first.plain, first.report, first.options, first.cache)

    return exporter


@pytest.fixture(scope="module")
def fragile(model: nn.Module) -> nn.Module:
    return blown_up(model)


def test_ranges_are_measured_once_and_kept_under_their_hash(
    make: Make, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(model)
    ranges = first.calibrate()
    files = sorted(first.cache.iterdir())
    assert len(files) == 1 and Ranges.load(files[0]) == ranges
    assert ranges.calibration["images"] == 8 and ranges.calibration["split"] == "train"
    assert min(ranges.calibration["images_per_class"].values()) >= 1
    edited = json.loads(files[0].read_text())
    edited["values"] = {name: 2 * value for name, value in edited["values"].items()}
    files[0].write_text(json.dumps(edited))
    with caplog.at_level("WARNING"):
        assert make(model).calibrate() == ranges  # damaged: measured again
    assert "was changed after it was written" in caplog.text and Ranges.load(files[0]) == ranges
    del edited["sha256"]
    files[0].write_text(json.dumps(edited))
    assert make(model).calibrate().values == {name: 2 * value for name, value in ranges.values.items()}
    files[0].unlink()
    assert make(model).calibrate() == ranges
    make(model, method="entropy").calibrate()
    make(model, images=9).calibrate()
    assert len(list(first.cache.iterdir())) == 3


def test_scores_of_every_precision_stay_close(make: Make, model: nn.Module, tmp_path: Path) -> None:
    exporter = make(model)
    scores = {"fp32": exporter.score(exporter.plain)["miou_pct"]}
    for kind in ("fp16", "int8"):
        report = exporter.write(tmp_path / f"{kind}.onnx", kind)
        scores[kind] = exporter.score(tmp_path / f"{kind}.onnx")["miou_pct"]
        assert report["parity"]["argmax_agreement"] > 0.9 and report["precision"]["kind"] == kind
    assert scores["fp32"] > 10
    assert scores["fp16"] == pytest.approx(scores["fp32"], abs=0.2)
    assert scores["int8"] == pytest.approx(scores["fp32"], abs=1.5)


def test_a_network_that_collapses_under_minmax_is_saved_by_the_search(
    make: Make, model: nn.Module, fragile: nn.Module, tmp_path: Path
) -> None:
    x = torch.randn(1, 3, 48, 64)
    with torch.inference_mode():
        assert torch.allclose(fragile(x), model(x), rtol=1e-5, atol=1e-5)
    exporter = make(fragile, method="minmax", search_images=6, max_drop=1.0)
    ticks: list[int] = []
    choice = exporter.search(lambda: ticks.append(1), timed=False)
    facts = choice.facts
    assert facts["tried"][0]["freed"] == 0 and facts["tried"][0]["drop"] > 3.0
    assert facts["within"] and facts["drop"] <= 1.0
    assert "encoder.0.1.0" in choice.keep and len(choice.keep) < sum(len(row["layers"]) for row in facts["groups"])
    worst = max(facts["groups"], key=lambda row: row["drop"])
    assert "encoder.0.1.0" in worst["layers"] and len(ticks) == len(facts["groups"])
    path = choice.save(tmp_path / "choice.json")
    keep = load_choice(path, vss.save(fragile, tmp_path / "fragile.safetensors"))
    report = exporter.write(tmp_path / "saved.onnx", "int8", keep)
    assert set(keep) <= set(report["precision"]["kept"])
    before, after = (exporter.score(file, "val")["miou_pct"] for file in (exporter.plain, tmp_path / "saved.onnx"))
    assert after >= before - 1.0
    with pytest.raises(VssError, match="chosen for other weights"):
        load_choice(path, vss.save(model, tmp_path / "other.safetensors"))


def test_times_of_groups_decide_who_goes_first(make: Make, model: nn.Module) -> None:
    choice = make(model, search_images=2, groups=3).search()
    assert all(np.isfinite(row["gain_ms"]) for row in choice.facts["groups"])


def test_a_failed_gate_names_the_layer_at_which_it_went_wrong(
    make: Make, fragile: nn.Module, project: Project, tmp_path: Path
) -> None:
    exporter = make(fragile, method="minmax")
    torch_scores = project.score_net(copy.deepcopy(fragile))
    plain = exporter.score(exporter.plain)
    path = tmp_path / "bad.onnx"
    exporter.write(path, "fp16")
    damaged = onnx.load(path)
    weight = next(tensor for tensor in damaged.graph.initializer if tensor.name == "model.decoder.0.0.0.weight")
    values = -onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(damaged, path)
    results = {"torch": torch_scores, "onnxruntime": plain, "engine": exporter.score(path)}
    verdict = judge(exporter, path, results, max_drop=0.5)
    assert not verdict["passed"] and verdict["scores"]["torch"] == pytest.approx(
        verdict["scores"]["onnxruntime"], abs=0.1
    )
    assert verdict["diverges"]["layer"] == "decoder.0.0.0" and "decoder.0.0.0" in verdict["sentence"]
    low, high = verdict["drop_interval"]
    assert low <= verdict["drop"] <= high
    fine = judge(exporter, path, results | {"engine": plain}, max_drop=0.5)
    assert fine["passed"] and "diverges" not in fine


def test_what_calibration_refuses(make: Make, model: nn.Module, project: Project, tmp_path: Path) -> None:
    with pytest.raises(VssError, match="asked for on the test split"):
        make(model, split="test").calibrate()
    listed = tmp_path / "list.txt"
    listed.write_text(f"{project.data.pairs('test')[0].id}\n")
    with pytest.raises(VssError, match="belongs to the test split"):
        make(model, image_list=str(listed)).calibrate()
    listed.write_text("\n\n")
    with pytest.raises(VssError, match="is empty"):
        make(model, image_list=str(listed)).calibrate()
    with pytest.raises(VssError, match=r"no\.txt cannot be read .* with ids of training images"):
        make(model, image_list=str(tmp_path / "no.txt")).calibrate()
    dead = copy.deepcopy(model)
    with torch.no_grad():
        dead.encoder[0][0][1].weight.zero_()
        dead.encoder[0][0][1].bias.fill_(-1.0)
    with pytest.raises(VssError, match=r"feeds layer 'encoder\.0\.1\.0', is 0\.0 over the calibration images"):
        make(dead).calibrate()


def test_a_file_for_another_runtime_is_one_of_its_own(make: Make, model: nn.Module, tmp_path: Path) -> None:
    exporter = make(model, keep=("up.1",))
    others = [name for name in BACKENDS.names() if exporter.differs("int8", name)]
    assert others == ["tensorrt", "tensorrt_rtx", "torch"]
    assert not exporter.differs("fp16", "tensorrt_rtx")
    own = exporter.write(tmp_path / "rtx.onnx", "int8", target="tensorrt_rtx")["precision"]
    assert own["kept"]["up.0"] == "TensorRT for RTX runs it in floating point" and own["kept"]["up.1"] == "asked for"
    assert (len(own["int8"]), own["layers"], own["target"], own["suits"]) == (10, 13, "tensorrt_rtx", ["tensorrt_rtx"])
    for target in ("onnxruntime", "openvino"):  # one file serves both
        own = exporter.write(tmp_path / f"{target}.onnx", "int8", target=target)
        assert own["precision"]["suits"] == ["onnxruntime", "openvino"]
    assert (tmp_path / "onnxruntime.onnx").read_bytes() == (tmp_path / "openvino.onnx").read_bytes()
    assert metadata(tmp_path / "openvino.onnx")["vss.int8_for"] == "onnxruntime, openvino"
