"""An engine is scored with the preprocessing that it was made for, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from typer.testing import CliRunner

import vss
from tests.deploy.test_probe import spoiled
from vss import models
from vss.cli.main import app
from vss.data.readers import CAMVID_NAMES
from vss.deploy.onnx_file import KEY
from vss.run import candidates, inputs

OWN = {"size": [32, 48], "mean": [0.1, 0.2, 0.3], "std": [1.0, 0.9, 0.8]}
FLAGS = ("--mean", "0.1,0.2,0.3", "--std", "1.0,0.9,0.8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a mean and std of its own, its float file, and one with both in the graph."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("engines")
    net = models.build("unet", 11, width=4, depth=1)
    ckpt = vss.save(
        net, place / "own.safetensors", preprocess=OWN, classes=CAMVID_NAMES, info={"dataset": "camvid"}
    )  # fmt: skip
    for name, inside in (("float", False), ("pixels", True)):
        candidates.export_checkpoint(ckpt, place / f"{name}.onnx", size=None, preprocess=inside, labels=True)
    return place


def changed(source: Path, target: Path, **values: str | None) -> Path:
    """A copy with other metadata; None takes an entry out."""
    model = onnx.load(source)
    keep = {each.key: each.value for each in model.metadata_props} | {
        f"vss.{key}": value for key, value in values.items()
    }
    del model.metadata_props[:]
    for key, value in keep.items():
        if value is not None:
            model.metadata_props.add(key=key, value=value)
    onnx.save(model, target)
    return target


def score(path: Path, root: Path, **more: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"split": "val", "dataset": "camvid", "data_root": str(root), "size": None}
    return candidates.evaluate(path, None, limits={}, **asked | more)["rows"][0]


def test_one_network_has_one_score(folder: Path, street_root: Path, tmp_path: Path) -> None:
    wanted = score(folder / "own.safetensors", street_root)["miou_pct"]
    assert score(folder / "float.onnx", street_root)["miou_pct"] == pytest.approx(wanted, abs=0.05)
    assert score(folder / "pixels.onnx", street_root)["miou_pct"] == pytest.approx(wanted, abs=0.05)
    silent = changed(folder / "float.onnx", tmp_path / "silent.onnx", preprocess=None)
    told = score(silent, street_root, statistics={"mean": OWN["mean"], "std": OWN["std"]})
    assert told["miou_pct"] == pytest.approx(wanted, abs=0.05)
    guessed = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert abs(score(silent, street_root, statistics=guessed)["miou_pct"] - wanted) > 0.05  # so it does matter


def refused(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, (result.output, result.exception)
    return " ".join(result.output.split())


def test_what_is_not_known_is_refused(folder: Path, street_root: Path, tmp_path: Path) -> None:
    data = ("--dataset", "camvid", "--data-root", street_root)
    silent = changed(folder / "float.onnx", tmp_path / "silent.onnx", preprocess=None)
    assert "give --mean and --std" in refused("evaluate", "--candidate", silent, *data)
    assert "go together" in refused("evaluate", "--candidate", silent, *data, *FLAGS[:2])
    for path in (folder / "own.safetensors", folder / "float.onnx", folder / "pixels.onnx"):
        assert "leave --mean and --std off" in refused("evaluate", "--candidate", path, *data, *FLAGS)
    for text in ("0.1", "0.1,nan,0.1", "0.1,0.1,0.1,0.1", "124,116,104", "a,b,c", "", "inf,0,0"):
        assert "--mean" in refused("evaluate", "--candidate", silent, *data, "--mean", text, *FLAGS[2:])
    for text in ("0,0,0", "-1,1,1", "nan,1,1", "58,57,57"):
        assert "--std" in refused("evaluate", "--candidate", silent, *data, *FLAGS[:2], "--std", text)


def test_a_file_that_contradicts_itself_or_the_data_is_refused(folder: Path, street_root: Path, tmp_path: Path) -> None:
    def words(**values: str) -> str:
        path = changed(folder / "float.onnx", tmp_path / "bad.onnx", **values)
        return refused("evaluate", "--candidate", path, "--dataset", "camvid", "--data-root", street_root)

    own = {**OWN, "order": "RGB"}
    assert "takes images of [32, 48]" in words(preprocess=json.dumps(own | {"size": [64, 64]}))
    assert "std is" in words(preprocess=json.dumps(own | {"std": [0, 1, 1]}))
    assert "expected size, mean" in words(preprocess=json.dumps(own | {"mean": [None, 1, 1]}))
    assert "classes" in words(classes=json.dumps(sorted(CAMVID_NAMES)))
    assert KEY == "vss.preprocess"


def test_a_runtime_is_known_by_the_file(folder: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "model.engine"
    renamed.write_bytes((folder / "float.onnx").read_bytes())
    plan = tmp_path / "plan.onnx"
    plan.write_bytes(b"ftrt" + bytes(64))
    assert inputs.backend_of(renamed) == inputs.backend_of(folder / "float.onnx") == "onnxruntime"
    assert inputs.backend_of(plan) == inputs.backend_of(tmp_path / "absent.engine") == "tensorrt"


@pytest.mark.parametrize("optimise", [None, "basic"])
def test_external_data_is_refused_and_nothing_is_left(folder: Path, tmp_path: Path, optimise: str | None) -> None:
    """An artefact is one file: copied, hashed and shipped alone, such a graph does not open."""
    outside = tmp_path / "outside.onnx"
    onnx.save(
        onnx.load(folder / "pixels.onnx"), outside, save_as_external_data=True, location="w.data", size_threshold=0
    )
    words = ["build", "--onnx", outside, "--save", tmp_path / "out" / "e.onnx", "--optimise", optimise]
    assert "in another file, 'w.data'" in refused(*words[: None if optimise else -2])
    assert not list(tmp_path.glob("out/*"))


def test_bench_refuses_an_engine_that_gives_nan(folder: Path, tmp_path: Path) -> None:
    broken = spoiled(folder / "pixels.onnx", tmp_path / "nan.onnx", float("nan"))
    done = CliRunner().invoke(app, ["bench", "--candidate", str(broken), "--max-seconds", "0.2"])
    assert done.exit_code == 2 and "NaN" in done.output and "ms" not in done.stdout
