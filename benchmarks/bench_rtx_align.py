"""What widths cost in engines of TensorRT for RTX: layers of networks cut to half of their MACs, step by step.

    python benchmarks/bench_rtx_align.py [--models unet,resnet18_seg] [--precisions fp32,fp16,int8] [--target sm86]
                                         [--write]

Each network is cut by L1 with `prune.budget.align` of 1, 2, 4, 8, 16 and auto, and built without a GPU; none is run.
Weights are random and INT8 ranges are 1: the list of layers depends on neither. Align 0 is the uncut network.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vss
from vss import deploy, models
from vss.core.environment import environment
from vss.core.files import write_json
from vss.data.preprocess import Preprocess
from vss.deploy.backends import step_for
from vss.deploy.backends.trt import verdict
from vss.deploy.backends.trt_flavour import TENSORRT_RTX
from vss.deploy.backends.trt_layers import summary
from vss.deploy.profile.setting import Setting
from vss.prune import apply_plan, make_plan
from vss.run.pruning import ops_of

ROOT = Path(__file__).resolve().parents[1]
LOG = logging.getLogger("bench_rtx_align")
SIZE, CLASSES, KEEP = (128, 160), 11, 0.5
NETWORKS: dict[str, dict[str, Any]] = {"unet": {"width": 16}, "resnet18_seg": {}}
STEPS = (0, 1, 2, 4, 8, 16)
BACKEND = "tensorrt_rtx"


class Subject:
    """A network and its cuts; each is exported once, and built once in a precision."""

    def __init__(self, name: str, folder: Path, target: str) -> None:
        torch.manual_seed(1)
        self.name, self.folder, self.target = name, folder, target
        self.network = models.build(name, num_classes=CLASSES, **NETWORKS[name]).eval()
        self.built: dict[tuple[int, str], dict[str, Any]] = {}

    def cut(self, step: int) -> nn.Module:
        if not step:
            return self.network
        budget = {"kind": "macs", "keep": KEEP, "scope": "global", "align": step}
        plan = make_plan(self.network, torch.zeros(1, 3, *SIZE), criterion="l1", budget=budget)
        return apply_plan(self.network, plan).eval()

    def layers(self, step: int, precision: str) -> dict[str, Any]:
        """Layers of an engine by type, and the version that built it."""
        if (step, precision) not in self.built:
            plain = self.folder / f"{self.name}-{step}.onnx"
            if not plain.is_file():
                deploy.export(self.cut(step), plain, size=SIZE, preprocess=Preprocess(size=SIZE), labels=True)
            typed = Setting(BACKEND, precision=precision).typed(plain, plain.with_suffix(f".{precision}.onnx"))
            found = verdict(typed, TENSORRT_RTX, (self.target,))
            if not found.built:
                raise SystemExit(f"{typed.name}: {found.reason}")
            self.built[step, precision] = {"tensorrt_rtx": found.version, "layers": summary(found.layers)}
        return self.built[step, precision]

    def rows(self, precision: str) -> Iterator[dict[str, Any]]:
        auto, why = step_for([BACKEND], [precision], ops_of(self.network.modules()))
        head = {"network": self.name, "precision": precision}
        for step in STEPS:
            yield head | {"align": step, "step": step} | self.layers(step, precision)
        yield head | {"align": "auto", "step": auto, "why": why} | self.layers(auto, precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(NETWORKS))
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["fp32", "fp16", "int8"])
    parser.add_argument("--target", default="sm86")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results/<machine>/")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = []
    with tempfile.TemporaryDirectory(prefix="vss-align-") as folder:
        for name in arguments.models:
            subject = Subject(name, Path(folder), arguments.target)
            for precision in arguments.precisions:
                for row in subject.rows(precision):
                    rows.append(row)
                    LOG.info("%s %s align %s: %d layers", name, precision, row["align"], row["layers"]["total"])
    about = environment()
    result = {"kind": "vss.bench.rtx_align", "schema": 1, "environment": about, "target": arguments.target}
    result |= {"size": list(SIZE), "keep": KEEP, "criterion": "l1", "rows": rows}
    if arguments.write:
        path = ROOT / "benchmarks" / "results" / about["machine"] / f"{vss.__version__}--rtx-align.json"
        LOG.info("%s", write_json(path, result).relative_to(ROOT))
    else:
        LOG.info("%s", json.dumps(result))


if __name__ == "__main__":
    main()
