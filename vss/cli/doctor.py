"""`vss doctor`: what of this machine works, what is missing, and how to get it.

Every probe stands alone: one that raises becomes a finding with the error's text. TensorRT and pycuda are looked up and
not imported, since both may create a CUDA context; nothing here starts CUDA.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

from vss.cli.console import out, print_table
from vss.core.environment import cuda_devices, package_version

KIND = "vss.doctor"
SCHEMA = 1
MIN_PYTHON, MIN_TORCH = (3, 11), (2, 11)
MIN_FREE_GIB = 5.0
Status = Literal["ok", "reference", "warning", "missing", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    `status`: "ok"; "reference" (works, in slow Python); "warning" (works, deserves a look); "missing" (absent,
    `fix` says how to get it); "broken" (there, and raises). `what` was found; `fix` is what to do, or empty.
    """

    name: str
    status: Status
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Package:
    """A package to look for: `module` is imported only when `load`, `use` says what it is needed for."""

    name: str
    module: str
    use: str
    load: bool
    fix: str


PACKAGES = (
    Package("lightning", "lightning", "vss train and vss finetune", True, 'pip install "lightning>=2.6"'),
    Package("onnx", "onnx", "vss export", True, "pip install onnx"),
    Package("onnxscript", "onnxscript", "vss export", True, "pip install onnxscript"),
    Package("onnx-graphsurgeon", "onnx_graphsurgeon", "cleaning up graphs", True, "pip install onnx-graphsurgeon"),
    Package("polygraphy", "polygraphy", "building TensorRT engines", True, "pip install polygraphy"),
    Package("pycuda", "pycuda", "device memory of TensorRT engines", False, 'pip install "vss[tensorrt]"'),
    Package("ray", "ray", "spreading a sweep over machines", False, 'pip install "vss[ray]"'),
)  # fmt: skip


def diagnose() -> list[Finding]:
    """Every finding, in the order of the chain: interpreter, torch, kernels, packages, compilers, machine."""
    probes: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("python", _python),
        ("torch", _torch),
        ("CUDA", _cuda),
        ("vss kernels", _kernels),
        *((package.name, lambda package=package: _package(package)) for package in PACKAGES[:4]),
        ("onnxruntime", _onnxruntime),
        ("openvino", _openvino),
        *((package.name, lambda package=package: _package(package)) for package in PACKAGES[4:]),
        ("tensorrt", _tensorrt),
        ("tensorrt_rtx", _tensorrt_rtx),
        ("nvcc", _nvcc),
        ("C++ compiler", _compiler),
        ("disk", _disk),
        ("threads", _threads),
    ]
    return [finding for name, probe in probes for finding in _safe(name, probe)]


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as a JSON object with kind and schema."""
    return {"kind": KIND, "schema": SCHEMA, "findings": [asdict(finding) for finding in findings]}


def _safe(name: str, probe: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run one probe; whatever it raises is the finding. A damaged package raises anything at all on import."""
    try:
        return list(probe())
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return [Finding(name, "broken", text, f"reinstall or remove {name}")]


def _python() -> Iterable[Finding]:
    version = platform.python_version()
    good = tuple(map(int, platform.python_version_tuple()[:2])) >= MIN_PYTHON
    wanted = ".".join(map(str, MIN_PYTHON))
    yield Finding("python", "ok" if good else "broken", version, "" if good else f"use Python {wanted} or newer")


def _torch() -> Iterable[Finding]:
    import torch

    numbers = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    good, wanted = numbers >= MIN_TORCH, ".".join(map(str, MIN_TORCH))
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    fix = "" if good else f'pip install "torch>={wanted}"'
    yield Finding("torch", "ok" if good else "broken", f"{torch.__version__}, {built}", fix)


def _cuda() -> Iterable[Finding]:
    import torch

    devices = cuda_devices()
    names = ", ".join(f"{device['name']} (driver {device['driver']}, sm {device['capability']})" for device in devices)
    if torch.cuda.is_available():
        yield Finding("CUDA", "ok", names or f"{torch.cuda.device_count()} device(s)")
    elif devices and torch.version.cuda is None:
        yield Finding("CUDA", "missing", f"{names}, and a torch built without CUDA", "install a CUDA build of torch")
    elif devices:
        fix = f"install a driver for CUDA {torch.version.cuda}, or a torch built for an older CUDA"
        yield Finding("CUDA", "broken", f"{names}, which this torch cannot use", fix)
    else:
        yield Finding("CUDA", "missing", "no NVIDIA device is visible; everything runs on the CPU")


def _kernels() -> Iterable[Finding]:
    from vss import ops

    facts = ops.build_info()
    if facts is None:
        error = ops.load_error()
        fix = "pip install --no-build-isolation -e . (needs a C++ compiler)"
        what = "the native extension vss._C is not built" if error is None else " ".join(error.split())
        yield Finding("vss kernels", "reference" if error is None else "broken", what, fix)
    else:
        yield Finding("vss kernels", "ok", ", ".join(f"{key} {_words(value)}" for key, value in facts.items()))
    for op, devices in ops.status().items():
        for device, state in devices.items():
            if state == "reference":
                fix = f"build the extension with {device} support: pip install --no-build-isolation -e ."
                yield Finding(f"op {op} on {device}", "reference", "Python reference: same numbers, slower", fix)
            else:
                what = "C++/CUDA kernel" if state == "native" else "torch's own operators; no kernel beats them"
                yield Finding(f"op {op} on {device}", "ok", what)


def _words(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return {True: "yes", False: "no", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)


def _package(package: Package) -> Iterable[Finding]:
    version = package_version(package.name)
    if importlib.util.find_spec(package.module) is None:
        yield Finding(package.name, "missing", f"not installed; needed for {package.use}", package.fix)
        return
    if package.load:
        importlib.import_module(package.module)
    yield Finding(package.name, "ok", f"{version or 'version unknown'}, for {package.use}")


def _onnxruntime() -> Iterable[Finding]:
    if importlib.util.find_spec("onnxruntime") is None:
        fix = "pip install onnxruntime (or onnxruntime-gpu)"
        yield Finding("onnxruntime", "missing", "not installed; needed for the default engine backend", fix)
        return
    import onnxruntime

    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    yield Finding("onnxruntime", "ok", f"{onnxruntime.__version__}, providers: {', '.join(providers)}")


def _openvino() -> Iterable[Finding]:
    from vss.deploy.backends.onnx_runner import openvino_core
    from vss.deploy.backends.ov import int8_by

    if importlib.util.find_spec("openvino") is None:
        what = "not installed; needed for vss build --backend openvino"
        yield Finding("openvino", "missing", what, 'pip install "vss[openvino]"')
        return
    devices = ", ".join(openvino_core().available_devices)
    yield Finding("openvino", "ok", f"{package_version('openvino')}, devices: {devices}; INT8 on this CPU: {int8_by()}")


def _flavour(name: str) -> tuple[Any, str | None, Finding | None]:
    """A TensorRT by name: its row, its version, and a finding where it is missing or unknown. Looked up, not imported;
    JetPack's has no distribution and so no version."""
    from vss.deploy.backends.trt_flavour import FLAVOURS

    flavour = FLAVOURS[name]
    if importlib.util.find_spec(flavour.module) is None:
        fix = (
            flavour.install
            if flavour.targets or cuda_devices()
            else f"on a machine with an NVIDIA GPU: {flavour.install}"
        )
        return flavour, None, Finding(name, "missing", f"not installed; needed for vss build --backend {name}", fix)
    version = next((found for each in flavour.packages if (found := package_version(each))), None)
    if version is not None and int(version.split(".")[0]) not in flavour.majors:
        known = " or ".join(map(str, flavour.majors))
        return flavour, version, Finding(name, "broken", f"{version}; engines need {known}", flavour.install)
    return flavour, version or "version unknown", None


def _tensorrt() -> Iterable[Finding]:
    _, version, bad = _flavour("tensorrt")
    if bad:
        yield bad
    elif not cuda_devices():
        what = f"{version}, and no NVIDIA device is visible: nothing can be built or run here"
        yield Finding("tensorrt", "warning", what, "run on a GPU machine")
    else:
        yield Finding("tensorrt", "ok", f"{version}, for TensorRT engines")


def _tensorrt_rtx() -> Iterable[Finding]:
    flavour, version, bad = _flavour("tensorrt_rtx")
    what = f"{version}, builds engines for {', '.join(flavour.targets)}"
    yield bad or Finding("tensorrt_rtx", "ok", what if cuda_devices() else f"{what}; running them needs such a GPU")


def _nvcc() -> Iterable[Finding]:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    beside = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    program = next((found for name in ("nvcc", *beside) if (found := shutil.which(name))), None)
    if program is None:
        yield Finding("nvcc", "missing", "not found; the extension builds for the CPU only", "install the CUDA toolkit")
        return
    release = re.search(r"release ([\d.]+)", _version_of(program))
    yield Finding("nvcc", "ok", f"CUDA {release[1]}" if release else "version unknown")


def _compiler() -> Iterable[Finding]:
    names = [os.environ.get("CXX"), "c++", "g++", "clang++", "cl"]
    program = next((found for name in names if name and (found := shutil.which(name))), None)
    if program is None:
        fix = "install one (Debian, Ubuntu: apt install g++)"
        yield Finding("C++ compiler", "missing", "not found; ops run as the Python reference", fix)
        return
    yield Finding("C++ compiler", "ok", next(iter(_version_of(program).splitlines()), Path(program).name))


def _version_of(program: str) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout


def _disk() -> Iterable[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    low = free < MIN_FREE_GIB
    fix = "free some space: checkpoints and engines are written here" if low else ""
    yield Finding("disk", "warning" if low else "ok", f"{free:.1f} GiB free in the current folder", fix)


def _threads() -> Iterable[Finding]:
    import torch

    from vss.deploy.profile.units import usable_threads

    usable = usable_threads(None)
    used, setting = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    what = f"torch uses {used} of {usable} usable cores"
    what += f" (OMP_NUM_THREADS={setting})" if setting else ""
    fix = "" if used <= usable else f"set OMP_NUM_THREADS={usable}: more threads than cores slow every kernel down"
    yield Finding("threads", "ok" if used <= usable else "warning", what, fix)


def doctor(as_json: Annotated[bool, Option("--json", help="print JSON in place of a table")] = False) -> None:
    """Show what is native, what is missing and how to get it."""
    findings = diagnose()
    if as_json:
        out.print_json(json.dumps(to_json(findings)))
        return
    print_table(
        [asdict(finding) for finding in findings],
        {"name": "part", "status": "status", "what": "what", "fix": "how to get it"},
    )
