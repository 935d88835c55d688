"""`import vss` needs torch alone and starts no CUDA.

Where the optional packages are absent every module imports, or raises the sentence that says what to install.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

OPTIONAL = (
    "onnx", "onnxruntime", "onnxscript", "onnx_ir", "onnx_graphsurgeon", "polygraphy", "tensorrt", "lightning",
    "pytorch_lightning", "torch_pruning", "matplotlib", "jinja2", "ray", "pycuda", "tensorboard", "tritonclient",
)  # fmt: skip
NOT_FOR_IMPORT_VSS = ("pydantic", "yaml", "PIL", "typer", "rich", "jinja2")

LEAN = """
import json, sys
import torch
before = set(sys.modules)
{statement}
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(json.dumps({{"new": sorted(new), "cuda": torch.cuda.is_initialized()}}))
"""

ABSENT = """
import json, sys, traceback
from importlib.machinery import PathFinder

BLOCKED = set({blocked!r})

class Without:
    # the ordinary finder, in an environment where BLOCKED are not installed
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(*args, **kwargs):
        for found in PathFinder.find_distributions(*args, **kwargs):
            if found.metadata["Name"].lower().replace("-", "_") not in BLOCKED:
                yield found

    @staticmethod
    def invalidate_caches():
        PathFinder.invalidate_caches()

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]

import importlib, pkgutil
import vss
names = ["vss"] + [m.name for m in pkgutil.walk_packages(vss.__path__, "vss.", onerror=lambda name: None)]
failed = {{}}
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        if type(error).__name__ != "VssError" or "pip install" not in str(error):
            failed[name] = traceback.format_exc().splitlines()[-1]
import torch
present = sorted(BLOCKED & {{name.split(".")[0] for name in sys.modules}})
print(json.dumps({{"names": names, "failed": failed, "present": present, "cuda": torch.cuda.is_initialized()}}))
"""


def run(code: str) -> dict[str, object]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_import_vss_needs_torch_alone() -> None:
    got = run(LEAN.format(statement="import vss"))
    assert set(got["new"]) & {*OPTIONAL, *NOT_FOR_IMPORT_VSS, "numpy", "torchvision"} == set()
    assert got["cuda"] is False


def test_the_core_imports_nothing_optional() -> None:
    got = run(LEAN.format(statement="import vss, vss.ops, vss.models, vss.prune"))
    assert "vss" in got["new"]
    assert set(got["new"]) & set(OPTIONAL) == set()
    assert got["cuda"] is False


def test_every_module_imports_or_says_what_to_install() -> None:
    got = run(ABSENT.format(blocked=OPTIONAL))
    assert {"vss.ops", "vss.models", "vss.prune", "vss.core.report", "vss.run.page.charts", "vss.cli.doctor"} <= set(
        got["names"]
    )
    assert got["failed"] == {}
    assert got["present"] == []
    assert got["cuda"] is False


def test_the_blocker_blocks() -> None:
    code = ABSENT.format(blocked=("jinja2",)).split("import importlib, pkgutil")[0]
    code += "import importlib.util, importlib.metadata\n"
    code += "try:\n    importlib.metadata.version('jinja2'); found = True\n"
    code += "except importlib.metadata.PackageNotFoundError:\n    found = False\n"
    code += "print(json.dumps({'spec': importlib.util.find_spec('jinja2') is not None, 'found': found}))"
    assert run(code) == {"spec": False, "found": False}


LIGHT = """
import json, sys
from vss.cli.main import app
try:
    app({words!r}, prog_name="vss")
except SystemExit as end:
    code = int(end.code or 0)
print()
print(json.dumps({{"code": code, "heavy": sorted(set({heavy!r}) & {{name.split(".")[0] for name in sys.modules}})}}))
"""
HEAVY = (*OPTIONAL, "torch", "torchvision", "torchmetrics", "numpy", "scipy", "PIL")


@pytest.mark.parametrize(
    "words", [["--help"], ["prune", "--help"], ["--version"], ["run", "demo", "--dry-run"], ["export"]], ids=" ".join
)
def test_the_command_line_imports_nothing_heavy_before_it_works(words: list[str]) -> None:
    got = run(LIGHT.format(words=words, heavy=HEAVY))
    assert got == {"code": 2 if words == ["export"] else 0, "heavy": []}
