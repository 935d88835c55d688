"""vss.deploy.backends: the table of runtimes, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vss.core.config import BuildConfig
from vss.core.errors import VssError
from vss.deploy import BACKENDS, BuildPlan, BuildSpec
from vss.deploy.backends import build_spec, inspected


def test_names_and_aliases() -> None:
    assert {"onnxruntime", "tensorrt", "torch"} <= set(BACKENDS.names())
    assert BACKENDS["ort"] is BACKENDS["onnxruntime"]
    assert all(BACKENDS[name].name == name for name in BACKENDS.names())
    with pytest.raises(VssError, match="Did you mean 'onnxruntime'"):
        BACKENDS["onnxruntme"]


def test_importing_deploy_imports_no_optional_package() -> None:
    heavy = ["onnx", "onnxruntime", "onnxscript", "onnx_graphsurgeon", "polygraphy", "tensorrt", "openvino"]
    heavy += ["matplotlib", "torchmetrics", "lightning"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy}));"
        "import vss.deploy; print(len(vss.deploy.BACKENDS.names()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "5"), done.stderr


def test_build_spec_is_what_the_recipe_says() -> None:
    wanted = {"optimisation_level": 5, "workspace_mib": 512, "hardware": "AMPERE_PLUS", "flags": ["SPARSE_WEIGHTS"]}
    config = BuildConfig.model_validate({"backend": "trt", "tensorrt": wanted})
    assert build_spec(config).plan == BuildPlan(
        optimisation_level=5, workspace_mib=512, hardware="AMPERE_PLUS", flags=("SPARSE_WEIGHTS",)
    )
    assert build_spec(BuildConfig(backend="trt")).plan == BuildPlan()
    assert build_spec(BuildConfig()) == BuildSpec()
    with pytest.raises(VssError, match=r"--flag \(build\.tensorrt\.flags\) is .* FP16 is no build option"):
        build_spec(BuildConfig.model_validate({"backend": "trt", "tensorrt": {"flags": ["FP16"]}}))


def test_inspected_reads_what_lies_beside_an_engine(tmp_path: Path) -> None:
    engine = tmp_path / "a.engine"
    assert inspected(engine) is None
    (tmp_path / "a.engine.layers.json").write_text('{"Layers": [{"Name": "conv"}], "Bindings": []}')
    assert inspected(engine) == {"Layers": [{"Name": "conv"}], "Bindings": []}
