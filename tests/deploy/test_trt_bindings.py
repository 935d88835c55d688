"""The TensorRT backend against the real Python bindings of 10 and of 11; see `trt_bindings` for how they get here.

Each version runs the tests of tests/deploy/bindings in a process of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.deploy.trt_bindings import VERSIONS, UnavailableError, bindings, old_numpy, run

INSIDE = Path(__file__).parent / "bindings"
LEAST = 85


@pytest.mark.parametrize("major", sorted(VERSIONS))
def test_backend_against_the_real_bindings(major: int) -> None:
    try:
        bindings(major)
        old_numpy()
    except UnavailableError as error:
        pytest.skip(f"needs wheels from the package index: {error}")
    options = ["-q", "-p", "no:cacheprovider", "-o", "python_files=check_*.py", "-o", "addopts="]
    done = run(major, "-m", "pytest", *options, INSIDE, numpy=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) >= LEAST, done.stdout[-2000:]
