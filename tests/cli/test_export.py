"""`vss export --precision`, `vss calibrate`, `vss sensitivity`: the flags work, and bad input is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper
from typer.testing import CliRunner, Result

import vss
from tests.command import cli, full_disk
from tests.command import refused as no_space
from vss import models
from vss.cli.main import app
from vss.core.errors import VssError
from vss.data import Preprocess
from vss.data.readers import CAMVID_NAMES
from vss.deploy.onnx_file import stated
from vss.deploy.quantize.ranges import Ranges

FAST = (
    "--images",
    6,
    "--set",
    "precision.search_images=2",
    "--set",
    "bench.max_seconds=0.5",
    "--set",
    "bench.min_seconds=0.1",
)


def vss_cli(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    result = vss_cli(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.stdout.split())


def refused(*words: object) -> str:
    """The sentence of exit code 2."""
    result = vss_cli(*words)
    assert result.exit_code == 2 and result.output.startswith("error: "), (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = models.build("unet", 11, width=4, depth=1)
    preprocess = Preprocess(size=(32, 48)).model_dump(mode="json")
    path = tmp_path_factory.mktemp("ckpt") / "net.safetensors"
    return vss.save(model, path, preprocess=preprocess, classes=CAMVID_NAMES, info={"dataset": "camvid"})


def test_calibrate_then_search_then_export(ckpt: Path, street_root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "ranges"
    base = ("--ckpt", ckpt, "--data-root", street_root, "--preprocess", "--labels", "--cache", cache, *FAST)
    text = done("calibrate", *base, "--save", tmp_path / "ranges.json")
    assert "ranges by percentile, measured, kept in" in text and "Pedestrian" in text
    ranges = Ranges.load(tmp_path / "ranges.json")
    assert ranges.calibration["images"] == 6 and f"images {ranges.calibration['sha256']}" in text
    assert "taken from" in done("calibrate", *base)
    choice = tmp_path / "choice.json"
    text = done("sensitivity", *base, "--max-drop", 90, "--groups", 3, "--save", choice)
    assert "kept in floating point: nothing" in text and "saves ms" in text
    facts = json.loads(choice.read_text())
    assert facts["keep"] == [] and len(facts["facts"]["groups"]) <= 3 and facts["facts"]["split"] == "val"
    facts["keep"] = ["decoder.0.1.0"]
    choice.write_text(json.dumps(facts))
    target = tmp_path / "m.onnx"
    text = done("export", *base, "--precision", "int8", "--choice", choice, "--keep", "up.0", "--save", target,
                "--report", tmp_path / "r.json")  # fmt: skip
    assert "decoder.0.1.0 (asked for)" in text and "up.0 (asked for)" in text and "parity with torch" in text
    text = done("export", *base, "--precision", "int8", "--backend", "tensorrt_rtx", "--save", tmp_path / "rtx.onnx")
    assert "INT8 in 6 of 8 layers" in text and "up.0 (TensorRT for RTX runs it in floating point)" in text
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["precision"]["calibration"]["sha256"] == ranges.calibration["sha256"]
    assert report["precision"]["ranges_sha256"] == ranges.sha256()
    assert len(list(cache.iterdir())) == 1
    metadata = {each.key: each.value for each in onnx.load(target).metadata_props}
    assert metadata["vss.precision"] == "int8" and metadata["vss.ranges_sha256"] == ranges.sha256()
    images = Preprocess(size=(32, 48))  # INT8 takes what the checkpoint was trained on
    assert stated(metadata) == {"size": [32, 48], "mean": list(images.mean), "std": list(images.std)}
    text = done("evaluate", "--candidate", target, "--dataset", "camvid", "--data-root", street_root)
    assert "mIoU" in text


def test_half_precision_needs_no_data(ckpt: Path, tmp_path: Path) -> None:
    text = done("export", "--ckpt", ckpt, "--precision", "fp16", "--keep", "classifier", "--save", tmp_path / "h.onnx")
    assert "MiB, in float32" in text
    stored = {t.name: t.data_type for t in onnx.load(tmp_path / "h.onnx").graph.initializer}
    assert stored["model.classifier.weight"] == onnx.TensorProto.FLOAT
    assert stored["model.up.0.weight"] == onnx.TensorProto.FLOAT16


def test_bad_requests(ckpt: Path, street_root: Path, tmp_path: Path) -> None:
    data = ("--data-root", street_root, "--cache", tmp_path / "r", "--images", 6)
    assert "Invalid value for '--split'" in refused("calibrate", "--ckpt", ckpt, *data, "--split", "test")
    listed = tmp_path / "list.txt"
    listed.write_text("nothing\n")
    export = ("export", "--ckpt", ckpt, "--save", tmp_path / "m.onnx")
    assert "Invalid value for '--precision'" in refused(*export, "--precision", "fp8")
    assert "--choice is for --precision int8" in refused(*export, "--choice", listed)
    assert "list.txt is not JSON" in refused(*export, *data, "--precision", "int8", "--choice", listed)
    assert "Invalid value for '--method'" in refused(*export, *data, "--precision", "int8", "--method", "max")
    assert not (tmp_path / "m.onnx").exists()


def test_a_full_disk_is_a_sentence_and_leaves_nothing(ckpt: Path, street_root: Path, tmp_path: Path) -> None:
    words = ["calibrate", "--ckpt", ckpt, "--data-root", street_root, "--images", "6", "--cache", tmp_path / "ranges"]
    with full_disk(16):
        ended = cli(*words)
    no_space(ended, "free some space")
    assert not (tmp_path / "ranges").exists()


def test_an_onnx_file_from_elsewhere_with_an_unknown_operator(tmp_path: Path) -> None:
    from vss.deploy.quantize.precision import Precision, convert

    value = helper.make_tensor_value_info("x", 1, ["batch", 3, 8, 8])
    graph = helper.make_graph([helper.make_node("Magic", ["x"], ["x2"], "m", domain="acme")], "g", [value], [])
    graph.output.append(helper.make_tensor_value_info("x2", 1, None))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("acme", 1)])
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(VssError, match=r"operator acme\.Magic \(node m\)"):
        convert(tmp_path / "x.onnx", tmp_path / "y.onnx", Precision("fp16"))
    assert not (tmp_path / "y.onnx").exists()
