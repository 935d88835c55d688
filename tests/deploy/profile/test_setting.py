"""Where a network runs: files in a precision keep the names of layers, engines are opened as said, keys tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from vss.core.errors import VssError
from vss.deploy import BACKENDS
from vss.deploy.profile.setting import Setting, SlicedVariants, table_key
from vss.deploy.profile.subject import open_subject
from vss.deploy.profile.units import usable_threads


def test_the_usual_device_is_that_of_the_backend() -> None:
    assert [Setting(name).device for name in ("onnxruntime", "torch", "tensorrt")] == ["cpu", "cpu", "cuda"]
    assert Setting("trt").backend == "tensorrt" and Setting("ort").backend == "onnxruntime"
    assert Setting("torch", "cuda").on_gpu and not Setting("torch").on_gpu


def test_threads_are_counted_on_a_cpu_alone() -> None:
    assert Setting("torch", threads=1).on_threads == 1 and Setting("onnxruntime").on_threads == usable_threads(None)
    assert Setting("torch", "cuda", threads=1).on_threads is None and Setting("tensorrt").on_threads is None


def test_int8_files_are_timed_under_the_same_names(net: Any, preprocess: Any, tmp_path: Path) -> None:
    plain, int8 = (
        open_subject(net, tmp_path, preprocess, Setting(precision=precision, threads=1), seconds=0.05)
        for precision in ("fp32", "int8")
    )
    widths = [max(8, group.channels // 2) for group in plain.groups]
    layers = {name.removesuffix(".weight") for name, p in net.named_parameters() if p.ndim == 4}
    assert layers <= set(plain.read(widths).units) & set(int8.read(widths).units)
    found = int8.read(widths)
    assert {"MaxPool:max_pool2d", "Concat:cat", "Transpose:cat", "QuantizeLinear:convolution"} <= set(found.units)
    ran = {unit: found.kernels[unit][0] for unit in layers}
    first = {unit for unit in layers if unit.startswith("encoder")}  # between two quantisers, behind a ReLU
    assert {unit for unit in first if ran[unit] == "int8"} == first and ran["classifier"] == "fp32"


@pytest.mark.parametrize(
    ("backend", "precision", "kinds"),
    [
        ("onnxruntime", "fp32", {1}),
        ("onnxruntime", "int8", {1, 2, 3}),
        ("tensorrt", "fp16", {1, 10}),
        ("tensorrt", "int8", {1, 3, 10}),
    ],
)
def test_a_file_is_in_the_precision_asked_for(
    backend: str, precision: str, kinds: set[int], variants: SlicedVariants, tmp_path: Path
) -> None:
    """onnx.TensorProto: 1 is float32, 2 and 3 (u)int8, 10 float16; the normalisation in front stays float32."""
    source = variants.write([group.channels for group in variants.groups], tmp_path / "plain.onnx")
    path = Setting(backend, precision=precision).typed(source, tmp_path / "typed.onnx")
    assert (path == source) == (precision == "fp32")
    model = onnx.load(str(path))
    assert {each.data_type for each in model.graph.initializer} & {1, 2, 3, 10} == kinds
    plain, typed = (
        BACKENDS["onnxruntime"].open(each, threads=1).run({"image": np.full((1, 48, 64, 3), 99, np.uint8)})
        for each in (source, path)
    )
    for name, value in plain.items():
        if precision != "int8":  # whose ranges are 1 on purpose
            assert np.abs(typed[name] - value).max() <= 0.02 * np.abs(value).max()


def test_settings_are_told_apart(net: Any, variants: SlicedVariants) -> None:
    settings = [Setting(threads=1), Setting(threads=1, precision="int8"), Setting("torch", threads=1, precision="fp16")]
    keys = [table_key(net, variants.groups, (48, 64), setting) for setting in settings]
    assert [key["precision"] for key in keys] == ["fp32", "int8", "fp16"]
    assert keys[0]["shapes_sha256"] == keys[1]["shapes_sha256"]
    assert keys[0]["threads"] == 1 and "build" not in keys[0]


def test_a_device_that_is_not_there_is_said(net: Any, preprocess: Any, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(VssError, match="torch sees no CUDA device; use device cpu"):
            open_subject(net, tmp_path, preprocess, Setting("torch", "cuda"))
    missing = BACKENDS["tensorrt"].unavailable()
    if missing:
        with pytest.raises(VssError, match="TensorRT"):
            open_subject(net, tmp_path, preprocess, Setting("tensorrt"))


def test_the_command_says_what_is_not_usual() -> None:
    assert Setting("torch", "cuda", "fp16").command("T") == (
        "vss lut build --ckpt CKPT --save T --backend torch --device cuda --precision fp16"
    )
    assert Setting("tensorrt", precision="int8").command("T") == (
        "vss lut build --ckpt CKPT --save T --backend tensorrt --precision int8"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_modules_on_a_gpu_add_up_to_the_graph(precision: str, net: Any, preprocess: Any, tmp_path: Path) -> None:
    setting = Setting("torch", "cuda", precision)
    subject = open_subject(net, tmp_path, preprocess, setting, seconds=0.3)
    full = [group.channels for group in subject.groups]
    reading = subject.read(full)
    assert sum(reading.units.values()) == pytest.approx(reading.total, rel=0.5)
    assert all(ms > 0 for ms in reading.units.values())
