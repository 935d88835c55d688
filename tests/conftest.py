"""Fixtures that several rooms share: generated data sets, made once per session, and the real data where it is."""

from __future__ import annotations

import copy
import functools
import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from pydantic import Field
from torch._export import utils
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx._internal.exporter._registration import ONNXRegistry

from vss.data.synthetic import write_defects, write_street
from vss.deploy.bench import Timing


class Short(Timing):
    """Windows of 20 ms where none are asked for: a run is to time its engines, how exactly is tested in `deploy`."""

    window_seconds: float = Field(default=0.02, gt=0)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a test marked `slow` begin, so that no process of several ends long after the others."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_configure() -> None:
    """As `vss` does it."""
    gc.set_threshold(10_000)


def pytest_collection_finish() -> None:
    """What is imported and collected stays to the end: no garbage collection looks at it again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where torch has no CUDA device."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device that this torch can use")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is remembered of files is remembered for this session alone; processes that tests start inherit it."""
    os.environ["VSS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def torchlib_once() -> None:
    """Every `torch.onnx.export` has onnxscript parse its 500 functions anew, a third of its time: here it does once."""
    made = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(opset_version: int = TORCHLIB_OPSET) -> ONNXRegistry:
        found = copy.copy(made(opset_version))
        found.functions = {name: list(functions) for name, functions in found.functions.items()}
        return found

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)


@pytest.fixture(scope="session", autouse=True)
def composite_ops_once() -> None:
    """Every export looks up torch's 900 composite operations 66 times, once for each of two tables and every namespace
    of operations: here it does once, since no test adds one."""
    utils._materialize_cpp_cia_ops = functools.cache(utils._materialize_cpp_cia_ops)


@pytest.fixture(scope="session", autouse=True)
def short_windows() -> None:
    """Runs of the tests time their engines, which takes 8 s at least with the windows that users get."""
    sys.modules[Timing.__module__].Timing = Short


@pytest.fixture(scope="session")
def street_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A street set in the CamVid layout: 24 train, 6 val, 8 test images of about 72x96."""
    root = tmp_path_factory.mktemp("data") / "street"
    return write_street(root, seed=1, counts={"train": 24, "val": 6, "test": 8}, size=((68, 76), (92, 100)))


@pytest.fixture(scope="session")
def defect_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A defect set in the KSDD2 layout: 40 train images, 5 defective, and 16 test images, 2 defective."""
    root = tmp_path_factory.mktemp("data") / "defects"
    return write_defects(root, seed=1, counts={"train": 40, "test": 16}, size=((92, 100), (44, 48)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data: VSS_DATA, or `shared/data` beside the repository; skips where there is none."""
    given = os.environ.get("VSS_DATA")
    root = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not root.is_dir():
        pytest.skip(
            f"needs the real data: {root} does not exist; set VSS_DATA to the folder that holds camvid/ and others"
        )
    return root
