"""Who may import whom, and how long a file may get: read from the source, without exceptions.

Layer 0: errors, files, registry, config, report, page ...   1: ops, losses, metrics   2: data, models, prune
3: train, evaluate, deploy   4: checkpoint, search, run, sweep, doctor, cli and its helpers
A module imports lower layers and its own package. Layer 2 and 3 modules do not import their neighbours; layer 3 reaches
layer 2 only at `vss.data.transforms`. Imports under TYPE_CHECKING are for types and free.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    (
        "version",
        "errors",
        "files",
        "locks",
        "progress",
        "registry",
        "config",
        "yaml12",
        "environment",
        "report",
        "page",
    ),
    ("ops", "losses", "metrics", "closeness", "decisions", "learner", "_C"),
    ("data", "models", "prune"),
    ("train", "evaluate", "deploy"),
    (
        *(
            "checkpoint",
            "tasks",
            "steps",
            "fits",
            "exits",
            "pictures",
            "run",
            "runner",
            "search",
            "sweep",
            "doctor",
            "quality",
            "latency",
        ),
        *(
            "command",
            "console",
            "__main__",
            "cli",
            "cli_build",
            "cli_data",
            "cli_export",
            "cli_latency",
            "cli_lint",
            "cli_methods",
            "precision",
            "keys",
            "preflight",
            "run_precision",
            "run_frame",
            "run_references",
            "cli_sweep",
            "ship",
            "cli_ship",
        ),
    ),
)
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
NEIGHBOURS_ALLOWED = {0, 1, 4}
SHARED_TYPES = "vss.data.transforms"
MAX_FILE, MAX_FUNCTION = 400, 60
KERNEL_TYPES = {".h", ".cuh", ".cpp", ".cu"}
PYTHON = sorted((ROOT / "vss").rglob("*.py"))
NATIVE = sorted(
    path for folder in ("csrc", "plugins_trt") for path in (ROOT / folder).rglob("*") if path.suffix in KERNEL_TYPES
)


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PYTHON}


def is_type_checking(node: ast.If) -> bool:
    test = node.test
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def statements(node: ast.AST, deep: bool = True) -> Iterator[ast.AST]:
    """Every node that runs: bodies of `if TYPE_CHECKING` are left out, functions too unless `deep`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child):
            for other in child.orelse:
                yield other
                yield from statements(other, deep)
            continue
        if not deep and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from statements(child, deep)


def lazy_names() -> dict[str, str]:
    """What `vss.__getattr__` gives: `vss.load` is `vss.train.checkpoint`."""
    for node in ast.parse((ROOT / "vss/__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_NAMES":
            return dict(ast.literal_eval(node.value))
    return {}


LAZY = lazy_names()


def resolve(base: str, name: str) -> str:
    """The module that `from base import name` reaches."""
    full = f"{base}.{name}"
    if base == "vss" and name in LAZY:
        return LAZY[name]
    return full if full in MODULES or (base == "vss" and not name.startswith("__")) else base


def imports(source: str, module: str, is_package: bool, deep: bool = True) -> Iterator[str]:
    """Modules of vss that running `source` imports, absolute or relative, at the top or (`deep`) inside functions."""
    for node in statements(ast.parse(source), deep):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "vss")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                above = parents[: len(parents) - node.level + is_package]
                base = ".".join([*above, base]).strip(".")
            if base.split(".")[0] == "vss":
                yield from (resolve(base, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call):
            yield from dynamic(node)


def dynamic(node: ast.Call) -> Iterator[str]:
    """`importlib.import_module("vss.x")` and `__import__("vss.x")` count as imports."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in {"import_module", "__import__"} and node.args and isinstance(node.args[0], ast.Constant):
        target = str(node.args[0].value)
        if target.split(".")[0] == "vss":
            yield target


def refusal(module: str, target: str) -> str:
    """Why `module` may not import `target`; empty when it may."""
    if target == "vss" or module == "vss":
        return ""
    here, there = module.split(".")[1], target.split(".")[1]
    if here == there:
        return ""
    missing = [name for name in (here, there) if name not in LAYER]
    if missing:
        return f"{missing[0]} is in no layer; add it to LAYERS"
    low, high = LAYER[there], LAYER[here]
    if low > high:
        return f"{here} (layer {high}) imports {there} (layer {low}), which lies above it"
    if low == high and high not in NEIGHBOURS_ALLOWED:
        return f"{here} imports its neighbour {there} in layer {high}"
    if (high, low) == (3, 2) and target != SHARED_TYPES and not target.startswith(f"{SHARED_TYPES}."):
        return f"{here} (layer 3) imports {target}; models and data arrive as arguments"
    return ""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_layers(module: str) -> None:
    path = MODULES[module]
    targets = set(imports(path.read_text(), module, path.name == "__init__.py"))
    assert [reason for target in sorted(targets) if (reason := refusal(module, target))] == []


def test_no_import_cycles_at_the_top_of_modules() -> None:
    graph = {
        name: {target for target in imports(path.read_text(), name, path.name == "__init__.py", deep=False)}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph.get(name, set()) - {name, "vss"}):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("import vss.deploy.bench", "vss.ops", {"vss.deploy.bench"}),
        ("from vss import load", "vss.ops", {"vss.checkpoint"}),
        ("from vss import deploy", "vss.ops", {"vss.deploy"}),
        ("from ..models import unet", "vss.prune.plan", {"vss.models.unet"}),
        ("from . import files", "vss.page", {"vss.files"}),
        ("def f():\n    from vss.cli import main", "vss.ops", {"vss.cli"}),
        ("import importlib\nimportlib.import_module('vss.run')", "vss.ops", {"vss.run"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vss.cli", "vss.ops", set()),
        ("import typing\nif typing.TYPE_CHECKING:\n    pass\nelse:\n    import vss.cli", "vss.ops", {"vss.cli"}),
    ],
)
def test_the_reader_sees_every_kind_of_import(source: str, module: str, found: set[str]) -> None:
    assert set(imports(source, module, is_package=False)) == found


@pytest.mark.parametrize(
    ("module", "target", "reason"),
    [
        ("vss.models.unet", "vss.ops", ""),
        ("vss.deploy.export", "vss.data.transforms", ""),
        ("vss.doctor", "vss.ops", ""),
        ("vss.report", "vss.files", ""),
        ("vss.deploy.export", "vss.data.pairs", "arrive as arguments"),
        ("vss.deploy.export", "vss.models", "arrive as arguments"),
        ("vss.deploy.gate", "vss.evaluate", "neighbour"),
        ("vss.prune.plan", "vss.models.unet", "neighbour"),
        ("vss.report", "vss.ops", "lies above it"),
        ("vss.train", "vss.checkpoint", "lies above it"),
        ("vss.nowhere", "vss.ops", "in no layer"),
    ],
)
def test_the_rules_refuse_what_they_should(module: str, target: str, reason: str) -> None:
    said = refusal(module, target)
    assert reason in said and bool(said) == bool(reason)


# Native code


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE)


def is_standard(name: str) -> bool:
    """A header of C++ itself: no folder, and no suffix or one of the C headers."""
    c_headers = {
        "stddef.h",
        "stdint.h",
        "math.h",
        "string.h",
        "limits.h",
        "float.h",
        "stdbool.h",
        "stdlib.h",
        "stdio.h",
    }
    return "/" not in name and ("." not in name or name in c_headers)


def is_cuda(name: str) -> bool:
    return bool(re.fullmatch(r"(cuda|cub|mma|cooperative_groups|vector_|device_|sm_)[\w/]*(\.(h|hpp|cuh))?", name))


@pytest.mark.parametrize("path", NATIVE, ids=lambda path: str(path.relative_to(ROOT)))
def test_includes(path: Path) -> None:
    kind = path.relative_to(ROOT).parts[:2]
    own = {other.name for other in (ROOT / "csrc/kernels").glob("*")}
    for name in includes(path.read_text()):
        torch = name.startswith(("torch/", "ATen", "c10/", "pybind11", "Python.h"))
        if kind == ("csrc", "kernels"):
            known = is_standard(name) or is_cuda(name) or name == "omp.h" or Path(name).name in own
            assert known and not torch, f"kernels include the standard library and CUDA only, not {name}"
        if kind[0] == "plugins_trt":
            assert not torch, f"TensorRT plugins never include torch, and this includes {name}"


def test_include_rules_know_torch_from_cuda() -> None:
    assert all(is_standard(name) for name in ("vector", "cstdint", "algorithm", "math.h"))
    assert all(is_cuda(name) for name in ("cuda_runtime.h", "cuda_fp16.h", "cub/cub.cuh", "cuda/std/limits"))
    assert not any(is_cuda(n) or is_standard(n) for n in ("torch/extension.h", "ATen/ATen.h", "NvInfer.h", "Python.h"))
    assert includes('#include <a.h>\n # include "b/c.h"\n// #include <d>\n') == ["a.h", "b/c.h"]


# Lengths


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=lambda path: str(path.relative_to(ROOT)))
def test_lengths(path: Path) -> None:
    text = path.read_text()
    lines = text.count("\n")
    assert lines <= MAX_FILE, f"{lines} lines; split it by idea"
    spans = python_functions(text) if path.suffix == ".py" else native_functions(text)
    assert [f"{name}: {length} lines" for name, length in spans if length > MAX_FUNCTION] == []


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def blank(text: str) -> str:
    """C++ without comments, literals and preprocessor lines; line breaks stay."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|^[ \t]*#(?:[^\n\\]|\\.|\\\n)*'
    return re.sub(pattern, lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)


def native_functions(text: str) -> Iterator[tuple[str, int]]:
    """(head, lines) of every outermost function body: a brace whose head has parentheses, inside no other function."""
    text, stack, start = blank(text), [], 0
    for match in re.finditer(r"[{};]", text):
        if match[0] == "{":
            head = text[start : match.start()].strip()
            container = re.match(
                r"(inline\s+)?namespace\b|extern\b|(template\s*<.*>\s*)?(struct|class|enum|union)\b", head
            )
            inside = any(kind == "function" for kind, *_ in stack)
            function = not inside and "(" in head and (container is None or ")" in head.split("{")[0][-12:])
            first = match.start() - len(text[start : match.start()].lstrip())
            stack.append(("function" if function else "other", " ".join(head.split())[:60], first))
        elif match[0] == "}" and stack:
            kind, head, first = stack.pop()
            if kind == "function":
                yield head, text.count("\n", first, match.end()) + 1
        start = match.end()


def test_native_functions_are_measured() -> None:
    body = "\n".join(f"  x += {i}; // }}" for i in range(3))
    function = f'template <class T>\nvoid f(T x) {{\n  if (x) {{ s = "}}"; }}\n{body}\n}}\n'
    text = f"namespace a {{\nstruct B {{ int c = 0; }};\n{function}}}\n"
    assert list(native_functions(text)) == [("template <class T> void f(T x)", 7)]


# Habits


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_prints_only_in_the_command_line(path: Path) -> None:
    if path.relative_to(ROOT / "vss").parts[0] in {"cli.py", "cli"}:
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert lines == [], f"print on lines {lines}; use logging"
