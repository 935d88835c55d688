"""A whole file of every kind that vss reads, small, and the way the commands read it."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save

from tests.deploy.nets import conv_graph
from tests.fuzz.judge import Subject
from vss import models
from vss.core.config import load_recipe
from vss.core.files import read_array, sha256_tensors
from vss.data import read_split_file
from vss.data.images import open_rgb, read_header, read_stored_mask
from vss.deploy.backends.trt_runner import read_about
from vss.deploy.lint import lint
from vss.deploy.profile.table import LatencyTable, Sample
from vss.deploy.profile.units import Reading
from vss.deploy.quantize.layers import read_onnx
from vss.deploy.quantize.ranges import Ranges
from vss.deploy.quantize.sensitivity import Choice
from vss.models.weights import read_state_dict
from vss.prune import Plan, apply_plan, make_plan
from vss.run.page import write_page
from vss.run.runner import KIND as STEP
from vss.run.runner import Runner, write_record
from vss.ship import manifest
from vss.ship.check import _gate
from vss.sweep.grid import Grid, load_grid
from vss.sweep.store import Store
from vss.train import checkpoint

X = torch.zeros(1, 3, 16, 16)
SHA = "a" * 64


def subjects(folder: Path) -> dict[str, Subject]:
    """All kinds; `folder` takes what is made on the way."""
    torch.manual_seed(0)
    net = models.build("unet", 3, width=4, depth=1).eval()
    return _networks(net, folder) | _settings() | _tables(folder) | _bundle(folder) | _pictures() | _report(folder)


def _networks(net: Any, folder: Path) -> dict[str, Subject]:
    plan = make_plan(net, X, budget={"kind": "channels", "keep": 0.5})
    path = checkpoint.save(apply_plan(net, plan), folder / "cut.safetensors", classes=("a", "b", "c"))
    state, meta = load_file(path), _metadata(path)
    sealed = plan.save(folder / "made.json").read_bytes()
    bare = json.dumps({key: value for key, value in json.loads(sealed).items() if key != "sha256"}).encode()
    zipped, legacy, graph = io.BytesIO(), io.BytesIO(), folder / "made.onnx"
    torch.save(net.state_dict(), zipped)
    torch.save(net.state_dict(), legacy, _use_new_zipfile_serialization=False)
    graph.write_bytes(conv_graph().SerializeToString())

    def cut(file: Path) -> str:
        small = apply_plan(net, Plan.load(file))
        with torch.no_grad():
            small(X)
        return sha256_tensors(small.state_dict())

    def look(file: Path) -> Any:
        return [str(each) for each in lint(file)], read_onnx(file).SerializeToString()

    return {
        "checkpoint": Subject(path.read_bytes(), "a.safetensors", _checkpoint, kind="bytes", sealed=True),
        "checkpoint header": Subject(
            meta,
            "b.safetensors",
            _checkpoint,
            weight=0.4,
            wrap=lambda text: save(state, {"vss": text.decode(errors="replace")}),
        ),
        "plan": Subject(sealed, "plan.json", cut, sealed=True),
        "plan without hash": Subject(bare, "bare.json", cut),
        "state dict": Subject(zipped.getvalue(), "net.pt", _state, kind="bytes"),
        "state dict, legacy": Subject(legacy.getvalue(), "old.pth", _state, kind="bytes"),
        "ONNX": Subject(graph.read_bytes(), "net.onnx", look, kind="bytes"),
    }


def _metadata(path: Path) -> bytes:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return str(header["__metadata__"]["vss"]).encode()


def _checkpoint(path: Path) -> Any:
    found = checkpoint.read(path)
    with torch.no_grad():
        found.model(X)
    return sha256_tensors(found.model.state_dict()), found.plans, found.classes, found.preprocess, found.info


def _state(path: Path) -> str:
    return sha256_tensors(read_state_dict(path))


def _settings() -> dict[str, Subject]:
    recipe = load_recipe("demo").model_dump(mode="json")
    grid = {
        "name": "small", "base": {"model": {"name": "unet"}}, "set": {"train.epochs": 1}, "networks": ["unet"],
        "criteria": ["l1", "taylor"], "budgets": [0.5, "params:0.3"], "seeds": [0, 1],
    }  # fmt: skip
    whole = Grid.model_validate(grid).model_dump(mode="json")
    sweep = {"kind": "vss.sweep", "schema": 1, "key": SHA, "grid": whole, "command": "vss", "created": "now"}
    split = ([(10000, True), (10001, False)], [(20000, True)])
    return {
        "recipe": Subject(json.dumps(recipe).encode(), "r.yaml", lambda file: load_recipe(str(file)), weight=0.5),
        "recipe as YAML": Subject(
            yaml.safe_dump(recipe).encode(), "s.yaml", lambda file: load_recipe(str(file)), kind="bytes", weight=0.3
        ),
        "grid": Subject(json.dumps(grid).encode(), "g.yaml", lambda file: load_grid(file).trials(), weight=0.5),
        "sweep": Subject(json.dumps(sweep).encode(), "sweep.json", lambda file: Store.read(file.parent).trials()),
        "split file": Subject(pickle.dumps(split), "split.pyb", read_split_file, kind="bytes"),
    }


def _tables(folder: Path) -> dict[str, Subject]:
    draw = random.Random(0)
    table = LatencyTable({"device": "x"}, [["g0", 16, 1], ["g1", 24, 1]], 0.1, step=8, done=True)
    table.channels = {"a": [3.0, 16.0, {"0": [0.0, 1.0]}], "b": [16.0, 24.0, {"0": [1.0, 0.0], "1": [0.0, 1.0]}]}
    for number in range(12):
        widths = (16, 24) if number == 0 else (draw.randint(2, 16), draw.randint(3, 24))
        units = {"a": 0.01 * widths[0], "b": 0.001 * widths[0] * widths[1]}
        role: Any = "full" if number == 0 else "fit"
        table.samples.append(Sample(f"s{number}", role, widths, Reading(units, sum(units.values()) + 0.1)))
    ranges = Ranges(
        method={"method": "minmax"},
        onnx_sha256=SHA,
        values={"x": 1.5, "y": 2.0},
        calibration={"sha256": SHA, "images": 3},
    )
    choice = {"kind": "vss.choice", "schema": 1, "weights_sha256": SHA, "keep": ["a"], "facts": {"x": 1}}
    choice["kind"] = json.loads(Choice(SHA, ("a",), {}).save(folder / "c.json").read_text())["kind"]
    about = {
        "kind": "vss.engine", "schema": 1, "device": {"name": "gpu", "capability": [8, 6]}, "tensorrt": "10.1.0",
        "plan": {"hardware": "NONE", "version_compatible": False}, "bytes": 3, "sha256": SHA,
    }  # fmt: skip

    def times(file: Path) -> Any:
        found = LatencyTable.load(file)
        return found.model()(np.array([[8.0, 8.0]])).tolist(), found.full_ms(), found.done

    sealed = {"table": table.save(folder / "t.json"), "ranges": ranges.save(folder / "r.json")}
    read: dict[str, Any] = {"table": times, "ranges": Ranges.load}
    found = {}
    for name, path in sealed.items():
        data = json.loads(path.read_text())
        weight = 0.3 if name == "table" else 1.0  # a model is fitted
        found[name] = Subject(path.read_bytes(), f"{name}.json", read[name], sealed=True, weight=weight)
        del data["sha256"]
        found[f"{name} without hash"] = Subject(
            json.dumps(data).encode(), f"bare-{name}.json", read[name], weight=weight
        )
    steps, record = Runner(folder, lambda *_: None), {"key": SHA, "seconds": 1.5, "outputs": {"a": SHA}}
    record |= {"result": {"detail": "x", "row": {"miou_pct": 50.0}}}
    write_record(folder / "steps" / "train.json", STEP, record)
    old = json.dumps({"kind": STEP, "schema": 1, **record}).encode()

    def remembered(file: Path) -> Any:
        steps._path("train").write_bytes(file.read_bytes())
        steps("train", {}, [], [], lambda: {})
        steps._path("train").write_bytes(file.read_bytes())
        return steps.result("train")

    found["step record"] = Subject(steps._path("train").read_bytes(), "train.json", remembered, sealed=True)
    found["step record without hash"] = Subject(old, "old.json", remembered)
    return found | {
        "choice": Subject(json.dumps(choice).encode(), "choice.json", lambda file: Choice.load(file, SHA)),
        "engine facts": Subject(
            json.dumps(about).encode(), "m.engine.json", lambda file: read_about(file.with_name("m.engine"))
        ),
    }


def _bundle(folder: Path) -> dict[str, Subject]:
    root = folder / "bundle"
    root.mkdir()
    (root / "m.onnx").write_bytes(b"engine")
    tensor = {"dtype": "uint8", "shape": [None, 8, 8, 3]}
    body = {
        "name": "b", "row": "engine pruned", "created": "now", "vss": "0", "versions": {}, "task": "segmentation",
        "image": {"size": [8, 8], "mean": [0.5] * 3, "std": [0.2] * 3}, "inputs": {"image": tensor},
        "outputs": {"labels": {"dtype": "uint8", "shape": [None, 8, 8]}}, "classes": ["a", "b"],
        "palette": [[0, 0, 0], [255, 255, 255]], "onnx": "m.onnx",
        "engine": {"backend": "onnxruntime", "file": "m.onnx"},
        "chain": [{"what": "onnx", "sha256": hashlib.sha256(b"engine").hexdigest(), "file": "m.onnx"}],
        "gate": {"passed": True, "checks": [{"passed": True, "sentence": "equal"}]}, "metrics": {},
        "samples": {"images": [], "truth": [], "expected": []}, "triton": {}, "serving": {},
    }  # fmt: skip
    manifest.seal(root, manifest.Manifest.model_validate(body))

    def verified(file: Path) -> Any:
        (root / manifest.MANIFEST).write_bytes(file.read_bytes())
        found = manifest.read(root)
        return found, manifest.damage(root, found), _gate(found)

    whole = (root / manifest.MANIFEST).read_bytes()
    array = io.BytesIO()
    np.save(array, np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    return {
        "bundle manifest": Subject(whole, "manifest.json", verified),
        "bundle answers": Subject(array.getvalue(), "a.npy", lambda file: read_array(file).tolist(), kind="bytes"),
    }


def _pictures() -> dict[str, Subject]:
    draw = np.random.default_rng(0)
    rgb = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    mask = Image.fromarray(draw.integers(0, 5, (24, 32), dtype=np.uint8))
    files = {}
    for kind in ("PNG", "JPEG"):
        buffer = io.BytesIO()
        rgb.save(buffer, kind)
        files[kind] = buffer.getvalue()
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return {
        "image, PNG": Subject(files["PNG"], "i.png", _picture, kind="bytes", weight=0.5),
        "image, JPEG": Subject(files["JPEG"], "i.jpg", _picture, kind="bytes", weight=0.5),
        "mask": Subject(
            buffer.getvalue(),
            "m.png",
            lambda f: (read_header(f, mask=True), read_stored_mask(f).tolist()),
            kind="bytes",
        ),
    }


def _picture(path: Path) -> Any:
    return read_header(path), np.array(open_rgb(path)).tolist()


def _report(folder: Path) -> dict[str, Subject]:
    row = {"params_m": 1.0, "macs_g": 2.0, "miou_pct": 60.0, "latency_ms_p50": 3.0, "latency_ms_p99": 4.0}
    points = [{"epoch": n, "step": n, "loss": 1.0 / (n + 1), "lr": 0.1} for n in range(3)]
    check = {
        "what": "engine", "metric": "miou_pct", "baseline": 60.0, "candidate": 59.0, "drop": 1.0, "max_drop": 2.0,
        "drop_interval": [0.5, 1.5], "passed": True, "sentence": "equal",
    }  # fmt: skip
    report = {
        "kind": "vss.report", "schema": 1, "name": "r", "status": "ok", "classes": ["a", "b"],
        "rows": [{"name": "baseline", **row}, {"name": "pruned", **row}], "curves": {"train": points},
        "iou_pct": {"baseline": [50.0, 60.0]}, "palette": [[0, 0, 0], [1, 2, 3]],
        "groups": [{"id": "g", "before": 8, "after": 4}], "recipe": {"seed": 1}, "environment": {"a": "b"},
        "bench": {"end_to_end": {"sessions": {"engine pruned": {"latency_ms_p50": 3.0, "stages_ms_p50": {"a": 1.0}}}}},
        "gate": {"passed": True, "checks": [check]}, "checks": {"x": {"ok": True}},
    }  # fmt: skip
    page = folder / "report.html"
    return {
        "report": Subject(
            json.dumps(report).encode(), "report.json", lambda file: write_page(file, page).read_text(), weight=0.2
        )
    }
