"""vss.deploy.quantize.precision: networks of this package in every precision, at three batches and three sizes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from tests.deploy.nets import conv_graph
from vss.core.errors import VssError
from vss.deploy import export
from vss.deploy.backends.ort import OnnxRuntimeSession
from vss.deploy.lint import lint
from vss.deploy.quantize.layers import Net, read_onnx
from vss.deploy.quantize.precision import Precision, alone, convert, export_as, graph_of, retype
from vss.deploy.quantize.qdq import observed
from vss.deploy.quantize.ranges import Method, Ranges, measure, ranges_of
from vss.models import build

SIZES = {"unet": (32, 48), "resnet18_seg": (64, 96), "segdecnet": (64, 128)}
INT8_HALF = Precision("int8", elsewhere="fp16")
PRECISIONS = [Precision("fp32"), Precision("fp16"), Precision("int8"), INT8_HALF]


def images(batch: int, size: tuple[int, int], seed: int, *, nhwc: bool = False) -> Tensor:
    """Smooth pictures: noise of an eighth of the size, enlarged."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(batch, 3, max(2, size[0] // 8), max(2, size[1] // 8), generator=generator)
    large = nn.functional.interpolate(small, size=size, mode="bilinear")
    return (large * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous() if nhwc else (large - 0.5) * 4


def calibrated(path: Path, tensors: list[str], *, size: tuple[int, int], nhwc: bool) -> Ranges:
    feeds: Iterator[dict[str, np.ndarray]] = (
        {"image": images(2, size, seed, nhwc=nhwc).numpy()} for seed in range(100, 104)
    )
    return ranges_of(path, measure(path, feeds, tensors), Method("minmax"), calibration={"sha256": "c" * 64})


@functools.cache
def network(name: str) -> Any:
    torch.manual_seed(0)
    options = {"unet": {"width": 8, "depth": 2}, "segdecnet": {"widths": [4, 8, 8, 8, 16]}}.get(name, {})
    return build(name, 1 if name == "segdecnet" else 5, **options).eval()


@functools.cache
def exported_once(name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The float32 file of a network and its report; the sides of segmentation networks are dynamic."""
    path, segments = folder / f"{name}.onnx", name != "segdecnet"
    batches = {} if segments else {"parity_batches": [1, 3]}
    return path, export(network(name), path, size=SIZES[name], dynamic_size=segments, **batches)


def written(name: str, path: Path, precision: Precision, folder: Path) -> dict[str, Any]:
    plain, report = exported_once(name, folder)
    ranges = functools.partial(calibrated, size=SIZES[name], nhwc=False)
    return retype(graph_of(network(name)), plain, path, precision, report, ranges=ranges, images=images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where float32 files are kept, so that each network is exported once."""
    return tmp_path_factory.mktemp("fp32")


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda each: f"{each.kind}-{each.elsewhere}")
@pytest.mark.parametrize("name", ["unet", "resnet18_seg"])
def test_three_batches_and_three_sizes_pass_parity(
    name: str, precision: Precision, folder: Path, tmp_path: Path
) -> None:
    model, size = network(name), SIZES[name]
    report = written(name, tmp_path / "x.onnx", precision, folder)
    rows = report["parity"]["shapes"]
    assert len({tuple(row["input"][2:]) for row in rows}) == 3 and [row["input"][0] for row in rows] == [1, 2, 3]
    limit = {"fp32": 1e-5, "fp16": 0.01, "int8": 0.2}[precision.kind]
    assert max(row["p99_rel"] for row in rows) < limit
    assert report["inputs"]["image"]["shape"][0] == "batch"
    if precision.kind != "fp32":
        assert report["parity"]["alone_max_rel"] < 0.02
    x = images(4, (size[0] * 2, size[1]), 9)
    found = OnnxRuntimeSession(tmp_path / "x.onnx").run({"image": x.numpy()})["logits"]
    with torch.inference_mode():
        expected = model(x).numpy()
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < {"fp32": 1e-5, "fp16": 0.005, "int8": 0.1}[precision.kind]


@pytest.mark.parametrize("precision", PRECISIONS[1:], ids=lambda each: f"{each.kind}-{each.elsewhere}")
def test_segdecnet_gives_both_heads(precision: Precision, folder: Path, tmp_path: Path) -> None:
    report = written("segdecnet", tmp_path / "x.onnx", precision, folder)
    assert set(report["outputs"]) == {"decision", "seg"} and report["precision"]["kind"] == precision.kind
    assert [row["input"][0] for row in report["parity"]["shapes"]] == [1, 3]
    if precision.kind == "int8":
        assert report["precision"]["kept"] == dict.fromkeys(["seg_mask.0", "fc"], "last layer")


@pytest.mark.parametrize("name", ["unet", "resnet18_seg", "segdecnet"])
@pytest.mark.parametrize("precision", PRECISIONS[2:], ids=lambda each: each.elsewhere)
def test_int8_files_are_what_tensorrt_takes(name: str, precision: Precision, folder: Path, tmp_path: Path) -> None:
    report = written(name, tmp_path / "x.onnx", precision, folder)
    model = onnx.load(tmp_path / "x.onnx")
    assert [finding for finding in lint(model) if finding.rule.startswith("q_")] == []
    zeros = {node.input[2] for node in model.graph.node if "zeLinear" in node.op_type}
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert zeros and all(values[name].dtype == np.int8 and not values[name].any() for name in zeros)
    dtype = np.float16 if precision.elsewhere == "fp16" else np.float32
    assert {values[node.input[1]].dtype.type for node in model.graph.node if "zeLinear" in node.op_type} == {dtype}
    facts = report["precision"]
    assert len(facts["int8"]) + len(facts["kept"]) == facts["layers"] and facts["method"] == "minmax"
    assert facts["calibration"]["sha256"] == "c" * 64
    found = {each.key: each.value for each in model.metadata_props}
    assert found["vss.precision"] == "int8" and found["vss.calibration_sha256"] == "c" * 64
    assert found["vss.model"] == name and found["vss.elsewhere"] == precision.elsewhere


def test_int8_weights_take_a_quarter_and_half_a_half(preprocess: Any, tmp_path: Path) -> None:
    model = build("unet", 5, width=16, depth=3).eval()
    options: dict[str, Any] = {"preprocess": preprocess, "labels": True}
    report = export(model, tmp_path / "fp32.onnx", size=(32, 48), parity_batches=[1], **options)
    sizes = {
        each.kind: retype(
            graph_of(model, **options), tmp_path / "fp32.onnx", tmp_path / f"{each.kind}.onnx", each, report,
            ranges=functools.partial(calibrated, size=(32, 48), nhwc=True),
            images=functools.partial(images, nhwc=True),
        )["bytes"]
        for each in PRECISIONS[1:3]
    }  # fmt: skip
    assert sizes["fp16"] < 0.55 * report["bytes"] and sizes["int8"] < 0.35 * report["bytes"]


def test_residual_additions_have_one_quantised_branch(folder: Path, tmp_path: Path) -> None:
    written("resnet18_seg", tmp_path / "x.onnx", Precision("int8"), folder)
    net = Net(onnx.load(tmp_path / "x.onnx"))
    additions = [
        [net.producer[name].op_type for name in node.input]
        for node in net.nodes
        if node.op_type == "Add"
        if {net.producer[name].op_type for name in node.input if name in net.producer} & {"DequantizeLinear"}
    ]
    assert len(additions) >= 8
    assert all(sorted(makers) == ["Conv", "DequantizeLinear"] for makers in additions)


def test_layers_are_kept_by_name_and_by_place(tmp_path: Path) -> None:
    onnx.save(conv_graph(), tmp_path / "a.onnx")
    rng = np.random.default_rng(0)
    feeds = [{"image": rng.standard_normal((2, 3, 16, 16)).astype(np.float32)}]
    histograms = measure(tmp_path / "a.onnx", feeds, observed(Net(conv_graph())))
    ranges = ranges_of(tmp_path / "a.onnx", histograms, Method())
    precision = Precision("int8", keep=("main.0",), first=False, last=True)
    report = convert(tmp_path / "a.onnx", tmp_path / "b.onnx", precision, ranges)
    assert report["kept"] == {"main.0": "asked for", "stem": "first layer"}
    assert report["int8"] == ["main.1", "project", "down", "mix", "head"]
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "b.onnx").graph.initializer}
    assert stored["model.main.0.weight"] == stored["model.stem.weight"] == onnx.TensorProto.FLOAT
    assert stored["model.head.weight_quantized"] == onnx.TensorProto.INT8
    other = tmp_path / "other.onnx"
    onnx.save(conv_graph(seed=1), other)
    with pytest.raises(VssError, match=r"the ranges belong to another file than .*other\.onnx"):
        convert(other, tmp_path / "c.onnx", Precision("int8"), ranges)
    with pytest.raises(VssError, match="cannot be quantised without ranges"):
        convert(other, tmp_path / "c.onnx", Precision("int8"))
    assert not (tmp_path / "c.onnx").exists()


def test_a_scale_that_float16_cannot_hold_keeps_its_layer_out_of_int8(tmp_path: Path) -> None:
    model = conv_graph()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "model.down.weight")
    values = numpy_helper.to_array(weight).copy()
    values[2] *= 1e-4
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    path = tmp_path / "a.onnx"
    onnx.save(model, path)
    feeds = [{"image": np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)}]
    ranges = ranges_of(path, measure(path, feeds, observed(Net(model))), Method())
    report = convert(path, tmp_path / "b.onnx", INT8_HALF, ranges)
    assert report["kept"]["down"] == "a scale below what float16 can hold" and "down" not in report["int8"]
    assert "down" in convert(path, tmp_path / "c.onnx", Precision("int8"), ranges)["int8"]


def test_a_float16_quantised_file_runs_as_written(folder: Path, tmp_path: Path) -> None:
    written("unet", tmp_path / "x.onnx", INT8_HALF, folder)
    session = OnnxRuntimeSession(tmp_path / "x.onnx")
    assert session.describe()["optimisation"] == "disabled"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    x = {"image": images(1, (32, 48), 3).numpy()}
    plain = onnxruntime.InferenceSession(tmp_path / "x.onnx", options)
    assert np.array_equal(session.run(x)["logits"], plain.run(None, x)[0])
    with pytest.raises(VssError, match=r"x\.onnx .* must run as written"):
        OnnxRuntimeSession(tmp_path / "x.onnx", optimisation="extended")
    written("unet", tmp_path / "y.onnx", Precision("int8"), folder)
    assert OnnxRuntimeSession(tmp_path / "y.onnx").describe()["optimisation"] == "all"


def test_bad_requests(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VssError, match=r"unknown precision 'int4'"):
        Precision("int4")
    with pytest.raises(VssError, match=r"unknown precision beside INT8 'int8'"):
        Precision("int8", elsewhere="int8")
    plain, report = exported_once("unet", folder)
    with pytest.raises(VssError, match="int8 needs ranges"):
        retype(graph_of(network("unet")), plain, tmp_path / "x.onnx", Precision("int8"), report)
    with pytest.raises(VssError, match=r"unknown layer 'classifer'. Did you mean 'classifier'"):
        convert(plain, tmp_path / "x.onnx", Precision("fp16", ("classifer",)))
    assert list(tmp_path.iterdir()) == []
    same = convert(plain, tmp_path / "same.onnx", Precision("fp32"))
    assert same["pairs"] == same["casts"] == 0
    assert read_onnx(tmp_path / "same.onnx").graph == read_onnx(plain).graph


def test_one_call_from_a_network_to_a_typed_file(tmp_path: Path) -> None:
    model = build("unet", 5, width=4, depth=1).eval()
    report = export_as(model, tmp_path / "x.onnx", Precision("fp16"), size=(16, 24), parity_batches=[2])
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"] and report["onnx"] == "x.onnx"
    assert report["precision"]["fp32"]["bytes"] > report["bytes"] == (tmp_path / "x.onnx").stat().st_size
    assert report["parity"]["shapes"][0]["input"] == [2, 3, 16, 24]
    with pytest.raises(VssError, match="int8 needs ranges"):
        export_as(model, tmp_path / "y.onnx", Precision("int8"), size=(16, 24), parity_batches=[2])
    assert not (tmp_path / "y.onnx").exists()


def test_a_file_that_mixes_the_images_of_a_batch_is_refused(folder: Path, tmp_path: Path) -> None:
    plain, _ = exported_once("unet", folder)
    model = onnx.load(plain)
    last = model.graph.node[-1]
    last.output[0] = "inner"
    mean = onnx.helper.make_node("ReduceMean", ["inner", "axis0"], ["mean"], "n_mean", keepdims=1)
    model.graph.node.extend([mean, onnx.helper.make_node("Add", ["inner", "mean"], ["logits"], "n_mix")])
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis0"))
    onnx.save(model, tmp_path / "mixed.onnx")
    graph, shapes = graph_of(network("unet")), [(1, (32, 48)), (3, (32, 48))]
    assert alone(graph, plain, shapes, images) < 1e-4
    with pytest.raises(VssError, match="gives an image other results in a batch than alone"):
        alone(graph, tmp_path / "mixed.onnx", shapes, images)


def test_segdecnet_that_takes_pixels_is_clean_for_tensorrt(preprocess: Any, tmp_path: Path) -> None:
    path = tmp_path / "pixels.onnx"
    export(network("segdecnet"), path, size=SIZES["segdecnet"], preprocess=preprocess, parity_batches=[1])
    found = lint(onnx.load(path))
    assert [finding for finding in found if finding.rule in ("uint8_compute", "cast_uint8")] == []


@pytest.mark.parametrize("elsewhere", ["fp32", "fp16"])
def test_what_a_target_never_runs_in_int8_stays_in_floating_point(elsewhere: str, tmp_path: Path, folder: Path) -> None:
    """TensorRT for RTX runs ConvTranspose in floating point: no Q/DQ, and a reason in place of a count."""
    plain, _ = exported_once("unet", folder)
    ranges = calibrated(plain, observed(Net(read_onnx(plain))), size=SIZES["unet"], nhwc=False)
    every = convert(plain, tmp_path / "any.onnx", Precision("int8", elsewhere=elsewhere), ranges)
    precision = Precision("int8", keep=("up.1",), elsewhere=elsewhere, target="rtx")
    found = convert(plain, tmp_path / "rtx.onnx", precision, ranges)
    assert set(every["int8"]) - set(found["int8"]) == {"up.0", "up.1"} and len(found["int8"]) == len(every["int8"]) - 2
    why = "TensorRT for RTX runs it in floating point"
    assert found["kept"] == {"up.0": why, "up.1": "asked for", "classifier": "last layer"}
    net = Net(onnx.load(str(tmp_path / "rtx.onnx")))
    ups = [node for node in net.nodes if node.op_type == "ConvTranspose"]
    weights = {each.name: each.data_type for each in net.model.graph.initializer}
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert len(ups) == 2 and {weights[node.input[1]] for node in ups} == {half if elsewhere == "fp16" else whole}
    same = convert(plain, tmp_path / "trt.onnx", Precision("int8", elsewhere=elsewhere, target="tensorrt"), ranges)
    assert same["sha256"] == every["sha256"]
    with pytest.raises(VssError, match="unknown backend 'rtxx'"):
        convert(plain, tmp_path / "no.onnx", Precision("int8", target="rtxx"), ranges)
