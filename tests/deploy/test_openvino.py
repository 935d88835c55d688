"""vss.deploy.backends.ov: OpenVINO on files good and bad, its cache, and what it says of its layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from tests.deploy.marks import needs_openvino
from tests.deploy.rtx import vss_cli
from vss.core.config import BuildConfig, OpenVINOConfig
from vss.core.errors import VssError
from vss.core.files import sha256_file
from vss.deploy import BACKENDS, Binding, BuildPlan, BuildSpec, onnx_file
from vss.deploy.backends import build_spec
from vss.deploy.backends.onnx_runner import (
    EngineError,
    OpenVINOEngine,
    check_precision,
    flat_argmax,
    openvino_core,
)
from vss.deploy.backends.ov import int8_by
from vss.deploy.backends.trt_flavour import FLAVOURS
from vss.deploy.backends.trt_plan import refuse_unsigned
from vss.deploy.profile.units import Graph
from vss.deploy.quantize.layers import Net
from vss.deploy.quantize.precision import Precision, convert
from vss.deploy.quantize.qdq import observed
from vss.deploy.quantize.ranges import Ranges

OV, ORT = BACKENDS["openvino"], BACKENDS["onnxruntime"]
pytestmark = needs_openvino


def test_bindings_and_numbers(exported: SimpleNamespace, tiny: Any) -> None:
    session = OV.open(exported.logits[0], threads=1)
    assert session.inputs == {"image": Binding((None, 3, 32, 48), "float32")}
    assert session.outputs == {"logits": Binding((None, 5, 32, 48), "float32")}
    for batch in (1, 2, 3, 1):
        x = torch.randn(batch, 3, 32, 48)
        assert np.abs(session.run({"image": x.numpy()})["logits"] - tiny(x).detach().numpy()).max() < 1e-5
    about = session.describe()
    assert (about["backend"], about["device"], about["precision"], about["threads"]) == ("openvino", "CPU", "f32", 1)
    assert about["artefact_sha256"] == exported.logits[1]["sha256"]
    assert about["metadata"]["vss.model"] == "tiny"
    assert OV.open(exported.labels[0]).inputs == {"image": Binding((None, 32, 48, 3), "uint8")}
    with pytest.raises(VssError, match=r"input 'image' takes float32 \(any, 3, 32, 48\), got float32 \(1, 3, 31, 48\)"):
        session.run({"image": np.zeros((1, 3, 31, 48), np.float32)})


def test_signals_are_handled_after_sessions_were_closed(exported: SimpleNamespace) -> None:
    """In a process of its own, which OpenVINO's Cores would end: one a session, closed in the order of opening."""
    code = f"""
import gc, os, signal
from pathlib import Path
from vss.deploy.backends.onnx_runner import OpenVINOEngine
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
first, second = (OpenVINOEngine(Path({str(exported.logits[0])!r}), threads=1) for _ in range(2))
for name in ("first", "second"):
    del globals()[name]
    gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_more_batch_sizes_than_have_a_model_of_their_own(exported: SimpleNamespace, tiny: Any) -> None:
    engine = OpenVINOEngine(exported.logits[0], threads=1, most=2)
    x = torch.randn(4, 3, 32, 48)
    for batch in (1, 2, 3, 4, 1, 2):
        found = engine({"image": x[:batch].numpy()}, ["logits"])["logits"]
        assert np.abs(found - tiny(x[:batch]).detach().numpy()).max() < 1e-5
    assert len(engine._requests) == 3


def test_labels_and_the_logits_behind_them(exported: SimpleNamespace) -> None:
    path, image = exported.labels[0], np.random.default_rng(1).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    ours, theirs = (BACKENDS[name].open(path, threads=1) for name in ("openvino", "onnxruntime"))
    assert (ours.run({"image": image})["labels"] == theirs.run({"image": image})["labels"]).mean() > 0.999
    (mine,), (other,) = ours.probe({"image": image}).values(), theirs.probe({"image": image}).values()
    assert np.abs(mine - other).max() < 1e-4
    assert BACKENDS["openvino"].open(exported.logits[0]).probe({"image": image}) == {}


def test_the_argmax_of_rows_is_that_of_maps() -> None:
    """Sides that are free, and scores in whole numbers so that most pixels have a tie: the first channel wins."""
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 7, "h", "w"])
    labels = helper.make_tensor_value_info("labels", TensorProto.INT64, ["n", "h", "w"])
    nodes = [helper.make_node("ArgMax", ["scores"], ["labels"], axis=1, keepdims=0)]
    model = helper.make_model(helper.make_graph(nodes, "labels", [scores], [labels]))
    graph = flat_argmax(openvino_core().read_model(model.SerializeToString()))
    (top,) = [node for node in graph.get_ordered_ops() if node.get_type_name() == "TopK"]
    assert top.input_value(0).partial_shape.rank == 3
    assert str(graph.output(0).partial_shape[0]) == "?"
    compiled = openvino_core().compile_model(graph, "CPU")
    for shape in ((1, 7, 5, 9), (3, 7, 8, 4), (2, 7, 1, 1)):
        x = np.random.default_rng(0).integers(0, 3, shape).astype(np.float32)
        assert (compiled({"scores": x})["labels"] == x.argmax(1)).all()


def test_an_artefact_names_its_runtime(exported: SimpleNamespace, tmp_path: Path) -> None:
    source, out = exported.labels[0], tmp_path / "a.onnx"
    OV.build(source, out, build_spec(BuildConfig(backend="ov")))
    assert (onnx_file.runtime_of(out), onnx_file.runtime_of(source)) == ("openvino", "onnxruntime")
    said = json.loads(onnx_file.metadata(out)[onnx_file.RUNTIME])
    assert said == {"backend": "openvino", "device": "CPU", "precision": "f32"}
    assert onnx_file.metadata(out).items() > onnx_file.metadata(source).items()
    assert OV.open(out).images == OV.open(source).images
    again = BACKENDS["onnxruntime"].build(out, tmp_path / "b.onnx", BuildSpec())
    assert onnx_file.metadata(again) == onnx_file.metadata(source)


def test_layers_and_their_times_name_the_nodes_of_the_file(exported: SimpleNamespace) -> None:
    path, feed = exported.labels[0], {"image": np.zeros((1, 32, 48, 3), np.uint8)}
    session, graph = OV.open(path, threads=1), Graph.of(onnx.load(path))
    times = session.profile(feed, 3)
    layers = {each["Name"]: each for each in session.layers(feed)["Layers"]}
    assert times.keys() <= layers.keys()
    assert all(len(each) == 3 and min(each) >= 0 for each in times.values())
    units = {unit for name in times for unit in graph.engine_layer(layers[name], dict)}
    convolutions = {graph.unit(node) for node in graph.nodes.values() if node.op_type == "Conv"}
    assert convolutions
    assert convolutions <= units


# -- bad input --------------------------------------------------------------------------------------------------------


def test_ops_that_it_has_not_are_named(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 4, 4]) for name in ("x", "z")]
    nodes = [
        helper.make_node("Foo", ["x"], ["y"], domain="my.domain"),
        helper.make_node("Bar", ["y"], ["z"], domain="my.domain"),
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.domain", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "a.onnx")
    with pytest.raises(VssError, match=r"OpenVINO cannot do my\.domain\.Bar and my\.domain\.Foo of .*a\.onnx; use"):
        OV.build(tmp_path / "a.onnx", tmp_path / "b.onnx", BuildSpec())
    assert [each.name for each in tmp_path.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"{}"])
def test_damaged_files_are_one_sentence(exported: SimpleNamespace, tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(damage(exported.logits[0].read_bytes()))
    with pytest.raises(VssError, match=r"bad\.onnx") as caught:
        OV.open(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": 0}, "threads is 0; expected 1 or more"),
        ({"device": "GPU.3"}, r"OpenVINO sees no device GPU\.3 here \(build\.openvino\.device\); it has CPU"),
    ],
)
def test_bad_options(exported: SimpleNamespace, options: dict, words: str) -> None:
    with pytest.raises(VssError, match=words):
        OV.open(exported.logits[0], **options)


def test_a_precision_that_the_processor_has_not_is_refused() -> None:
    core = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8", "BIN", "BF16"])
    check_precision(core, "CPU", "bf16")
    with pytest.raises(EngineError, match=r"this CPU computes in BF16 and FP32 and not in f16 \(build\.openvino\.prec"):
        check_precision(core, "CPU", "f16")


def test_an_int8_file_of_another_runtime_is_not_built(
    exported: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = exported.labels[0]
    values = dict.fromkeys(observed(Net(onnx.load(source))), 4.0)
    ranges = Ranges(method={"method": "minmax"}, onnx_sha256=sha256_file(source), values=values, calibration={})
    for target in ("tensorrt", "onnxruntime"):
        convert(source, tmp_path / f"{target}.onnx", Precision("int8", target=target), ranges)
    with pytest.raises(VssError, match=r"as TensorRT wants it, and OpenVINO computes such files wrong .* vss export"):
        OV.build(tmp_path / "tensorrt.onnx", tmp_path / "built.onnx", BuildSpec())
    assert not (tmp_path / "built.onnx").exists()
    for backend in (OV, ORT):
        backend.build(tmp_path / "onnxruntime.onnx", tmp_path / "built.onnx", BuildSpec())
    assert not caplog.records
    OV.open(tmp_path / "tensorrt.onnx")
    assert "its answers here are not what it says" in caplog.text
    ORT.build(tmp_path / "tensorrt.onnx", tmp_path / "built.onnx", BuildSpec())
    assert "onnxruntime computes it right, but convolutions in float32" in caplog.text
    for name in ("tensorrt", "tensorrt_rtx"):
        with pytest.raises(VssError, match=rf"as uint8, for ONNX Runtime .* --backend {name} \(in a recipe"):
            refuse_unsigned(tmp_path / "onnxruntime.onnx", onnx.load(tmp_path / "onnxruntime.onnx"), FLAVOURS[name])


def test_specs_of_other_runtimes_are_refused(exported: SimpleNamespace, tmp_path: Path) -> None:
    for spec in (BuildSpec(plan=BuildPlan()), BuildSpec(optimise="basic")):
        with pytest.raises(VssError, match="openvino takes a device and a precision alone"):
            OV.build(exported.labels[0], tmp_path / "a.onnx", spec)
    with pytest.raises(VssError, match="a device for openvino; onnxruntime takes optimise alone"):
        BACKENDS["ort"].build(exported.labels[0], tmp_path / "a.onnx", BuildSpec(openvino=OpenVINOConfig()))
    assert "--compute is for --backend openvino, and the backend is onnxruntime" in vss_cli(
        "build", "--onnx", exported.labels[0], "--save", tmp_path / "a.onnx", "--compute", "bf16", code=2
    )


def test_metadata_that_is_no_runtime_is_a_sentence(exported: SimpleNamespace, tmp_path: Path) -> None:
    model = onnx.load(exported.labels[0])
    cases = {"{": "vss.runtime", "[]": "build it again", '{"backend": "openvino", "speed": 1}': "speed"}
    for text, words in cases.items():
        onnx_file.set_metadata(model, onnx_file.RUNTIME, text)
        onnx.save(model, tmp_path / "a.onnx")
        assert words in vss_cli("bench", "--ckpt", tmp_path / "a.onnx", code=2)


def test_without_openvino_the_sentence_says_what_to_install(
    exported: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert 'run: pip install "vss[openvino]"' in str(OV.unavailable())
    with pytest.raises(VssError, match=r"the runtime openvino needs openvino .* run: pip install"):
        OV.open(exported.logits[0])


def test_what_a_processor_multiplies_int8_with() -> None:
    flags = {"amx_int8": "AMX", "avx512_vnni": "VNNI", "avx512bw": "AVX-512 without", "avx2": "AVX2 without"}
    for flag, name in flags.items():
        assert int8_by(frozenset({flag, "avx2"})).startswith(name)
    assert int8_by(frozenset({"sse4_1"})).startswith("no instructions")


# -- cache ------------------------------------------------------------------------------------------------------------


def blobs(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.rglob("*.blob")}


def test_compiled_models_are_kept_and_made_again_where_they_are_damaged(
    exported: SimpleNamespace, tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x, cache = torch.randn(1, 3, 32, 48), tmp_path / "cache"
    wanted = tiny(x).detach().numpy()

    def found() -> np.ndarray:
        session = OV.open(exported.logits[0], threads=1, cache=cache)
        return np.asarray(session.run({"image": x.numpy()})["logits"])

    assert np.abs(found() - wanted).max() < 1e-5
    first = blobs(cache)
    assert len(first) == 1
    assert np.abs(found() - wanted).max() < 1e-5
    assert blobs(cache) == first
    assert not caplog.records
    (path,) = cache.rglob("*.blob")
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 2, len(data) - 64, 97):  # weights, which nobody else checks
        data[place] ^= 0x55
    path.write_bytes(data)
    assert np.abs(found() - wanted).max() < 1e-5
    assert "is not as it was written; it is compiled again" in caplog.text
    (cache.rglob("hashes.json").__next__()).write_text("{")
    assert np.abs(found() - wanted).max() < 1e-5
    assert len(blobs(cache)) == 1


def test_the_cache_of_another_version_is_left_alone(
    exported: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OV.open(exported.logits[0], cache=tmp_path)
    first = blobs(tmp_path)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2030.1")
    OV.open(exported.logits[0], cache=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "openvino-2030.1"
    assert len(list(tmp_path.rglob("*.blob"))) == 2 * len(first)


def test_a_cache_that_cannot_be_written_is_a_sentence(exported: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VssError, match="file"):
        OV.open(exported.logits[0], cache=tmp_path / "file")
