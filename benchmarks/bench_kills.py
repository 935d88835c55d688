"""Kill -9 at random times over run, train, sweep, export, ship and lut build: the same figures at the end as unbroken.

    python benchmarks/bench_kills.py --write

Every command is first done whole, in a folder of its own, and timed. Then it is started again and again in another
folder and killed with all its processes at a moment drawn over that time. Each start goes on from what the killed one
left, or from nothing where it had finished; the last runs to its end. Compared are weights, plans, scores, ONNX files,
hashes of the bundle, and of a latency table what was measured, but no times. What is left half-written is a fault.
Children are forks of one process that has imported everything, so that a kill hits work and no imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import vss  # (threads are fixed first)
import vss.cli.main
import vss.run.job
import vss.ship
import vss.sweep.prune
import vss.train.fit
from vss.core.environment import environment
from vss.core.files import TEMPORARY, sha256_file, write_json
from vss.data import write_street
from vss.train.checkpoint import read

ROOT = Path(__file__).resolve().parent.parent
FIT = {"epochs": 2, "batch_size": 4, "lr": 0.05, "precision": "32-true", "accelerator": "cpu"}
RECIPE = {
    "name": "tiny",
    "data": {"dataset": "camvid", "root": "data", "size": [48, 64]},
    "model": {"name": "unet", "options": {"width": 4, "depth": 2}},
    "train": FIT,
    "prune": {"batches": 2, "batch_size": 4, "recalibrate": 2, "budget": {"keep": 0.5}},
    "finetune": FIT,
    "gate": {"max_drop": 100, "max_drop_from_baseline": 100},
    "bench": {"spread": 50, "min_seconds": 0.05, "max_seconds": 0.5, "images": 2},
    "build": {"threads": 1},
    "panels": 1,
}
GRID = {
    "name": "tiny", "recipe": "tiny.yaml", "criteria": ["l1", "taylor"], "budgets": [0.5], "panels": 0,
    "latency_seconds": 0,
}  # fmt: skip
TIMES = ("latency", "speedup", "fps", "end_to_end", "seconds", "size_mib")


@dataclass(frozen=True)
class Command:
    """What is killed: its words after `vss`, what it writes, and the figures of that; `{out}` is its folder."""

    words: tuple[str, ...]
    target: str
    figures: Callable[[Path], Any]
    share: int


def weights(folder: Path, *names: str) -> dict[str, str]:
    return {name: read(folder / f"{name}.safetensors").weights_sha256 for name in names}


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not any(word in key for word in TIMES)}


def of_run(folder: Path) -> Any:
    report = json.loads((folder / "report.json").read_text())
    nets = weights(folder, "baseline", "pruned", "finetuned", "control")
    gates = [check["passed"] for check in report["gate"]["checks"]]
    return [report["status"], nets, sha256_file(folder / "plan.json"), [timeless(r) for r in report["rows"]], gates]


def of_sweep(folder: Path) -> Any:
    files = sorted((folder / "cells").glob("*.json"))
    return {file.stem: timeless(json.loads(file.read_text())["row"]) for file in files}


def of_bundle(folder: Path) -> Any:
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: fact for name, fact in manifest["files"].items() if Path(name).suffix in (".onnx", ".npy", ".png")}
    vss.ship.verify(folder, run=False)
    return [files, manifest["name"]]


def of_table(path: Path) -> Any:
    table = json.loads(path.read_text())
    return [table["key"], table["groups"], table["done"]]


COMMANDS = {
    "run": Command(("run", "tiny.yaml", "--out", "{out}/run"), "run", of_run, 14),
    "train": Command(
        ("train", "--recipe", "tiny.yaml", "--save", "{out}/train"), "train", lambda f: weights(f, "best"), 10
    ),
    "sweep": Command(("sweep", "grid.yaml", "--out", "{out}/sweep", "--workers", "1"), "sweep", of_sweep, 6),
    "export": Command(
        ("export", "--ckpt", "whole/run/finetuned.safetensors", "--save", "{out}/model.onnx", "--labels"), "model.onnx",
        sha256_file, 7,
    ),
    "ship": Command(("ship", "whole/run", "--to", "{out}/bundle"), "bundle", of_bundle, 7),
    "lut": Command(
        ("lut", "build", "--ckpt", "whole/run/baseline.safetensors", "--save", "{out}/lut.json", "--quick", "--seconds",
         "0.02", "--threads", "1", "--allow-unstable"), "lut.json", of_table, 6,
    ),
}  # fmt: skip


def start(words: list[str], log: Path) -> int:
    """A fork of this process, leader of a group of its own, that does the command."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["vss", *words]
    code = 70
    try:
        vss.cli.main.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def whole(words: list[str], log: Path) -> float:
    """Seconds of the command, done to its end; anything but exit code 0 is a fault."""
    begin = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(start(words, log), 0)[1])
    if code:
        raise SystemExit(f"vss {' '.join(words)} ended with {code}:\n{log.read_text()[-2000:]}")
    return time.monotonic() - begin


def killed(words: list[str], log: Path, after: float) -> bool:
    """Whether the command was killed after so many seconds; it may have been done before."""
    pid, end = start(words, log), time.monotonic() + after
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def try_out(name: str, command: Command, kills: int, rng: random.Random, folder: Path) -> dict[str, Any]:
    """Kill one command so often, let it end, compare."""
    log = folder / f"{name}.log"
    first, second = ([word.format(out=out) for word in command.words] for out in ("whole", "broken"))
    seconds = whole(first, log)
    wanted = command.figures(folder / "whole" / command.target)
    moments: list[float] = []
    while len(moments) < kills:
        after = rng.uniform(0, seconds)
        if killed(second, log, after):
            moments.append(round(after, 3))
            continue
        same(name, wanted, command.figures(folder / "broken" / command.target))
        target = folder / "broken" / command.target
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    if name == "ship" and (folder / "broken" / command.target).exists():
        shutil.rmtree(folder / "broken" / command.target)  # it was whole, and a bundle is not written over
    whole(second, log)
    same(name, wanted, command.figures(folder / "broken" / command.target))
    left = [str(path.relative_to(folder)) for path in (folder / "broken").rglob(f"*{TEMPORARY}*")]
    if left:
        raise SystemExit(f"{name} left {left}")
    print(f"{name}: {len(moments)} kills within {seconds:.1f} s, the same figures, nothing left", flush=True)
    return {
        "kills": len(moments),
        "seconds_unbroken": round(seconds, 2),
        "killed_at_s": moments,
        "same": True,
        "left": 0,
    }


def same(name: str, wanted: Any, found: Any) -> None:
    if wanted != found:
        raise SystemExit(f"{name}: the figures differ:\n{wanted}\n{found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=sum(c.share for c in COMMANDS.values()), help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results/<machine>/")
    arguments = parser.parse_args()
    total, rng = sum(c.share for c in COMMANDS.values()), random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="vss-kills-") as name:
        folder = Path(name)
        os.chdir(folder)
        write_street(folder / "data", seed=1, counts={"train": 8, "val": 4, "test": 4}, size=((48, 52), (64, 68)))
        (folder / "tiny.yaml").write_text(json.dumps(RECIPE))
        (folder / "grid.yaml").write_text(json.dumps(GRID))
        (folder / "whole").mkdir()
        (folder / "broken").mkdir()
        rows = {
            key: try_out(key, command, round(command.share * arguments.kills / total), rng, folder)
            for key, command in COMMANDS.items()
        }
    about = environment()
    found = {"kind": "vss.kills", "schema": 1, "environment": about, "seed": arguments.seed, "recipe": RECIPE}
    found |= {"kills": sum(row["kills"] for row in rows.values()), "commands": rows}
    if arguments.write:
        target = ROOT / "benchmarks" / "results" / about["machine"] / f"{vss.__version__}--kills.json"
        print(f"wrote {write_json(target, found)}")


if __name__ == "__main__":
    main()
