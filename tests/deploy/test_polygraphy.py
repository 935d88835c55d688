"""polygraphy as a second opinion without TensorRT: inspect, check lint, surgeon sanitize and run take every file."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from vss.deploy import export
from vss.deploy.quantize.precision import Precision, graph_of, retype
from vss.deploy.quantize.ranges import Method, Ranges, measure, ranges_of
from vss.models import build

KINDS = {"fp32": Precision(), "fp16": Precision("fp16"), "int8": Precision("int8"),
         "int8-fp16": Precision("int8", elsewhere="fp16")}  # fmt: skip
SIZES = {"unet": (32, 48), "segdecnet": (64, 128)}


def polygraphy(*words: object) -> str:
    """Output of a command, run in this process, which has everything loaded already."""
    from polygraphy.tools import main

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["polygraphy", *map(str, words)])
        code = main()
    assert not code, said.getvalue()[-2000:]
    return said.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """network -> precision -> file."""
    folder, result = tmp_path_factory.mktemp("polygraphy"), {}
    for name, size in SIZES.items():
        torch.manual_seed(0)
        options = {"width": 4, "depth": 1} if name == "unet" else {"widths": [4, 4, 4, 4, 8]}
        model = build(name, 5 if name == "unet" else 1, **options).eval()
        plain = folder / f"{name}.fp32.onnx"
        report = export(model, plain, size=size, parity_batches=[1])
        feeds = [{"image": np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32)}]

        def ranges(path: Path, tensors: list[str], feeds: list = feeds) -> Ranges:
            return ranges_of(path, measure(path, feeds, tensors), Method("minmax"))

        result[name] = {"fp32": plain}
        for kind, precision in list(KINDS.items())[1:]:
            result[name][kind] = folder / f"{name}.{kind}.onnx"
            retype(graph_of(model), plain, result[name][kind], precision, report, ranges=ranges)
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SIZES)
def test_every_file_is_accepted(files: dict[str, dict[str, Path]], name: str, kind: str, tmp_path: Path) -> None:
    path = files[name][kind]
    before = len(onnx.load(path).graph.node)
    assert f"{before} Node(s)" in polygraphy("inspect", "model", path)
    polygraphy("check", "lint", path, "-o", tmp_path / "lint.json")
    found = json.loads((tmp_path / "lint.json").read_text())
    assert [entry for entry in found["lint_entries"] if entry["level"] == "exception"] == []
    polygraphy("surgeon", "sanitize", path, "--fold-constants", "-o", tmp_path / "clean.onnx")
    after = onnx.load(tmp_path / "clean.onnx")
    assert 0 < len(after.graph.node) <= before
    pairs = [sum(n.op_type == "QuantizeLinear" for n in each.graph.node) for each in (onnx.load(path), after)]
    assert pairs[0] == pairs[1] and (pairs[0] > 0) == kind.startswith("int8")
    shape = ",".join(map(str, (2, 3, *SIZES[name])))
    done = polygraphy(
        "run", path, "--onnxrt", "--input-shapes", f"image:[{shape}]", "--save-outputs", tmp_path / "outputs.json"
    )
    assert "PASSED" in done or "Completed 1 iteration" in done
    assert (tmp_path / "outputs.json").stat().st_size > 0
