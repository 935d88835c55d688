"""Which widths and which INT8 a runtime wants: what its fields say, for one and for several engines."""

from __future__ import annotations

import pytest

from vss.core.errors import VssError
from vss.deploy.backends import float_ops, int8_of, step_for
from vss.deploy.backends.base import Int8

UNET, RESNET = {"Conv", "ConvTranspose"}, {"Conv"}


@pytest.mark.parametrize(
    ("backend", "kinds", "ops", "step"),
    [
        ("onnxruntime", ["fp32"], RESNET, 8),
        ("ort", ["fp32", "int8"], UNET, 8),
        ("openvino", ["fp32"], UNET, 16),
        ("ov", ["fp32", "int8"], UNET, 32),
        ("torch", ["fp32"], UNET, 1),
        ("torch", ["fp32", "fp16"], UNET, 8),
        ("tensorrt", ["fp32"], UNET, 4),
        ("tensorrt", ["fp32", "fp16"], RESNET, 8),
        ("tensorrt", ["fp32", "int8"], RESNET, 32),
        ("tensorrt", ["fp32", "fp16"], set(), 1),
        ("tensorrt_rtx", ["fp32"], RESNET, 1),
        ("tensorrt_rtx", ["fp32"], UNET, 8),
        ("rtx", ["fp32", "fp16"], RESNET, 8),
        ("rtx", ["int8"], RESNET, 2),
    ],
)
def test_the_step_of_a_target(backend: str, kinds: list[str], ops: set[str], step: int) -> None:
    assert step_for([backend], kinds, ops)[0] == step


def test_several_engines_take_what_all_of_them_want() -> None:
    step, why = step_for(["torch", "onnxruntime", "ort"], ["fp32", "fp16"], RESNET)
    assert step == 8
    assert why.startswith("torch wants 1 in fp32 and 8 in fp16: ") and why.count("onnxruntime wants 8 in") == 1


def test_what_runtimes_say_of_int8() -> None:
    assert float_ops("onnxruntime") == {} and float_ops("tensorrt") == {}
    assert float_ops("rtx") == {"ConvTranspose": "TensorRT for RTX runs it in floating point"}
    assert int8_of("openvino") == int8_of("ort") == Int8(unsigned=True, weight_bits=7, one_reader=True, tied=False)
    assert int8_of("tensorrt") == int8_of("rtx") == int8_of("") == Int8()
    with pytest.raises(VssError, match="unknown backend 'ncnn'"):
        step_for(["ncnn"], ["fp32"], UNET)
