"""Fixtures that several rooms share: generated data sets, made once per session, and the real data where it is."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
import torch
from torch.onnx._internal._lazy_import import onnxscript_apis

from vss.data.synthetic import write_defects, write_street


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
    """Every `torch.onnx.export` has onnxscript parse its 500 functions anew, a fifth of its time: here it does once."""
    parse = onnxscript_apis.__getattr__
    onnxscript_apis.get_torchlib_ops = functools.cache(lambda: parse("get_torchlib_ops")())


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
