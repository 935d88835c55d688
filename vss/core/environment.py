"""Where a number was measured: versions, processor, memory, devices, clocks, load.

Nothing heavy is imported to find out: versions come from package metadata, device facts from `nvidia-smi` and /proc.
No host name, user name, path or serial number is recorded.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from vss.core import __version__

PACKAGES = (
    "torch", "torchvision", "numpy", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "openvino",
    "onnx-graphsurgeon", "polygraphy", "torch-pruning", "lightning", "torchmetrics", "tensorrt", "tensorrt-rtx-cu13",
    "pycuda", "ray",
)  # fmt: skip
_ROOT = Path(__file__).resolve().parent.parent.parent
_CPU = "/sys/devices/system/cpu/cpu"
_NOT_A_NAME = {"cpu", "processor", "platinum", "gold", "silver", "bronze", "intel", "with", "radeon", "graphics"}
_SMI_FIELDS = {
    "name": "name",
    "driver_version": "driver",
    "compute_cap": "capability",
    "memory.total": "memory_mib",
    "clocks.sm": "clock_sm_mhz",
    "clocks.max.sm": "clock_sm_max_mhz",
    "clocks.mem": "clock_memory_mhz",
    "power.limit": "power_limit_w",
    "persistence_mode": "persistence_mode",
    "pstate": "pstate",
    "temperature.gpu": "temperature_c",
}
_TEXT_FIELDS = {"name", "driver_version", "compute_cap", "persistence_mode", "pstate"}
_THROTTLE_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # of newer and older drivers
_THROTTLE = {
    0x1: "idle",
    0x2: "applications clocks setting",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks setting",
}  # NVML, nvmlClocksEventReasons


def environment() -> dict[str, Any]:
    """Facts about this process and machine, all JSON types; a fact that cannot be read is None.

    `machine` is a folder name such as `xeon-8370c-2c` (processor and usable cores) or `nvidia-h200` (first CUDA device
    when the loaded torch can use it). Torch facts appear only when torch is imported already; CUDA is not initialised.
    """
    cpu, torch = _cpu(), _torch()
    devices = cuda_devices() if torch is None or torch["cuda_available"] else []
    use_device = torch is not None and torch["cuda_available"] and devices
    name = devices[0]["name"] if use_device else f"{cpu['model']} {cpu['usable_cores']}c"
    return {
        "machine": folder_name(name),
        "vss": __version__,
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu,
        "ram_gib": _ram_gib(),
        "torch": torch,
        "devices": devices,
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def folder_name(name: str) -> str:
    """A processor's marketing name as a short folder name.

    >>> folder_name("Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz 2c"), folder_name("NVIDIA H200")
    ('xeon-8370c-2c', 'nvidia-h200')
    """
    name = re.sub(r"\((r|tm|c)\)|@\s*[\d.]+\s*ghz|\b\d+-core\b", " ", name.lower())
    words = [word for word in re.split(r"[^a-z0-9]+", name) if word and word not in _NOT_A_NAME]
    return "-".join(words) or "unknown"


def package_version(name: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_devices() -> list[dict[str, Any]]:
    """One row per NVIDIA device that this process may see, from `nvidia-smi`; no CUDA context is made."""
    program = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if program is None or (visible is not None and visible.strip() in {"", "-1"}):
        return []
    which = [f"--id={visible.strip()}"] if visible and re.fullmatch(r"\d+(,\d+)*", visible.strip()) else []

    def ask(fields: str) -> list[str]:
        text = _output([program, f"--query-gpu={fields}", "--format=csv,noheader,nounits", *which])
        return (text or "").splitlines()

    devices = [_device(line) for line in ask(",".join(_SMI_FIELDS)) if line.count(",") == len(_SMI_FIELDS) - 1]
    masks = next((found for field in _THROTTLE_FIELDS if len(found := ask(field)) == len(devices)), [])
    return [
        device | {"throttle": throttle_reasons(mask)}
        for device, mask in zip(devices, masks or [""] * len(devices), strict=True)
    ]


def throttle_reasons(mask: str) -> list[str] | None:
    """Why a device runs below its highest clocks, from the bit mask that nvidia-smi prints; None when unreadable.

    >>> throttle_reasons("0x0000000000000024"), throttle_reasons("[N/A]")
    (['software power cap', 'software thermal slowdown'], None)
    """
    if not re.fullmatch(r"0x[0-9a-fA-F]+", mask.strip()):
        return None
    return [reason for bit, reason in _THROTTLE.items() if int(mask, 16) & bit]


def _device(line: str) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for (field, key), value in zip(_SMI_FIELDS.items(), line.split(","), strict=True):
        value = value.strip()
        if field in _TEXT_FIELDS:
            row[key] = None if value.startswith("[") else value
        else:
            row[key] = float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else None
    return row


def _output(command: list[str]) -> str | None:
    """What a command prints, or None when it is absent, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _git() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether tracked files differ from it."""
    if not (_ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    commit = _output(["git", "-C", str(_ROOT), "rev-parse", "HEAD"])
    changes = _output(["git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "modified": None if changes is None else bool(changes)} if commit else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpu() -> dict[str, Any]:
    info = _read("/proc/cpuinfo") or ""
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", info, re.MULTILINE)
    clock = re.search(r"^cpu MHz\s*:\s*([\d.]+)", info, re.MULTILINE)
    places = set(re.findall(r"^physical id\s*:\s*(\d+).*?^core id\s*:\s*(\d+)", info, re.MULTILINE | re.DOTALL))
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return {
        "model": model[1].strip() if model else platform.processor() or platform.machine(),
        "physical_cores": len(places) or None,
        "logical_cores": os.cpu_count(),
        "usable_cores": len(cores),
        "clock_mhz": round(float(clock[1])) if clock else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "cores": cores,
        "max_clock_mhz": top // 1000 if (top := _number(f"{_CPU}{cores[0]}/cpufreq/cpuinfo_max_freq")) else None,
        "throttled": _throttled(cores),
    }


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the processor as Linux names them; none where it does not say."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return frozenset(found[1].split() if found else ())


def _number(path: str) -> int | None:
    text = _read(path)
    return int(text) if text and text.isdigit() else None


def _throttled(cores: list[int]) -> int | None:
    """How often the cores were slowed down by heat since the system started; None where that is not counted."""
    counts = [_number(f"{_CPU}{core}/thermal_throttle/core_throttle_count") for core in cores]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _ram_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _torch() -> dict[str, Any] | None:
    """Facts of the torch that this process has imported; None when it has not."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    return {
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "built_for_cuda": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
