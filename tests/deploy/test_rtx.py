"""Engines of TensorRT for RTX, built here for GPUs that are not here: two networks in six forms for two targets, and
what is written of them. The whole matrix is benchmarks/bench_rtx.py."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from tests.deploy.rtx import needs_rtx, vss_cli
from vss.core.errors import VssError
from vss.core.files import sha256_file
from vss.deploy import BACKENDS, BuildPlan, BuildSpec, export, spans
from vss.deploy.backends import available, inspected
from vss.deploy.backends.trt import failed_checks
from vss.deploy.backends.trt_layers import type_of
from vss.deploy.backends.trt_plan import declared
from vss.deploy.profile.units import LAYERS, Graph, Shape
from vss.deploy.quantize.layers import Net, read_onnx
from vss.deploy.quantize.precision import Precision, convert
from vss.deploy.quantize.qdq import observed
from vss.deploy.quantize.ranges import Ranges
from vss.models import build

pytestmark = needs_rtx
TARGETS = ("sm86", "sm120")
SIZES = ((32, 32), (32, 48), (64, 64))
PRECISIONS = {
    "fp16": Precision("fp16"),
    "int8_fp32": Precision("int8", elsewhere="fp32"),
    "int8_fp16": Precision("int8", elsewhere="fp16"),
}
FORMS = ("logits", "uint8", "dynamic", *PRECISIONS)
IMAGE = {"logits": ("FLOAT", [-1, 3, 32, 48]), "uint8": ("UINT8", [-1, 32, 48, 3])}
LABELS = {"logits": ("logits", "FLOAT", [-1, 5, 32, 48]), "uint8": ("labels", "UINT8", [-1, 32, 48])}
FREE = ("UINT8", [-1, -1, -1, 3]), ("labels", "INT32", [-1, -1, -1])
RUNS = {"fp16": {"Half": 13, "Int8": 0}, "int8_fp32": {"Half": 0, "Int8": 10}, "int8_fp16": {"Half": 3, "Int8": 10}}
"""Convolutions of the U-Net by type: 13, of which two are transposed and one is the last, which stay in float."""


@pytest.fixture(scope="module")
def version() -> str:
    return str(available("tensorrt_rtx").about()["version"])


@pytest.fixture(scope="module")
def files(exported: SimpleNamespace, preprocess: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Form -> ONNX file: logits and uint8 labels of one network, and labels of a U-Net of any size in four types."""
    folder = tmp_path_factory.mktemp("rtx")
    torch.manual_seed(0)
    source = folder / "dynamic.onnx"
    unet = build("unet", 5, width=8, depth=2).eval()
    options: dict[str, Any] = {"preprocess": preprocess, "labels": True, "dynamic_size": True}
    export(unet, source, size=(32, 48), parity_batches=(1,), **options)
    values = dict.fromkeys(observed(Net(read_onnx(source))), 1.0)
    ranges = Ranges(method={"method": "minmax"}, onnx_sha256=sha256_file(source), values=values, calibration={})
    found = {"logits": exported.logits[0], "uint8": exported.labels[0], "dynamic": source}
    for name, precision in PRECISIONS.items():
        found[name] = folder / f"{name}.onnx"
        convert(source, found[name], precision, ranges if precision.kind == "int8" else None)
    return found


@pytest.fixture(scope="module")
def engines(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Form -> engine."""
    folder, found = tmp_path_factory.mktemp("engines"), {}
    for name, path in files.items():
        profile = spans(declared(onnx.load(path)), (1, 2, 4), SIZES)
        plan = BuildPlan(targets=TARGETS, profiles=(profile,))
        found[name] = BACKENDS["tensorrt_rtx"].build(path, folder / f"{name}.engine", BuildSpec(plan=plan))
    return found


def about_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.with_name(path.name + ".json").read_text()))


@pytest.mark.parametrize("form", FORMS)
def test_an_engine_and_its_facts(form: str, files: dict[str, Path], engines: dict[str, Path], version: str) -> None:
    path = engines[form]
    about = about_of(path)
    assert path.read_bytes()[:4] == b"vtrt"
    assert (about["sha256"], about["bytes"]) == (sha256_file(path), path.stat().st_size)
    assert (about["onnx"], about["onnx_sha256"]) == (files[form].name, sha256_file(files[form]))
    assert (about["flavour"], about["targets"], about["device"]) == ("tensorrt_rtx", list(TARGETS), None)
    assert about["tensorrt"] == version and version.startswith("1.")
    assert about["timing_cache"] is None and list(about["commands"]) == ["polygraphy"]
    image, out = (IMAGE[form], LABELS[form]) if form in IMAGE else FREE
    assert about["inputs"] == {"image": dict(zip(("dtype", "shape"), image, strict=True))}
    assert about["outputs"] == {out[0]: dict(zip(("dtype", "shape"), out[1:], strict=True))}
    assert [check["what"] for check in about["checks"]] == ["inputs and outputs", "types of convolutions"]
    assert failed_checks(path) == []
    kept = dict((entry.key, entry.value) for entry in onnx.load(files[form]).metadata_props)
    assert about["metadata"] == kept and kept["vss.model"] in ("tiny", "unet")
    script = path.with_name(path.name + ".sh").read_text().splitlines()
    assert script == ["# polygraphy", about["commands"]["polygraphy"]]


def test_nothing_else_is_beside_the_engines(engines: dict[str, Path]) -> None:
    folder = next(iter(engines.values())).parent
    names = {f"{form}.engine{suffix}" for form in FORMS for suffix in ("", ".json", ".layers.json", ".sh")}
    assert {each.name for each in folder.iterdir()} == names


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_of_the_network_is_in_the_engine(
    form: str, files: dict[str, Path], engines: dict[str, Path]
) -> None:
    graph, layers = Graph.of(onnx.load(files[form])), (inspected(engines[form]) or {})["Layers"]
    assert "unknown" not in {layer["LayerType"] for layer in layers}
    found: set[str] = set()
    for layer in layers:
        found |= graph.engine_layer(layer, lambda: defaultdict(lambda: Shape(1, 1, 1, 1, 1))).keys()
    units = {graph.unit(node) for node in graph.nodes.values() if node.op_type in LAYERS}
    assert len(units) == (3 if form in IMAGE else 13) and not any(":" in unit for unit in units)
    assert units <= found
    kinds = Counter(type_of(layer) or "other" for layer in layers)
    assert about_of(engines[form])["layers"] == {"total": len(layers), **dict(sorted(kinds.items()))}


@pytest.mark.parametrize("form", PRECISIONS)
def test_convolutions_run_in_the_type_of_the_file(form: str, engines: dict[str, Path]) -> None:
    """INT8 in all but the last layer, which is not quantised, and the transposed ones, which RTX runs in float."""
    types = about_of(engines[form])["convolutions"]
    counts = Counter(each["runs"] for each in types.values())
    assert {kind: counts[kind] for kind in ("Half", "Int8")} == RUNS[form] and counts.total() == 13
    for each in types.values():
        assert each["runs"] == each["asked"] or (each["op"], each["asked"]) == ("ConvTranspose", "Int8")


def test_one_file_for_any_gpu_from_sm80_on(files: dict[str, Path], version: str, tmp_path: Path) -> None:
    runtime: Any = BACKENDS["rtx"]
    path = runtime.named(tmp_path / "a.engine", BuildPlan())
    assert path == tmp_path / f"a--sm80-and-newer-rtx{version}.engine"
    runtime.build(files["logits"], path, BuildSpec())
    assert about_of(path)["targets"] == [] and failed_checks(path) == []
    assert about_of(path)["plan"]["profiles"][0]["image"]["high"] == [8, 3, 32, 48]


def test_the_command(files: dict[str, Path], version: str, tmp_path: Path) -> None:
    words = ["--backend", "tensorrt_rtx", "--targets", "sm86,SM120", "--batch", "1,2,4"]
    said = vss_cli("build", "--onnx", files["uint8"], *words, "--save", tmp_path / "model.engine")
    path = tmp_path / f"model--sm86-sm120-rtx{version}.engine"
    about = about_of(path)
    assert f"wrote {path} and, beside it, .json, .layers.json and .sh" in said
    assert f"TensorRT for RTX {version}, for sm86, sm120: {about['bytes'] / 2**20:.2f} MiB in" in said
    assert f"{about['layers']['total']} engine layers: {about['layers']['Float']} Float" in said
    assert "ok: inputs and outputs:" in said and "ok: types of convolutions: 3 of 3 convolutions run in Float" in said
    assert "was built without its GPU and was not run" in said
    assert about["plan"]["profiles"][0]["image"]["high"] == [4, 32, 48, 3]


def test_a_failed_check_is_exit_code_1(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose layers run in another type than the file's; it stays, with what was found."""
    monkeypatch.setattr("vss.deploy.backends.trt_layers.ASKED", {"FLOAT": "Half"})
    words = ["--backend", "tensorrt_rtx", "--targets", "sm86", "--save", tmp_path / "model.engine"]
    said = vss_cli("build", "--onnx", files["logits"], *words, code=1)
    assert "FAILED: types of convolutions: 3 of 3 convolutions run in Float, not as asked: " in said
    (path,) = tmp_path.glob("*.engine")
    assert f"failed: {path} is not what logits.onnx asked for: types of convolutions" in said
    assert len(failed_checks(path)) == 1
    monkeypatch.undo()
    vss_cli("build", "--onnx", files["logits"], *words)  # a better one takes its place, and no worse one after that
    kept = path.read_bytes(), about_of(path)
    monkeypatch.setattr("vss.deploy.backends.trt_layers.ASKED", {"FLOAT": "Half"})
    assert "the engine that was there stays" in vss_cli("build", "--onnx", files["logits"], *words, code=1)
    assert (path.read_bytes(), about_of(path)) == kept


def test_an_engine_has_a_path_of_its_own(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "link.engine").symlink_to(tmp_path / "other.engine")
    with pytest.raises(VssError, match=r"link.engine is a link, and an engine and its JSON lie side by side"):
        BACKENDS["rtx"].build(files["logits"], tmp_path / "link.engine", BuildSpec(plan=BuildPlan(targets=("sm86",))))


CHECK = """
import argparse, shlex, sys
from polygraphy.tools.registry import TOOL_REGISTRY
parser = argparse.ArgumentParser()
tools = parser.add_subparsers()
for tool in TOOL_REGISTRY:
    tool.setup_parser(tools)
args, strange = parser.parse_known_args(shlex.split(sys.argv[1]))
assert strange == [], strange
args.subcommand.parse(args)
groups = {type(group).__name__: group for group in args.subcommand.arg_groups.values()}
import tensorrt_rtx
config = groups["TrtConfigArgs"]
builder, network, _ = groups["TrtLoadNetworkArgs"].load_network()
made = config.create_config(builder, network=network)
print([made.get_compute_capability(i).name for i in range(made.num_compute_capabilities)], "tensorrt" in sys.modules)
"""


def test_polygraphy_takes_the_line_of_a_dry_run(files: dict[str, Path]) -> None:
    """By its real parser, with this TensorRT, in a process of its own: it makes network and configuration of it."""
    words = ["--targets", "sm86,sm120", "--sizes", "32x32,32x48,64x64", "--workspace-mib", "512", "--no-tf32"]
    line = vss_cli("build", "--onnx", files["dynamic"], "--backend", "tensorrt_rtx", *words, "--dry-run")
    first, program, *rest = shlex.split(line)
    assert (first, program) == ("POLYGRAPHY_USE_TENSORRT_RTX=1", "polygraphy")
    done = subprocess.run(
        ["env", first, sys.executable, "-c", CHECK, shlex.join(rest)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "['SM86', 'SM120'] False"


def test_an_engine_is_not_opened_without_a_gpu(engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str, *rest: Any, **more: Any) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("vss.deploy.backends.trt_device.ctypes.CDLL", no_driver)
    with pytest.raises(VssError, match=r"^TensorRT[^.]*no libcuda.so.1 here; run this on a GPU machine\.$"):
        BACKENDS["tensorrt_rtx"].open(engines["logits"])
