"""Values of flags that cannot be meant: exit code 2 and a sentence with the flag, before work, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from typer.testing import CliRunner

import vss
from vss import models
from vss.cli.main import app
from vss.data import Preprocess

LUT = ("lut", "build", "--ckpt", "net.safetensors")
TRT = ("build", "--onnx", "fixed.onnx", "--backend", "tensorrt", "--dry-run")
FREE = ("build", "--onnx", "free.onnx", "--backend", "tensorrt", "--dry-run", "--sizes")
EXPORT = ("export", "--ckpt", "net.safetensors")
INT8 = ("--ckpt", "net.safetensors", "--data-root", "folder")
NUMBERS = {
    ("ship", "folder", "--to", "b"): {
        "--samples": "-1", "--max-batch": "0 -1 1000000000000", "--delay-us": "-1 1000000000000",
        "--instances": "0 1000000000000", "--threads": "-1 1000000000000",
    },
    ("serve", "folder"): dict.fromkeys(("--http-port", "--grpc-port", "--metrics-port"), "0 -1 65536 1000000000000"),
    ("load", "folder"): {
        "--rate": "0 -1 nan inf 1e308", "--concurrency": "0 -1 1000000000000", "--seconds": "0 -1 nan inf 1e308",
    },
    LUT: {
        "--threads": "0 1000000000000", "--batch-size": "0 -1 1000000000000", "--step": "0 -1 1000000000000",
        "--limit": "0 -1 1000000000000", "--seconds": "0 -1 nan inf 1e308", "--level": "-1 6", "--workspace-mib": "0",
        "--seed": "-1 1000000000000",
    },
    ("explain", "folder"): {"--seconds": "0 nan inf", "--top": "0 -1"},
    ("quality", "--methods", "l1", *INT8): {
        "--channels": "0 -1 1000000000000", "--macs": "0 -1 nan inf 1e308", "--seed": "-1",
    },
    TRT: {"--level": "-1 6", "--workspace-mib": "0 -1 1000000000000"},
    FREE: {"8x8 --batch": "0 -1 3,2,1 1000000000000 nan", "0x0 --sizes": "0x0 8x8,4x8,8x8 1x1000000000000 \u00b2x1"},
    ("rebuild", "folder"): {"--max-drop": "-1 nan inf"},
}  # fmt: skip
ROWS = [
    (*command, *flag.split(), value) for command, flags in NUMBERS.items() for flag, text in flags.items()
    for value in text.split()
]  # fmt: skip
SENTENCES = [
    (("ship", "folder", "--to", ""), "--to is followed by nothing"),
    (("ship", "folder", "--name="), "--name is followed by nothing"),
    (("lut", "build", "--ckpt", "net.safetensors", "--save", ""), "--save is followed by nothing"),
    (("load", "bundle", "--address", "127.0.0.1:99999"), "--address is '127.0.0.1:99999'; expected HOST:PORT"),
    (("build", "--onnx", "fixed.onnx", "--level", "3"), "--level is for --backend tensorrt"),
    (("build", "--onnx", "fixed.onnx", "--no-tf32"), "--tf32 is for --backend tensorrt"),
    (("build", "--onnx", "fixed.onnx", "--batch", "1,1,8"), "--batch is for --backend tensorrt"),
    ((*TRT, "--batch", "4"), "--batch is for a free batch"),
    ((*TRT, "--sizes", "8x8"), "--sizes is for a free size"),
    ((*TRT, "--flag", "nonsense"), "unknown --flag of trtexec and polygraphy 'NONSENSE'"),
    ((*TRT, "--plugin-library", "folder"), "folder is a folder; expected a plugin library file"),
    ((*TRT, "--aot-ptx", "gone"), "gone does not exist; expected a PTX file"),
    ((*TRT, "--timing-cache", "folder"), "folder is a folder"),
    ((*TRT, "--save", "file/x"), "file/x cannot be written"),
    ((*LUT, "--save", "folder"), "folder is a folder"),
    ((*LUT, "--save", "file/x"), "is a file); choose another place"),
    ((*LUT, "--tf32"), "--tf32 is for --backend tensorrt"),
    ((*LUT, "--quick", "--limit", "9"), "--max-samples is for a whole table"),
    ((*LUT, "--no-labels", "--labels-dtype", "uint8"), "--labels-dtype is for --labels"),
    ((*EXPORT, "--images", "8"), "--images is for --precision int8"),
    ((*EXPORT, "--elsewhere", "fp16"), "--elsewhere is for --precision int8"),
    ((*EXPORT, "--keep", "up.0"), "--keep is for --precision fp16 and int8"),
    ((*EXPORT, "--labels-dtype", "uint8"), "--labels-dtype is for --labels"),
    ((*EXPORT, "--save", "folder"), "folder is a folder"),
    (("calibrate", *INT8, "--save", "folder"), "folder is a folder"),
    (("calibrate", *INT8, "--cache", "file"), "is a file); choose another place"),
    (("sensitivity", *INT8, "--save", "file/x"), "is a file); choose another place"),
    (("serve", "folder", "--log", "new/place/x.log"), "manifest.json does not exist"),
    (("ship", "folder", "--to", "new/place/b"), "report.json does not exist"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    (folder / "folder").mkdir()
    (folder / "file").write_text("hello\n")
    torch.manual_seed(0)
    preprocess = Preprocess(size=(32, 48)).model_dump(mode="json")
    vss.save(models.build("unet", 3, width=4, depth=2), folder / "net.safetensors", preprocess=preprocess,
             classes=["a", "b", "c"], info={"dataset": "camvid"})  # fmt: skip
    shapes: dict[str, list[int | str | None]] = {"fixed": [1, 3, 8, 8], "free": ["n", 3, "h", "w"]}
    for name, shape in shapes.items():
        ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, shape) for end in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [ends[0]], [ends[1]])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, str(folder / f"{name}.onnx"))
    return folder


def refused(place: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said with exit code 2, where nothing is left behind."""
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "300"})
    assert done.exit_code == 2, (words, done.output, done.exception)
    assert sorted(place.rglob("*")) == before, words
    return " ".join(done.output.split())


@pytest.mark.parametrize("words", ROWS, ids=" ".join)
def test_a_number_out_of_range_names_its_flag(
    words: tuple[str, ...], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert words[-2] in refused(place, words, monkeypatch)


@pytest.mark.parametrize(("words", "said"), SENTENCES, ids=[" ".join(words) for words, _ in SENTENCES])
def test_what_nothing_would_read_and_places_that_are_none(
    words: tuple[str, ...], said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[1] == "bundle":
        monkeypatch.setattr("vss.ship.read", lambda _: None)
        monkeypatch.setattr("vss.ship.load.read", lambda _: None)
    assert said in refused(place, words, monkeypatch)
