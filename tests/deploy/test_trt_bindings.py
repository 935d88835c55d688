"""The TensorRT backend against the real Python bindings of 10 and of 11, see `trt_bindings` for how they get here, and
of TensorRT for RTX.

Each version runs the tests of tests/deploy/bindings in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.rtx import needs_rtx
from tests.deploy.trt_bindings import VERSIONS, UnavailableError, bindings, old_numpy, run

INSIDE = Path(__file__).parent / "bindings"
LEAST = 85
LONG = ("table_finds", "target_is_reached", "layers_are_timed", "is_explained", "several_layers")
"""Tables, targets and times by layer come of dozens of engines, by the calls that tests of single engines make: one
version is enough for these seven."""
OPTIONS = ("-q", "-p", "no:cacheprovider", "-o", "python_files=check_*.py", "-o", "addopts=")


@pytest.mark.slow
@pytest.mark.parametrize("major", sorted(VERSIONS))
def test_backend_against_the_real_bindings(major: int) -> None:
    try:
        bindings(major)
        old_numpy()
    except UnavailableError as error:
        pytest.skip(f"needs wheels from the package index: {error}")
    some = [] if major == max(VERSIONS) else ["-k", " and ".join(f"not {name}" for name in LONG)]
    done = run(major, "-m", "pytest", *OPTIONS, *some, "--ignore", INSIDE / "check_rtx.py", INSIDE, numpy=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= LEAST - 7 * bool(some), done.stdout[-2000:]


@needs_rtx
def test_running_rtx_engines_against_the_real_bindings() -> None:
    command = [sys.executable, "-m", "pytest", *OPTIONS, str(INSIDE / "check_rtx.py")]
    environment = os.environ | {"PYTHONPATH": str(INSIDE.parents[2]), "VSS_TEST_TENSORRT": "tensorrt_rtx"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= 12, done.stdout[-2000:]
