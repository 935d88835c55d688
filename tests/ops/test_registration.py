"""What holds for every op: the dispatcher's view, torch's own checks, and that what is built is what runs."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from cases import ALL, Case, on_cuda

from vss import ops

BUILT = importlib.util.find_spec("vss._C") is not None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", [case for case in ALL if not case.bench], ids=lambda case: case.id)
def test_opcheck(case: Case, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device that this torch can use")
    args = case.inputs() if device == "cpu" else on_cuda(case.inputs())
    torch.library.opcheck(getattr(torch.ops.vss, case.op).default, args)


def test_every_op_has_cases_and_at_least_one_is_timed() -> None:
    assert {case.op for case in ALL} == set(ops.NAMES)
    assert {case.op for case in ALL if case.bench} == set(ops.NAMES)


@pytest.mark.skipif(not BUILT, reason="needs the extension vss._C (pip install --no-build-isolation -e .)")
def test_a_built_extension_is_the_one_that_runs() -> None:
    info = ops.build_info()
    assert ops.load_error() is None
    assert info is not None and set(info) == {"compiler", "torch", "cpu_clones", "openmp", "cuda", "architectures"}
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    devices = {"CPU": "native", "CUDA": "native" if info["cuda"] else "reference"}
    assert ops.status() == {name: devices for name in ops.NAMES} | {"max_unpool": devices | {"CPU": "torch"}}


@pytest.mark.skipif(BUILT, reason="the extension vss._C is built")
def test_without_an_extension_every_op_is_the_reference() -> None:
    assert ops.build_info() is None
    devices = {"CPU": "reference", "CUDA": "reference"}
    assert ops.status() == {name: devices for name in ops.NAMES} | {"max_unpool": devices | {"CPU": "torch"}}


def test_the_reference_keeps_the_name_and_arguments_of_the_public_function() -> None:
    for name in ops.NAMES:
        assert callable(getattr(ops, name))
        assert callable(getattr(ops.reference, name, None) or getattr(ops.reference_pruning, name))
        assert f"vss::{name}(" in str(getattr(torch.ops.vss, name).default._schema)
