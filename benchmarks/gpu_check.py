"""What part 1, 2 or 3 of gpu.sh needs and this machine lacks, one sentence each; exit code 2 where it cannot begin.

    python benchmarks/gpu_check.py PART [--cpu] [--data FOLDER]

Also `--state`: one line of the GPU's clocks, power, temperature and reasons for throttling, by nvidia-smi.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

LEAST = (8, 0)
TORCH = (2, 11)
# Wheels that a plain image of torch may lack: module -> name on the package index. Part 1 needs the first list alone.
NETWORKS = {
    "numpy": "numpy", "torchvision": "torchvision", "pydantic": "pydantic", "yaml": "pyyaml", "scipy": "scipy",
    "safetensors": "safetensors", "PIL": "pillow",
}  # fmt: skip
TRAINING = {name: name for name in ("lightning", "torchmetrics", "tensorboard", "typer", "rich")}
WHEELS = {1: {"numpy": "numpy", "pytest": "pytest"}, 2: NETWORKS | {"onnx": "onnx"}, 3: NETWORKS | TRAINING}
STATE = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the name changed with driver 535


@dataclass(frozen=True)
class Machine:
    """What torch and the toolkit say. `built_for` and `nvcc` are CUDA releases such as "13.0", or None."""

    torch: str
    built_for: str | None
    available: bool
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    nvcc: str | None = None
    has: Callable[[str], bool] = lambda module: importlib.util.find_spec(module) is not None
    ninja: bool = True


def this_machine(cpu: bool) -> Machine:
    """`cpu`: its version alone, for which torch is not imported."""
    if cpu:
        return Machine(version("torch"), None, False)
    import torch

    available = torch.cuda.is_available()
    name, capability = ("", (0, 0))
    if available:
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    ninja = importlib.util.find_spec("ninja") is not None or shutil.which("ninja") is not None
    return Machine(torch.__version__, torch.version.cuda, available, name, capability, nvcc_release(), ninja=ninja)


def nvcc_release() -> str | None:
    places = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc", shutil.which("nvcc") or ""]
    nvcc = next((place for place in places if place and Path(place).exists()), None)
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else None


def problems(part: int, machine: Machine, *, cpu: bool, data: str | None) -> list[str]:
    """Why this part cannot begin here, in full sentences; empty where it can."""
    found = []
    if tuple(map(int, re.findall(r"\d+", machine.torch)[:2])) < TORCH:
        found.append(f"torch is {machine.torch} and 2.11 or later is needed: pip install 'torch>=2.11'.")
    if not cpu:
        found += gpu_problems(part, machine)
    lacks = [wheel for module, wheel in WHEELS[part].items() if not machine.has(module)]
    if lacks:
        found.append(f"part {part} needs {' '.join(lacks)}, not installed: pip install {' '.join(lacks)} before.")
    if part == 3 and not cpu and not data:
        found.append("part 3 needs DATA, the folder of CamVid in the layout of SegNet (train/, trainannot/, ...).")
    if part == 3 and data and not (Path(data) / "train").is_dir():
        found.append(f"DATA is {data} and there is no folder {Path(data) / 'train'}; expected CamVid in the layout of "
                     "SegNet (train/, trainannot/, val/, ...).")  # fmt: skip
    return found


def gpu_problems(part: int, machine: Machine) -> list[str]:
    if machine.built_for is None:
        return [f"torch {machine.torch} is built without CUDA: install a build with it, or give --cpu."]
    if not machine.available:
        return [f"torch {machine.torch}, built for CUDA {machine.built_for}, sees no GPU (driver too old, or none): "
                "look at nvidia-smi, or give --cpu."]  # fmt: skip
    if machine.capability < LEAST:
        major, minor = machine.capability
        return [f"{machine.name} has compute capability {major}.{minor} and the kernels need 8.0 or later "
                "(A100, RTX 30 and newer)."]  # fmt: skip
    if part == 1 and machine.nvcc is None:
        return ["nvcc was not found and part 1 builds the kernels: install the CUDA toolkit or set CUDA_HOME."]
    if part == 1 and not machine.ninja:
        return ["part 1 needs ninja, without which building takes longer than a call: pip install ninja before."]
    if part == 1 and machine.nvcc and machine.nvcc.split(".")[0] != machine.built_for.split(".")[0]:
        return [f"torch is built for CUDA {machine.built_for} and nvcc is of CUDA {machine.nvcc}: set CUDA_HOME to a "
                f"toolkit of CUDA {machine.built_for.split('.')[0]}."]  # fmt: skip
    return []


def state() -> str:
    """The GPU now, or why nothing is known of it."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "nvidia-smi was not found: clocks and throttling are not known"
    for reasons in REASONS:
        command = [smi, f"--query-gpu={STATE},{reasons}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            names = [*STATE.split(","), reasons]
            values = done.stdout.strip().splitlines()[0].split(", ")
            return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=False))
    return f"nvidia-smi failed: {done.stdout.strip().partition(chr(10))[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", type=int, choices=(1, 2, 3))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--data")
    parser.add_argument("--state", action="store_true")
    arguments = parser.parse_args()
    if arguments.state:
        sys.stdout.write(state() + "\n")
        return
    if found := problems(arguments.part, this_machine(arguments.cpu), cpu=arguments.cpu, data=arguments.data):
        sys.stderr.write("\n".join(found) + "\n")
        raise SystemExit(2)


if __name__ == "__main__":
    main()
