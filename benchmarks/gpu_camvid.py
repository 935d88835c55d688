"""CamVid at its own size: one network trained from scratch, cut by several criteria at equal MACs, each fine-tuned.

    python benchmarks/gpu_camvid.py --data FOLDER [--model resnet50_seg] [--size 360,480] [--train-seconds 180]
                                    [--finetune-seconds 20] [--seconds-left 220] [--cpu] [--quick] [--write]

Epochs are as many as the seconds give, by the time of the first one; the same number for every criterion. The unpruned
network is fine-tuned as long, too (`control`). Half of the MACs, widths in steps of 8, test split, mIoU by one
confusion matrix. Whatever is done is kept, and the same call goes on: training first, then a row for each criterion.
`--quick` takes generated streets where there is no `--data`, a small network and seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from measure import STOPPED, facts, result_path, write

from vss.core.config import PruneConfig, Recipe
from vss.core.errors import VssError
from vss.core.files import write_json
from vss.data.synthetic import write_street
from vss.run import pruning
from vss.run.project import Project

ROOT = Path(__file__).resolve().parents[1]
LOG = logging.getLogger("gpu_camvid")
CRITERIA = ("taylor", "sirfp", "fpgm", "l1", "random")
KEEP, ALIGN, QUICK_ALIGN = 0.5, 8, 2


def project_of(arguments: argparse.Namespace, data: Path) -> Project:
    fit = {"lr": 0.03, "ema": 0.99, "class_weights": "log", "batch_size": 4 if arguments.quick else 8}
    recipe = {
        "data": {"dataset": "camvid", "root": str(data), "size": arguments.size, "augment": {"scale": [0.75, 1.5]}},
        "model": {"name": arguments.model, "options": arguments.options},
        "train": fit | {"epochs": 1},
        "finetune": fit | {"epochs": 1, "lr": 0.01},
    }
    return Project.open(Recipe.model_validate(recipe))


def fit(project: Project, model: Any, epochs: int, folder: Path, *, finetune: bool) -> float:
    """Trains in place; returns the seconds of an epoch."""
    config = project.recipe.finetune if finetune else project.recipe.train
    config = config.model_copy(update={"epochs": epochs, "val_every": epochs})
    begin = time.monotonic()
    project.train(model, config, folder, progress=False)
    return (time.monotonic() - begin) / epochs


class Trial:
    """One call: what is known, and how long there is."""

    def __init__(self, arguments: argparse.Namespace, project: Project, device: str) -> None:
        self.begin, self.arguments, self.project, self.device = time.monotonic(), arguments, project, device
        self.known = facts(device, model=arguments.model, size=list(arguments.size), keep=KEEP, align=ALIGN)
        commit = str(self.known["git"]["commit"])[:12] if self.known["git"] else "none"
        kind = "quick" if arguments.quick else device
        self.out = ROOT / "build" / "gpu" / f"camvid-{arguments.model}-{kind}-{commit}"
        self.out.mkdir(parents=True, exist_ok=True)
        path = result_path("camvid", device, self.known)
        record = json.loads(path.read_text()) if arguments.write and path.is_file() else {}
        same = bool(record) and record["environment"]["git"] == self.known["git"]
        self.rows: dict[str, Any] = record["rows"] if same else {}
        self.failed = self.stopped = False

    def left(self) -> float:
        return float(self.arguments.seconds_left - (time.monotonic() - self.begin))

    def enough(self, what: str, needs: float) -> bool:
        if self.left() >= needs:
            return True
        self.stopped = True
        LOG.info("%.0f s are left and %s needs about %.0f s; what is done stays, the same call goes on",
                 max(0.0, self.left()), what, needs)  # fmt: skip
        return False

    def keep(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        if self.arguments.write:
            write("camvid", self.device, self.known, {"rows": self.rows})
        LOG.info("%-10s %s", name, ", ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float | int)))

    def baseline(self) -> Any | None:
        """The trained network, or None where the time does not suffice to train it."""
        path, about = self.out / "baseline.safetensors", self.out / "baseline.json"
        if not about.is_file():
            seconds = min(self.arguments.train_seconds, self.left() - 20)
            if not self.enough("training", min(60.0, self.arguments.train_seconds)):
                return None
            first = time.monotonic()
            epoch = fit(self.project, self.project.build_model(), 1, self.out / "first", finetune=False)
            epochs = max(1, int((seconds - (time.monotonic() - first)) / epoch))
            model = self.project.build_model()
            epoch = fit(self.project, model, epochs, self.out / f"train-{epochs}", finetune=False)
            self.project.save(model, path)
            write_json(about, {"epochs": epochs, "epoch_s": epoch})
        trained = json.loads(about.read_text())
        model = self.project.load(path)
        if "unpruned" not in self.rows:
            self.keep("unpruned", trained | {"miou_pct": self.project.score_net(model)["miou_pct"]})
        return model

    def criterion(self, name: str, model: Any, epochs: int) -> None:
        """`control`: nothing is cut."""
        row: dict[str, Any] = {"finetune_epochs": epochs}
        small = self.project.load(self.out / "baseline.safetensors")
        if name != "control":
            budget = {"kind": "macs", "keep": KEEP, "align": QUICK_ALIGN if self.arguments.quick else ALIGN}
            config = {"criterion": name, "budget": budget, "batches": 4 if self.arguments.quick else 20}
            config |= {"recalibrate": 2 if self.arguments.quick else 20}
            begin = time.monotonic()
            small, about = pruning.prune(self.project, model, PruneConfig.model_validate(config), self.out / name,
                                         progress=False)  # fmt: skip
            row |= {"prune_s": time.monotonic() - begin, "macs_kept": about.kept["macs"]}
            row |= {"params_kept": about.kept["params"], "cut_miou_pct": self.project.score_net(small)["miou_pct"]}
        fit(self.project, small, epochs, self.out / f"{name}-finetune-{epochs}", finetune=True)
        self.keep(name, row | {"miou_pct": self.project.score_net(small)["miou_pct"]})

    def run(self) -> None:
        model = self.baseline()
        if model is None:
            return
        trained = self.rows["unpruned"]
        epochs = max(1, int(self.arguments.finetune_seconds / trained["epoch_s"]))
        needs = 0.0
        for name in (*CRITERIA, "control"):
            if name in self.rows:
                continue
            if not self.enough(name, max(needs, self.arguments.finetune_seconds)):
                return
            begin = time.monotonic()
            try:
                self.criterion(name, model, epochs)
            except (VssError, RuntimeError) as error:  # out of memory
                LOG.info("%s: %s", name, str(error).strip().partition("\n")[0])
                self.failed = True
            needs = max(needs, 1.2 * (time.monotonic() - begin))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="resnet50_seg")
    parser.add_argument("--size", default="360,480", help="height,width")
    parser.add_argument("--train-seconds", type=float, default=180)
    parser.add_argument("--finetune-seconds", type=float, default=20)
    parser.add_argument("--seconds-left", type=float, default=220, help="begin nothing for which they are too few")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="keep results/<machine>/<version>--camvid[-cuda].json")
    arguments = parser.parse_args()
    arguments.size, arguments.options = tuple(map(int, arguments.size.split(","))), {}
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("vss").setLevel(logging.WARNING)
    if arguments.quick:
        arguments.model, arguments.size, arguments.options = "unet", (48, 64), {"width": 8, "depth": 2}
        arguments.train_seconds, arguments.finetune_seconds = 2.0, 0.3
    data = arguments.data
    if data is None:
        if not arguments.quick:
            raise SystemExit("give --data, the folder of CamVid, or --quick")
        data = ROOT / "build" / "gpu" / "street"
        if not data.is_dir():
            write_street(data, size=((48, 48), (64, 64)), counts={"train": 16, "val": 4, "test": 4}, workers=0)
    device = "cpu" if arguments.cpu or not torch.cuda.is_available() else "cuda"
    try:
        trial = Trial(arguments, project_of(arguments, data), device)
        trial.run()
    except VssError as error:
        raise SystemExit(str(error)) from None
    raise SystemExit(STOPPED if trial.stopped else int(trial.failed))


if __name__ == "__main__":
    main()
