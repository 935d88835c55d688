"""Size, mean, std and channel order are in every file and in every runtime's session, whatever was done to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.deploy.conftest import SIZE
from vss.core.errors import VssError
from vss.deploy import BACKENDS, BuildSpec, export
from vss.deploy.onnx_file import KEY, stated
from vss.deploy.quantize.precision import Precision, convert

WANTED = {"size": list(SIZE), "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}


@pytest.fixture(scope="module")
def plain(tiny: Any, preprocess: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes normalised floats."""
    path = tmp_path_factory.mktemp("stated") / "plain.onnx"
    export(tiny, path, size=SIZE, expects=preprocess, parity_batches=(1,))
    return path


def said(path: Path) -> dict[str, Any] | None:
    return BACKENDS["onnxruntime"].open(path).images


def test_it_stays_with_the_file_through_every_step(plain: Path, exported: Any, tmp_path: Path) -> None:
    assert said(plain) == WANTED
    assert said(exported.labels[0]) == WANTED
    assert said(exported.logits[0]) is None  # nobody said what its images are
    convert(plain, tmp_path / "half.onnx", Precision("fp16"))
    assert said(tmp_path / "half.onnx") == WANTED
    for optimise in (None, "basic", "extended"):
        built = BACKENDS["onnxruntime"].build(plain, tmp_path / "built.onnx", BuildSpec(optimise=optimise))
        assert said(built) == WANTED


def test_torch_says_it_too(tiny: Any, preprocess: Any) -> None:
    assert BACKENDS["torch"].open(tiny, size=SIZE, preprocess=preprocess).images == WANTED
    assert BACKENDS["torch"].open(tiny, size=SIZE).images is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is nested more than 64 deep"),
        ("[]", "expected size, mean, std, order"),
        ('{"size": [1, 1], "mean": [0, 0, 0], "std": [1, 1, 1]}', "expected size, mean, std, order"),
        ('{"size": [1, 1], "mean": [0, 0, 0], "std": [1, 1, 1], "order": "BGR"}', "another order than RGB"),
    ],
)
def test_a_damaged_statement_is_a_sentence(value: str, words: str) -> None:
    with pytest.raises(VssError, match=words) as caught:
        stated({KEY: value})
    assert len(str(caught.value)) < 400
    assert stated({}) is None


@pytest.mark.parametrize("opset", [-1, 0, 11, 17, 26, 2**40])
def test_an_opset_that_is_not_written_is_refused(tiny: Any, tmp_path: Path, opset: int) -> None:
    with pytest.raises(VssError, match=f"opset {opset} cannot be written; expected 18 to 25: change --opset"):
        export(tiny, tmp_path / "x.onnx", size=SIZE, opset=opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [18, 25])
def test_the_opset_that_was_asked_for_is_in_the_file(tiny: Any, tmp_path: Path, opset: int) -> None:
    report = export(tiny, tmp_path / "x.onnx", size=SIZE, opset=opset, labels=True, parity_batches=(1,))
    assert report["opset"] == opset == onnx.load(tmp_path / "x.onnx").opset_import[0].version
