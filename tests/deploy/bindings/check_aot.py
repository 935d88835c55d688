"""The ahead-of-time Python plugin in the real registry: created, and its kernel, grid and arguments at run time."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt as trt
from onnx import TensorProto, helper
from recording import Install
from tensorrt.plugin import _tensor

from vss.core.errors import VssError
from vss.deploy.backends import BACKENDS, BuildSpec, trt_aot
from vss.deploy.backends.trt_plan import BuildPlan
from vss.deploy.surgeon import add_bodies

if trt.__version__.startswith("10.") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("quick plugins of TensorRT 10 need numpy below 2.4", allow_module_level=True)

PTX = "".join(f".visible .entry {name}(\n)\n" for name in trt_aot.ENTRIES.values())


class Number(trt.IDimensionExpr):
    """An expression that is its value; made without a TensorRT object behind it."""

    def get_constant_value(self) -> int:
        return self.value

    def is_constant(self) -> bool:
        return True


def number(value: int) -> Number:
    made = Number.__new__(Number)
    made.value = value
    return made


class Builder:
    """The expression builder: adds, multiplies and divides numbers."""

    def constant(self, value: int) -> Number:
        return number(value)

    def operation(self, op: Any, first: Number, second: Number) -> Number:
        names = {"SUM": int.__add__, "PROD": int.__mul__, "FLOOR_DIV": int.__floordiv__}
        return number(names[op.name](first.value, second.value))


def described(dtype: Any, shape: tuple[int, ...]) -> Any:
    """A tensor as TensorRT describes it to a plugin; smallest, usual and largest shape are one."""
    made = trt.DynamicPluginTensorDesc()
    made.desc.type, made.desc.format, made.desc.scale = dtype, trt.TensorFormat.LINEAR, 1.0
    made.desc.dims = made.min = made.max = made.opt = trt.Dims(shape)
    return made


class Setter(dict):
    nbSymExprs = 0  # noqa: N815


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ptx") / "seg_argmax.ptx"
    path.write_text(PTX)
    assert trt_aot.register(trt, path) == {"VssSegArgmax"}
    assert trt_aot.register(trt, path) == {"VssSegArgmax"}  # a second build in the same process
    return path


def create(**values: int) -> Any:
    creator = trt.get_plugin_registry().get_creator("VssSegArgmax", "1", "vss")
    assert creator is not None
    kind = trt.PluginFieldType.INT32
    fields = trt.PluginFieldCollection([trt.PluginField(k, np.array([v], np.int32), kind) for k, v in values.items()])
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    return creator.create_plugin("VssSegArgmax", "vss", fields, trt.TensorRTPhase.BUILD, request)


@pytest.mark.parametrize(("dtype", "entry"), [("FLOAT", "vss_seg_argmax_f32"), ("HALF", "vss_seg_argmax_f16")])
@pytest.mark.parametrize("shape", [(2, 19, 33, 65, 132, 260), (1, 5, 8, 8, 7, 513), (3, 2, 4, 4, 16, 1024)])
def test_kernel_grid_and_arguments(
    ptx: Path, dtype: str, entry: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k, h, w, out_h, out_w = shape
    plugin = create(out_h=out_h, out_w=out_w, align_corners=1)
    assert type(plugin).__name__ == "_TemplateAOTPlugin"
    kind = getattr(trt.DataType, dtype)
    assert plugin.get_output_data_types([kind], [4]) == [trt.DataType.INT32]
    monkeypatch.setattr(_tensor.SymInt32, "__call__", lambda self: self._expr.value)
    monkeypatch.setattr(trt, "DimsExprs", lambda length: [None] * length)
    (labels,) = plugin.get_output_shapes([[number(side) for side in (n, k, h, w)]], [], Builder())
    assert [side.value for side in labels] == [n, out_h, out_w]
    descs = [described(kind, (n, k, h, w)), described(trt.DataType.INT32, (n, out_h, out_w))]
    plugin.set_tactic(0)
    launch, arguments = SimpleNamespace(), Setter()
    plugin.get_launch_params([], descs, 1, launch, arguments, Builder())
    assert launch.grid_x == n * out_h * math.ceil(out_w / 512) and launch.block_x == 128
    assert (launch.grid_y, launch.grid_z, launch.block_y, launch.shared_mem) == (1, 1, 1, 0)
    assert [arguments[index] for index in range(arguments.nbSymExprs)] == [n, k, h, w, out_h, out_w, 1]
    name, code = plugin.get_kernel([each.desc for each in descs[:1]], [each.desc for each in descs[1:]])
    assert (name, code) == (entry, PTX.encode())


def labels_model(path: Path, free: bool) -> Path:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])
    out = helper.make_tensor_value_info("labels", TensorProto.INT32, ["n", 16, 16])
    inputs, size = (["image", "image"], 0) if free else (["image"], 16)
    node = helper.make_node("VssSegArgmax", inputs, ["labels"], domain="vss", out_h=size, out_w=size, align_corners=0)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("vss", 1)]
    model = helper.make_model(helper.make_graph([node], "g", [image], [out]), opset_imports=opsets, ir_version=10)
    add_bodies(model)
    onnx.save(model, str(path))
    return path


def test_a_build_marks_the_nodes(ptx: Path, device: Any, fakes: Install, tmp_path: Path) -> None:
    plan = BuildPlan(aot=ptx)
    path = BACKENDS["tensorrt"].build(
        labels_model(tmp_path / "m.onnx", False), tmp_path / "m.engine", BuildSpec(plan=plan)
    )
    parsed = onnx.load_from_string(fakes.parsed[0])
    (node,) = parsed.graph.node
    found = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    assert found == {"out_h": 16, "out_w": 16, "align_corners": 0, "plugin_namespace": b"vss", "aot": 1}
    assert len(parsed.functions) == 0
    assert '"aot": "seg_argmax.ptx"' in path.with_name(path.name + ".json").read_text()


def test_what_is_refused(ptx: Path, device: Any, fakes: Install, tmp_path: Path) -> None:
    free, spec = labels_model(tmp_path / "m.onnx", True), BuildSpec(plan=BuildPlan(aot=ptx))
    with pytest.raises(VssError, match="has labels of a free size; ahead-of-time plugins need a fixed one"):
        BACKENDS["tensorrt"].build(free, tmp_path / "m.engine", spec)
    with pytest.raises(VssError, match=r"absent.ptx cannot be read as PTX"):
        trt_aot.read_ptx(tmp_path / "absent.ptx")
    (tmp_path / "other.ptx").write_text(".visible .entry something(\n)")
    with pytest.raises(VssError, match=r"other.ptx has no kernel vss_seg_argmax_f32"):
        trt_aot.read_ptx(tmp_path / "other.ptx")
    (tmp_path / "second.ptx").write_text(PTX)
    with pytest.raises(VssError, match=r"is registered from .*seg_argmax.ptx; build with .*second.ptx in another"):
        trt_aot.register(trt, tmp_path / "second.ptx")


def test_the_constants_are_those_of_the_kernel() -> None:
    text = (Path(__file__).parents[3] / "csrc/kernels/seg_argmax_tile.h").read_text()
    segment, pixels = (int(re.search(rf"{name} = (\d+);", text)[1]) for name in ("kSegment", "kPixels"))
    assert (segment, segment // pixels) == (trt_aot.SEGMENT, trt_aot.THREADS)
