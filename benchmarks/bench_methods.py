"""All pruning criteria on one trained network at equal MACs: accuracy before and after the same fine-tuning.

    python benchmarks/bench_methods.py --ckpt BASELINE.safetensors --data-root CAMVID --epochs 3 --write

Every row is (method, seed): the seed draws the calibration images, the shuffles of the fine-tuning and, for `random`,
the scores; budget, recipe and images are the same for all. A row is kept in the result file as soon as it is known, so
that a killed run goes on. `slimming`, `fn` and `dmcp` have their own phase before, which the row tells. A method that
cannot run says why in its row.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import vss
from vss import checkpoint, steps
from vss.config import Recipe
from vss.environment import environment
from vss.errors import VssError
from vss.files import read_json, sha256_json, write_json
from vss.prune import CRITERIA

ROOT = Path(__file__).resolve().parent.parent
KIND, SCHEMA = "vss.bench_methods", 1
SEEDED = ("random", "l1", "taylor", "fpgm", "sirfp")
LOG = logging.getLogger("bench_methods")


def recipe(arguments: argparse.Namespace, method: str, seed: int) -> Recipe:
    """The one recipe; only the criterion and the seed differ."""
    fit = {"epochs": arguments.epochs, "lr": 0.03, "ema": 0.98, "class_weights": "log", "val_every": arguments.epochs}
    budget = {"kind": "macs", "keep": arguments.macs, "align": 8, "floor": 0.2}
    return Recipe.model_validate(
        {
            "seed": seed,
            "data": {"augment": {"scale": [0.75, 1.5]}},
            "prune": {"criterion": method, "budget": budget, "batches": 10, "recalibrate": 20},
            "sparse": {"epochs": arguments.phase_epochs, "lr": 0.01},
            "dmcp": {"epochs": arguments.phase_epochs, "lr": 0.01},
            "finetune": fit,
        }
    )


def row_of(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Prune, score, fine-tune, score."""
    start = time.monotonic()
    row: dict[str, Any] = {"method": method, "seed": seed}
    job = recipe(arguments, method, seed)
    try:
        project = steps.project_of(arguments.ckpt, data_root=arguments.data_root, dataset=None, recipe=job)
        with tempfile.TemporaryDirectory() as folder:
            small, facts = steps.prune(
                project, checkpoint.load(arguments.ckpt), job.prune, Path(folder), progress=False
            )
            row |= {"macs_kept": facts["kept"]["macs"], "params_kept": facts["kept"]["params"]}
            row["miou_pruned_pct"] = steps.torch_score(project, small)["miou_pct"]
            steps.train(project, small, job.finetune, Path(folder) / "fit", progress=False)
            row["miou_finetuned_pct"] = steps.torch_score(project, small)["miou_pct"]
            row["phase_epochs"] = arguments.phase_epochs if CRITERIA[method].sparse_phase else 0
            row["labels"] = [label for plan in small.plans for label in plan.labels]
    except VssError as error:
        return row | {"status": "not_applicable", "reason": str(error)}
    return row | {"status": "ok", "seconds": time.monotonic() - start}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds, best first."""
    table = []
    for method in dict.fromkeys(row["method"] for row in rows if row["status"] == "ok"):
        mine = [row for row in rows if row["method"] == method and row["status"] == "ok"]
        line: dict[str, Any] = {"method": method, "seeds": len(mine), "macs_kept": mine[0]["macs_kept"]}
        for key in ("miou_pruned_pct", "miou_finetuned_pct"):
            values = [row[key] for row in mine]
            line |= {key: statistics.mean(values), f"{key}_std": statistics.stdev(values) if len(values) > 1 else None}
        table.append(line)
    return sorted(table, key=lambda line: -line["miou_finetuned_pct"])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--phase-epochs", type=int, default=3, help="of the sparse phase or the search, where one is")
    parser.add_argument("--seeds", type=int, default=3, help=f"for {', '.join(SEEDED)}; the others get one")
    parser.add_argument("--methods", default=",".join(CRITERIA.names()))
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results/<machine>/")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    about = environment()
    baseline = checkpoint.read(arguments.ckpt)
    setting = {"weights": baseline.weights_sha256, "macs": arguments.macs, "epochs": arguments.epochs}
    setting["phase_epochs"] = arguments.phase_epochs
    path = ROOT / "benchmarks" / "results" / about["machine"] / f"{vss.__version__}--methods.json"
    result: dict[str, Any] = {"kind": KIND, "schema": SCHEMA, "key": sha256_json(setting), "rows": []}
    if path.is_file() and arguments.write:
        old = read_json(path, kind=KIND, schema=SCHEMA)
        result = old if old["key"] == result["key"] else result
    result |= {"environment": about, "setting": setting, "baseline": baseline.info}
    methods = arguments.methods.split(",")
    jobs = [(m, 0) for m in methods] + [(m, s) for s in range(1, arguments.seeds) for m in methods if m in SEEDED]
    for method, seed in jobs:
        if any((row["method"], row["seed"]) == (method, seed) for row in result["rows"]):
            continue
        row = row_of(arguments, method, seed)
        LOG.info("%s", json.dumps(row))
        result["rows"].append(row)
        result["summary"] = summary(result["rows"])
        if arguments.write:
            write_json(path, result)
    for line in summary(result["rows"]):
        LOG.info("%s", json.dumps(line))


if __name__ == "__main__":
    main()
