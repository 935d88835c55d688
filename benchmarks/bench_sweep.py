"""Sweeps measured: two Ray workers with one killed against the local executor, overhead per cell, memory of the driver.

    python benchmarks/bench_sweep.py --data-root CAMVID --out DIR --write   all of it, about half an hour on two cores
    python benchmarks/bench_sweep.py --quick --out DIR                      a tiny one on generated data

3 networks x 5 criteria x 2 budgets x 2 seeds. Resumable: the same command goes on, finished sweeps are not repeated. A
worker of the Ray sweep is killed with SIGKILL when a third of the cells are done. The figures: cells done, cells lost
and repeated, steps computed twice (must be 0), largest difference between the rows of both executors (must be 0 for
plans and costs; scores come from the same arithmetic with the same number of threads), machinery's share of a cell's
time, and the resident size of a driver over 100 and 1000 cells that compute nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vss.core.errors import VssError  # noqa: E402
from vss.core.files import read_json, write_json  # noqa: E402
from vss.sweep import Grid, Settings, Store, sweep  # noqa: E402

KIND, SCHEMA = "vss.bench_sweep", 1
LOG = logging.getLogger("bench_sweep")
FIT = {"batch_size": 8, "ema": 0.98, "class_weights": "log", "accelerator": "cpu", "precision": "32-true"}
NETWORKS = (
    {"name": "unet", "set": {"model.name": "unet", "model.options": {"width": 12, "depth": 3}}},
    {"name": "resnet18_seg", "set": {"model.name": "resnet18_seg", "model.options": {}}},
    {"name": "lraspp", "set": {"model.name": "lraspp_mobilenet_v3_large", "model.options": {}}},
)
QUICK = (
    {"name": "unet8", "set": {"model.name": "unet", "model.options": {"width": 8, "depth": 2}}},
    {"name": "unet4", "set": {"model.name": "unet", "model.options": {"width": 4, "depth": 2}}},
)
NOT_COMPARED = ("latency", "fps", "pixels_per_s", "speedup", "baseline_latency")


def grid(root: Path, *, quick: bool) -> Grid:
    """The sweep, on 64 images of every split: it is about the executors. Cells of about 5 s on one core."""
    fit = FIT | {"epochs": 1 if quick else 4, "lr": 0.05, "val_every": 1 if quick else 2}
    base = {
        "data": {"dataset": "camvid", "root": str(root), "size": [48, 64], "limit": 64},
        "train": fit,
        "prune": {
            "batches": 2 if quick else 8,
            "recalibrate": 2 if quick else 10,
            "budget": {"floor": 0.1, "align": 4},
        },
        "finetune": fit | {"epochs": 1, "lr": 0.03, "val_every": 1},
    }
    criteria = ["l1", "taylor"] if quick else ["l1", "taylor", "fpgm", "sirfp", "random"]
    content = {"name": "bench", "base": base, "networks": QUICK if quick else NETWORKS, "criteria": criteria,
               "budgets": [0.5] if quick else [0.6, 0.4], "seeds": [0, 1], "latency_seconds": 0.0}  # fmt: skip
    return Grid.model_validate(content)


def killer(folder: Path, cells: int, note: dict[str, Any]) -> None:
    """SIGKILL to the worker of a running cell once a third of the cells are done; once in the life of the folder."""
    flag = folder.parent / "killed.json"
    while not flag.is_file() and not note.get("stop"):
        time.sleep(0.2)
        done = {path.stem for path in (folder / "cells").glob("*.json")}
        running = [path for path in (folder / "runs").glob("*/.lock") if path.parent.name not in done]
        if len(done) < max(1, cells // 3) or not running:
            continue
        number = running[0].read_text()
        if number and Path(f"/proc/{number}").exists():
            os.kill(int(number), signal.SIGKILL)
            write_json(flag, {"cell": running[0].parent.name, "done": len(done)})


def one(chosen: Grid, folder: Path, executor: str) -> dict[str, Any]:
    """A sweep by one executor; what is done before is kept, and so are its figures."""
    record = folder.parent / f"{executor}.json"
    old = (
        read_json(record, kind=KIND, schema=SCHEMA)
        if record.is_file()
        else {"seconds": 0.0, "lost": [], "overhead": []}
    )
    lost, note = list(old["lost"]), {}
    watch = threading.Thread(target=killer, args=(folder, len(chosen.trials()), note), daemon=True)
    if executor == "ray":
        watch.start()

    def tell(what: str, name: str, detail: str) -> None:
        LOG.info("%s %s %s %s", executor, what, name, detail)
        if what == "lost":
            lost.append(name)

    try:
        summary = sweep(chosen, folder, settings=Settings(executor=executor, workers=2, threads=1), tell=tell)  # type: ignore[arg-type]
    finally:
        note["stop"] = True
    store = Store.read(folder)
    records = [store.record(cell.id) or {} for cell in store.trials()]
    found = {
        "cells": summary.total, "ok": sum(r.get("status") == "ok" for r in records), "lost": lost,
        "seconds": old["seconds"] + summary.seconds, "computed": len(store.computed()),
        "repeated": len(store.repeated()), "overhead": [_overhead(r) for r in records if r.get("steps")],
        "cell_seconds": [r["seconds"] for r in records if r.get("seconds")],
    }  # fmt: skip
    write_json(record, {"kind": KIND, "schema": SCHEMA, **found})
    return found


def _overhead(record: dict[str, Any]) -> float:
    """Share of a cell's time that none of its steps took."""
    steps = sum(step["seconds"] for step in record["steps"] if step["status"] == "ok")
    return 1 - min(1.0, steps / record["seconds"])


def differences(a: Path, b: Path) -> dict[str, float]:
    """Figure -> largest absolute difference over the cells of two sweeps."""
    first, second = Store.read(a), Store.read(b)
    worst: dict[str, float] = {}
    for cell in first.trials():
        one_row, other = ((store.record(cell.id) or {}).get("row", {}) for store in (first, second))
        for key in sorted(one_row.keys() | other.keys()):
            if not key.startswith(NOT_COMPARED):
                worst[key] = max(worst.get(key, 0.0), abs(one_row[key] - other[key]))
    return worst


DRY = """
import re, sys, tempfile
sys.path[:0] = [{tests!r}, {root!r}]
import dry_experiment
from vss.sweep import Grid, LocalExecutor, Store
from vss.sweep.run import Driver
grid = Grid.model_validate({{"name": "dry", "study": "dry", "plugins": ["dry_experiment"],
    "variants": [{{"name": str(i)}} for i in range({cells})], "seeds": [0]}})
import time
with tempfile.TemporaryDirectory() as folder:
    store = Store.make(folder + "/s", grid, about={{}})
    executor = LocalExecutor(1, threads=1)
    start = time.monotonic()
    summary = Driver(store, executor).run(grid.trials())
    seconds = time.monotonic() - start
    executor.close()
assert summary.ok == {cells}, summary
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(int(peak) / 1024, seconds / {cells})
"""


def dry(cells: int) -> dict[str, float]:
    """Peak resident MiB of a driver over so many cells that compute nothing, and seconds a cell."""
    tests = str(ROOT / "tests" / "sweep")
    script = DRY.format(tests=tests, root=str(ROOT), cells=cells)
    environment = os.environ | {"PYTHONPATH": tests}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    size, seconds = map(float, done.stdout.split())
    return {"cells": cells, "driver_mib": size, "seconds_per_cell": seconds}


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    root = arguments.data_root
    if arguments.quick and root is None:
        root = arguments.out / "street"
        if not root.is_dir():
            from vss.data.synthetic import write_street

            write_street(root, seed=1, counts={"train": 24, "val": 6, "test": 8}, size=((68, 76), (92, 100)))
    if root is None:
        raise VssError("give --data-root, the folder of CamVid, or --quick.")
    chosen = grid(root.resolve(), quick=arguments.quick)
    found = {name: one(chosen, arguments.out / name, name) for name in ("ray", "local")}
    body: dict[str, Any] = {
        "quick": arguments.quick,
        **{
            name: {k: v for k, v in row.items() if k not in ("overhead", "cell_seconds")} for name, row in found.items()
        },
        "largest_difference": differences(arguments.out / "ray", arguments.out / "local"),
        "cell_seconds_p50": statistics.median(found["local"]["cell_seconds"]),
        "overhead_share_p50": statistics.median(found["local"]["overhead"]),
        "dry": [dry(count) for count in (100, 1000)],
    }
    body["machinery_share"] = body["dry"][1]["seconds_per_cell"] / body["cell_seconds_p50"]
    LOG.info("%s", json.dumps(body, indent=1))
    if arguments.write:
        from measure import facts, write

        write("sweep", "cpu", facts("cpu"), body)


if __name__ == "__main__":
    main()
