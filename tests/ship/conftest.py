"""Finished runs of small untrained networks, and their bundles: a labels engine, a logits engine, a defect engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vss import models
from vss.core.config import Recipe
from vss.core.files import sha256_artefact
from vss.core.report import write_report
from vss.deploy import BACKENDS, BuildSpec, export
from vss.deploy.backends import build_spec
from vss.prune import apply_plan, make_plan
from vss.run.project import Project
from vss.ship import ship
from vss.train.evaluate import engine_predictor
from vss.train.gate import gate

SEG = {"dataset": "camvid", "size": [32, 48]}
BASELINE = "engine baseline"
DEFECT = {"dataset": "ksdd2", "size": [128, 64]}


def make_run(
    out: Path,
    root: Path,
    *,
    defect: bool = False,
    graph: bool = True,
    passed: bool = True,
    backend: str = "onnxruntime",
) -> Path:
    """A run folder as `vss run` leaves it, of an untrained network; `graph`: pre- and post-processing in the graph."""
    data: dict[str, Any] = {**(DEFECT if defect else SEG), "root": str(root)}
    name = "defects" if defect else "street"
    recipe = Recipe.model_validate({"name": name, "data": data, "build": {"backend": backend}})
    project = Project.open(recipe)
    torch.manual_seed(0)
    options: dict[str, Any] = {"widths": [4, 6, 8, 8, 16]} if defect else {"width": 4, "depth": 2}
    name, classes = ("segdecnet", 1) if defect else ("unet", 11)
    net = models.build(name, classes, **options).eval()
    plan = make_plan(net, torch.zeros(1, 3, *data["size"]), criterion="l1", budget={"kind": "macs", "keep": 0.6})
    small = apply_plan(net, plan)
    plan.save(out / "plan.json")
    exported = export(
        small, out / "engine/a.onnx", size=tuple(data["size"]), preprocess=project.preprocess if graph else None,
        labels=graph and not defect, class_names=None if defect else project.data.class_names,
        plan_sha256=plan.sha256(),
    )  # fmt: skip
    spec = build_spec(recipe.build)
    BACKENDS[backend].build(out / "engine/a.onnx", out / "engine/a.engine.onnx", spec)
    metrics = {"miou_pct": 50.0, "pixel_acc_pct": 60.0} | ({"threshold": 0.5} if defect else {})
    if not defect:
        found = project.score(engine_predictor(BACKENDS["onnxruntime"].open(out / "engine/a.onnx"), project.preprocess))
        metrics = {key: found[key] for key in metrics}
        (out / "scores").mkdir()
        np.save(out / "scores/a.npy", found["confusion_per_image"])
    files = {"onnx": "engine/a.onnx", "engine": "engine/a.engine.onnx"} | ({} if defect else {"scores": "scores/a.npy"})
    equal = gate({"miou_pct": metrics["miou_pct"]}, {"miou_pct": metrics["miou_pct"]})
    start = {"miou_pct": metrics["miou_pct"] + (0 if passed else 5)}
    verdict = gate(start, {"miou_pct": metrics["miou_pct"]}, max_drop=1, interval=[4.0, 6.5])
    checks = [{"what": "engine equals its network", **equal}, {"what": "pruned against baseline", **verdict}]
    artefact = {"backend": backend, "spec": spec.model_dump(mode="json"), "files": files}
    row = "engine pruned"
    artefacts = {row: sha256_artefact(out, artefact)}
    if not defect:
        artefacts[BASELINE] = baseline_engine(out, project, net)
    write_report(
        out / "report.json",
        {
            "kind": "vss.report", "schema": 1, "name": recipe.name, "status": "ok", "protocol": "a generated set",
            "recipe": recipe.model_dump(mode="json"), "inputs": {"preprocess": project.preprocess.sha256},
            "rows": [{"name": row, **metrics}], "gate": {**verdict, "checks": checks},
            "classes": [] if defect else list(project.data.class_names), "palette": project.data.palette.tolist(),
            "plan": {"criterion": "l1", "budget": plan.budget}, "export": {row: exported},
            "artefacts": artefacts,
        },
    )  # fmt: skip
    return out


def baseline_engine(out: Path, project: Project, net: torch.nn.Module) -> dict[str, Any]:
    """The network before pruning as an engine of labels, which no gate judges."""
    names = {"onnx": "engine/whole.onnx", "engine": "engine/whole.engine.onnx"}
    export(
        net, out / names["onnx"], size=project.preprocess.size, preprocess=project.preprocess, labels=True,
        class_names=project.data.class_names,
    )  # fmt: skip
    BACKENDS["onnxruntime"].build(out / names["onnx"], out / names["engine"], BuildSpec())
    return sha256_artefact(out, {"backend": "onnxruntime", "spec": BuildSpec().model_dump(mode="json"), "files": names})


@pytest.fixture(scope="session")
def seg_run(street_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("seg-run"), street_root)


@pytest.fixture(scope="session")
def openvino_run(street_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := BACKENDS["openvino"].unavailable():
        pytest.skip(reason)
    return make_run(tmp_path_factory.mktemp("openvino-run"), street_root, backend="openvino")


@pytest.fixture(scope="session")
def logits_run(street_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("logits-run"), street_root, graph=False)


@pytest.fixture(scope="session")
def defect_run(defect_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("defect-run"), defect_root, defect=True)


@pytest.fixture(scope="session")
def seg_bundle(seg_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never changed by a test: copy it."""
    to = tmp_path_factory.mktemp("bundles") / "seg"
    ship(seg_run, to, samples=3)
    return to


@pytest.fixture(scope="session")
def openvino_bundle(openvino_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("bundles") / "openvino"
    ship(openvino_run, to, name="intel", samples=2)
    return to


@pytest.fixture(scope="session")
def baseline_bundle(seg_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("bundles") / "baseline"
    ship(seg_run, to, row=BASELINE, name="baseline", samples=2, force=True)
    return to


@pytest.fixture(scope="session")
def logits_bundle(logits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("bundles") / "logits"
    ship(logits_run, to, name="logits", samples=2)
    return to


@pytest.fixture(scope="session")
def defect_bundle(defect_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("bundles") / "defect"
    ship(defect_run, to, samples=2)
    return to
