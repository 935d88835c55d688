"""Every network in every form built into an engine by TensorRT for RTX, which needs no GPU; none is run.

    python benchmarks/bench_rtx.py [--models unet,segnet] [--forms fp16,dynamic] [--cuts none,half] [--again]
                                   [--work FOLDER] [--out FILE]

A cell exports one network, as it is or pruned to half the MACs, in one form, builds it for three targets through the
runtime `tensorrt_rtx`, and asks: are inputs and outputs those of the file; does every convolution run in the type of
the file; is every layer with weights found in the engine's list of layers. Weights are random and INT8 ranges are 1.
Rows go one by one into benchmarks/results/<machine>/<version>--rtx.json, and a row that is there for this TensorRT is
not made again; exports are kept in `--work`.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

import vss
from vss import deploy, models
from vss.core.environment import environment
from vss.core.errors import VssError
from vss.core.files import read_json, sha256_file, write_json
from vss.data.preprocess import Preprocess
from vss.deploy import BACKENDS, BuildPlan, BuildSpec, onnx_file, spans
from vss.deploy.backends import available, inspected
from vss.deploy.backends.trt_plan import declared, default_folder
from vss.deploy.backends.trt_runner import read_about
from vss.deploy.profile.units import LAYERS, Graph, Shape
from vss.deploy.quantize.layers import Net, read_onnx
from vss.deploy.quantize.precision import Precision, convert
from vss.deploy.quantize.qdq import observed
from vss.deploy.quantize.ranges import Ranges
from vss.prune import Budget, apply_plan, make_criterion, make_plan

ROOT = Path(__file__).resolve().parents[1]
LOG = logging.getLogger("bench_rtx")
KIND, SCHEMA = "vss.bench_rtx", 1
BACKEND = "tensorrt_rtx"
SIZE, TARGETS = (128, 160), ("sm86", "sm89", "sm120")
BATCHES, SIZES = (1, 2, 4), ((64, 96), SIZE, (256, 320))
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("unet", {"width": 16}),
    "unet_bilinear": ("unet", {"width": 16, "up": "bilinear"}),
    **{name: (name, {}) for name in ("resnet18_seg", "resnet50_seg", "deeplabv3_resnet50", "fcn_resnet50")},
    "lraspp_mobilenet_v3_large": ("lraspp_mobilenet_v3_large", {}),
    "segnet": ("segnet", {"width": 16}),
    "segdecnet": ("segdecnet", {}),
}
DEFECTS = ("segdecnet",)
FORMS: dict[str, tuple[dict[str, Any], Precision | None]] = {
    "logits": ({}, None),
    "labels": ({"labels": True, "preprocess": True}, None),
    "uint8_labels": ({"labels": True, "preprocess": True, "labels_dtype": "uint8"}, None),
    "dynamic": ({"labels": True, "preprocess": True, "dynamic_size": True}, None),
    "fp16": ({}, Precision("fp16")),
    "int8_fp32": ({}, Precision("int8", elsewhere="fp32")),
    "int8_fp16": ({}, Precision("int8", elsewhere="fp16")),
}
"""Form -> options of the export, and the precision that its float32 file is brought into: of labels, or of logits where
a network has no labels."""
CUTS = ("none", "half")
RUNS_IN = {"fp16": "Half", "int8_fp32": "Int8", "int8_fp16": "Int8"}


class Subject:
    """One network, made when something has to be exported; the same weights every time."""

    def __init__(self, name: str, cut: str, work: Path) -> None:
        self.name, self.cut = name, cut
        self.folder = work / f"{name}-{cut}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def _network(self, dynamic: bool) -> Any:
        model, options = NETWORKS[self.name]
        torch.manual_seed(0)
        options = options | ({"multiple": 32} if dynamic and model == "segnet" else {})
        net: Any = models.build(model, 1 if self.name in DEFECTS else 11, **options).eval()
        if self.cut == "none":
            return net
        plan = make_plan(
            net,
            torch.zeros(1, 3, *SIZE),
            criterion=make_criterion("l1"),
            budget=Budget(kind="macs", keep=0.5, scope="global"),
        )
        return apply_plan(net, plan)

    def file(self, form: str) -> Path:
        """The ONNX file of a form, made once."""
        path = self.folder / f"{form}.onnx"
        if path.is_file():
            return path
        options, precision = FORMS[form]
        if precision is None:
            images = Preprocess(size=SIZE)
            given = options | ({"preprocess": images} if options.get("preprocess") else {"expects": images})
            network = self._network(form == "dynamic")
            deploy.export(network, path, size=SIZE, parity_batches=(1,), **given)
            return path
        source = self.file("logits" if self.name in DEFECTS else "labels")
        ranges = None
        if precision.kind == "int8":
            values = dict.fromkeys(observed(Net(read_onnx(source))), 1.0)
            ranges = Ranges(method={"method": "minmax"}, onnx_sha256=sha256_file(source), values=values, calibration={})
        convert(source, path, precision, ranges)
        return path


def weighted_units(graph: Graph) -> set[str]:
    """The layers of the network, by module, that a file computes."""
    units = {graph.unit(node) for node in graph.nodes.values() if node.op_type in LAYERS}
    return {unit for unit in units if ":" not in unit}


def cell(subject: Subject, form: str) -> dict[str, Any]:
    """Build one form and hold the engine against its file."""
    path = subject.file(form)
    model = onnx_file.load(path)
    profile = spans(declared(model), BATCHES, SIZES)
    spec = BuildSpec(plan=BuildPlan(targets=TARGETS, profiles=(profile,)))
    engine = BACKENDS[BACKEND].build(path, subject.folder / f"{form}.engine", spec)
    about, layers = read_about(engine) or {}, (inspected(engine) or {})["Layers"]
    graph, found = Graph.of(model), set[str]()
    for layer in layers:
        found |= graph.engine_layer(layer, lambda: defaultdict(lambda: Shape(1, 1, 1, 1, 1))).keys()
    units, types = weighted_units(graph), about["convolutions"]
    engine.unlink()  # its facts stay
    asked = {name for name, each in types.items() if each["asked"] == RUNS_IN.get(form, "Float")}
    return {
        "onnx_mib": round(path.stat().st_size / 2**20, 2),
        "engine_mib": round(about["bytes"] / 2**20, 2),
        "build_s": about["build_seconds"],
        "layers": about["layers"],
        "kinds": dict(sorted(Counter(layer["LayerType"] for layer in layers).items())),
        "convolutions": {
            op: dict(sorted(Counter(each["runs"] or "unnamed" for each in types.values() if each["op"] == op).items()))
            for op in sorted({each["op"] for each in types.values()})
        },
        "other_types": sorted(
            f"{name} ({types[name]['op']}): {types[name]['asked']} asked, {types[name]['runs'] or 'unnamed'} runs"
            for name in types
            if name not in asked or types[name]["runs"] != types[name]["asked"]
        ),
        "units": len(units),
        "units_missing": sorted(units - found),
        "checks": {check["what"]: check["passed"] for check in about["checks"]},
        "sentences": [check["sentence"] for check in about["checks"]],
    }


def row_of(subject: Subject, form: str, version: str) -> dict[str, Any]:
    """One row; what TensorRT refuses is a row as well."""
    row = {"network": subject.name, "cut": subject.cut, "form": form, "tensorrt": version, "built": True, "reason": ""}
    start = time.perf_counter()
    try:
        row |= cell(subject, form)
    except VssError as error:
        row |= {"built": False, "reason": str(error)}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def cells(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(network, cut, form) in the order of the result."""
    every = itertools.product(arguments.models, arguments.cuts, arguments.forms)
    return [each for each in every if each[0] not in DEFECTS or not FORMS[each[2]][0]]


def counts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many cells were built, and of those how many agree with their files in each of the three questions."""
    built = [row for row in rows if row["built"]]
    convolutions: Counter[str] = Counter()
    for row in built:
        for op, kinds in row["convolutions"].items():
            family = row["form"].partition("_")[0] if row["form"] in RUNS_IN else "fp32"
            convolutions.update({f"{family} {op} {kind}": count for kind, count in kinds.items()})
    return {
        "cells": len(rows),
        "built": len(built),
        **{what: sum(row["checks"][what] for row in built) for what in (built[0]["checks"] if built else ())},
        "every unit found": sum(not row["units_missing"] for row in built),
        "units": sum(row["units"] for row in built),
        "units missing": sum(len(row["units_missing"]) for row in built),
        "convolutions": dict(sorted(convolutions.items())),
        "build_s": round(sum(row["build_s"] for row in built), 1),
    }


def main() -> int:
    arguments = parse()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    LOG.setLevel(logging.INFO)
    known = environment()
    out = arguments.out or ROOT / "benchmarks" / "results" / known["machine"] / f"{vss.__version__}--rtx.json"
    version = available(BACKEND).about()["version"]
    order = [(name, cut, form) for name in NETWORKS for cut in CUTS for form in FORMS]
    for name, cut, form in cells(arguments):
        rows: dict[tuple[str, str, str], dict[str, Any]] = {}
        if out.exists():
            rows = {(r["network"], r["cut"], r["form"]): r for r in read_json(out, kind=KIND, schema=SCHEMA)["rows"]}
        old = rows.get((name, cut, form))
        if old and old["built"] and old["tensorrt"] == version and not arguments.again:
            continue
        row = rows[name, cut, form] = row_of(Subject(name, cut, arguments.work), form, version)
        table = sorted(rows.values(), key=lambda r: order.index((r["network"], r["cut"], r["form"])))
        setting = {"size": SIZE, "targets": TARGETS, "batches": BATCHES, "sizes": SIZES, "backend": BACKEND}
        body = {"environment": known, "setting": setting, "counts": counts(table), "rows": table}
        write_json(out, {"kind": KIND, "schema": SCHEMA, **body})
        LOG.info("%-26s %-5s %-13s %s %5.1f s", name, cut, form, line_of(row), row["seconds"])
    made = read_json(out, kind=KIND, schema=SCHEMA)
    LOG.info("%s\n%s", "\n".join(f"{key}: {value}" for key, value in made["counts"].items()), out)
    good = [row["built"] and all(row["checks"].values()) and not row["units_missing"] for row in made["rows"]]
    return 0 if all(good) else 1


def line_of(row: dict[str, Any]) -> str:
    """One row for the log."""
    if not row["built"]:
        return f"NOT BUILT: {row['reason'][:300]}"
    failed = [what for what, passed in row["checks"].items() if not passed]
    faults = f" FAILED {failed}" * bool(failed) + f" units missing {row['units_missing']}" * bool(row["units_missing"])
    kinds = ", ".join(f"{count} {kind}" for kind, count in row["layers"].items())
    return f"{kinds}; {row['engine_mib']:.1f} MiB in {row['build_s']:.1f} s{faults}"


def parse() -> argparse.Namespace:
    def names(known: Any) -> Any:
        return lambda text: [next(name for name in known if name == each) for each in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--cuts", type=names(CUTS), default=list(CUTS))
    parser.add_argument("--forms", type=names(FORMS), default=list(FORMS))
    parser.add_argument("--again", action="store_true", help="make rows that are there already")
    parser.add_argument(
        "--work", type=Path, default=default_folder().parent / "bench_rtx", help="where exports are kept"
    )
    parser.add_argument("--out", type=Path, help="default benchmarks/results/<machine>/<version>--rtx.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
