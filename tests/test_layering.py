"""Who may import whom, and how long a file may get: read from the source, without exceptions.

A room of `vss` imports rooms on lower floors and itself; rooms on one floor do not know each other. Every import
counts, inside functions and under TYPE_CHECKING too, and no module reaches itself again through what it imports.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (
    ("core",),
    ("ops",),
    ("data", "models", "prune"),
    ("train", "deploy"),
    ("run",),
    ("ship", "sweep"),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
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


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Modules of vss that `source` imports, absolute or relative, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
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
            yield from (each for each in dynamic(node, module) if each.split(".")[0] == "vss")


@functools.cache
def imported(source: str, module: str, is_package: bool) -> list[str]:
    return sorted(set(imports(source, module, is_package)))


def dynamic(node: ast.Call, module: str) -> Iterator[str]:
    """What a call imports, now or when it is asked for: `importlib.import_module("vss.x")`, `__import__("vss.x")`,
    `MODELS.later("x", "vss.x:X")` and `lazy_names(__name__, {"x": ["X"]})`, whose arguments are literals."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in {"import_module", "__import__"} and node.args and isinstance(node.args[0], ast.Constant):
        yield str(node.args[0].value)
    elif name == "later":
        yield ast.literal_eval(node.args[1]).partition(":")[0]
    elif name == "lazy_names":
        yield from (f"{module}.{part}" for part in ast.literal_eval(node.args[1]))


def refusal(module: str, target: str) -> str:
    """Why `module` may not import `target`; empty when it may."""
    if module == "vss" or target == "vss._C":
        return ""
    if target == "vss":
        return "the package itself is above all rooms; import the module that is meant"
    here, there = module.split(".")[1], target.split(".")[1]
    missing = [name for name in (here, there) if name not in FLOOR]
    if missing:
        return f"{missing[0]} is no room"
    if here != there and FLOOR[there] >= FLOOR[here]:
        return f"{here} (floor {FLOOR[here]}) imports {there} (floor {FLOOR[there]})"
    return ""


def faults(sources: dict[str, str], packages: set[str]) -> list[str]:
    """What is wrong in a tree of modules: imports upwards or sideways, and circles."""
    graph = {name: imported(text, name, name in packages) for name, text in sources.items()}
    found = [f"{name}: {why}" for name, targets in graph.items() for each in targets if (why := refusal(name, each))]
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            found.append(" -> ".join((*trail[trail.index(name) :], name)))
        elif name not in done:
            for target in graph.get(name, []):
                if target not in (name, "vss"):
                    visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        if name != "vss":
            visit(name, ())
    return found


SOURCES = {name: path.read_text() for name, path in MODULES.items()}
PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def test_rooms_import_lower_floors_alone_and_nothing_goes_in_circles() -> None:
    assert faults(SOURCES, PACKAGES) == []
    assert {path.name for path in (ROOT / "vss").iterdir() if path.is_dir() and list(path.glob("*.py"))} == set(FLOOR)


@pytest.mark.parametrize(
    ("module", "planted", "said"),
    [
        ("vss.prune.plan", "def f() -> None:\n    from vss.deploy import bench\n", "prune (floor 2) imports deploy"),
        ("vss.models.unet", "import vss.data.readers\n", "models (floor 2) imports data"),
        ("vss.core.files", "def f() -> None:\n    import vss.cli.main\n", "core (floor 0) imports cli"),
        ("vss.core.errors", "if TYPE_CHECKING:\n    from vss.core import files\n", "vss.core.errors -> "),
        ("vss.run.project", "def f() -> None:\n    from vss.run import pruning\n", "vss.run.project -> "),
        ("vss.sweep.grid", "from vss.ship import bundle\n", "sweep (floor 5) imports ship"),
        ("vss.ops.reference", "import vss\n", "the package itself"),
        ("vss.models.factory", 'MODELS.later("x", "vss.run.job:run")\n', "models (floor 2) imports run"),
        ("vss.ops", 'lazy_names(__name__, {"later": ["X"]})\n', "vss.ops -> vss.ops.later -> vss.ops"),
    ],
)
def test_a_planted_import_is_found(module: str, planted: str, said: str) -> None:
    sources = SOURCES | {"vss.ops.later": "import vss.ops\n"}
    found = faults(sources | {module: sources[module] + planted}, PACKAGES)
    assert found and any(said in each for each in found)


@pytest.mark.parametrize(
    ("source", "module", "found"),
    [
        ("import vss.deploy.bench", "vss.ops", {"vss.deploy.bench"}),
        ("from vss import load", "vss.ops", {"vss.train.checkpoint"}),
        ("from vss import deploy", "vss.ops", {"vss.deploy"}),
        ("from ..models import unet", "vss.prune.plan", {"vss.models.unet"}),
        ("def f():\n    from vss.cli import main", "vss.ops", {"vss.cli.main"}),
        ("import importlib\nimportlib.import_module('vss.run.job')", "vss.ops", {"vss.run.job"}),
        ("MODELS.later('x', 'vss.models.unet:UNet', aliases=['y'])", "vss.models.factory", {"vss.models.unet"}),
        (
            "find = lazy_names(__name__, {'base': ['SegModel'], 'weights': ['load_weights']})",
            "vss.models",
            {"vss.models.base", "vss.models.weights"},
        ),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vss.cli", "vss.ops", {"vss.cli"}),
    ],
)
def test_the_reader_sees_every_kind_of_import(source: str, module: str, found: set[str]) -> None:
    assert set(imports(source, module, is_package=False)) == found


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


def test_includes() -> None:
    own = {other.name for other in (ROOT / "csrc/kernels").glob("*")}
    for path in NATIVE:
        kind = path.relative_to(ROOT).parts[:2]
        for name in includes(path.read_text()):
            torch = name.startswith(("torch/", "ATen", "c10/", "pybind11", "Python.h"))
            if kind == ("csrc", "kernels"):
                known = is_standard(name) or is_cuda(name) or name == "omp.h" or Path(name).name in own
                assert known and not torch, f"kernels include the standard library and CUDA only, not {name}: {path}"
            if kind[0] == "plugins_trt":
                assert not torch, f"TensorRT plugins never include torch, and this includes {name}: {path}"


def test_include_rules_know_torch_from_cuda() -> None:
    assert all(is_standard(name) for name in ("vector", "cstdint", "algorithm", "math.h"))
    assert all(is_cuda(name) for name in ("cuda_runtime.h", "cuda_fp16.h", "cub/cub.cuh", "cuda/std/limits"))
    assert not any(is_cuda(n) or is_standard(n) for n in ("torch/extension.h", "ATen/ATen.h", "NvInfer.h", "Python.h"))
    assert includes('#include <a.h>\n # include "b/c.h"\n// #include <d>\n') == ["a.h", "b/c.h"]


# Lengths


def test_lengths() -> None:
    for path in (*PYTHON, *NATIVE):
        text = path.read_text()
        lines = text.count("\n")
        assert lines <= MAX_FILE, f"{path}: {lines} lines; split it by idea"
        spans = python_functions(text) if path.suffix == ".py" else native_functions(text)
        long = [f"{name}: {length} lines" for name, length in spans if length > MAX_FUNCTION]
        assert long == [], path


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


def test_prints_only_in_the_command_line() -> None:
    for name, source in SOURCES.items():
        if not name.startswith("vss.cli"):
            calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
            lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
            assert lines == [], f"print on lines {lines} of {name}; use logging"
