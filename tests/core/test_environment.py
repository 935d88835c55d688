"""Facts about the machine: read without importing, and without naming it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vss.core.environment import cuda_devices, environment, folder_name


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz 2c", "xeon-8370c-2c"),
        ("NVIDIA H200", "nvidia-h200"),
        ("AMD EPYC 7763 64-Core Processor 8c", "amd-epyc-7763-8c"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("../ ", "unknown"),
    ],
)
def test_folder_name(name: str, folder: str) -> None:
    assert folder_name(name) == folder


def test_facts_agree_with_their_sources() -> None:
    facts = environment()
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["torch"] == importlib.metadata.version("torch")
    assert facts["torch"]["threads"] == torch.get_num_threads()
    assert facts["cpu"]["logical_cores"] == os.cpu_count()
    assert facts["machine"] == folder_name(facts["machine"])
    if not torch.cuda.is_available():
        assert facts["machine"].endswith(f"{facts['cpu']['usable_cores']}c")
    text = json.dumps(facts, allow_nan=False)
    assert str(Path.home()) not in text.replace('"/"', "")
    assert socket.gethostname() not in text or len(socket.gethostname()) < 4


def test_imports_no_torch() -> None:
    code = "import sys; from vss.core.environment import environment as e; print(e()['torch'], 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "False"]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program named nvidia-smi that prints two devices, one with unreadable facts."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'echo "$@" > "$(dirname "$0")/arguments"\n'
        'case "$1" in\n'
        "*clocks_event*) echo 'Field is not a valid field to query.'; exit 2 ;;\n"
        "*clocks_throttle*) echo 0x0000000000000044; echo '[N/A]'; exit 0 ;;\n"
        "esac\n"
        "echo 'NVIDIA H200, 580.65, 9.0, 143771, 1980, 1980, 3201, 700.00, Enabled, P0, 41'\n"
        "echo 'NVIDIA Thor, 580.65, [N/A], [N/A], 315, [N/A], [N/A], [N/A], Disabled, P8, [N/A]'\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_devices_from_nvidia_smi(smi: Path) -> None:
    first, second = cuda_devices()
    assert first["name"] == "NVIDIA H200" and first["driver"] == "580.65" and first["capability"] == "9.0"
    assert first["memory_mib"] == 143771 and first["clock_sm_mhz"] == 1980 and first["power_limit_w"] == 700
    assert (first["pstate"], first["temperature_c"]) == ("P0", 41)
    assert first["throttle"] == ["software power cap", "hardware thermal slowdown"] and second["throttle"] is None
    assert second["capability"] is None and second["memory_mib"] is None and second["clock_sm_mhz"] == 315


def test_only_visible_devices_are_asked_for(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    cuda_devices()
    assert "--id=0,2" in (smi / "arguments").read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert cuda_devices() == []


def test_no_nvidia_smi_is_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda_devices() == []
