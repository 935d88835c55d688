"""What the C++ plugins are worth on TensorRT for RTX: engines of one network, with plugins and with the standard ops.

Counts layers of engines that are built for `TARGETS` on this machine and are not run: no times. The plugins are built
from plugins_trt/ against the headers of TensorRT 11.

    python benchmarks/bench_rtx_plugins.py --headers /path/to/TensorRT --write
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measure import facts, write

import vss
from vss.data import Preprocess
from vss.deploy import BACKENDS, BuildPlan, BuildSpec, export, spans
from vss.deploy.backends import inspected
from vss.deploy.backends.trt_runner import read_about
from vss.deploy.quantize.precision import ANY, GRAPH_OPTIONS, Precision, graph_of, retype

ROOT = Path(__file__).resolve().parents[1]
SIZE, TARGETS = (128, 160), ("sm86", "sm89", "sm120")
PREPROCESS = Preprocess(size=SIZE)
LABELS = {"labels": True, "preprocess": PREPROCESS}
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "segnet labels": ("segnet", {}, LABELS),
    "segnet logits": ("segnet", {}, {}),
    "segnet labels fp16": ("segnet", {"precision": "fp16"}, LABELS),
    "segnet labels free size": ("segnet", {"multiple": 32}, LABELS | {"dynamic_size": True}),
    "segnet labels pruned": ("segnet", {"pruned": True}, LABELS),
    "unet labels": ("unet", {}, LABELS),
    "unet labels fp16": ("unet", {"precision": "fp16"}, LABELS),
    "unet labels pruned": ("unet", {"pruned": True}, LABELS),
    "resnet18_seg labels": ("resnet18_seg", {}, LABELS),
}
"""Title -> network, how it is made, how it is exported."""


def library(headers: Path, folder: Path) -> Path:
    """The plugins with CPU kernels, which a builder does not tell from CUDA ones."""
    options = ["-DVSS_TENSORRT=ON", f"-DTENSORRT_ROOT={headers}", "-DVSS_TESTS=OFF"]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder, "--target", "vss_trt_plugins"], check=True, capture_output=True)
    return folder / "libvss_trt_plugins-trt11.so"


def network(name: str, made: Mapping[str, Any]) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"multiple": made["multiple"]} if "multiple" in made else {}
    width = {} if name.startswith("resnet") else {"width": 16}
    model = vss.models.build(name, num_classes=5, **width, **options).eval()
    if not made.get("pruned"):
        return model
    budget = {"kind": "macs", "keep": 0.5, "scope": "global", "align": 8}
    return vss.prune.apply_plan(
        model, vss.prune.make_plan(model, torch.zeros(1, 3, *SIZE), criterion="l1", budget=budget)
    )


def write_onnx(model: torch.nn.Module, onnx: Path, kind: str, options: Mapping[str, Any]) -> None:
    """Numbers are compared with torch in float32 alone: those of a float16 network with random weights say nothing."""
    report = export(model, onnx, size=SIZE, **options)
    if kind != "fp32":
        graph = graph_of(model, **{name: options[name] for name in GRAPH_OPTIONS if name in options})
        retype(graph, onnx, onnx, Precision(kind), report, tolerance=ANY)


def engine(onnx: Path, libraries: tuple[Path, ...]) -> dict[str, Any]:
    """Layers by kind and size of one engine."""
    import onnx as package

    inputs = {
        value.name: [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in package.load(str(onnx)).graph.input
    }
    free = any(isinstance(side, str) for dims in inputs.values() for side in dims[1:])
    profile = spans(inputs, (1, 2, 4), [(64, 96), SIZE, (256, 320)] if free else None)
    plan = BuildPlan(targets=TARGETS, plugins=libraries, profiles=(profile,))
    path = BACKENDS["tensorrt_rtx"].build(onnx, onnx.with_suffix(".engine"), BuildSpec(plan=plan))
    layers = (inspected(path) or {})["Layers"]
    about = read_about(path) or {}
    return {
        "layers": len(layers),
        "plugins": sum(layer["LayerType"] == "custom_layer" for layer in layers),
        "transposes": sum(layer["Name"].startswith("__myl_Tran_") for layer in layers),
        "kinds": dict(collections.Counter(layer["LayerType"] for layer in layers).most_common()),
        "mib": round(about["bytes"] / 2**20, 2),
        "ops": about["plugins"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--headers", type=Path, required=True, help="folder with include/ of TensorRT 11")
    parser.add_argument("--write", action="store_true", help="keep the file")
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory(prefix="vss-plugins-") as name:
        folder = Path(name)
        plugins = library(options.headers, folder / "build")
        for title, (net, made, options_of_export) in ROWS.items():
            model, found = network(net, made), {}
            for form, libraries in {"native": (), "plugins": (plugins,)}.items():
                onnx = folder / f"{form}.onnx"
                wanted = options_of_export | ({"plugins": True} if libraries else {})
                write_onnx(model, onnx, made.get("precision", "fp32"), wanted)
                found[form] = engine(onnx, libraries)
            rows[title] = found | {"difference": found["plugins"]["layers"] - found["native"]["layers"]}
            print(title, {form: found[form]["layers"] for form in found}, found["plugins"]["ops"], flush=True)
    if options.write:
        print("wrote", write("rtx_plugins", "cpu", facts("cpu"), {"targets": TARGETS, "size": SIZE, "rows": rows}))


if __name__ == "__main__":
    main()
