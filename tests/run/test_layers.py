"""Engine layers without a GPU: kernels that widths cost are planted and found by name, and a real compiler is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vss
from tests.command import cli, refused
from tests.run.test_explain import write_run
from vss.core.errors import VssError
from vss.core.files import sha256_file
from vss.deploy.backends import available
from vss.deploy.backends.base import BuildSpec
from vss.deploy.backends.trt import verdict
from vss.deploy.backends.trt_layers import type_of
from vss.deploy.backends.trt_plan import BuildPlan
from vss.deploy.onnx_file import load
from vss.deploy.quantize.layers import Net, read_onnx
from vss.deploy.quantize.precision import Precision, convert
from vss.deploy.quantize.qdq import observed
from vss.deploy.quantize.ranges import Ranges
from vss.prune import apply_plan, make_plan
from vss.run.layers import Engine, explain_layers, figures, work_of

SIZE = (32, 48)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose U-Net was cut to half of its MACs, to any widths."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    net = vss.models.build("unet", num_classes=5, width=16, depth=1).eval()
    plan = make_plan(net, torch.zeros(1, 3, *SIZE), criterion="l1", budget={"kind": "macs", "keep": 0.5})
    plan.save(folder / "plan.json")
    for name, each in (("baseline", net), ("finetuned", apply_plan(net, plan).eval())):
        path = folder / "engine" / f"{name}.onnx"
        vss.deploy.export(each, path, size=SIZE, labels=True, parity_batches=(1,))
    write_run(folder)
    return folder


def layer(name: str, kind: str, *nodes: str) -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Metadata": "".join(f"[ONNX Layer: {node}]" for node in nodes)}


def test_planted_kernels_are_named_with_a_width_without_them(run: Path) -> None:
    model = load(run / "engine" / "finetuned.onnx")
    node = {each.input[1].removeprefix("model.").removesuffix(".weight"): each for each in model.graph.node
            if each.op_type in ("Conv", "ConvTranspose")}  # fmt: skip
    up, first, second = (node[name].name for name in ("up.0", "encoder.0.0.0", "encoder.0.1.0"))
    relu = next(each.name for each in model.graph.node if each.input[0] == node["encoder.0.0.0"].output[0])
    deconv = layer(f"{up}_myl0_2", "deconv", up)
    whole = [layer(f"{first}_myl0_1", "correlation", first, relu), layer("a", "correlation", second), deconv]
    torn = [layer(f"{first}_myl0_1", "correlation", first), layer("__myl_Relu_myl0_9", "kgen", relu), whole[1]]
    torn += [layer("__myl_ReplConc_myl0_1", "kgen", up), deconv, layer("__myl_SlicMove_myl0_3", "kgen", up)]
    half = [*whole[:2], layer("__myl_SlicMove_myl0_3", "kgen", up), deconv]

    def engine(layers: list[dict[str, Any]]) -> Engine:
        from vss.deploy.profile.units import unit_shapes

        return Engine("1", layers, model, lambda: unit_shapes(model, 1))

    found = figures(engine(whole), engine(torn), {2: engine(half), 8: engine(whole)})
    [row] = [each for each in found["rows"] if each["unit"] == "up.0"]
    assert (row["kernels_before"], row["kernels_after"], sorted(row["extra"])) == (1, 3, ["pad", "slice"])
    assert row["better"] == f"{row['cin']} -> {row['cout']} (multiples of 8)"
    assert found["fusions_lost"] == [{"node": "Relu:relu", "layer": "encoder.0.0.0"}]
    assert found["layers_rounded"] == {"2": 4, "8": 3}
    assert figures(engine(whole), engine(whole), {})["rows"] == []


@pytest.mark.parametrize(
    ("name", "kind", "work"),
    [
        ("__myl_ReplConc_myl0_12", "kgen", "pad"),
        ("__myl_SlicMove_myl0_3", "kgen", "slice"),
        ("__myl_Move_myl0_3", "kgen", "copy"),
        ("__myl_ReshTran_myl0_3", "kgen", "transpose"),
        ("__myl_AddRelu_myl0_3", "kgen", "AddRelu"),
        ("node_Conv_5_myl0_3", "correlation", "correlation"),
    ],
)
def test_what_a_kernel_does(name: str, kind: str, work: str) -> None:
    assert work_of({"Name": name, "LayerType": kind}) == work


def test_a_real_compiler_names_the_layers_and_the_widths(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13 (Linux x86_64)")
    report = tmp_path / "layers.json"
    done = cli("explain", run, "--backend", "rtx", "--precision", "fp16", "--report", report, "--targets", "sm89")
    assert done.returncode == 0, done.stderr
    assert "No engine was run and no time was measured" in " ".join(done.stdout.split())
    found = json.loads(report.read_text())
    rows = {row["unit"]: row for row in found["rows"]}
    assert "slice" in rows["up.0"]["extra"]
    assert all(row["better"].endswith(("(multiples of 2)", "(multiples of 8)")) for row in found["rows"])
    assert found["layers_rounded"]["8"] == found["layers_before"]["total"] < found["layers_after"]["total"]
    assert found["layers_before"]["Half"] > 10 and found["targets"] == ["sm89"]


def test_engines_of_the_run_are_read_and_not_built_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13 (Linux x86_64)")
    from vss.run import layers

    def refuse(*_: object) -> None:
        raise AssertionError("an engine was built")

    spec = BuildSpec(plan=BuildPlan(targets=("sm86",)))
    for name in ("baseline", "finetuned"):
        path = run / "engine" / f"{name}.onnx"
        available("tensorrt_rtx").build(path, path.with_name(f"{name}.fp32.tensorrt_rtx.engine"), spec)
    monkeypatch.setattr(layers, "verdict", refuse)
    monkeypatch.setattr(layers, "STEPS", ())
    found = explain_layers(run, "tensorrt_rtx")
    assert found["layers_before"]["Float"] > 10 and found["rows"]


def test_bad_input_is_a_sentence(run: Path) -> None:
    with pytest.raises(VssError, match="--backend is onnxruntime; vss explain reads layers"):
        explain_layers(run, "onnxruntime")
    with pytest.raises(VssError, match=r"--targets sm90 \(H100, H200\) is served by TensorRT"):
        explain_layers(run, "tensorrt_rtx", targets=["sm90"])
    refused(cli("explain", run, "--targets", "sm86"), "--targets is for --backend tensorrt_rtx")
    refused(cli("explain", run, "--backend", "rtx", "--seconds", "2"), "--seconds is for times")


def test_an_int8_file_for_the_target_has_fewer_kernels(run: Path, tmp_path: Path) -> None:
    """A quantised ConvTranspose runs in floating point and its weight is dequantised in every run."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13 (Linux x86_64)")
    plain = run / "engine" / "baseline.onnx"
    ranges = Ranges(
        method={"method": "minmax"},
        onnx_sha256=sha256_file(plain),
        values=dict.fromkeys(observed(Net(read_onnx(plain))), 1.0),
        calibration={},
    )
    layers, facts = {}, {}
    for target in ("", "tensorrt_rtx"):
        path = tmp_path / f"{target or 'any'}.onnx"
        facts[target] = convert(plain, path, Precision("int8", target=target), ranges)
        layers[target] = verdict(path).layers
    assert len(facts[""]["int8"]) - len(facts["tensorrt_rtx"]["int8"]) == 1  # up.0
    assert len(layers["tensorrt_rtx"]) < len(layers[""])
    for found in layers.values():
        types = [type_of(each) for each in found if each["LayerType"] == "deconv"]
        assert types == ["Float"]
        assert [type_of(each) for each in found if each["LayerType"] == "correlation"].count("Int8") >= 5
