"""`import vss` needs torch alone and starts no CUDA.

Where the optional packages are absent every module imports, or raises the sentence that says what to install.
"""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

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


COMMANDS = """
import json, sys
from vss.cli.main import app
found, seen = [], set()
for line in {lines!r}:
    try:
        app(line.split(), prog_name="vss")
    except SystemExit as end:
        code = int(end.code or 0)
    here = set({heavy!r}) & {{name.split(".")[0] for name in sys.modules}}
    found.append([line, code, sorted(here - seen)])
    seen |= here
print()
print(json.dumps({{"found": found, "modules": len(sys.modules)}}))
"""
HEAVY = (*OPTIONAL, "torch", "torchvision", "torchmetrics", "scipy", "openvino", "pandas", "sklearn")


@pytest.mark.parametrize(
    ("line", "code", "most"),
    [
        ("--version", 0, 420),
        ("--help", 0, 540),
        ("prune --help", 0, 540),
        ("run demo --dry-run", 0, 420),
        ("export", 2, 420),
        ("methods", 0, 440),
        ("lint absent.onnx", 2, 620),
        ("export --ckpt absent.safetensors", 2, 420),
    ],
)
def test_a_command_imports_what_it_needs(line: str, code: int, most: int) -> None:
    got: Any = run(COMMANDS.format(lines=[line], heavy=(*HEAVY, *(() if most > 600 else ("numpy", "PIL")))))
    assert got["found"] == [[line, code, []]]
    assert got["modules"] < most


REFUSED = """
lint absent.onnx --backend absent
export --ckpt absent.safetensors --set prune.absent=1
calibrate --ckpt absent.safetensors
sensitivity --ckpt absent.safetensors
sensitivity --ckpt absent.safetensors --backend absent
build --onnx absent.onnx
build --onnx absent.onnx --backend absent
build --onnx absent.onnx --backend tensorrt_rtx
run absent
run absent.yaml
run demo --set data.root=absent
run demo --set prune.criterion=absent
run demo --set model.name=absent
run demo --set model.checkpoint=absent.safetensors
train --data-root absent
train --dataset absent
train --model absent
train --recipe absent
finetune --ckpt absent.safetensors
prune --ckpt absent.safetensors --macs 0.5
prune --model unet --weights absent.pt --macs 0.5
prune --model absent --weights absent.pt --macs 0.5
quality --ckpt absent.safetensors --criteria l1
quality --ckpt absent.safetensors --criteria absent
evaluate --ckpt absent.safetensors
evaluate --ckpt absent.onnx
evaluate --ckpt absent.safetensors --max-drop 1
bench --ckpt absent.safetensors
bench --ckpt absent.onnx
bench --ckpt absent.onnx --backend absent
bench --ckpt absent.safetensors --cores 4095
report absent
lut build --ckpt absent.safetensors
lut build --ckpt absent.safetensors --backend absent
lut show absent.json
explain absent
explain absent --backend absent
sweep absent
sweep absent.yaml
benchmark --ckpt absent.safetensors --criteria l1
finetune-batch --sweep absent --epochs 1
compare absent absent2
ship absent --save out
verify absent
verify absent.tar.gz
rebuild absent
serve
serve absent
load absent
data check absent
data check . --dataset absent
data make absent out
"""


def test_a_refused_command_imports_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = REFUSED.strip().splitlines()
    got: Any = run(COMMANDS.format(lines=lines, heavy=HEAVY))
    assert got["found"] == [[line, 2, []] for line in lines]


def test_lazy_names_are_those_that_a_package_says_it_has() -> None:
    for name in ("data", "models", "prune", "ship"):
        package = importlib.import_module(f"vss.{name}")
        assert package.__file__ is not None
        source = ast.parse(Path(package.__file__).read_text())
        typed = [node for node in source.body if isinstance(node, ast.If)]
        assert len(typed) == 1
        lazy = {alias.name for node in typed[0].body if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert lazy <= set(package.__all__)
        assert [each for each in package.__all__ if not hasattr(package, each)] == []
        modules = {path.stem for path in Path(package.__file__).parent.iterdir()}
        assert lazy & modules == set()  # an imported module would hide the name
        with pytest.raises(AttributeError, match="has no attribute 'absent'"):
            package.absent  # noqa: B018
