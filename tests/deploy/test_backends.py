"""vss.deploy.backends: the table of runtimes, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vss.deploy import BACKENDS
from vss.errors import VssError


def test_names_and_aliases() -> None:
    assert {"onnxruntime", "tensorrt", "torch"} <= set(BACKENDS.names())
    assert BACKENDS["ort"] is BACKENDS["onnxruntime"]
    assert all(BACKENDS[name].name == name for name in BACKENDS.names())
    with pytest.raises(VssError, match="Did you mean 'onnxruntime'"):
        BACKENDS["onnxruntme"]


def test_importing_deploy_imports_no_optional_package() -> None:
    heavy = ["onnx", "onnxruntime", "onnxscript", "onnx_graphsurgeon", "polygraphy", "tensorrt", "matplotlib"]
    heavy += ["torchmetrics", "lightning"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy}));"
        "import vss.deploy; print(len(vss.deploy.BACKENDS.names()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr
