"""The diagnosis: complete, honest about what is missing, and alive when a package is broken."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from vss import ops
from vss.cli import doctor
from vss.cli.doctor import PACKAGES, Finding, Package, diagnose, to_json


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in diagnose()}


def test_everything_is_looked_at(findings: dict[str, Finding]) -> None:
    names = {"python", "torch", "CUDA", "vss kernels", "onnxruntime", "nvcc", "C++ compiler", "disk", "threads"}
    assert names | {package.name for package in PACKAGES} <= set(findings)
    assert torch.__version__ in findings["torch"].what
    assert not torch.cuda.is_initialized()


def test_every_op_and_device_says_native_or_reference(findings: dict[str, Finding]) -> None:
    for op, devices in ops.status().items():
        for device, state in devices.items():
            finding = findings[f"op {op} on {device}"]
            assert finding.status == ("reference" if state == "reference" else "ok")
            assert bool(finding.fix) == (finding.status == "reference")


def test_packages_agree_with_what_is_installed(findings: dict[str, Finding]) -> None:
    for package in PACKAGES:
        finding = findings[package.name]
        if importlib.util.find_spec(package.module) is None:
            assert finding.status == "missing" and "pip install" in finding.fix and package.use in finding.what
        else:
            assert finding.status in {"ok", "broken"}


def test_json(findings: dict[str, Finding]) -> None:
    data = json.loads(json.dumps(to_json(list(findings.values()))))
    assert (data["kind"], data["schema"], len(data["findings"])) == ("vss.doctor", 1, len(findings))
    assert set(data["findings"][0]) == {"name", "status", "what", "fix"}


def test_a_package_that_raises_on_import_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "damaged_package.py").write_text("raise OSError('libdamaged.so.3: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    package = Package("damaged", "damaged_package", "nothing", True, "pip install damaged")
    monkeypatch.setattr(doctor, "PACKAGES", (*PACKAGES, package))
    finding = next(finding for finding in diagnose() if finding.name == "damaged")
    assert finding.status == "broken"
    assert finding.what == "OSError: libdamaged.so.3: cannot open shared object file"


def test_a_package_that_must_not_be_imported_is_only_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "context_maker.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = doctor._package(Package("maker", "context_maker", "engines", False, ""))
    assert finding.status == "ok"
    assert {package.name for package in PACKAGES if not package.load} == {"pycuda", "ray"}


@pytest.mark.parametrize(
    ("version", "devices", "status", "words"),
    [
        ("11.4.0.106", [{}], "ok", "11.4.0.106, for TensorRT engines"),
        ("10.3.0", [], "warning", "no NVIDIA device is visible"),
        ("8.6.1", [{}], "broken", "engines need 10 or 11"),
    ],
)
def test_tensorrt_is_looked_up_by_every_name_it_is_sold_under(
    version: str, devices: list, status: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "package_version", lambda name: version if name == "tensorrt-cu13" else None)
    monkeypatch.setattr(doctor, "cuda_devices", lambda: devices)
    (finding,) = doctor._tensorrt()
    assert (finding.name, finding.status) == ("tensorrt", status) and words in finding.what


def test_without_tensorrt_doctor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "cuda_devices", lambda: [])
    (finding,) = doctor._tensorrt()
    assert finding.status == "missing"
    assert finding.fix.startswith("on a machine with an NVIDIA GPU: pip install tensorrt-cu13")


def test_broken_probe_keeps_the_others_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def boom() -> Iterable[Finding]:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "_kernels", boom)
    found = {finding.name: finding for finding in diagnose()}
    assert (found["vss kernels"].status, found["vss kernels"].what) == ("broken", "RuntimeError: first line")
    assert found["threads"].status in {"ok", "warning"}


def test_reference_ops_tell_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "build_info", lambda: None)
    monkeypatch.setattr(ops, "status", lambda: {"seg_argmax": {"CPU": "reference", "CUDA": "native"}})
    kernels, cpu, cuda = doctor._kernels()
    assert kernels.status == cpu.status == "reference" and cuda.status == "ok"
    assert "--no-build-isolation" in kernels.fix and "CPU support" in cpu.fix


def test_an_extension_that_cannot_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "build_info", lambda: None)
    monkeypatch.setattr(ops, "load_error", lambda: "vss._C cannot be loaded (undefined symbol: x);\nrebuild it")
    kernels = next(iter(doctor._kernels()))
    assert kernels.status == "broken"
    assert kernels.what == "vss._C cannot be loaded (undefined symbol: x); rebuild it"


def test_disk_and_threads_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = type("Usage", (), {"free": 2**30})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    (disk,) = doctor._disk()
    assert disk.status == "warning" and "1.0 GiB" in disk.what
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    (threads,) = doctor._threads()
    assert threads.status == "warning" and "OMP_NUM_THREADS" in threads.fix
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert next(iter(doctor._threads())).status == "ok"


def test_compilers_that_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert [next(iter(probe())).status for probe in (doctor._nvcc, doctor._compiler)] == ["missing", "missing"]
    assert os.environ.get("CXX") is None
